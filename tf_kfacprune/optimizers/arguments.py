"""What the arguments of `KFAC` must be."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from numbers import Real
from typing import Any

from tf_kfacprune.curvature import LABELS
from tf_kfacprune.optimizers.damping import LevenbergMarquardt, check_hyperparameter
from tf_kfacprune.optimizers.preconditioners import PRECONDITIONERS
from tf_kfacprune.validation import require, require_count, require_number

__all__ = ["check_arguments"]

_CHOICES = {
    "labels": LABELS,
    "inverse": tuple(PRECONDITIONERS),
    "weight_sharing": ("expand", "reduce"),
    "large_factors": ("diagonal", "split"),
}
_COUNTS = ("factor_every", "inverse_every")
_FRACTIONS = ("batch_fraction", "location_fraction")


# name -> where it must be, whether None is fine
_HYPERPARAMETERS = {
    "momentum": ("[0, 1)", False),
    "damping": ("(0, inf)", False),
    "kl_clip": ("(0, inf]", True),
    "norm_constraint": ("(0, inf]", True),
    "factor_decay": ("[0, 1)", False),
    "adam_ratio": ("(0, inf)", False),
}


def check_arguments(learning_rate: Any, settings: Mapping[str, Any]) -> None:
    """Refuses arguments of `KFAC` that are out of range or not supported.

    Args:
        learning_rate: As given to the constructor.
        settings: The other arguments by name.

    Raises:
        InvalidArgumentError: If one is.
    """
    check = functools.partial(require, "KFAC")
    named = learning_rate == "auto" if isinstance(learning_rate, str) else True
    check(named, "learning_rate", "a float, a schedule or 'auto'", learning_rate)
    if isinstance(learning_rate, Real):
        require_number("KFAC", "learning_rate", learning_rate, "[0, inf)")
    for name, (interval, optional) in _HYPERPARAMETERS.items():
        value = settings[name]
        if not (name == "damping" and isinstance(value, LevenbergMarquardt)):
            check_hyperparameter("KFAC", name, value, interval, optional=optional)
    for name in _COUNTS:
        require_count("KFAC", name, settings[name])
    require_count("KFAC", "max_factor_dim", settings["max_factor_dim"], optional=True)
    for name in _FRACTIONS:
        require_number("KFAC", name, settings[name], "(0, 1]")
    for name, options in _CHOICES.items():
        check(settings[name] in options, name, f"one of {options}", settings[name])
    check(
        settings["location_fraction"] == 1 or settings["weight_sharing"] == "expand",
        "location_fraction",
        "1 with weight_sharing='reduce', which sums over all locations",
        settings["location_fraction"],
    )
    measures = learning_rate == "auto" or isinstance(settings["damping"], LevenbergMarquardt)
    overwrites = settings.get("ema_overwrite_frequency")
    check(
        not (measures and settings.get("use_ema") and overwrites),
        "ema_overwrite_frequency",
        "None where steps are judged: one that averaging has moved cannot be taken back",
        overwrites,
    )
    refreshed_too_often = settings["inverse"] == "ekfac" and (
        settings["inverse_every"] <= settings["factor_every"]
    )
    check(
        not refreshed_too_often,
        "inverse_every",
        f"> factor_every={settings['factor_every']} with inverse='ekfac': moments begin anew with "
        "every eigenbasis",
        settings["inverse_every"],
    )
    sharded = settings["shard_inverses"]
    check(isinstance(sharded, bool), "shard_inverses", "True or False", sharded)
    accumulation = settings.get("gradient_accumulation_steps")
    check(
        accumulation is None,
        "gradient_accumulation_steps",
        "None (factors would be updated on every micro-step; use larger batches)",
        accumulation,
    )

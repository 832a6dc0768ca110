"""What the arguments of `KFAC` must be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from tf_kfacprune.curvature import LABELS
from tf_kfacprune.optimizers.damping import LevenbergMarquardt, check_hyperparameter
from tf_kfacprune.optimizers.preconditioners import PRECONDITIONERS
from tf_kfacprune.validation import require, require_count

__all__ = ["check_arguments"]

_CHOICES = {
    "labels": LABELS,
    "inverse": tuple(PRECONDITIONERS),
    "weight_sharing": ("expand", "reduce"),
    "large_factors": ("diagonal", "split"),
}
_COUNTS = ("factor_every", "inverse_every")
_FRACTIONS = ("batch_fraction", "location_fraction")


def _in_unit_interval(value: float) -> bool:
    return 0 <= value < 1


def _is_positive(value: float) -> bool:
    return value > 0


# name -> what holds of it, the same in words, whether None is fine
_HYPERPARAMETERS: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "momentum": (_in_unit_interval, "in [0, 1)", False),
    "damping": (_is_positive, "> 0", False),
    "kl_clip": (_is_positive, "> 0 or None", True),
    "norm_constraint": (_is_positive, "> 0 or None", True),
    "factor_decay": (_in_unit_interval, "in [0, 1)", False),
    "adam_ratio": (_is_positive, "> 0", False),
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
    if isinstance(learning_rate, (int, float)):
        check(learning_rate >= 0, "learning_rate", ">= 0", learning_rate)
    for name, (is_valid, expected, optional) in _HYPERPARAMETERS.items():
        value = settings[name]
        adapts = name == "damping" and isinstance(value, LevenbergMarquardt)
        if not adapts and not (optional and value is None):
            check_hyperparameter("KFAC", name, value, is_valid, expected)
    for name in _COUNTS:
        require_count("KFAC", name, settings[name])
    require_count("KFAC", "max_factor_dim", settings["max_factor_dim"], optional=True)
    for name in _FRACTIONS:
        check(0 < settings[name] <= 1, name, "in (0, 1]", settings[name])
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

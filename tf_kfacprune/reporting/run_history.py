"""How a run went, epoch by epoch, from what `fit` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from tf_kfacprune.callbacks.pruning_state import phase_boundaries
from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["Run", "run_of"]

Points = tuple[tuple[float, float], ...]

# What `fit` logs of the pruning; everything else is the loss or a metric of the user's.
COSTS = ("macs", "params", "bytes", "latency", "flash", "ram")
_OF_PRUNING = ("neurons", "skipped_steps", "learning_rate", "spectral_radius", *COSTS)


@dataclass(frozen=True)
class Run:
    """The figures of one `fit`.

    Attributes:
        first: Epochs that had been done before.
        last: Epochs done at its end.
        series: Name in the history -> points `(epochs done, value)`.
        prune: Epochs at which pruning began and ended, `(start, end)`; None if nothing was pruned
            in this run.
        settled: Whether the network was settled when the run began.
    """

    first: float
    last: float
    series: Mapping[str, Points]
    prune: tuple[float, float] | None = None
    settled: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the model was compiled with, without those of validation."""
        return tuple(
            name
            for name in self.series
            if name not in ("loss", *_OF_PRUNING)
            and not name.startswith(("val_", "expected_", "lambda"))
        )

    @property
    def costs(self) -> tuple[str, ...]:
        """Measures of cost that were logged, as fractions of the dense network."""
        return tuple(name for name in COSTS if name in self.series)


def run_of(model: Any, history: Any = None) -> Run | None:
    """Reads a history.

    Args:
        model: The `PrunableModel` that was trained, or a gated model built by hand.
        history: What `fit` returned; by default what the model remembers of its last `fit`.

    Returns:
        The run, or None if the model has not been trained in this process.

    Raises:
        InvalidArgumentError: If `history` is something else.
    """
    if history is None:
        history = getattr(model, "history", None)
        if not isinstance(history, keras.callbacks.History):
            return None
    if not isinstance(history, keras.callbacks.History):
        raise InvalidArgumentError(
            "history must be the keras.callbacks.History that `fit` returns. Received: "
            f"{type(history).__name__}."
        )
    epochs = [epoch + 1 for epoch in getattr(history, "epoch", [])]
    if not epochs:
        return None
    series = {
        name: points
        for name, values in history.history.items()
        if (points := _points(epochs, values))
    }
    prune, settled = _phases(model, history.params, epochs, series)
    return Run(epochs[0] - 1, epochs[-1], series, prune, settled)


def _points(epochs: list[int], values: list[Any]) -> Points:
    """Values with their epochs; those of `validation_freq=n` belong to every n-th epoch."""
    if values and len(values) < len(epochs):
        every = len(epochs) // len(values)
        epochs = [epoch for epoch in epochs if epoch % every == 0]
    if len(values) != len(epochs):
        return ()  # it cannot be told which epochs they belong to
    return tuple((float(e), float(v)) for e, v in zip(epochs, values, strict=True))


def _phases(
    model: Any, params: Mapping[str, Any], epochs: list[int], series: Mapping[str, Points]
) -> tuple[tuple[float, float] | None, bool]:
    steps = params.get("steps")
    if not steps or getattr(model, "budget", None) is None:
        return None, False
    boundaries = phase_boundaries(model, steps * params["epochs"])
    if boundaries is None:
        return None, False
    start, end = (step / steps for step in boundaries)
    costs = {value for _, value in series.get("macs", ())}
    # A network that had settled before stays as it is; a new one would still have been pruned.
    settled = len(costs) == 1 and max(costs) < 1.0 and (epochs[0] > 1 or end > epochs[0])
    return (None, True) if settled else ((start, end), False)

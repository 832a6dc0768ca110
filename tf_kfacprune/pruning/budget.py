"""Budgets: how much of the dense model's cost the compact model may have."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any

import keras

from tf_kfacprune.errors import BudgetError
from tf_kfacprune.graph import CostModel

__all__ = ["Budget"]

# Above 1 these are absolute: the unit, the type of number, and how it is called.
_ABSOLUTE = {
    "bytes": (Integral, "a whole number of bytes"),
    "latency": (Real, "microseconds"),
    "flash": (Integral, "a whole number of bytes"),
    "ram": (Integral, "a whole number of bytes"),
}
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class Budget:
    """Upper bounds on the cost of the pruned network; several hold all at once.

    A number in (0, 1] is a fraction of the dense model. A number above 1 is absolute: bytes, or
    microseconds. Sizes with units, such as ``"24kB"``, are taken by `for_board`.

    Args:
        macs: Multiply-accumulates of all contractions for one example, in (0, 1].
        params: All weights, biases and normalization statistics included, in (0, 1].
        bytes: Size of the float32 `.tflite` file that `kp.export.tflite` writes of the compact
            model: a fraction in (0, 1], or a whole number of bytes above 1. Predicted from the
            layers, to one or two per cent.
        latency: Time of one inference, batch 1 on one thread: a fraction in (0, 1], or microseconds
            above 1. Predicted from times that `kp.export.latency_table` measured, and of the file
            that the table is of: float32, or int8 with ``of="int8"``. `PrunableModel` needs that
            table.
        flash: Size of the int8 `.tflite` file that `kp.export.tflite` writes with
            ``quantization="int8", batch_size=1``: a fraction in (0, 1], or a whole number of bytes
            above 1. Predicted from the layers: within one per cent for the dense built-in networks.
        ram: Tensor arena in which TensorFlow Lite Micro runs that file, `kp.export.arena_bytes`:
            a fraction in (0, 1], or a whole number of bytes above 1. It is what the operation with
            the most activations needs, and the runtime's records; predicted likewise.

    Raises:
        BudgetError: If no bound is given or one is out of range.

    Examples:
        >>> budget = kp.Budget(macs=0.1)
        >>> small_file = kp.Budget(bytes=64_000, macs=0.5)
        >>> board = kp.Budget.for_board(flash="256kB", ram="64kB")
    """

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    flash: float | None = None
    ram: float | None = None

    @classmethod
    def for_board(
        cls,
        flash: int | str | None = None,
        ram: int | str | None = None,
        **bounds: float,
    ) -> Budget:
        """What a microcontroller has, as people say it.

        The sizes bound the model's file and the tensor arena. The program around them needs flash
        and RAM, too: give what is left for the model.

        Args:
            flash: Flash memory: a number of bytes, or text with a unit, ``"256kB"``, ``"1 MB"``
                (1,000 and 1,000,000 bytes) or ``"256KiB"``, ``"1MiB"`` (1,024 and 1,048,576).
            ram: Memory that can be written, likewise.
            **bounds: Other bounds, as of `Budget`.

        Returns:
            A budget of bytes.

        Raises:
            BudgetError: If a size cannot be read, is no more than 1 byte, or none is given.

        Examples:
            >>> kp.Budget.for_board(flash="256kB", ram="64kB").targets
            {'flash': 256000, 'ram': 64000}
        """
        sizes = {"flash": flash, "ram": ram}
        read = {name: _bytes(name, size) for name, size in sizes.items() if size is not None}
        return cls(**{**bounds, **read})

    def __post_init__(self) -> None:
        if not self.targets:
            raise BudgetError(
                "A Budget needs at least one bound, such as Budget(macs=0.1). Received: none. "
                "Pass budget=None to train without pruning."
            )
        for measure, target in self.targets.items():
            kind, unit = _ABSOLUTE.get(measure, (Real, ""))
            is_number = isinstance(target, Real) and not isinstance(target, bool)
            is_absolute = is_number and unit and target > 1 and isinstance(target, kind)
            if not is_number or not (0.0 < target <= 1.0 or is_absolute):
                raise BudgetError(
                    f"Budget `{measure}` must be a fraction of the dense model in (0, 1]"
                    + (f", or {unit} above 1" if unit else "")
                    + f". Received: {measure}={target!r}"
                )

    @property
    def targets(self) -> dict[str, float]:
        """The bounds that were given, by measure."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def is_open(self) -> bool:
        """Whether every bound is 1, so that nothing has to be pruned."""
        return all(target == 1.0 for target in self.targets.values())

    def unit(self, measure: str, cost: CostModel) -> float:
        """What a bound is counted in: 1 if it is a fraction of a fraction, the dense cost if not.

        Args:
            measure: The measure.
            cost: Cost of the network that is to be pruned.

        Returns:
            The factor from fractions of the dense model to the numbers in `targets`.
        """
        return cost.dense(measure) if self.targets[measure] > 1 else 1.0

    def relative_to(self, cost: CostModel) -> Budget:
        """The same budget with fractions for absolute bounds.

        Args:
            cost: Cost of the network that is to be pruned.

        Returns:
            A budget all of whose bounds lie in (0, 1].

        Raises:
            BudgetError: If there is no such measure for this network.
        """
        unknown = set(self.targets) - set(cost.available)
        if unknown:
            raise BudgetError(
                f"Budget latency={self.latency!r} needs the times of the layers on your machine. "
                "Received: latency_table=None. Measure them first: PrunableModel(model, "
                "budget=..., latency_table=kp.export.latency_table(model))."
            )
        fractions = {m: min(t / self.unit(m, cost), 1.0) for m, t in self.targets.items()}
        return replace(self, **fractions)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for serialization."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Budget:
        """Inverse of `get_config`."""
        return cls(**config)


def _bytes(name: str, size: int | str) -> int:
    """A number of bytes, from a number or from text with a unit."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = _UNITS.get(match[2].lower()) if match else None
    count = 0.0 if match is None or unit is None else float(match[1]) * unit
    if not 2 <= count < math.inf:
        raise BudgetError(
            f"`{name}` of a board must be a number of bytes above 1, or text such as '256kB' or "
            f"'256KiB'. Received: {name}={size!r}. For a fraction of the dense model, use "
            f"Budget({name}=...)."
        )
    return int(count)

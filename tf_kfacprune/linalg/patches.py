"""Input patches of a convolution, one row per output position.

A convolution is a matrix product of its patches with its kernel reshaped to a matrix; the
patches' second moment is therefore its Kronecker factor A (Grosse & Martens 2016, eq. 9 and 17).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["conv_patches"]


def conv_patches(
    x: Any,
    kernel_size: Sequence[int],
    strides: Sequence[int] | int = 1,
    padding: str = "valid",
    dilation_rate: Sequence[int] | int = 1,
    rows: Any = None,
) -> Any:
    """Collects the input window behind every output position of a convolution.

    With ``k`` the kernel of shape (kernel_size..., channels, filters),

        conv(x) = patches @ reshape(k, (prod(kernel_size) * channels, filters)).

    The windows are collected one spatial axis at a time (a sum instead of a product of slices),
    from the last axis to the first, which leaves the entries in the kernel's row-major order.

    Args:
        x: Tensor of shape (batch, spatial..., channels), channels last, with one to three spatial
            axes; spatial sizes may be unknown until run time.
        kernel_size: Window size per spatial axis.
        strides: Step between windows, one for all axes or one per axis.
        padding: ``"valid"``, ``"same"`` or ``"causal"`` (padded in front only), as in Keras.
        dilation_rate: Distance between the taps of a window, one for all axes or one per axis.
        rows: Positions along the first spatial axis of the output, integers of shape (k,); windows
            are collected there only. None means all.

    Returns:
        Tensor of shape (batch, output positions, prod(kernel_size) * channels), positions in
        row-major order.

    Raises:
        InvalidArgumentError: If the arguments do not fit each other.

    References:
        Grosse & Martens 2016, "A Kronecker-factored Approximate Fisher Matrix for Convolution
        Layers", section 2.
    """
    rank = len(x.shape) - 2
    sizes = _per_axis("kernel_size", kernel_size, rank)
    steps = _per_axis("strides", strides, rank)
    rates = _per_axis("dilation_rate", dilation_rate, rank)
    if padding not in ("valid", "same", "causal"):
        raise InvalidArgumentError(
            f"padding must be 'valid', 'same' or 'causal'. Received: padding={padding!r}"
        )
    shape = keras.ops.shape(x)
    reach = [(size - 1) * rate for size, rate in zip(sizes, rates, strict=True)]
    pads = [
        _padding_amounts(padding, shape[axis + 1], reach[axis], steps[axis]) for axis in range(rank)
    ]
    if padding != "valid":
        x = keras.ops.pad(x, [(0, 0), *pads, (0, 0)])
    for axis in reversed(range(rank)):
        length = shape[axis + 1] + pads[axis][0] + pads[axis][1]
        last_start = (length - 1 - reach[axis]) // steps[axis] * steps[axis]
        taps = []
        for tap in range(sizes[axis]):
            first = tap * rates[axis]
            if axis == 0 and rows is not None:
                taps.append(keras.ops.take(x, first + steps[0] * rows, axis=1))
                continue
            window = slice(first, first + last_start + 1, steps[axis])
            taps.append(x[(slice(None),) * (axis + 1) + (window,)])
        x = keras.ops.concatenate(taps, axis=-1) if len(taps) > 1 else taps[0]
    return keras.ops.reshape(x, (shape[0], -1, x.shape[-1]))


def _padding_amounts(padding: str, length: Any, reach: int, step: int) -> tuple[Any, Any]:
    """Zeros in front of and behind one axis; integers, or tensors for an unknown length."""
    if padding == "valid":
        return 0, 0
    if padding == "causal":
        return reach, 0
    if step == 1:
        return reach // 2, reach - reach // 2
    missing = (-(-length // step) - 1) * step + reach + 1 - length
    total = max(missing, 0) if isinstance(missing, int) else keras.ops.maximum(missing, 0)
    return total // 2, total - total // 2


def _per_axis(name: str, value: Sequence[int] | int, rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if not 1 <= rank <= 3 or len(values) != rank or any(entry < 1 for entry in values):
        raise InvalidArgumentError(
            f"{name} must hold one positive integer per spatial axis of x, and x must have the "
            f"shape (batch, 1 to 3 spatial axes, channels). Received: {name}={value!r} for an x "
            f"with {rank} spatial axes"
        )
    return values

"""Blocks of convolutions: ordinary, grouped, depthwise, separable, transposed; 1D to 3D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tf_kfacprune.curvature.blocks.base import KroneckerBlock, Record
from tf_kfacprune.curvature.blocks.locations import LocationSample
from tf_kfacprune.linalg import conv_patches

__all__ = ["ConvBlock", "ConvTransposeBlock", "DepthwiseConvBlock", "PointwiseBlock"]


def _channels_last(layer: keras.layers.Layer, tensor: Any) -> Any:
    if layer.data_format == "channels_last":
        return tensor
    rank = len(tensor.shape)
    return ops.transpose(tensor, (0, *range(2, rank), 1))


def _by_location(tensor: Any, channels: int, groups: int) -> Any:
    """`(batch, spatial..., channels)` as `(*groups, batch, T, channels / groups)`."""
    batch = ops.shape(tensor)[0]
    if not groups:
        return ops.reshape(tensor, (batch, -1, channels))
    split = ops.reshape(tensor, (batch, -1, groups, channels // groups))
    return ops.transpose(split, (2, 0, 1, 3))


def _patches(layer: keras.layers.Layer, record: Record, rows: Any = None) -> Any:
    """Patches at all output positions, or at those in some rows of the output."""
    x = _channels_last(layer, record.x)
    shape = (layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate)
    return conv_patches(x, *shape, rows=rows)


def _sampled_patches(
    layer: keras.layers.Layer, record: Record, sample: LocationSample
) -> tuple[Any, Any]:
    """Patches at a sample of the output's rows, and how many rows there are for each of them."""
    total = ops.shape(_channels_last(layer, record.s))[1]
    rows = sample.positions(total)
    weight = ops.cast(total, "float32") / ops.cast(ops.shape(rows)[0], "float32")
    return _patches(layer, record, rows), weight


class ConvBlock(KroneckerBlock):
    """Convolution in one, two or three dimensions, grouped or not."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        kernel = layer.kernel
        groups = layer.groups if layer.groups > 1 else 0
        super().__init__(
            layer,
            kernel,
            layer.bias if layer.use_bias else None,
            n_in=math.prod(kernel.shape[:-1]),
            n_out=kernel.shape[-1] // max(groups, 1),
            groups=groups,
        )

    def rows_a(self, record: Record) -> Any:
        return self._by_group(_patches(self.layer, record))

    def sampled_rows_a(self, record: Record, sample: LocationSample) -> tuple[Any, Any]:
        patches, weight = _sampled_patches(self.layer, record, sample)
        return self._by_group(patches), weight

    def _by_group(self, patches: Any) -> Any:
        if not self.group_shape:
            return patches
        batch = ops.shape(patches)[0]
        groups, taps = self.group_shape[0], math.prod(self.layer.kernel_size)
        split = ops.reshape(patches, (batch, -1, taps, groups, self.n_in // taps))
        rows = ops.transpose(split, (3, 0, 1, 2, 4))
        return ops.reshape(rows, (groups, batch, -1, self.n_in))

    def rows_g(self, record: Record, g: Any) -> Any:
        g = _channels_last(self.layer, g)
        return _by_location(g, self.layer.filters, *self.group_shape or (0,))

    def kernel_to_matrix(self, kernel: Any) -> Any:
        if not self.group_shape:
            return super().kernel_to_matrix(kernel)
        split = ops.reshape(kernel, (self.n_in, self.group_shape[0], self.n_out))
        return ops.transpose(split, (1, 0, 2))

    def matrix_to_kernel(self, matrix: Any) -> Any:
        if not self.group_shape:
            return super().matrix_to_kernel(matrix)
        return ops.reshape(ops.transpose(matrix, (1, 0, 2)), self.kernel.shape)

    def project(self, record: Record, u: Any) -> Any:
        if self.group_shape:
            return super().project(record, u)
        layer, x = self.layer, _channels_last(self.layer, record.x)
        # A convolution with one filter: patches are never formed.
        kernel = ops.reshape(u[: self.n_in], (*self.kernel.shape[:-1], 1))
        x, padding = _padded(x, layer)
        projection = ops.conv(
            x,
            ops.cast(kernel, x.dtype),
            strides=list(layer.strides),
            padding=padding,
            data_format="channels_last",
            dilation_rate=layer.dilation_rate,
        )
        projection = ops.squeeze(projection, axis=-1)
        return projection if self.bias is None else projection + ops.cast(u[self.n_in], x.dtype)


def _padded(x: Any, layer: keras.layers.Layer) -> tuple[Any, str]:
    """Input and padding with causal padding carried out."""
    if layer.padding != "causal":
        return x, layer.padding
    reach = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
    return ops.pad(x, [[0, 0], [reach, 0], [0, 0]]), "valid"


class DepthwiseConvBlock(KroneckerBlock):
    """Depthwise convolution, also the first half of a separable one: every channel is a group."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        self._is_separable = hasattr(layer, "depthwise_kernel")
        kernel = layer.depthwise_kernel if self._is_separable else layer.kernel
        has_bias = layer.use_bias and not self._is_separable
        super().__init__(
            layer,
            kernel,
            layer.bias if has_bias else None,
            n_in=math.prod(kernel.shape[:-2]),
            n_out=kernel.shape[-1],
            groups=kernel.shape[-2],
            part="depthwise" if self._is_separable else "",
        )

    def rows_a(self, record: Record) -> Any:
        return self._by_channel(_patches(self.layer, record))

    def sampled_rows_a(self, record: Record, sample: LocationSample) -> tuple[Any, Any]:
        patches, weight = _sampled_patches(self.layer, record, sample)
        return self._by_channel(patches), weight

    def _by_channel(self, patches: Any) -> Any:
        shape = (ops.shape(patches)[0], -1, self.n_in, self.group_shape[0])
        return ops.transpose(ops.reshape(patches, shape), (3, 0, 1, 2))

    def rows_g(self, record: Record, g: Any) -> Any:
        layer, g = self.layer, _channels_last(self.layer, g)
        channels = self.group_shape[0] * self.n_out
        if self._is_separable:
            pointwise = ops.reshape(layer.pointwise_kernel, (channels, layer.filters))
            g = ops.matmul(g, ops.cast(ops.transpose(pointwise), g.dtype))
        return _by_location(g, channels, self.group_shape[0])

    def kernel_to_matrix(self, kernel: Any) -> Any:
        split = ops.reshape(kernel, (self.n_in, self.group_shape[0], self.n_out))
        return ops.transpose(split, (1, 0, 2))

    def matrix_to_kernel(self, matrix: Any) -> Any:
        return ops.reshape(ops.transpose(matrix, (1, 0, 2)), self.kernel.shape)


class PointwiseBlock(KroneckerBlock):
    """The second half of a separable convolution: a 1 x 1 convolution of the depthwise result."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__(
            layer,
            layer.pointwise_kernel,
            layer.bias if layer.use_bias else None,
            n_in=layer.pointwise_kernel.shape[-2],
            n_out=layer.filters,
            part="pointwise",
        )

    def rows_a(self, record: Record) -> Any:
        layer, x = self.layer, _channels_last(self.layer, record.x)
        x, padding = _padded(x, layer)
        strides = layer.strides if len(set(layer.strides)) > 1 else layer.strides[0]
        x = ops.depthwise_conv(
            x,
            ops.cast(layer.depthwise_kernel, x.dtype),
            strides=strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=layer.dilation_rate,
        )
        return _by_location(x, self.n_in, 0)

    def rows_g(self, record: Record, g: Any) -> Any:
        return _by_location(_channels_last(self.layer, g), self.n_out, 0)


class ConvTransposeBlock(KroneckerBlock):
    """Transposed convolution: an ordinary one of the input spread out with zeros between.

    Its kernel has the shape `(taps..., n_out, channels)`. An output pixel p sees input pixel t
    through tap j where `p = stride t - before + dilation j`, `before` being the padding of the
    convolution that this one transposes.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        *taps, filters, channels = layer.kernel.shape
        super().__init__(
            layer,
            layer.kernel,
            layer.bias if layer.use_bias else None,
            n_in=math.prod(taps) * channels,
            n_out=filters,
        )

    def rows_a(self, record: Record) -> Any:
        layer = self.layer
        x, s = _channels_last(layer, record.x), _channels_last(layer, record.s)
        for axis in range(1, len(x.shape) - 1):
            x = self._spread(x, axis, ops.shape(s)[axis])
        patches = conv_patches(x, layer.kernel_size, 1, "valid", layer.dilation_rate)
        taps = math.prod(layer.kernel_size)
        channels = self.n_in // taps
        split = ops.reshape(patches, (ops.shape(x)[0], -1, taps, channels))
        # Windows meet the taps in reverse order, in every direction.
        return ops.reshape(ops.flip(split, axis=2), (ops.shape(x)[0], -1, self.n_in))

    def _spread(self, x: Any, axis: int, length: Any) -> Any:
        """Zeros between the entries and at the ends, so that a window fits every output."""
        layer, k = self.layer, axis - 1
        stride = layer.strides[k]
        reach = (layer.kernel_size[k] - 1) * layer.dilation_rate[k]
        n = ops.shape(x)[axis]
        if stride > 1:
            shape = list(ops.shape(x))
            spread = ops.expand_dims(x, axis + 1)
            pads = [(0, 0)] * len(spread.shape)
            pads[axis + 1] = (0, stride - 1)
            x = ops.reshape(ops.pad(spread, pads), (*shape[:axis], n * stride, *shape[axis + 1 :]))
        before = 0
        if layer.padding == "same":
            before = ops.maximum((n - 1) * stride + reach + 1 - length, 0) // 2
        left = reach - before
        right = length + reach - left - n * stride
        index = [slice(None)] * len(x.shape)
        pads = [(0, 0)] * len(x.shape)
        pads[axis] = (ops.maximum(left, 0), ops.maximum(right, 0))
        x = ops.pad(x, pads)
        index[axis] = slice(ops.maximum(-left, 0), ops.maximum(-left, 0) + length + reach)
        return x[tuple(index)]

    def rows_g(self, record: Record, g: Any) -> Any:
        return _by_location(_channels_last(self.layer, g), self.n_out, 0)

    def _orders(self) -> tuple[Sequence[int], Sequence[int]]:
        rank = len(self.kernel.shape) - 2
        return (*range(rank), rank + 1, rank), self.kernel.shape

    def kernel_to_matrix(self, kernel: Any) -> Any:
        swap, _ = self._orders()
        return ops.reshape(ops.transpose(kernel, swap), (self.n_in, self.n_out))

    def matrix_to_kernel(self, matrix: Any) -> Any:
        swap, shape = self._orders()
        return ops.transpose(ops.reshape(matrix, [shape[k] for k in swap]), swap)

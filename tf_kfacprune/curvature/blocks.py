r"""One Kronecker block per layer type: how a layer turns into factors A and G.

=======  =============================================================  =================
symbol   meaning                                                        shape
=======  =============================================================  =================
`a`      input of the layer, for convolutions its patches               (batch, T, n_in)
`[a; 1]` input with the homogeneous coordinate, if the layer has a bias (batch, T, n_a)
`g`      d loss / d s, per example and location                         (batch, T, n_out)
`A`      E sum_t [a; 1] [a; 1]^T                                        (n_a, n_a)
`G`      E mean_t g g^T                                                 (n_out, n_out)
`W`      kernel as a matrix, its last row the bias                      (n_a, n_out)
=======  =============================================================  =================

T is the number of locations at which the layer applies its weights: 1 for a Dense layer on
vectors, the number of output pixels for a convolution. The Fisher block is `A (x) G`.

References:
    Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", section 3 (Dense).
    Grosse & Martens 2016, "A Kronecker-factored Approximate Fisher Matrix for Convolution
    Layers", section 3.1 (KFC).
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from tf_kfacprune.linalg import conv_patches

__all__ = ["ConvBlock", "DenseBlock", "KroneckerBlock", "block_for"]

GROUPED = "grouped convolution has no Kronecker block yet"
CHANNELS_FIRST = "channels_first convolution has no Kronecker block yet"
FROZEN = "the layer is not trainable"
LORA = "the layer carries LoRA weights"
QUANTIZED = "the layer is quantized"
NO_RULE = "this layer type has no Kronecker block"


class KroneckerBlock:
    """Base of the Kronecker blocks; one instance serves one layer.

    Args:
        layer: A built layer with a kernel and perhaps a bias.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.kernel: keras.Variable = layer.kernel
        self.bias: keras.Variable | None = layer.bias if layer.use_bias else None
        self.kernel_shape = tuple(int(d) for d in self.kernel.shape)
        self.n_in = math.prod(self.kernel_shape[:-1])
        self.n_out = self.kernel_shape[-1]
        self.n_a = self.n_in + (self.bias is not None)

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.layer.name

    @property
    def variables(self) -> list[keras.Variable]:
        """The kernel and, if there is one, the bias."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    def locations(self, x: Any) -> Any:
        """Inputs of every application of the weights, shape `(batch, T, n_in)`."""
        raise NotImplementedError

    def project(self, x: Any, u: Any) -> Any:
        """`u^T [a; 1]` at every location, shape `(batch, ...)`, without forming patches.

        Args:
            x: Input of the layer.
            u: Vector of shape `(n_a,)`.
        """
        raise NotImplementedError

    def factor_a(self, x: Any) -> Any:
        """A of a batch of layer inputs, shape `(n_a, n_a)`, float32."""
        a = ops.cast(self.locations(x), "float32")
        batch = ops.cast(ops.shape(a)[0], "float32")
        a = ops.reshape(a, (-1, self.n_in))
        factor = ops.matmul(ops.transpose(a), a)
        if self.bias is not None:
            sums = ops.sum(a, axis=0)
            count = ops.cast(ops.shape(a)[0], "float32")
            factor = ops.concatenate([factor, sums[None, :]], axis=0)
            last = ops.append(sums, ops.reshape(count, (1,)))
            factor = ops.concatenate([factor, last[:, None]], axis=1)
        return factor / batch

    def factor_g(self, g: Any) -> Any:
        """G of a batch of per-example gradients, shape `(n_out, n_out)`, float32."""
        g = ops.reshape(ops.cast(g, "float32"), (-1, self.n_out))
        return ops.matmul(ops.transpose(g), g) / ops.cast(ops.shape(g)[0], "float32")

    def to_matrix(self, kernel: Any, bias: Any | None) -> Any:
        """Kernel-shaped and bias-shaped tensors as one matrix, shape `(n_a, n_out)`."""
        matrix = ops.reshape(kernel, (self.n_in, self.n_out))
        return matrix if bias is None else ops.concatenate([matrix, bias[None, :]], axis=0)

    def from_matrix(self, matrix: Any) -> tuple[Any, Any | None]:
        """Inverse of `to_matrix`."""
        kernel = ops.reshape(matrix[: self.n_in], self.kernel_shape)
        return kernel, (None if self.bias is None else matrix[self.n_in])


class DenseBlock(KroneckerBlock):
    """Dense on inputs of any rank; axes between batch and features are locations."""

    def locations(self, x: Any) -> Any:
        return ops.reshape(x, (ops.shape(x)[0], -1, self.n_in))

    def project(self, x: Any, u: Any) -> Any:
        projection = ops.squeeze(ops.matmul(x, u[: self.n_in, None]), axis=-1)
        return projection if self.bias is None else projection + u[self.n_in]


class ConvBlock(KroneckerBlock):
    """Ordinary convolution in one, two or three dimensions, channels last."""

    def locations(self, x: Any) -> Any:
        layer = self.layer
        return conv_patches(x, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate)

    def project(self, x: Any, u: Any) -> Any:
        layer = self.layer
        padding = layer.padding
        if padding == "causal":
            reach = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            x, padding = ops.pad(x, [[0, 0], [reach, 0], [0, 0]]), "valid"
        kernel = ops.reshape(u[: self.n_in], (*self.kernel_shape[:-1], 1))
        projection = ops.conv(
            x,
            kernel,
            strides=list(layer.strides),
            padding=padding,
            data_format="channels_last",
            dilation_rate=layer.dilation_rate,
        )
        projection = ops.squeeze(projection, axis=-1)
        return projection if self.bias is None else projection + u[self.n_in]


_BLOCKS: dict[type, type[KroneckerBlock]] = {
    keras.layers.Dense: DenseBlock,
    keras.layers.Conv1D: ConvBlock,
    keras.layers.Conv2D: ConvBlock,
    keras.layers.Conv3D: ConvBlock,
}


def block_for(layer: keras.layers.Layer) -> KroneckerBlock | str:
    """The Kronecker block of a layer, or the reason why it has none.

    Subclasses of supported layers are not supported: their `call` may differ.

    Args:
        layer: A built Keras layer.

    Returns:
        A `KroneckerBlock`, or a reason as text.
    """
    kind = _BLOCKS.get(type(layer))
    if kind is None:
        return f"{NO_RULE} ({type(layer).__name__})"
    if not layer.trainable:
        return FROZEN
    if getattr(layer, "lora_enabled", False):
        return LORA
    if getattr(layer, "quantization_mode", None):
        return QUANTIZED
    if kind is ConvBlock:
        if layer.groups != 1:
            return GROUPED
        if layer.data_format != "channels_last":
            return CHANNELS_FIRST
    return kind(layer)

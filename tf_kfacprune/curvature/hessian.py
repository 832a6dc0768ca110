r"""Exact products with the Hessian and the Gauss-Newton matrix of a model over a data set.

=========  ================================================================  ===========
symbol     meaning                                                           shape
=========  ================================================================  ===========
``w``      trainable parameters (gate parameters apart), flattened           (n,)
``L``      mean of the entries' losses, inference mode                       scalar
``H``      Hessian of L with respect to w                                    (n, n)
``G``      generalized Gauss-Newton matrix (see `gauss_newton`)              (n, n)
``D``      diagonal: each parameter's tensor norm ``|w_t|``, or 1            (n,)
=========  ================================================================  ===========

``H v = grad (grad L . v)`` (Pearlmutter 1994). Both are exact, batch by batch, in the model's
precision, and accumulated in float64. Memory does not depend on N. Layers whose second derivatives
TensorFlow gets wrong are called by another expression meanwhile (`twice_differentiable`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tf_kfacprune.curvature.batch import Batch
from tf_kfacprune.curvature.data_passes import batches_of, length_of
from tf_kfacprune.curvature.forward_state import kept_state
from tf_kfacprune.curvature.gauss_newton import gauss_newton_product
from tf_kfacprune.curvature.objective import SingleObjective
from tf_kfacprune.curvature.second_derivatives import (
    check_executed_operations,
    check_second_derivatives,
    reachable_operations,
)
from tf_kfacprune.curvature.twice_differentiable import mends, twice_differentiable
from tf_kfacprune.errors import DataError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.gates import GateSource
from tf_kfacprune.graph import network_of
from tf_kfacprune.validation import is_count

__all__ = ["CurvatureOperator", "checked_network"]

_CURVATURES = ("hessian", "ggn")
_SCALINGS = (None, "norm")
_ZERO = tf.UnconnectedGradients.ZERO
# Rounding of a mean loss in float32, in other batches or another order, is far below.
_SAME_LOSS = 1e-4


class CurvatureOperator:
    """The Hessian or Gauss-Newton matrix of a model's mean loss over a data set, as a product.

    The model runs in inference mode and is left as it was. Regularization losses are not part of
    the objective, and entries that masks or the loss leave out do not count. Gates are held at
    their inference values and are no parameters.

    Args:
        model: A built `keras.Model` with one output, or an object that holds one as ``.net``.
        data: ``(x, y)`` arrays (x may be nested), or a `tf.data.Dataset` of batches ``(x, y)``
            that yields the same examples each time it is iterated, in any order.
        loss: As given to `compile`; taken as a mean over examples.
        curvature: ``"hessian"``, or ``"ggn"`` for the generalized Gauss-Newton matrix.
        scaling: ``None``; or ``"norm"`` for ``D H D``, whose eigenvalues do not change when one
            layer is scaled up and the next one down by the same factor.
        batch_size: Number of examples per product when ``data`` holds arrays. It changes speed
            and memory, and the result only by rounding.

    Raises:
        InvalidArgumentError: If an argument is not one of its options.
        UnsupportedModelError: If the model is unbuilt, has several outputs, runs in reduced
            precision, or contains a layer without trustworthy second derivatives.
        DataError: If the data are empty, of unequal lengths, or change between passes.

    References:
        Pearlmutter 1994, "Fast Exact Multiplication by the Hessian"; Schraudolph 2002 (GGN);
        Tsuzuku, Sato & Sugiyama 2020, "Normalized Flat Minima" (scaling).
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        loss: Any,
        *,
        curvature: str = "hessian",
        scaling: str | None = None,
        batch_size: int = 500,
    ) -> None:
        _check_option("curvature", curvature, _CURVATURES)
        _check_option("scaling", scaling, _SCALINGS)
        if not is_count(batch_size):
            raise InvalidArgumentError(
                f"batch_size must be an integer >= 1. Received: batch_size={batch_size!r}"
            )
        self._net = checked_network(model)
        check_second_derivatives(self._net, jacobian_only=curvature == "ggn", mended=mends)
        self._objective = SingleObjective(loss)
        self._is_ggn = curvature == "ggn"
        self._batches = batches_of(data, batch_size)
        self._variables = _parameters(self._net)
        # The shapes of batches differ at most in the last one: two traces.
        product = self._ggn_product if self._is_ggn else self._hessian_product
        self._product = tf.function(product, reduce_retracing=True, jit_compile=False)
        self._value = tf.function(self._batch_loss, reduce_retracing=True, jit_compile=False)
        self._may_be_trusted = False
        self._num_examples: int | None = None
        self._first_loss: tuple[int, float] | None = None  # with a hash of the weights
        self._scale = self._scaling_vector() if scaling == "norm" else None

    @property
    def dimension(self) -> int:
        """Number of parameters, n."""
        return sum(int(np.prod(v.shape)) for v in self._variables)

    @property
    def parameters(self) -> NDArray[np.float64]:
        """The parameters w, flattened, shape (n,)."""
        flat = [np.asarray(v.numpy(), np.float64).ravel() for v in self._variables]
        return np.concatenate(flat)

    @property
    def num_examples(self) -> int:
        """Number of examples in the data, N (one pass over them, if none was made yet)."""
        if self._num_examples is None:
            self._checked_count(sum(length_of(y) for _, y in self._batches()))
        return self._num_examples or 0

    def loss(self) -> float:
        """The mean loss L over the data."""
        total = entries = 0.0
        count = 0
        with kept_state(self._net):
            for x, y in self._batches():
                value, of_batch = self._value(x, y)
                total += float(value)
                entries += float(of_batch)
                count += length_of(y)
        self._checked_count(count)
        return total / _counted(entries)

    def matvec(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Multiplies the matrix with a vector: one pass over the data.

        Args:
            vector: Shape (n,).

        Returns:
            The product, float64, shape (n,).

        Raises:
            DataError: If the number of examples, or their loss, differs from that of the pass
                before.
            UnsupportedModelError: If TensorFlow lacks a second derivative that is needed.
        """
        scaled = vector if self._scale is None else self._scale * vector
        parts = self._split(scaled)
        total = np.zeros(self.dimension)
        loss = entries = 0.0
        count = 0
        with kept_state(self._net), twice_differentiable(self._net):
            for x, y in self._batches():
                self._check_operations(x)
                value, of_batch, product = self._differentiated(self._product, x, y, parts)
                total += _flattened(product)
                loss += float(value)
                entries += float(of_batch)
                count += length_of(y)
        self._checked_count(count)
        total /= _counted(entries)
        self._check_loss(loss / entries)
        return total if self._scale is None else self._scale * total

    def _check_operations(self, x: Any) -> None:
        if not self._may_be_trusted:
            returned = check_executed_operations(self._net, x, jacobian_only=self._is_ggn)
            if keras.tree.is_nested(returned):
                raise UnsupportedModelError(
                    f"Model {self._net.name!r} must return one tensor. Received: a "
                    f"{type(returned).__name__}. Measure one of its outputs, as a model of its own."
                )
            self._may_be_trusted = True

    def _batch_loss(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Sum of the losses of the entries that count, and how many these are."""
        mean, count = self._objective.mean(Batch(x, y), self._net(x, training=False))
        return count * mean, count

    def _hessian_product(self, x: Any, y: Any, vector: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
        variables = self._variables
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch(variables)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(variables)
                value, count = self._batch_loss(x, y)
            gradients = inner.gradient(value, variables, unconnected_gradients=_ZERO)
            along = _inner_product(gradients, vector)
        return value, count, outer.gradient(along, variables, unconnected_gradients=_ZERO)

    def _ggn_product(self, x: Any, y: Any, vector: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
        value, count = self._batch_loss(x, y)
        found = gauss_newton_product(
            self._net, Batch(x, y), self._objective, self._variables, vector
        )
        # Sums over entries add up, means do not.
        return value, count, [tf.cast(count, part.dtype) * part for part in found]

    def _differentiated(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            # TensorFlow raises LookupError, wrapped in various ways when it traces.
            missing = re.search(r"gradient registry has no entry for: (\w+)", str(error))
            if missing is None:
                raise
            raise UnsupportedModelError(
                f"Model {self._net.name!r} contains an operation without a second derivative in "
                f"TensorFlow ({missing[1]}). Replace the layer that uses it."
            ) from error

    def _split(self, vector: NDArray[np.float64]) -> list[Any]:
        if vector.shape != (self.dimension,):
            raise InvalidArgumentError(
                f"vector must have the shape ({self.dimension},), one entry per parameter. "
                f"Received: shape {vector.shape}"
            )
        ends = np.cumsum([int(np.prod(v.shape)) for v in self._variables])[:-1]
        parts = np.split(vector, ends)
        return [
            tf.constant(part.reshape(v.shape), dtype=v.dtype)
            for part, v in zip(parts, self._variables, strict=True)
        ]

    def _scaling_vector(self) -> NDArray[np.float64]:
        blocks = [np.asarray(v.numpy(), np.float64) for v in self._variables]
        return np.concatenate([np.full(block.size, np.linalg.norm(block)) for block in blocks])

    def _checked_count(self, count: int) -> int:
        if count == 0:
            raise DataError("data: there is no example in it.")
        if self._num_examples not in (None, count):
            raise DataError(
                f"data: it yielded {self._num_examples} examples in one pass and {count} in "
                "another. The matrix is defined over a fixed data set; pass arrays, or a "
                "tf.data.Dataset without sampling."
            )
        self._num_examples = count
        return count

    def _check_loss(self, loss: float) -> None:
        weights = hash(self.parameters.tobytes())
        if self._first_loss is None or self._first_loss[0] != weights:
            self._first_loss = weights, loss
        first = self._first_loss[1]
        if abs(loss - first) > _SAME_LOSS * (abs(first) + 1e-2):
            raise DataError(
                f"data: the mean loss was {first:.6g} in one pass and {loss:.6g} in another, with "
                f"the same weights. The matrix is defined over a fixed data set and a fixed "
                "function: pass arrays, or a tf.data.Dataset without sampling and augmentation "
                "(or with `.cache()` behind them); a layer must draw no random numbers in "
                "inference mode."
            )


def _check_option(name: str, value: Any, options: tuple[Any, ...]) -> None:
    if value not in options:
        raise InvalidArgumentError(f"{name} must be one of {options}. Received: {name}={value!r}")


def checked_network(model: Any) -> keras.Model:
    """The network that is measured.

    Args:
        model: A `keras.Model`, or an object that holds one as ``.net``.

    Raises:
        UnsupportedModelError: If it is unbuilt, has several outputs or reduced precision.
    """
    net = network_of(model)
    if not isinstance(net, keras.Model):
        raise UnsupportedModelError(
            f"model must be a keras.Model or hold one as `.net`. Received: {type(model).__name__}"
        )
    if not net.built:
        raise UnsupportedModelError(
            f"Model {net.name!r} must be built. Call it once on data, or give it an Input."
        )
    if not net.trainable_variables:
        raise UnsupportedModelError(
            f"Model {net.name!r} must have trainable parameters: all of its layers are frozen, or "
            "have none. Set `trainable` of those to be measured."
        )
    outputs = getattr(net, "outputs", None) or [None]  # a subclassed model has no list of them
    if len(outputs) != 1:
        raise UnsupportedModelError(
            f"Model {net.name!r} must have one output. Received: {len(outputs)} outputs. Measure "
            "one of them: keras.Model(model.inputs, model.outputs[0])."
        )
    for layer in reachable_operations(net):
        if isinstance(layer, keras.Layer) and layer.compute_dtype not in ("float32", "float64"):
            raise UnsupportedModelError(
                f"Layer {layer.name!r} ({type(layer).__name__}) computes in "
                f"{layer.compute_dtype}; exact curvature needs float32 or float64. Rebuild the "
                "model with dtype='float32' and copy the weights."
            )
    types = sorted({v.dtype.name for v in _parameters(net)})
    if len(types) > 1:
        raise UnsupportedModelError(
            f"Model {net.name!r} must have parameters of one type. Received: {types}. Rebuild it "
            "with one dtype and copy the weights."
        )
    return net


def _counted(entries: float) -> float:
    if not entries:
        raise DataError("data: no entry counts in the loss, all are masked or ignored.")
    return entries


def _parameters(net: keras.Model) -> list[tf.Variable]:
    """Backend variables of all trainable parameters but those of gates."""
    gates = {
        id(variable)
        for operation in reachable_operations(net)
        if isinstance(operation, GateSource)
        for variable in operation.trainable_variables
    }
    return [v.value for v in net.trainable_variables if id(v) not in gates]


def _inner_product(left: Sequence[Any], right: Sequence[Any]) -> Any:
    return tf.add_n(
        [tf.reduce_sum(tf.convert_to_tensor(a) * b) for a, b in zip(left, right, strict=True)]
    )


def _flattened(parts: Sequence[Any]) -> NDArray[np.float64]:
    dense = [tf.convert_to_tensor(part).numpy() for part in parts]
    return np.concatenate([part.astype(np.float64).ravel() for part in dense])

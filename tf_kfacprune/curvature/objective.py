r"""The loss of a batch, taken apart into its entries.

=========  ================================================================  ==============
symbol     meaning                                                           shape
=========  ================================================================  ==============
`L`        loss of the batch                                                 scalar
`l_i`      losses of its entries (examples, tokens, pixels)                  (batch, ...)
`c_i`      what each entry counts: `L = sum_i c_i l_i`                       like l
`f_i`      predictions                                                       (batch, ..., D)
`B`        number of examples                                                scalar
=========  ================================================================  ==============

Keras reduces the l_i with the weights of the examples, the masks of the predictions, classes to be
ignored and the weights of several losses. The result is linear in the l_i, so that all of this is
in its derivative, c_i. The curvature of L is the sum of the entries' curvatures times c_i, whatever
the loss, the outputs and the masks are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature.batch import Batch, mask_of
from tf_kfacprune.curvature.likelihoods import Likelihood, likelihood_of
from tf_kfacprune.distribution import num_replicas
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.rules.substitution import substituted

__all__ = ["CompiledObjective", "Entries", "SingleObjective", "averaged_outputs"]


@dataclass(frozen=True)
class Entries:
    """The losses of one output for one batch.

    Attributes:
        loss: The Keras loss.
        likelihood: What it stands for, or the reason why that is not known.
        labels: Labels as the loss was given them.
        prediction: f.
        values: l, shape `(batch, ...)`; a scalar for losses that average over the batch.
        coefficients: c, like `values`.
        are_equal: Whether all c_i are known to be equal: no weights, no masks.
    """

    loss: keras.losses.Loss
    likelihood: Likelihood | str
    labels: Any
    prediction: Any
    values: Any
    coefficients: Any
    are_equal: bool

    def sum(self) -> Any:
        """The part of L that comes from this output, a scalar."""
        return ops.sum(self.coefficients * self.values)

    @property
    def has_coordinates(self) -> bool:
        """Whether `scaled_coordinates` are known, so that labels need not be those of the data."""
        by_prediction = len(self.values.shape) == len(self.prediction.shape) - 1
        return by_prediction and not isinstance(self.likelihood, str)

    @property
    def roots(self) -> Any:
        """Square roots of c, constants; entries that count less than nothing have no curvature."""
        return tf.sqrt(tf.maximum(tf.stop_gradient(self.coefficients), 0.0))

    def scaled_coordinates(self) -> Any:
        """`sqrt(c_i / D) phi_i`, shape `(batch, ..., D)`; their squared derivatives sum to F.

        D counts the outputs that the loss averages over, and is 1 if it adds them up.
        """
        likelihood: Any = self.likelihood
        roots = self.roots[..., None]
        if likelihood.is_mean:
            roots = roots * ops.rsqrt(ops.cast(ops.shape(self.prediction)[-1], roots.dtype))
        coordinates = likelihood.coordinates(self.prediction)
        return ops.cast(roots, coordinates.dtype) * coordinates

    def example_weights(self) -> Any:
        """What each example counts, shape `(batch,)`; None if all count the same."""
        if self.are_equal or not len(self.values.shape):
            return None
        flat = ops.reshape(self.coefficients, (ops.shape(self.coefficients)[0], -1))
        counting = ops.sum(ops.cast(flat != 0, flat.dtype), axis=1)
        return ops.maximum(ops.sum(flat, axis=1) / ops.maximum(counting, 1.0), 0.0)


class _Reduction(keras.losses.Loss):
    """Keras' reduction of losses that are known already."""

    def __init__(self, values: Any, reduction: str) -> None:
        super().__init__(
            "reduction", reduction=reduction, dtype=keras.backend.standardize_dtype(values.dtype)
        )
        self._values = values

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._values


class SingleObjective:
    """A loss of a network with one output, as a mean over examples; for diagnostics.

    It is evaluated in the precision of the predictions (float32 at least).

    Args:
        loss: A loss as given to `compile`: name, function `(y_true, y_pred) -> losses`, or
            `keras.losses.Loss`. Its reduction is taken for a mean.

    Raises:
        InvalidArgumentError: If `loss` is none of these.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = _loss_object(loss)
        self.likelihood = likelihood_of(loss)

    def entries(self, batch: Batch, outputs: Any) -> list[Entries]:
        """The losses of a batch, entry by entry, in a list of one.

        Args:
            batch: The batch.
            outputs: The network's output for it.
        """
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        prediction = ops.cast(outputs, "float32") if dtype in ("float16", "bfloat16") else outputs
        labels = ops.convert_to_tensor(batch.y, dtype=prediction.dtype)
        values = self.loss.call(labels, prediction)
        of_values = mask_of(values)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            reduction = _Reduction(values, "sum_over_batch_size")
            total = reduction(labels, outputs, batch.weights)
        are_equal = all(v is None for v in (batch.weights, mask_of(outputs), of_values))
        coefficients = tape.gradient(total, values)
        return [
            Entries(self.loss, self.likelihood, labels, prediction, values, coefficients, are_equal)
        ]

    def mean(self, batch: Batch, outputs: Any) -> tuple[Any, Any]:
        """The mean loss of a batch, and of how many entries it is one.

        Entries that masks or the loss itself leave out do not count, so that batches are averaged
        in proportion to this number. A loss that averages over the batch by itself has no entries:
        its examples are counted.

        Returns:
            Two scalars of the loss's type.
        """
        (entries,) = self.entries(batch, outputs)
        dtype = entries.values.dtype
        if not len(entries.values.shape):
            return entries.sum(), ops.cast(batch.size, dtype)
        return entries.sum(), ops.sum(ops.cast(entries.coefficients != 0, dtype))


class CompiledObjective:
    """The loss that a model was compiled with: any structure of outputs, losses and weights.

    Args:
        model: A compiled Keras model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    @property
    def _compile_loss(self) -> Any:
        return self._model._compile_loss

    def losses(self) -> list[Any]:
        """The losses as the user gave them, one after another."""
        return [loss for loss in keras.tree.flatten(self._model.loss) if loss is not None]

    def reasons(self) -> list[str]:
        """Why labels cannot be sampled for some of the losses."""
        found = [likelihood_of(loss) for loss in self.losses()]
        return list(dict.fromkeys(reason for reason in found if isinstance(reason, str)))

    def entries(self, batch: Batch, outputs: Any) -> list[Entries]:
        """The losses of a batch, entry by entry, for each output that has a loss.

        Args:
            batch: The batch.
            outputs: The network's outputs for it.

        Raises:
            InvalidArgumentError: If a loss cannot take this batch, which may be part of one.
        """
        compiled = self._compile_loss
        if not compiled.built:
            compiled.build(batch.y, outputs)
        losses = {id(entry.loss): entry.loss for entry in compiled._flat_losses}
        calls: list[tuple[Any, Any, Any, Any]] = []
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as tape:
            with ExitStack() as stack:
                for loss in losses.values():
                    recording = functools.partial(_recorded, loss, loss.call, calls, tape)
                    stack.enter_context(substituted(loss, call=recording))
                # Keras counts the losses of several outputs as metrics; this pass is none of them.
                muted = [None] * len(compiled._metrics)
                stack.enter_context(substituted(compiled, _metrics=muted))
                total = compiled(batch.y, outputs, batch.weights)
            total *= num_replicas()  # Keras' own is this replica's share of the mean
        if not calls:
            raise InvalidArgumentError(
                f"The loss {[type(loss).__name__ for loss in losses.values()]} computes its value "
                "in `__call__`, where single examples cannot be told apart. Put the computation "
                "into `call(self, y_true, y_pred)`, as keras.losses.Loss has it."
            )
        are_equal = batch.weights is None and not any(
            mask_of(tensor) is not None
            for tensor in [*keras.tree.flatten(outputs), *(values for *_, values in calls)]
        )
        return [
            Entries(
                loss,
                likelihood_of(loss),
                labels,
                prediction,
                values,
                tape.gradient(total, values, unconnected_gradients=tf.UnconnectedGradients.ZERO),
                are_equal,
            )
            for loss, labels, prediction, values in calls
        ]


def _recorded(
    loss: Any, call: Callable[..., Any], calls: list[Any], tape: Any, y_true: Any, y_pred: Any
) -> Any:
    try:
        values = call(y_true, y_pred)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise InvalidArgumentError(
            f"Loss {getattr(loss, 'name', loss)!r} failed on the part of a batch that curvature is "
            f"computed on: labels of shape {tuple(y_true.shape)}, predictions of shape "
            f"{tuple(y_pred.shape)}. It said: {error} If the loss counts on a fixed batch size, "
            "pass batch_fraction=1 to whatever looks at curvature: the optimizer KFAC, the policy "
            "KFACSaliency, the penalty SpectralRadius."
        ) from error
    tape.watch(values)
    calls.append((loss, y_true, y_pred, values))
    return values


def averaged_outputs(loss: keras.losses.Loss, shape: Sequence[int | None]) -> int:
    """Over how many outputs a loss of unknown kind averages: the last dimension D, or 1.

    The loss of outputs that are repeated is the same if it averages over them, and twice as large
    if it adds them up. That is measured on random numbers; a loss that is neither, or cannot take
    them, counts as a sum.

    Args:
        loss: The loss.
        shape: Shape of its predictions, `(batch, ..., D)`.
    """
    outputs = shape[-1] if len(shape) > 1 else None
    if outputs is None:
        return 1
    rng = np.random.default_rng(0)
    drawn = rng.uniform(0.2, 0.8, (2, 2, *(n or 2 for n in shape[1:]))).astype("float32")
    with tf.init_scope():
        try:
            once = loss.call(*(tf.constant(part) for part in drawn))
            twice = loss.call(*(tf.constant(np.concatenate([p, p], -1)) for p in drawn))
            is_mean = np.allclose(np.array(once), np.array(twice), rtol=1e-4)
        except Exception:  # noqa: BLE001 (it is the user's code: any error means that we cannot tell)
            return 1
    return outputs if is_mean else 1


def _loss_object(loss: Any) -> keras.losses.Loss:
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError as error:
            raise InvalidArgumentError(f"loss {loss!r} is not the name of a Keras loss.") from error
    if not callable(loss):
        raise InvalidArgumentError(
            "loss must be the name of a Keras loss, a function (y_true, y_pred) -> losses, or a "
            f"keras.losses.Loss. Received: loss={loss!r}"
        )
    return loss if isinstance(loss, keras.losses.Loss) else _FunctionLoss(loss)


class _FunctionLoss(keras.losses.Loss):
    """A function as a loss."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(name=getattr(function, "__name__", "loss"))
        self.fn = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if len(y_pred.shape) == len(y_true.shape) + 1 and y_pred.shape[-1] == 1:
            y_true = ops.expand_dims(y_true, axis=-1)  # as Keras does: else they would broadcast
        return self.fn(y_true, y_pred)

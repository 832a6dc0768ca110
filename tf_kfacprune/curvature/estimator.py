r"""Looks at the curvature of a network on one batch, for whoever wants to know about it.

=========  ================================================================  ==============
symbol     meaning                                                           shape
=========  ================================================================  ==============
`l_i`      loss of one entry (example, token, pixel) of one output           scalar
`c_i`      what it counts: the loss of the batch is `sum_i c_i l_i`          scalar
`phi_i`    coordinates of its prediction (`Likelihood`)                      (D,)
`D`        outputs that the loss averages over, 1 if it adds them up         scalar
`B`        number of examples                                                scalar
`g`        gradient of a probe by a pre-activation, per example              as it
=========  ================================================================  ==============

The Fisher of the batch is `F = sum_i c_i / D J_i^T J_i` with J_i the derivative of phi_i by the
parameters. A *probe* is a scalar whose per-example gradients g have it as their second moment,
`F = E (1/B) sum_examples g g^T`:

    sampled   sum_i sqrt(B c_i / D) eps_i . phi_i        eps normal
    exact     sum_i sqrt(B c_i / D) phi_ik               one probe for each output k
    data      sum_i sqrt(B c_i D) l_i                    empirical Fisher

Where a loss has no known likelihood, its entries count by the third line.

References:
    Martens & Grosse 2015, section 2.2. Kunstner, Balles, Hennig 2019 (empirical Fisher).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature.batch import Batch
from tf_kfacprune.curvature.blocks import Record
from tf_kfacprune.curvature.capture import OfLayer, capture
from tf_kfacprune.curvature.forward_state import ForwardState
from tf_kfacprune.curvature.gauss_newton import gauss_newton_form
from tf_kfacprune.curvature.objective import (
    CompiledObjective,
    Entries,
    SingleObjective,
    averaged_outputs,
)
from tf_kfacprune.curvature.second_derivatives import reachable_operations
from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["LABELS", "LEAST_EXAMPLES", "CurvatureEstimator", "Look", "Uses"]

LABELS = ("sampled", "data", "exact")
_MOST_OUTPUTS = 256  # beyond, one backward pass per output is no option any more
# BatchNormalization makes another function of a smaller part of a batch. Normalized by the
# statistics of n vectors, 2 of n directions of the batch have no curvature: of one vector, or of
# two, none is left.
LEAST_EXAMPLES = 16


@dataclass(frozen=True)
class Uses:
    """How one layer was used in one pass.

    Attributes:
        records: One record per call.
        probes: For each probe, g of each record.
        weights: What each example counts, shape `(batch,)`, or None if all count the same.
        examples: Number of examples, of each of which a model may make several rows, scalar int32
            tensor; None for as many as there are rows.
    """

    records: Sequence[Record]
    probes: Sequence[Sequence[Any]]
    weights: Any = None
    examples: Any = None


@dataclass(frozen=True)
class Look:
    """What one pass showed.

    Attributes:
        records: Uses of the layers that were looked at, in the order of their calls.
        probes: For each probe, g of each record, float32.
        examples: B, a scalar int32 tensor.
        weights: What each example counts, shape `(batch,)`, or None if all count the same.
        points: For each probe its gradients by the further points, summed over the examples.
    """

    records: list[Record]
    probes: list[list[Any]]
    examples: Any
    weights: Any
    points: list[list[Any]]

    def of(self, layer: keras.layers.Layer) -> Uses:
        """What concerns one layer."""
        places = [k for k, record in enumerate(self.records) if record.layer is layer]
        return Uses(
            [self.records[k] for k in places],
            [[probe[k] for k in places] for probe in self.probes],
            self.weights,
            self.examples,
        )


class CurvatureEstimator:
    """Curvature of a network's loss, batch by batch.

    Every pass leaves the network as it was: normalization statistics and seeds are put back.

    Args:
        network: The network; called as `network(x, training=...)`.
        objective: Its loss.
        seed: Where probes come from, a `keras.random.SeedGenerator`.
    """

    def __init__(
        self, network: Any, objective: CompiledObjective | SingleObjective, seed: Any = None
    ) -> None:
        self.network = network
        self.objective = objective
        self._seed = seed

    def part_of(self, batch: Batch, fraction: float) -> Batch:
        """The part of a batch to look at in training mode: its first `ceil(fraction * size)`.

        With BatchNormalization, which makes another function of few examples, it has at least 16,
        as far as there are so many.

        Args:
            batch: The batch.
            fraction: Share of the batch, in (0, 1].
        """
        normalizes = any(
            isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
            for layer in reachable_operations(self.network)
        )
        return batch.head(fraction, LEAST_EXAMPLES if normalizes else 1)

    def look(
        self,
        batch: Batch,
        layers: Sequence[OfLayer],
        labels: str,
        *,
        training: bool,
        points: Sequence[Any] = (),
    ) -> Look:
        """Runs the network on a batch and takes the gradients of probes at some layers.

        Args:
            batch: The batch, or a part of one.
            layers: Kronecker blocks, or whatever else has a layer.
            labels: `"sampled"`, `"exact"` or `"data"`.
            training: Whether layers run in training mode.
            points: Tensors or variables to differentiate by, too.

        Returns:
            A `Look`.

        Raises:
            InvalidArgumentError: If the loss cannot take the batch, or labels are `"exact"` and
                an output is not of shape `(batch, outputs)` or has too many outputs.
            UnsupportedModelError: If one of the layers was not called.
        """
        state = ForwardState(self.network)
        with tf.GradientTape(persistent=True) as tape:
            outputs, records = capture(self.network, batch.x, layers, training)
            entries = self.objective.entries(batch, outputs)
            examples = batch.size
            # What is summed over the examples is squared by who asks for it: their signs must be
            # independent, as those of sampled labels are.
            signs = _random_signs(examples, self._seed) if points else None
            probes = self._probes(entries, labels, tf.cast(examples, "float32"), signs)
        state.restore()
        sources = [*(record.s for record in records), *points]
        found = [
            tape.gradient(probe, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            for probe in probes
        ]
        count = len(records)
        of_records = [[tf.cast(g, "float32") for g in gradients[:count]] for gradients in found]
        return Look(
            [_as_seen(record, of) for record, *of in zip(records, *of_records, strict=True)],
            of_records,
            examples,
            _example_weights(entries),
            [gradients[count:] for gradients in found],
        )

    def quadratic_form(
        self,
        batch: Batch,
        variables: Sequence[keras.Variable],
        directions: Sequence[Sequence[Any]],
        *,
        is_whole: bool,
    ) -> Any:
        """Products of the curvature with directions, in training mode: `D^T (F + R) D`.

        F is the Gauss-Newton matrix of the loss; R the Hessian of everything that layers add to
        it, such as weight regularizers.

        Args:
            batch: The batch, or a part of one.
            variables: The parameters.
            directions: r directions, each one tensor per parameter.
            is_whole: Whether the batch is all of the one that the loss is computed on.

        Returns:
            Shape `(r, r)`, float32, symmetric.

        Raises:
            InvalidArgumentError: If layers add losses of their activations, whose scale depends
                on the batch in ways of their own, and the batch is a part.
        """
        state = ForwardState(self.network)
        form = gauss_newton_form(
            self.network,
            batch,
            self.objective,
            variables,
            directions,
            added=lambda: self._added_losses(is_whole),
        )
        state.restore()
        return form

    def _added_losses(self, is_whole: bool) -> list[Any]:
        losses = self.network.losses
        of_weights = sum(
            getattr(v, "regularizer", None) is not None for v in self.network.trainable_variables
        )
        if len(losses) > of_weights and not is_whole:
            raise InvalidArgumentError(
                f"The quadratic model of {self.network.name!r} (learning_rate='auto' or "
                "damping=LevenbergMarquardt(...)) cannot be computed on a part of the batch: "
                "layers add losses of their activations (activity_regularizer, add_loss). Pass "
                "batch_fraction=1 to KFAC, or take a fixed learning rate and a fixed damping."
            )
        return [tf.reduce_sum(loss) for loss in losses]

    def _probes(
        self, all_entries: Sequence[Entries], labels: str, examples: Any, signs: Any
    ) -> list[Any]:
        """The probes, each scaled so that gradients belong to one example."""
        together: list[Any] = []  # those that one backward pass can take at once
        single: list[Any] = []
        for entries in all_entries:
            if labels == "data" or not entries.has_coordinates:
                together.append(_data_probe(entries, examples, signs))
                continue
            scaled = entries.scaled_coordinates()
            scaled = scaled * tf.cast(tf.sqrt(examples), scaled.dtype)
            if labels == "exact":
                single += _by_output(_signed(scaled, signs))
                continue
            noise = keras.random.normal(ops.shape(scaled), dtype=scaled.dtype, seed=self._seed)
            together.append(ops.sum(noise * scaled))
        total = [sum(together[1:], together[0])] if together else []
        return total + single


def _as_seen(record: Record, gradients: Sequence[Any]) -> Record:
    """A record whose mask hides no location that the loss sees all the same.

    A layer that knows no masks, such as Flatten, reads what is behind one.
    """
    mask = record.mask
    # The statistics of a normalization are those of Keras, whatever becomes of its outputs.
    is_normalization = isinstance(record.layer, keras.layers.BatchNormalization)
    if mask is None or is_normalization or len(mask.shape) >= len(record.s.shape):
        return record
    features = list(range(len(mask.shape), len(record.s.shape)))
    for g in gradients:
        mask = tf.logical_or(mask, tf.reduce_any(g != 0.0, axis=features))
    return dataclasses.replace(record, mask=mask)


def _data_probe(entries: Entries, examples: Any, signs: Any) -> Any:
    values, root = entries.values, entries.roots
    examples = tf.cast(examples, values.dtype)
    likelihood = entries.likelihood
    if len(entries.prediction.shape) == 1:  # one number for each example
        averaged: Any = 1
    elif isinstance(likelihood, str):
        averaged = averaged_outputs(entries.loss, entries.prediction.shape)
    else:
        averaged = ops.shape(entries.prediction)[-1] if likelihood.is_mean else 1
    averaged = tf.sqrt(tf.cast(averaged, values.dtype))
    if not len(values.shape):  # a mean over the batch
        return examples * averaged * root * values
    return tf.sqrt(examples) * averaged * ops.sum(_signed(root * values, signs))


def _random_signs(examples: Any, seed: Any) -> Any:
    """+1 or -1 for each example."""
    return tf.sign(keras.random.uniform((examples,), -1.0, 1.0, seed=seed))


def _signed(values: Any, signs: Any) -> Any:
    """Values `(batch, ...)` times the signs of their examples."""
    if signs is None:
        return values
    shape = (-1, *[1] * (len(values.shape) - 1))
    return values * ops.cast(ops.reshape(signs, shape), values.dtype)


def _by_output(scaled: Any) -> list[Any]:
    shape = scaled.shape
    if len(shape) != 2 or shape[-1] is None or shape[-1] > _MOST_OUTPUTS:
        raise InvalidArgumentError(
            "labels='exact' takes one backward pass per output and needs predictions of shape "
            f"(batch, outputs) with at most {_MOST_OUTPUTS} outputs. Received: predictions of "
            f"shape {tuple(shape)}. Use labels='sampled'."
        )
    return [ops.sum(scaled[:, k]) for k in range(shape[-1])]


def _example_weights(all_entries: Sequence[Entries]) -> Any:
    """What each example counts, summed over outputs; None if all count the same."""
    found = [entries.example_weights() for entries in all_entries]
    given = [tf.cast(weights, "float32") for weights in found if weights is not None]
    return tf.add_n(given) if given else None

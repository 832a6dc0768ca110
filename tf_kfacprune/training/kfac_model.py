"""`KFACModel`: any Keras model, trained with K-FAC (or any other optimizer) in plain `fit`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import (
    KroneckerBlock,
    NetworkBlocks,
    find_blocks,
    gauss_newton_form,
    probe_gradients,
)
from tf_kfacprune.distribution import (
    ReplicaSeedGenerator,
    cond,
    num_replicas,
    sum_over_replicas,
    weighted_mean,
)
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training.batches import head_of_batch, num_examples
from tf_kfacprune.training.compiled import Compiled, inner_optimizer
from tf_kfacprune.training.distributed import (
    check_distributed,
    is_multi_worker,
    one_per_worker,
    raise_lost_worker,
)
from tf_kfacprune.training.forward_state import ForwardState
from tf_kfacprune.training.guard_callback import GuardCallback
from tf_kfacprune.training.step_guard import StepGuard
from tf_kfacprune.training.untracked import Untracked
from tf_kfacprune.training.validation import check_labels
from tf_kfacprune.validation import require, require_count

__all__ = ["KFACModel"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class KFACModel(keras.Model):
    """Hands the Kronecker factors of an ordinary Keras model to the `KFAC` optimizer.

    The wrapper adds nothing to the model: it trains the layers of `model`, in place, and
    `model` itself is what you save, export or call afterwards. With any other optimizer the
    steps are those of plain Keras.

    Args:
        model: A built Keras model: Functional, Sequential or subclassed.
        max_skipped_steps: A batch with NaN or infinite values is skipped; so many in a row end
            the training with an error.
        seed: Seed of label sampling, or None for a random one.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        net: The model.

    Raises:
        UnsupportedModelError: If the model is not built.
        InvalidArgumentError: If an argument has the wrong type or value.

    Example:
        >>> trainer = kp.KFACModel(model)
        >>> trainer.compile(kp.KFAC("auto"), loss="sparse_categorical_crossentropy")
        >>> trainer.fit(x_train, y_train, batch_size=512, epochs=10)
        >>> model.save("trained.keras")

    References:
        Martens & Grosse 2015.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        max_skipped_steps: int = 10,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        require(owner, isinstance(model, keras.Model), "model", "a keras.Model", model)
        require_count(owner, "max_skipped_steps", max_skipped_steps)
        if not model.built:
            raise UnsupportedModelError(
                f"Model {model.name!r} is not built, so its layers are not known yet. Call it once "
                "on data, or give it an Input."
            )
        kwargs.setdefault("name", f"kfac_{model.name}")
        super().__init__(**kwargs)
        self.net = model
        self.max_skipped_steps = max_skipped_steps
        self.seed = seed
        self.seed_generator = ReplicaSeedGenerator(seed)
        self.guard = StepGuard(max_skipped_steps, name="guard")
        self._found = Untracked(find_blocks(model))
        self.built = True

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """Kronecker blocks of the network."""
        return list(self._network_blocks.blocks)

    @property
    def without_block(self) -> dict[str, str]:
        """Layers with weights but without a Kronecker block, and the reason."""
        return dict(self._network_blocks.without_block)

    @property
    def _network_blocks(self) -> NetworkBlocks:
        return self._found.content

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        # Subclassed models may know neither of the two.
        given = {"training": training} if self.net._call_has_training_arg else {}
        if mask is not None:
            given["mask"] = mask
        return self.net(inputs, **given)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.net.compute_output_shape(input_shape)

    # ---- compile and fit

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        with self.distribute_strategy.scope():
            super().compile(optimizer, loss, *args, **kwargs)
            kfac = self._kfac
            if self.distribute_strategy.num_replicas_in_sync > 1:
                check_distributed(self, kwargs.get("jit_compile", "auto"))
                self.jit_compile = False
            if kfac is not None:
                kfac.bind(self.blocks, self._network_blocks.reasons)
            # Before weights are loaded: an optimizer without variables would lose its state.
            self.optimizer.build(self.network_variables)
        self._compiled = Compiled(loss, inner_optimizer(self.optimizer))
        if kfac is not None and kfac.needs_quadratic_form:
            self._compiled.objective()
        users = [user for user in self._label_users() if user.labels != "data"]
        if users and self._compiled.reason is not None:
            warnings.warn(
                f"{' and '.join(type(user).__name__ for user in users)} of {self.name!r} fall back "
                f"on the empirical Fisher (labels='data'): {self._compiled.reason}.",
                stacklevel=2,
            )

    def _label_users(self) -> list[Any]:
        """What takes labels from the model or from the data."""
        return [] if self._kfac is None else [self._kfac]

    @property
    def network_variables(self) -> list[keras.Variable]:
        """What the compiled optimizer trains."""
        return self.net.trainable_variables

    @property
    def constant_learning_rate(self) -> float | None:
        """The learning rate if it is a constant, None if it follows a schedule."""
        if not self._compiled.constant_learning_rate:
            return None
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    @property
    def _kfac(self) -> KFAC | None:
        inner = inner_optimizer(self.optimizer)
        return inner if isinstance(inner, KFAC) else None

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        if y is not None:
            check_labels(y, self.loss, self.net)
        callbacks = kwargs.get("callbacks") or []
        if isinstance(callbacks, keras.callbacks.Callback):
            callbacks = [callbacks]
        if isinstance(callbacks, keras.callbacks.CallbackList):
            for callback in self._run_callbacks():
                callbacks.append(callback)
        else:
            callbacks = [*self._run_callbacks(), *callbacks]
        with raise_lost_worker(self.distribute_strategy):
            return super().fit(x, y, *args, **{**kwargs, "callbacks": callbacks})

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # Keras averages the first batch over the replicas to learn its shape. That fails for parts
        # of different size, and with several workers for any; the part of one replica will do.
        # Metrics have to be built here: a step that creates variables cannot all-reduce.
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
            return
        for _, _, batches in iterator or ():
            data_batch = keras.tree.map_structure(
                lambda v: strategy.experimental_local_results(v)[0], next(batches)
            )
            break
        with strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    def _run_callbacks(self) -> list[keras.callbacks.Callback]:
        """Callbacks that every `fit` needs."""
        return [GuardCallback()]

    # ---- one training step

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step: loss, gradients, Kronecker statistics, update; skipped if not finite."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._begin_step()
        before = self._forward_state()
        variables = [*self.network_variables, *self._extra_variables()]
        examples = num_examples(x)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self._loss_of_replica(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, [v.value for v in variables])
        gradients = self._regularized(gradients, variables, x, y)
        finite = self._is_finite(loss, gradients)
        if num_replicas() > 1:
            gradients, finite = self._agreed(gradients, finite, examples, before)

        def apply() -> None:
            self._judge_last_step(before, loss, x, y, sample_weight)
            self._update_factors(x, y)
            self._apply(gradients, variables, x, y)
            self._update_metrics(x, y, y_pred, sample_weight, loss)

        cond(finite, apply, before.restore)
        self.guard.count(finite)
        self._end_step()
        return self._results({**self.get_metrics_result(), **self._figures()})

    def test_step(self, data: Any) -> dict[str, Any]:
        return self._results(super().test_step(data))

    def _results(self, results: dict[str, Any]) -> dict[str, Any]:
        return one_per_worker(results) if is_multi_worker(self.distribute_strategy) else results

    def _loss_of_replica(self, **arguments: Any) -> Any:
        """Mean loss over this replica's examples; Keras' own is divided by the replicas."""
        loss = self.compute_loss(**arguments)
        return loss if num_replicas() == 1 else loss * tf.cast(num_replicas(), loss.dtype)

    def _agreed(
        self, gradients: Sequence[Any], finite: Any, examples: Any, before: ForwardState
    ) -> tuple[list[Any], Any]:
        """This replica's part of the gradient of the whole batch; whether all parts are finite.

        A replica without examples (in a small last batch) contributes nothing, and its pass leaves
        no trace: means over no examples are NaN. Where a loss scale is too high for one replica,
        all see it.
        """
        idle = tf.equal(examples, 0)
        fine = _all_finite(gradients)
        finite = tf.logical_or(finite, idle)
        # Not its seeds: all replicas have to draw the same gates in the next step.
        tf.cond(idle, before.restore_statistics, lambda: None)
        weight = tf.cast(examples, "float32")
        flags = [tf.cast(flag, "float32") for flag in (finite, tf.logical_or(fine, idle))]
        total, *agreeing = sum_over_replicas([weight, *flags])
        finite, fine = (tf.equal(count, float(num_replicas())) for count in agreeing)
        share = weight / tf.maximum(total, 1.0)
        poison = tf.where(fine, 0.0, math.nan)
        parts = [
            None
            if g is None
            else tf.math.multiply_no_nan(g, tf.cast(share, g.dtype)) + tf.cast(poison, g.dtype)
            for g in (None if g is None else tf.convert_to_tensor(g) for g in gradients)
        ]
        return parts, finite

    def _begin_step(self) -> None:
        """What happens before the forward pass."""

    def _end_step(self) -> None:
        """What happens at the end of every step, skipped or not."""

    def _extra_variables(self) -> Sequence[keras.Variable]:
        """Variables that need gradients but that the compiled optimizer does not train."""
        return ()

    def _regularized(
        self, gradients: list[Any], variables: Sequence[keras.Variable], x: Any, y: Any
    ) -> list[Any]:
        """Gradients with those of further terms of the objective added."""
        del variables, x, y
        return gradients

    def _forward_state(self) -> ForwardState:
        return ForwardState(self.net)

    def _is_finite(self, loss: Any, gradients: Sequence[Any]) -> Any:
        finite = tf.math.is_finite(tf.cast(loss, "float32"))
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return finite  # overflowing gradients are its signal to lower the scale
        return tf.logical_and(finite, _all_finite(gradients))

    def _mean_loss(self, labels: str) -> Any:
        """`(outputs, y) -> scalars`: likelihoods of the model's own labels, or the compiled loss.

        Args:
            labels: `"sampled"`, `"exact"` or `"data"`.
        """
        compiled = self._compiled
        if labels == "sampled" and compiled.sampled is not None:
            sampled = compiled.sampled
            return lambda outputs, y: [sampled(outputs, self.seed_generator)]
        if labels == "exact" and compiled.exact is not None:
            exact = compiled.exact
            return lambda outputs, y: exact(outputs)
        return lambda outputs, y: [self._loss_of_replica(y=y, y_pred=outputs, training=False)]

    def _update_factors(self, x: Any, y: Any) -> None:
        kfac = self._kfac
        if kfac is None or not kfac.blocks:
            return
        mean_loss = self._mean_loss(kfac.labels)
        x, y = head_of_batch(x, kfac.batch_fraction), head_of_batch(y, kfac.batch_fraction)

        def update() -> None:
            # This second forward pass must not move the normalization statistics again.
            state = self._forward_state()
            records, probes = probe_gradients(
                self.net, x, kfac.blocks, lambda outputs: mean_loss(outputs, y), training=True
            )
            state.restore()
            kfac.update_factors(kfac.statistics(records, probes), num_examples(x))

        cond(kfac.factors_due(), update, lambda: None)

    def _apply(
        self, gradients: Sequence[Any], variables: Sequence[keras.Variable], x: Any, y: Any
    ) -> None:
        kfac = self._kfac
        count = len(self.network_variables)
        pairs = list(zip(gradients[:count], variables[:count], strict=True))
        if kfac is None:
            self.optimizer.apply_gradients(pairs)
            return
        with kfac.measured_by(lambda directions: self._quadratic_form(kfac, x, y, directions)):
            self.optimizer.apply_gradients(pairs)

    def _quadratic_form(self, kfac: KFAC, x: Any, y: Any, directions: Any) -> Any:
        state = self._forward_state()
        x = head_of_batch(x, kfac.batch_fraction)
        products = gauss_newton_form(
            self.net,
            x,
            head_of_batch(y, kfac.batch_fraction),
            self._compiled.objective(),
            kfac.block_variables,
            directions,
            training=True,
        )
        state.restore()
        return weighted_mean([products], num_examples(x))[0]

    def _judge_last_step(
        self, before: ForwardState, loss: Any, x: Any, y: Any, sample_weight: Any
    ) -> None:
        """Adapts the damping by what the last step did to the loss on this batch, new to it.

        Args:
            before: State in which the pass on this batch began that gave `loss`.
            loss: Loss of the present weights on this batch.
            x: Inputs.
            y: Labels.
            sample_weight: Weights of the examples, or None.
        """
        kfac = self._kfac
        if kfac is None or not kfac.needs_quadratic_form:
            return

        def judge() -> None:
            after = self._forward_state()
            before.restore()  # the same noise as in the pass that gave `loss`
            with kfac.last_step_undone():
                y_pred = self(x, training=True)
                old_loss = self._loss_of_replica(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
            after.restore()
            (change,) = weighted_mean([tf.cast(loss - old_loss, "float32")], num_examples(x))
            kfac.adapt_damping(change)

        cond(kfac.damping_due(), judge, lambda: None)

    def _update_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, loss: Any) -> None:
        batch = num_examples(x)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=batch)
        self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _figures(self) -> dict[str, Any]:
        """What the progress bar shows beside the metrics."""
        figures: dict[str, Any] = {"skipped_steps": tf.convert_to_tensor(self.guard.skipped)}
        kfac = self._kfac
        if kfac is not None and kfac.needs_quadratic_form:
            figures["damping"] = tf.convert_to_tensor(kfac.current_damping)
            if kfac.is_adaptive:
                figures["learning_rate"] = tf.convert_to_tensor(kfac.learning_rate)
        return figures

    # ---- saving

    def _noise_states(self) -> list[keras.Variable]:
        """States of all seed generators. Keras does not count them among the weights."""
        weights = {id(variable) for variable in self.weights}
        return [v for v in self.non_trainable_variables if id(v) not in weights]

    def save_own_variables(self, store: Any) -> None:
        """Saves what no layer saves: the states of noise, so that a resumed run repeats it."""
        for k, state in enumerate(self._noise_states()):
            store[f"noise_{k}"] = keras.ops.convert_to_numpy(state)

    def load_own_variables(self, store: Any) -> None:
        for k, state in enumerate(self._noise_states()):
            if f"noise_{k}" in store.keys():  # noqa: SIM118 (a store is no mapping)
                state.assign(store[f"noise_{k}"])

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.net),
            "max_skipped_steps": self.max_skipped_steps,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> KFACModel:
        model = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        return cls(**{**config, "model": model})

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))


def _all_finite(gradients: Sequence[Any]) -> Any:
    sums = [tf.reduce_sum(tf.abs(tf.cast(g, "float32"))) for g in gradients if g is not None]
    return tf.math.is_finite(tf.add_n(sums))

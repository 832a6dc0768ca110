"""`KFACModel`: any Keras model, trained with K-FAC (or any other optimizer) in plain `fit`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import (
    KroneckerBlock,
    NetworkBlocks,
    find_blocks,
)
from tf_kfacprune.distribution import (
    ReplicaSeedGenerator,
    cond,
    num_replicas,
)
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training.array_batches import batched
from tf_kfacprune.training.batches import example_weights, num_examples
from tf_kfacprune.training.compiled import Compiled, inner_optimizer
from tf_kfacprune.training.distributed import (
    agreed,
    check_distributed,
    is_multi_worker,
    one_per_worker,
    raise_lost_worker,
)
from tf_kfacprune.training.guard_callback import GuardCallback
from tf_kfacprune.training.kfac_steps import KFACSteps
from tf_kfacprune.training.step_guard import StepGuard
from tf_kfacprune.training.untracked import Untracked
from tf_kfacprune.training.validation import check_labels
from tf_kfacprune.validation import require, require_count

__all__ = ["KFACModel"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class KFACModel(KFACSteps):
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

    def compile(self, optimizer: Any = None, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Configures the training, as Keras does; the optimizer is `KFAC` unless one is given."""
        # Layers may have been frozen or freed since.
        self._found = Untracked(find_blocks(self.net))
        with self.distribute_strategy.scope():
            if optimizer is None:
                optimizer = self._default_optimizer()
            super().compile(optimizer, loss, *args, **kwargs)
            kfac = self._kfac
            if self.distribute_strategy.num_replicas_in_sync > 1:
                check_distributed(self, kwargs.get("jit_compile", "auto"))
                self.jit_compile = False
            if kfac is not None:
                kfac.bind(self.blocks, self._network_blocks.reasons)
            # Before weights are loaded: an optimizer without variables would lose its state.
            if not self.optimizer.built:
                self.optimizer.build(self.network_variables)
        weights = args[0] if args else kwargs.get("loss_weights")
        outputs = len(getattr(self.net, "outputs", None) or [None])
        self._compiled = Compiled(loss, inner_optimizer(self.optimizer), weights, outputs)
        if kfac is not None:
            self._compiled.check_reduction()
        if kfac is not None and kfac.needs_quadratic_form:
            self._compiled.objective()
        users = [user for user in self._label_users() if user.labels != "data"]
        if users and self._compiled.reason is not None:
            warnings.warn(
                f"{' and '.join(type(user).__name__ for user in users)} of {self.name!r} fall back "
                f"on the empirical Fisher (labels='data'): {self._compiled.reason}.",
                stacklevel=2,
            )

    def _default_optimizer(self) -> keras.optimizers.Optimizer:
        return KFAC()

    def _label_users(self) -> list[Any]:
        """What takes labels from the model or from the data."""
        return [] if self._kfac is None else [self._kfac]

    @property
    def constant_learning_rate(self) -> float | None:
        """The learning rate if it is a constant, None if it follows a schedule."""
        if not self._compiled.constant_learning_rate:
            return None
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        if y is not None:
            check_labels(y, self.loss, self.net)
        fit = super().fit
        given = inspect.signature(fit).bind(x, y, *args, **kwargs)
        callbacks = given.arguments.get("callbacks") or []
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        given.arguments["callbacks"] = [*self._run_callbacks(), *keras.tree.flatten(callbacks)]
        arguments = dict(given.arguments)
        if self.distribute_strategy.num_replicas_in_sync == 1:
            arguments = batched(arguments)
        with raise_lost_worker(self.distribute_strategy):
            return fit(**arguments)

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
            gradients, finite = agreed(gradients, finite, examples, before)

        rejected = self._is_last_step_rejected(before, loss, finite, x, y, sample_weight)

        def apply() -> None:
            weights = example_weights(sample_weight)
            self._update_factors(x, y, weights)
            self._apply(gradients, variables, x, y, weights)
            self._update_metrics(x, y, y_pred, sample_weight, loss)

        def leave_out() -> None:
            before.restore()
            self._take_back_if(rejected)

        cond(tf.logical_and(finite, tf.logical_not(rejected)), apply, leave_out)
        self.guard.count(finite)
        self._end_step()
        return self._results({**self.get_metrics_result(), **self._figures()})

    def test_step(self, data: Any) -> dict[str, Any]:
        return self._results(super().test_step(data))

    def _results(self, results: dict[str, Any]) -> dict[str, Any]:
        return one_per_worker(results) if is_multi_worker(self.distribute_strategy) else results

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
            if kfac.adaptive_damping is not None:
                figures["rejected_steps"] = kfac.adaptive_damping.rejected_steps
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

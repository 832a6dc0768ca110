"""`KFACModel`: any Keras model, trained with K-FAC (or any other optimizer) in plain `fit`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import (
    Batch,
    CompiledObjective,
    CurvatureEstimator,
    KroneckerBlock,
    NetworkBlocks,
    find_blocks,
)
from tf_kfacprune.distribution import ReplicaSeedGenerator, num_replicas
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import HoldsNetwork
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training.compile_checks import (
    check_losses,
    explained_losses,
    warn_of_changed_freezing,
    warn_of_labels,
    warn_of_logits,
    warn_of_own_steps,
)
from tf_kfacprune.training.distributed import (
    check_distributed,
    is_multi_worker,
    one_per_worker,
    raise_lost_worker,
)
from tf_kfacprune.training.fit_arguments import batched
from tf_kfacprune.training.labels import check_labels, check_labels_are_given
from tf_kfacprune.training.run_callback import FitCall, RunCallback
from tf_kfacprune.training.step import TrainingStep
from tf_kfacprune.training.step_guard import StepGuard
from tf_kfacprune.training.trainee import Trainee, call_network
from tf_kfacprune.validation import require, require_count

__all__ = ["TRACING", "KFACModel"]

TRACING = "The first step is traced before it runs, which takes from seconds to minutes."


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class KFACModel(HoldsNetwork, keras.Model):
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

    Examples:
        >>> trainer = kp.KFACModel(model)
        >>> trainer.compile(kp.KFAC("auto"), loss="sparse_categorical_crossentropy")
        >>> trainer.fit(x_train, y_train, batch_size=512, epochs=10)
        >>> model.save("trained.keras")

    References:
        Martens & Grosse 2015.
    """

    train_function: Any  # of Keras

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
        warn_of_own_steps(owner, model)
        kwargs.setdefault("name", f"kfac_{model.name}")
        super().__init__(**kwargs)
        self.net = model
        self.max_skipped_steps = max_skipped_steps
        self.seed = seed
        self.seed_generator = ReplicaSeedGenerator(seed)
        self.guard = StepGuard(max_skipped_steps, name="guard")
        self._trainee: Trainee | None = None  # of the last `compile`
        self.built = True

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Exports the model that is trained, as Keras' `Model.export`; same arguments."""
        self.net.export(*args, **kwargs)

    @property
    def network_variables(self) -> list[keras.Variable]:
        """What the compiled optimizer trains."""
        return self.net.trainable_variables

    @property
    def trainee(self) -> Trainee:
        """The network that training steps work on at the moment; there is one once compiled."""
        if self._trainee is None:
            raise UnsupportedModelError(
                f"Model {self.name!r} is not compiled. Call `compile` before training."
            )
        return self._trainee

    @property
    def _network_blocks(self) -> NetworkBlocks:
        return find_blocks(self.net) if self._trainee is None else self._trainee.found

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """Kronecker blocks of the network, as of the last `compile`."""
        return list(self._network_blocks.blocks)

    @property
    def without_block(self) -> dict[str, str]:
        """Layers with weights but without a Kronecker block, and the reason."""
        return dict(self._network_blocks.without_block)

    @property
    def output_names(self) -> list[str] | None:
        """Names of the network's outputs, by which Keras tells losses and labels apart."""
        return getattr(self.net, "output_names", None)

    @property
    def constant_learning_rate(self) -> float | None:
        """The learning rate if it is a constant, None if it follows a schedule."""
        if self._trainee is None or not self._trainee.has_constant_rate:
            return None
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return call_network(self.net, inputs, training, mask)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.net.compute_output_shape(input_shape)

    # ---- compile and fit

    def compile(self, optimizer: Any = None, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Configures the training, as Keras does; the optimizer is `KFAC` unless one is given."""
        with self.distribute_strategy.scope():
            if optimizer is None:
                optimizer = self._default_optimizer()
            super().compile(optimizer, loss, *args, **kwargs)
            if self.distribute_strategy.num_replicas_in_sync > 1:
                check_distributed(self, kwargs.get("jit_compile", "auto"))
                self.jit_compile = False
            objective = CompiledObjective(self)
            estimator = CurvatureEstimator(self.net, objective, self.seed_generator)
            # Layers may have been frozen or freed since the last `compile`.
            self._trainee = trainee = self._trainee_of(self.optimizer, estimator)
            trainee.bind_and_build()
        if trainee.kfac is not None:
            check_losses(objective)
        warn_of_labels(self.name, objective, self._label_users(trainee))
        warn_of_logits(self.name, self.net, self.loss)

    def _default_optimizer(self) -> keras.optimizers.Optimizer:
        return KFAC()

    def _trainee_of(
        self, optimizer: keras.optimizers.Optimizer, estimator: CurvatureEstimator
    ) -> Trainee:
        found = find_blocks(self.net)
        return Trainee(self.net, self.network_variables, optimizer, found, estimator)

    def _label_users(self, trainee: Trainee) -> list[Any]:
        """What takes labels from the model or from the data."""
        return [] if trainee.kfac is None else [trainee.kfac]

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self._trainee is not None and not self._trainee.variables:
            raise UnsupportedModelError(
                f"Model {self.name!r} has no trainable weights, so that there is nothing to train. "
                "Set `trainable = True` where it is False and compile again, or use a model with "
                "weights."
            )
        if self._trainee is not None:
            warn_of_changed_freezing(self.name, self.network_variables, self._trainee.variables)
            check_labels_are_given(x, y, self.loss, self.name)
        if y is not None:
            check_labels(y, self.loss, self.net)
        fit = super().fit
        given = inspect.signature(fit).bind(x, y, *args, **kwargs)
        callbacks = given.arguments.get("callbacks") or []
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = keras.tree.flatten(callbacks)
        run = RunCallback(callbacks, given.arguments.get("initial_epoch") or 0)
        given.arguments["callbacks"] = [run, *callbacks]
        arguments = dict(given.arguments)
        if self.train_function is None and arguments.get("verbose", "auto") and _is_terminal():
            print(TRACING, flush=True)
        if self.distribute_strategy.num_replicas_in_sync == 1:
            arguments = batched(arguments)
        with raise_lost_worker(self.distribute_strategy), explained_losses():
            return fit(**arguments)

    @property
    def has_settled(self) -> bool:
        """Whether the network is what it will be, so that its epochs may be compared."""
        return True

    @property
    def is_settled_at_next_step(self) -> bool:
        """Whether `has_settled` will be true while the next step is taken."""
        return True

    @property
    def decaying_learning_rate(self) -> float | None:
        """The learning rate, if it is a constant that the model will let fall; else None."""
        return None

    def begin_run(self, call: FitCall) -> None:
        """Called when a `fit` begins.

        Args:
            call: What `fit` was asked for.
        """

    def begin_epoch(self, steps_left: int | None) -> None:
        """Called when an epoch of a `fit` begins.

        Args:
            steps_left: Steps that are left of the run, or None if unknown.
        """

    def end_epoch(self) -> None:
        """Called when an epoch of a `fit` has ended, and before validation."""

    def end_run(self) -> None:
        """Called when a `fit` has ended."""

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

    # ---- one training step

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step, as `TrainingStep` has it; skipped if not finite."""
        batch = Batch.of(data)
        step = self._step()
        step(batch, lambda outputs, loss: self._update_metrics(batch, outputs, loss))
        return self._results({**self.get_metrics_result(), **self._figures()})

    def _step(self) -> TrainingStep:
        return TrainingStep(self.trainee, self.guard, self._loss_of_replica)

    @property
    def losses(self) -> list[Any]:
        """What layers of the network that is trained at the moment add to the loss."""
        trainee = getattr(self, "_trainee", None)  # Keras asks before there is the attribute
        return super().losses if trainee is None else trainee.net.losses

    def _loss_of_replica(self, batch: Batch, outputs: Any) -> Any:
        """Mean loss over this replica's examples; Keras' own is divided by the replicas."""
        loss = self.compute_loss(batch.x, batch.y, outputs, batch.weights, training=True)
        return loss if num_replicas() == 1 else loss * tf.cast(num_replicas(), loss.dtype)

    def test_step(self, data: Any) -> dict[str, Any]:
        return self._results(super().test_step(data))

    def _results(self, results: dict[str, Any]) -> dict[str, Any]:
        return one_per_worker(results) if is_multi_worker(self.distribute_strategy) else results

    def _update_metrics(self, batch: Batch, outputs: Any, loss: Any) -> None:
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=batch.size)
        self.compute_metrics(batch.x, batch.y, outputs, sample_weight=batch.weights)

    def _figures(self) -> dict[str, Any]:
        """What the progress bar shows beside the metrics."""
        figures: dict[str, Any] = {"skipped_steps": tf.convert_to_tensor(self.guard.skipped)}
        kfac = self.trainee.kfac
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


def _is_terminal() -> bool:
    """Whether somebody is waiting there; a notebook shows that a cell runs."""
    return sys.stdout is not None and sys.stdout.isatty()

"""`PrunableModel`: an ordinary Keras network, trained and pruned in one `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import (
    KroneckerBlock,
    SpectralRadius,
    check_second_derivatives,
    kronecker_factors,
    per_example_gradients,
)
from tf_kfacprune.errors import BudgetError, InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork, GateSource, insert_gates
from tf_kfacprune.graph import trace
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.pruning import Budget, GateGroups, Phases
from tf_kfacprune.training.anatomy import Anatomy, Compiled, inner_optimizer
from tf_kfacprune.training.budget_controller import BudgetController
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty, head_of_batch
from tf_kfacprune.training.run_callback import RunCallback
from tf_kfacprune.training.step_guard import StepGuard
from tf_kfacprune.training.validation import check_labels
from tf_kfacprune.validation import require

__all__ = ["PrunableModel"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class PrunableModel(keras.Model):
    """Trains a network, prunes its neurons and flattens its minimum at the same time.

    One `fit` goes through three phases: *warm-up* (every gate open), *prune* (gates close until
    the network meets the budget), *settle* (what is closed stays closed, the rest is trained on
    with a decaying learning rate). `compact` then returns an ordinary, small Keras model.

    Args:
        model: A built Sequential or Functional model of ordinary Keras layers. Its layers are
            used, not copied: they are the ones that are trained. A model with gates in it, built
            by hand, is taken as it is.
        budget: What the pruned network may cost, or None to train without pruning.
        curvature: Penalty on the spectral radius of the curvature, or None.
        prune_inputs: Whether input features are neurons too.
        include: Layers that may lose neurons: names, regular expressions or layers; by default
            all.
        exclude: Layers that keep all their neurons, likewise; wins over `include`.
        round_to: Keep channels in multiples of this number (4, 8, 16...), group by group; a group
            with fewer channels stays whole, with a warning. The budget is still obeyed.
        min_channels: Keep at least so many channels per group. By default one, unless the group
            lies in a residual branch, which may then be removed as a whole.
        gate: `"hard_concrete"` (stochastic) or `"deterministic"`.
        phases: How the steps are divided.
        max_skipped_steps: A batch with NaN or infinite values is skipped; so many in a row end
            the training with an error.
        seed: Seed of gate noise and label sampling, or None for a random one.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        net: The gated network, a Functional model of ordinary layers and gates.
        gated: Analysis of `net` (a `GatedNetwork`), or None without gates.

    Raises:
        UnsupportedModelError: If the model is not built, is subclassed, or cannot be gated; if
            the curvature penalty meets a layer whose second derivative is wrong or missing.
        BudgetError: If frozen channels keep the budget out of reach.
        InvalidArgumentError: If an argument has the wrong type or value.

    Example:
        >>> pm = kp.PrunableModel(network, budget=kp.Budget(macs=0.1))
        >>> pm.compile(kp.KFAC(1e-2), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> pm.fit(x_train, y_train, epochs=30)
        >>> small = kp.compact(pm)

    References:
        Ebrahimi & Klabjan, arXiv 2111.08577.
    """

    def __init__(
        self,
        model: keras.Model,
        budget: Budget | None = None,
        curvature: SpectralRadius | None = None,
        *,
        prune_inputs: bool = False,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        round_to: int | None = None,
        min_channels: int | None = None,
        gate: str = "hard_concrete",
        phases: Phases | None = None,
        max_skipped_steps: int = 10,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        _require_type("model", model, keras.Model)
        _require_type("budget", budget, Budget, optional=True)
        _require_type("curvature", curvature, SpectralRadius, optional=True)
        _require_type("phases", phases, Phases, optional=True)
        require(
            "PrunableModel",
            isinstance(max_skipped_steps, int) and max_skipped_steps >= 1,
            "max_skipped_steps",
            "an integer >= 1",
            max_skipped_steps,
        )
        graph = trace(model)
        has_gates = any(isinstance(call.operation, GateSource) for call in graph.calls)
        if has_gates and (prune_inputs or exclude or include is not None):
            raise InvalidArgumentError(
                f"Model {model.name!r} has gates already, so `prune_inputs`, `include` and "
                "`exclude` of PrunableModel would have no effect. Received: "
                f"prune_inputs={prune_inputs!r}, include={include!r}, exclude={exclude!r}. Pass "
                "the model without gates, or leave them out."
            )
        if budget is not None and not has_gates:
            model = insert_gates(
                model, prune_inputs=prune_inputs, include=include, exclude=exclude, kind=gate
            )
            graph, has_gates = trace(model), True
        gated = GatedNetwork(model) if has_gates else None
        groups = None
        if budget is not None and gated is not None:
            groups = GateGroups(gated, round_to, min_channels)
            _check_reachable(budget, gated, groups)
        if curvature is not None and curvature.strength > 0:
            check_second_derivatives(model)
        kwargs.setdefault("name", f"prunable_{model.name}")
        super().__init__(**kwargs)
        self.net = model
        self.budget = budget
        self.curvature = curvature
        self.phases = phases or Phases()
        self.max_skipped_steps = max_skipped_steps
        self.round_to = round_to
        self.min_channels = min_channels
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self._anatomy = Anatomy(graph, gated)
        self.controller = None
        if budget is not None and gated is not None:
            self.controller = BudgetController(gated, budget, self.phases, groups, name="budget")
        self.curvature_penalty = None
        if curvature is not None:
            self.curvature_penalty = CurvaturePenalty(
                curvature, graph, self._anatomy.blocks, name="curvature"
            )
        self.guard = StepGuard(max_skipped_steps, name="guard")
        self.built = True

    @property
    def gated(self) -> GatedNetwork | None:
        """Analysis of the gated network, or None without gates."""
        return self._anatomy.gated

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """Kronecker blocks of the network, in the order of its calls."""
        return list(self._anatomy.blocks)

    @property
    def without_block(self) -> dict[str, str]:
        """Layers with weights but without a Kronecker block, and the reason."""
        return dict(self._anatomy.without_block)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return self.net(inputs, training=training, mask=mask)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.net.compute_output_shape(input_shape)

    # ------------------------------------------------------------------ compile and fit

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise InvalidArgumentError(
                "PrunableModel does not support tf.distribute strategies with several replicas "
                f"yet. Received: {tf.distribute.get_strategy()!r}. Train on one device."
            )
        super().compile(optimizer, loss, *args, **kwargs)
        kfac = self._kfac
        if kfac is not None:
            kfac.bind(self.blocks, self._anatomy.reasons)
        # Before weights are loaded: an optimizer without variables would lose its state silently.
        self.optimizer.build(self.network_variables)
        self._compiled = Compiled(loss, inner_optimizer(self.optimizer))
        users = [user for user in (kfac, self.curvature) if user and user.labels == "sampled"]
        if users and self._compiled.reason is not None:
            warnings.warn(
                f"{' and '.join(type(user).__name__ for user in users)} of {self.name!r} fall back "
                f"on the empirical Fisher (labels='data'): {self._compiled.reason}.",
                stacklevel=2,
            )

    @property
    def network_variables(self) -> list[keras.Variable]:
        """What the compiled optimizer trains: all trainable variables but the gates."""
        gates = {id(source.logits) for source in self._gate_sources()}
        return [v for v in self.net.trainable_variables if id(v) not in gates]

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
            callbacks.append(RunCallback())
        else:
            callbacks = [RunCallback(), *callbacks]
        return super().fit(x, y, *args, **{**kwargs, "callbacks": callbacks})

    # ------------------------------------------------------------------ one training step

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step: loss, Kronecker statistics, curvature penalty, gates and prices."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self.controller is not None:
            self.controller.enter_phase()
        restore_state = self._remembered_state()
        variables = self.network_variables
        gates = self.controller.logits if self.controller is not None else []
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, [v.value for v in [*variables, *gates]])
        if self.curvature_penalty is not None and self.curvature is not None:
            penalty = self.curvature_penalty.gradients(
                self.guard.step, x, y, self._mean_loss(self.curvature.labels), [*variables, *gates]
            )
            scale = self.optimizer.scale_loss(tf.constant(1.0))
            gradients = [_add(g, p * scale) for g, p in zip(gradients, penalty, strict=True)]
        finite = self._is_finite(loss, gradients)

        def apply() -> None:
            self._update_factors(x, y)
            self._apply(gradients[: len(variables)], variables, gradients[len(variables) :])
            self._update_metrics(x, y, y_pred, sample_weight, loss)

        tf.cond(finite, apply, restore_state)
        self.guard.count(finite)
        if self.controller is not None:
            self.controller.step.assign_add(1)
        return {**self.get_metrics_result(), **self._figures()}

    def _remembered_state(self) -> Callable[[], None]:
        """Remembers what a forward pass in training mode changes, normalization statistics.

        Returns:
            A function that brings it back.
        """
        of_gates = {id(w) for s in self._gate_sources() for w in s.non_trainable_weights}
        state = [v for v in self.net.non_trainable_weights if id(v) not in of_gates]
        values = [tf.convert_to_tensor(variable) for variable in state]

        def restore() -> None:
            for variable, value in zip(state, values, strict=True):
                variable.assign(value)

        return restore

    def _gate_sources(self) -> Sequence[GateSource]:
        return self.gated.sources if self.gated is not None else ()

    def _is_finite(self, loss: Any, gradients: Sequence[Any]) -> Any:
        finite = tf.math.is_finite(tf.cast(loss, "float32"))
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return finite  # overflowing gradients are its signal to lower the scale
        sums = [tf.reduce_sum(tf.abs(tf.cast(g, "float32"))) for g in gradients if g is not None]
        return tf.logical_and(finite, tf.math.is_finite(tf.add_n(sums)))

    def _mean_loss(self, labels: str) -> Any:
        """`(outputs, y) -> scalar`: the likelihood of sampled labels, or the compiled loss."""
        sampled = self._compiled.sampled if labels == "sampled" else None
        if sampled is not None:
            return lambda outputs, y: sampled(outputs, self.seed_generator)
        return lambda outputs, y: self.compute_loss(y=y, y_pred=outputs, training=False)

    def _update_factors(self, x: Any, y: Any) -> None:
        kfac = self._kfac
        if kfac is None or not kfac.blocks:
            return
        mean_loss = self._mean_loss(kfac.labels)
        x, y = head_of_batch(x, kfac.batch_fraction), head_of_batch(y, kfac.batch_fraction)

        def update() -> None:
            # This second forward pass must not move the normalization statistics again.
            restore_state = self._remembered_state()
            records, g = per_example_gradients(
                self._anatomy.graph,
                x,
                kfac.blocks,
                lambda outputs: mean_loss(outputs, y),
                training=True,
            )
            restore_state()
            kfac.update_factors(kronecker_factors(kfac.blocks, records, g))

        tf.cond(kfac.factors_due(), update, lambda: None)

    def _apply(
        self, gradients: Sequence[Any], variables: Sequence[Any], gate_gradients: list[Any]
    ) -> None:
        controller = self.controller
        if controller is not None:
            tf.cond(controller.decays_now(), self._decay_learning_rate, lambda: None)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        if controller is not None:
            scale = self.optimizer.scale_loss(tf.constant(1.0))
            unscaled = [g / scale for g in gate_gradients]
            tf.cond(controller.is_pruning(), lambda: controller.move_gates(unscaled), lambda: None)

    def _decay_learning_rate(self) -> None:
        if self.controller is not None and self._compiled.constant_learning_rate:
            self.optimizer.learning_rate = self.controller.learning_rate()

    def _update_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, loss: Any) -> None:
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=batch)
        self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.controller is not None:
            figures.update(self.controller.figures())
        if self.curvature_penalty is not None:
            figures["spectral_radius"] = self.curvature_penalty.radius()
        figures["skipped_steps"] = tf.convert_to_tensor(self.guard.skipped)
        return figures

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "model": serialize(self.net),
            "budget": serialize(self.budget),
            "curvature": serialize(self.curvature),
            "phases": serialize(self.phases),
            "round_to": self.round_to,
            "min_channels": self.min_channels,
            "max_skipped_steps": self.max_skipped_steps,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> PrunableModel:
        deserialize = keras.saving.deserialize_keras_object
        objects = {
            key: deserialize(config[key], custom_objects=custom_objects)
            for key in ("model", "budget", "curvature", "phases")
        }
        return cls(**{**config, **objects})

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))


def _add(gradient: Any, penalty: Any) -> Any:
    return penalty if gradient is None else gradient + penalty


def _require_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    expected = f"a {kind.__name__}" + (" or None" if optional else "")
    ok = isinstance(value, kind) or (optional and value is None)
    require("PrunableModel", ok, name, expected, value)


def _check_reachable(budget: Budget, gated: GatedNetwork, groups: GateGroups) -> None:
    for measure, target in budget.targets.items():
        least = float(gated.cost.least(measure, groups.least))
        if target < least:
            frozen = "; ".join(f"{f.layer}: {f.reason}" for f in gated.channels.frozen) or "none"
            raise BudgetError(
                f"Budget {measure}={target} cannot be reached on model {gated.net.name!r}: the "
                f"least that pruning can reach is {measure}={least:.4g}, with {groups.floor}. "
                f"Channels that cannot be pruned: {frozen}. Ask for at least {least:.4g}, "
                "or unfreeze channels (`inspect` tells how)."
            )

"""`PrunableModel`: an ordinary Keras network, trained and pruned in one `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.curvature import SpectralRadius, check_second_derivatives
from tf_kfacprune.distribution import cond
from tf_kfacprune.errors import BudgetError, InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork, GateSource, insert_gates
from tf_kfacprune.graph import LatencyTable, trace
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.pruning import (
    Budget,
    BudgetOutcome,
    GateGroups,
    Phases,
    ScheduledClosing,
    budget_outcomes,
    gate_kind,
)
from tf_kfacprune.training.budget_controller import BudgetController
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty
from tf_kfacprune.training.distributed import all_finite
from tf_kfacprune.training.forward_state import ForwardState
from tf_kfacprune.training.kfac_model import KFACModel
from tf_kfacprune.training.phases_callback import PhasesCallback
from tf_kfacprune.training.policies import (
    check_kind_of_gates,
    chosen_policy,
    policy_state,
)
from tf_kfacprune.training.pruning_plan import PruningPlan
from tf_kfacprune.training.running_statistics import forgetting_momentum
from tf_kfacprune.training.shrinking import ShrinkingCallback, Shrunk
from tf_kfacprune.training.untracked import Untracked
from tf_kfacprune.validation import require

__all__ = ["PrunableModel"]

# Of the default optimizer.
_LEARNING_RATE = 3e-2
_WEIGHT_DECAY = 0.03


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class PrunableModel(KFACModel):
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
        policy: How gates find out whether to close: a `ScheduledClosing` (its criterion alone will
            do: `"kfac"`, `"taylor"`, `"magnitude"` or `"random"`), `"hard_concrete"` (stochastic
            gates, trained on loss and cost) or `"proximal"` (deterministic gates, likewise). By
            default `"kfac"`, or what fits the gates of a model built by hand, which must be of
            the policy's kind.
        phases: How the steps are divided.
        shrink: Whether a settled network is trained on through a compact copy, where that pays:
            with a constant learning rate, on one device, with a thousand steps or more to go.
            The copy's optimizer starts anew.
        latency_table: Times of the layers on your machine, from `kp.export.latency_table(model)`;
            needed for a budget of latency.
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
        policy: str | ScheduledClosing | None = None,
        phases: Phases | None = None,
        shrink: bool = True,
        latency_table: LatencyTable | None = None,
        max_skipped_steps: int = 10,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        _require_type("model", model, keras.Model)
        _require_type("budget", budget, Budget, optional=True)
        _require_type("curvature", curvature, SpectralRadius, optional=True)
        _require_type("phases", phases, Phases, optional=True)
        _require_type("latency_table", latency_table, LatencyTable, optional=True)
        graph = trace(model)
        sources = [call.operation for call in graph.calls if isinstance(call.operation, GateSource)]
        has_gates = bool(sources)
        policy = chosen_policy(policy, sources)
        of_gates = {"prune_inputs": prune_inputs, "include": include, "exclude": exclude}
        of_budget = {"round_to": round_to, "min_channels": min_channels}
        if has_gates:
            _refuse(of_gates, f"Model {model.name!r} has gates already", "the model without gates")
        if budget is None:
            _refuse({**of_gates, **of_budget}, "Nothing is pruned without a budget", "a budget")
        if budget is not None and not has_gates:
            model = insert_gates(
                model,
                prune_inputs=prune_inputs,
                include=include,
                exclude=exclude,
                kind=gate_kind(policy),
            )
            graph, has_gates = trace(model), True
        gated = GatedNetwork(model, latency_table) if has_gates else None
        groups = None
        if budget is not None and gated is not None:
            check_kind_of_gates(policy, gated)
            groups = GateGroups(gated, round_to, min_channels)
            _check_reachable(budget, gated, groups)
        if curvature is not None and curvature.strength > 0:
            check_second_derivatives(model)
        kwargs.setdefault("name", f"prunable_{model.name}")
        super().__init__(model, max_skipped_steps=max_skipped_steps, seed=seed, **kwargs)
        self.budget = budget
        self.latency_table = latency_table
        self.curvature = curvature
        self.policy = policy
        self.phases = phases or Phases()
        self.shrink = shrink
        self.round_to = round_to
        self.min_channels = min_channels
        self._gating = Untracked(gated)
        self._groups = Untracked(groups)
        self._shrunk = Untracked(None)
        self._shrunk_state = Untracked(None)
        self.controller = None
        if budget is not None and gated is not None and groups is not None:
            plan = PruningPlan(gated, budget.relative_to(gated.cost), self.phases, groups)
            self.controller = BudgetController(
                plan, policy_state(policy, plan, seed), name="budget"
            )
        self.curvature_penalty = None
        if curvature is not None:
            self.curvature_penalty = CurvaturePenalty(
                curvature, model, self.blocks, name="curvature"
            )

    @property
    def gated(self) -> GatedNetwork | None:
        """Analysis of the gated network, or None without gates."""
        return self._gating.content

    @property
    def network_variables(self) -> list[keras.Variable]:
        """What the compiled optimizer trains: all trainable variables but the gates."""
        gates = {id(source.logits) for source in self._gate_sources()}
        return [v for v in self.net.trainable_variables if id(v) not in gates]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """`network_variables`: Keras hands them to the optimizer when a `fit` ends."""
        return self.network_variables

    def budget_outcomes(self) -> dict[str, BudgetOutcome]:
        """What the budget asked for, what the network has come to, and why the two differ.

        Returns:
            For every bound of the budget `asked`, `achieved` and the `reason`; nothing without a
            budget.

        Example:
            >>> print(pm.budget_outcomes()["macs"])
        """
        if self.budget is None or self.gated is None:
            return {}
        return budget_outcomes(self.budget, self.gated, self._groups.content)

    def _gate_sources(self) -> Sequence[GateSource]:
        return self.gated.sources if self.gated is not None else ()

    @property
    def compile_arguments(self) -> tuple[Any, Sequence[Any], dict[str, Any]]:
        """What `compile` was given after the optimizer: the loss, and the rest."""
        return self._compile_arguments.content

    @property
    def was_shrunk(self) -> bool:
        """Whether a compact copy has been trained in this run, perhaps before a resume."""
        return self._shrunk_state.content is not None

    @property
    def shrunk(self) -> Shrunk | None:
        """The compact copy that is trained at the moment in place of the settled network."""
        return self._shrunk.content

    def start_shrunk(self) -> None:
        """Goes on training through a compact copy; called by `fit` between two epochs."""
        self._shrunk.content = shrunk = Shrunk(self)
        if self._shrunk_state.content is not None:
            shrunk.restore(self._shrunk_state.content)
        self.make_train_function(force=True)

    def stop_shrunk(self) -> None:
        """Goes back to the network itself; what the copy's optimizer knows is kept."""
        if self.shrunk is not None:
            self._shrunk_state.content = self.shrunk.state()
            self._shrunk.content = self.train_function = None

    def compile(self, optimizer: Any = None, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Configures the training, as Keras does.

        Without an optimizer it is `KFAC(3e-2, weight_decay=0.03)`, chosen on held-out images of
        MNIST.
        """
        is_same = getattr(self, "optimizer", None) is optimizer
        replicas = self.distribute_strategy.num_replicas_in_sync
        if replicas > 1 and self.curvature is not None:
            raise InvalidArgumentError(
                f"PrunableModel {self.name!r} on {replicas} replicas of tf.distribute does not "
                f"support curvature={self.curvature!r}: every replica would flatten along "
                "directions of its own. Leave the penalty out, or train on one device."
            )
        super().compile(optimizer, loss, *args, **kwargs)
        self._shrunk.content = self._shrunk_state.content = None
        self._compile_arguments = Untracked((loss, args, kwargs))
        if self.controller is not None and not is_same:
            self.controller.change_learning_rate(self.constant_learning_rate)

    def _default_optimizer(self) -> keras.optimizers.Optimizer:
        return KFAC(_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)

    def _label_users(self) -> list[Any]:
        users: list[Any] = [] if self.curvature is None else [self.curvature]
        if self.controller is not None and isinstance(self.policy, ScheduledClosing):
            users.append(self.policy)
        return [*super()._label_users(), *users]

    def _run_callbacks(self) -> list[keras.callbacks.Callback]:
        return [*super()._run_callbacks(), PhasesCallback(), ShrinkingCallback()]

    # ---- one training step

    def train_step(self, data: Any) -> dict[str, Any]:
        if self.controller is None:
            return super().train_step(data)
        net = self.net if self.shrunk is None else self.shrunk.trainer.net
        with forgetting_momentum(net, self.controller.steps_since_landing()):
            if self.shrunk is None:
                return super().train_step(data)
            return self._shrunk_step(data, self.shrunk.trainer, self.controller)

    def _shrunk_step(
        self, data: Any, trainer: PrunableModel, controller: BudgetController
    ) -> dict[str, Any]:
        # The compiled optimizer stays the one whose learning rate callbacks and phases set.
        cond(controller.decays_now(), self._decay_learning_rate, lambda: None)
        trainer.optimizer.learning_rate = tf.convert_to_tensor(self.optimizer.learning_rate)
        results = trainer.train_step(data)
        self.optimizer.iterations.assign_add(1)
        self._end_step()
        return {**results, **controller.figures()}

    def get_metrics_result(self) -> dict[str, Any]:
        # A resumed run may never take a step of its own that would build its metrics.
        metrics = self._compile_metrics
        if self.shrunk is not None and metrics is not None and not metrics.built:
            return self.shrunk.trainer.get_metrics_result()
        return super().get_metrics_result()

    def _begin_step(self) -> None:
        if self.controller is not None:
            self.controller.enter_phase()

    def _end_step(self) -> None:
        if self.controller is not None:
            self.controller.step.assign_add(1)

    def _extra_variables(self) -> Sequence[keras.Variable]:
        return self.controller.logits if self.controller is not None else ()

    def _forward_state(self) -> ForwardState:
        of_gates = [w for s in self._gate_sources() for w in s.non_trainable_weights]
        return ForwardState(self.net, ignore=of_gates)

    def _regularized(
        self, gradients: list[Any], variables: Sequence[keras.Variable], x: Any, y: Any
    ) -> list[Any]:
        if self.curvature_penalty is None or self.curvature is None:
            return gradients
        mean_losses = self._mean_loss(self.curvature.labels)
        penalty = self.curvature_penalty.gradients(
            self.guard.step, x, y, lambda outputs, y: mean_losses(outputs, y)[0], variables
        )
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        return [_add(g, p * scale) for g, p in zip(gradients, penalty, strict=True)]

    def _apply(
        self,
        gradients: Sequence[Any],
        variables: Sequence[keras.Variable],
        x: Any,
        y: Any,
        weights: Any,
    ) -> None:
        controller = self.controller
        if controller is None:
            super()._apply(gradients, variables, x, y, weights)
            return
        cond(controller.decays_now(), self._decay_learning_rate, lambda: None)
        scale = self.optimizer.scale_loss(tf.constant(1.0))  # before a step that may change it
        unscaled = [g / scale for g in gradients[len(self.network_variables) :]]
        super()._apply(gradients, variables, x, y, weights)

        def move() -> None:
            labels = getattr(self.policy, "labels", "data")
            mean_losses = self._mean_loss(labels)
            controller.policy.observe(x, lambda outputs: mean_losses(outputs, y))
            controller.move_gates(unscaled)

        # Gradients overflow now and then while a loss scale is being found.
        cond(tf.logical_and(controller.is_pruning(), all_finite(unscaled)), move, lambda: None)

    def _decay_learning_rate(self) -> None:
        if self.controller is not None and self._compiled.constant_learning_rate:
            self.optimizer.learning_rate = self.controller.learning_rate()

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.controller is not None:
            figures.update(self.controller.figures())
        if self.curvature_penalty is not None:
            figures["spectral_radius"] = self.curvature_penalty.radius()
        return {**figures, **super()._figures()}

    # ---- saving

    def save_own_variables(self, store: Any) -> None:
        """Saves also what the compact copy is trained with, in the middle of a run."""
        super().save_own_variables(store)
        state = self._shrunk_state.content
        if self.shrunk is not None:
            self.shrunk.write_back()  # before the network is saved, which comes after this
            state = self.shrunk.state()
        for k, value in enumerate(state or ()):
            store[f"shrunk_{k}"] = value

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        count = sum(key.startswith("shrunk_") for key in store.keys())  # noqa: SIM118
        state = [np.array(store[f"shrunk_{k}"]) for k in range(count)]
        if self.shrunk is not None:  # the training function is that of a copy of other weights
            self._shrunk.content = None
            self.make_train_function(force=True)
        self._shrunk_state.content = state or None

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "model": serialize(self.net),
            "budget": serialize(self.budget),
            "curvature": serialize(self.curvature),
            "policy": serialize(self.policy),
            "phases": serialize(self.phases),
            "latency_table": serialize(self.latency_table),
            "shrink": self.shrink,
            "round_to": self.round_to,
            "min_channels": self.min_channels,
            "max_skipped_steps": self.max_skipped_steps,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> PrunableModel:
        deserialize = keras.saving.deserialize_keras_object
        objects = {
            key: deserialize(config.get(key), custom_objects=custom_objects)
            for key in ("model", "budget", "curvature", "policy", "phases", "latency_table")
        }
        return cls(**{**config, **objects})


def _add(gradient: Any, penalty: Any) -> Any:
    return penalty if gradient is None else gradient + penalty


def _require_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    expected = f"a {kind.__name__}" + (" or None" if optional else "")
    ok = isinstance(value, kind) or (optional and value is None)
    require("PrunableModel", ok, name, expected, value)


def _refuse(arguments: dict[str, Any], reason: str, remedy: str) -> None:
    given = [f"{name}={value!r}" for name, value in arguments.items() if value]
    if given:
        raise InvalidArgumentError(
            f"{reason}, so these arguments of PrunableModel would have no effect: "
            f"{', '.join(given)}. Pass {remedy}, or leave them out."
        )


def _check_reachable(budget: Budget, gated: GatedNetwork, groups: GateGroups) -> None:
    fractions = budget.relative_to(gated.cost).targets
    for measure, target in budget.targets.items():
        least = float(gated.cost.least(measure, groups.least))
        if fractions[measure] < least:
            least *= budget.unit(measure, gated.cost)
            frozen = "; ".join(f"{f.layer}: {f.reason}" for f in gated.channels.frozen) or "none"
            raise BudgetError(
                f"Budget {measure}={target} cannot be reached on model {gated.net.name!r}: the "
                f"least that pruning can reach is {measure}={least:.4g}, with {groups.floor}. "
                f"Channels that cannot be pruned: {frozen}. Ask for at least {least:.4g}, "
                "or unfreeze channels (`inspect` tells how)."
            )

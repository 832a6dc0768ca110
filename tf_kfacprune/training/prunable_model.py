"""`PrunableModel`: an ordinary Keras network, trained and pruned in one `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tf_kfacprune.curvature import (
    CurvatureEstimator,
    SpectralRadius,
    check_trained_twice_differentiably,
    find_blocks,
)
from tf_kfacprune.errors import BudgetError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.gates import GatedNetwork, GatePhase, GateSource, insert_gates
from tf_kfacprune.graph import (
    LatencyTable,
    check_countable,
    trace,
    warn_of_unconfirmed,
    what_stays,
)
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.pruning import (
    Budget,
    BudgetOutcome,
    GateGroups,
    Phases,
    Policy,
    PruningController,
    PruningTask,
    budget_outcomes,
    policy_for,
)
from tf_kfacprune.training.compile_checks import warn_of_own_steps
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty
from tf_kfacprune.training.kfac_model import KFACModel
from tf_kfacprune.training.run_callback import FitCall
from tf_kfacprune.training.shrinking import Shrunk, can_shrink
from tf_kfacprune.training.step import TrainingStep
from tf_kfacprune.training.trainee import Trainee
from tf_kfacprune.validation import require, require_count

__all__ = ["PrunableModel"]

# Of the default optimizer.
_LEARNING_RATE = 3e-2
_WEIGHT_DECAY = 0.03
_SEVERAL_CALLS = (
    "Where one run is made of several calls of `fit`, say its length before the first: "
    "`model.plan_phases(total_steps)`."
)


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
        prune_features: Whether flattened features are neurons too: each position of each channel
            that a Dense layer reads behind `Flatten` or a reshape.
        include: Layers that may lose neurons: names, regular expressions or layers; by default
            all.
        exclude: Layers that keep all their neurons, likewise; wins over `include`.
        round_to: Keep channels in multiples of this number (4, 8, 16...), group by group; a group
            with fewer channels stays whole, with a warning. The budget is still obeyed.
        min_channels: Keep at least so many channels per group. By default one, unless the group
            lies in a residual branch, which may then be removed as a whole.
        policy: How gates find out whether to close: by a saliency (`KFACSaliency(...)`,
            `TaylorSaliency`, `MagnitudeSaliency`, `RandomSaliency`, or their short names `"kfac"`,
            `"taylor"`, `"magnitude"`, `"random"`), or trained on loss and cost, stochastic
            (`"hard_concrete"`) or deterministic (`"proximal"`). By default `"kfac"`, or what fits
            the gates of a model built by hand, which must be of the policy's kind.
        phases: How the steps are divided.
        shrink: Whether a settled network is trained on through a compact copy, where that pays:
            with a constant learning rate, on one device, with a thousand steps or more to go, and
            no callback that acts between batches. The copy's optimizer starts anew.
        latency_table: Times of the layers on your machine, from `kp.export.latency_table(model)`,
            for the int8 file with ``of="int8"``; needed for a budget of latency.
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

    Examples:
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
        prune_features: bool = False,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        round_to: int | None = None,
        min_channels: int | None = None,
        policy: str | Policy | None = None,
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
        if isinstance(model, KFACModel):
            raise UnsupportedModelError(
                f"Model {model.name!r} is a {type(model).__name__}, which wraps a network: train "
                "it as it is, or pass the network that it was made from. For a network that has "
                "been pruned, pass what `compact` makes of it."
            )
        graph = trace(model)
        sources = [call.operation for call in graph.calls if isinstance(call.operation, GateSource)]
        has_gates = bool(sources)
        chosen = policy_for(policy, sources if budget is not None else ())
        of_gates = {
            "prune_inputs": prune_inputs,
            "prune_features": prune_features,
            "include": include,
            "exclude": exclude,
        }
        of_budget = {"round_to": round_to, "min_channels": min_channels}
        if has_gates:
            _refuse(of_gates, f"Model {model.name!r} has gates already", "the model without gates")
        if budget is None:
            _refuse({**of_gates, **of_budget}, "Nothing is pruned without a budget", "a budget")
        if budget is not None and not has_gates:
            warn_of_own_steps("PrunableModel", model)  # which the gated copy has not
            model = insert_gates(
                model,
                prune_inputs=prune_inputs,
                prune_features=prune_features,
                include=include,
                exclude=exclude,
                kind=chosen.gate_kind,
            )
            graph, has_gates = trace(model), True
        gated = GatedNetwork(model, latency_table) if has_gates else None
        fractions = groups = None
        if budget is not None and gated is not None:
            fractions = budget.relative_to(gated.cost)  # refuses what nothing is known about
            groups = GateGroups(gated, round_to, min_channels, budget.targets)
            _check_reachable(budget, fractions, gated, groups)
        if curvature is not None and curvature.strength > 0:
            check_trained_twice_differentiably(model)
        kwargs.setdefault("name", f"prunable_{model.name}")
        super().__init__(model, max_skipped_steps=max_skipped_steps, seed=seed, **kwargs)
        self.budget = budget
        self.latency_table = latency_table
        self.curvature = curvature
        self.policy = chosen
        self.phases = phases or Phases()
        self.shrink = shrink
        self.round_to = round_to
        self.min_channels = min_channels
        self._run = _Run(gated, groups)
        self.controller = None
        if gated is not None and fractions is not None and groups is not None:
            task = PruningTask(gated, fractions, self.phases, groups)
            self.controller = PruningController(task, chosen.build(task, seed), name="budget")
        self.curvature_penalty = None
        if curvature is not None:
            blocks = find_blocks(model, with_frozen=True).blocks  # they may be freed later
            self.curvature_penalty = CurvaturePenalty(curvature, blocks, name="curvature")

    @property
    def gated(self) -> GatedNetwork | None:
        """Analysis of the gated network, or None without gates."""
        return self._run.gated

    @property
    def network_variables(self) -> list[keras.Variable]:
        """What the compiled optimizer trains: all trainable variables but the gates."""
        gates = {id(source.parameters) for source in self._gate_sources()}
        return [v for v in self.net.trainable_variables if id(v) not in gates]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """`network_variables`: Keras hands them to the optimizer when a `fit` ends."""
        return self.network_variables

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """As `trainable_weights`: gates are moved by the controller, never by an optimizer."""
        return self.network_variables

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a model with gates is not what a runtime is to have.

        Raises:
            UnsupportedModelError: Always, with what to export instead.
        """
        del args, kwargs
        raise UnsupportedModelError(
            f"Model {self.name!r} still has gates. Call `small = kp.compact(model)`, then "
            "`small.export(...)`, `kp.export.saved_model` or `kp.export.tflite`."
        )

    def budget_outcomes(self) -> dict[str, BudgetOutcome]:
        """What the budget asked for, what the network has come to, and why the two differ.

        Returns:
            For every bound of the budget `asked`, `achieved` and the `reason`; nothing without a
            budget.

        Examples:
            >>> print(pm.budget_outcomes()["macs"])
        """
        if self.budget is None or self.gated is None or self._run.groups is None:
            return {}
        return budget_outcomes(self.budget, self.gated, self._run.groups)

    def _gate_sources(self) -> Sequence[GateSource]:
        return self.gated.sources if self.gated is not None else ()

    # ---- compile

    def compile(self, optimizer: Any = None, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Configures the training, as Keras does.

        Without an optimizer it is `KFAC(3e-2, weight_decay=0.03)`, chosen on held-out images of
        MNIST.
        """
        is_same = getattr(self, "optimizer", None) is optimizer
        super().compile(optimizer, loss, *args, **kwargs)
        self._run.shrunk = self._run.shrunk_state = None
        if self.controller is not None and not is_same:
            self.controller.change_learning_rate(self.constant_learning_rate)

    def _default_optimizer(self) -> keras.optimizers.Optimizer:
        return KFAC(_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)

    def _trainee_of(
        self, optimizer: keras.optimizers.Optimizer, estimator: CurvatureEstimator
    ) -> Trainee:
        return Trainee(
            self.net,
            self.network_variables,
            optimizer,
            find_blocks(self.net),
            estimator,
            self.curvature_penalty,
            gates=[w for s in self._gate_sources() for w in s.non_trainable_weights],
        )

    def _label_users(self, trainee: Trainee) -> list[Any]:
        users: list[Any] = [] if self.curvature is None else [self.curvature]
        if self.controller is not None and self.policy.labels is not None:
            users.append(self.policy)
        return [*super()._label_users(trainee), *users]

    # ---- one run

    def plan_phases(self, total_steps: int) -> None:
        """Says how long the training will be, all calls together.

        `fit` takes its own length for the whole run. Where that is not so (`fit(epochs=1)` in a
        loop, `train_on_batch`, a training loop of one's own), or the data do not tell how many
        batches they have, this says it beforehand; without it, steps outside of `fit` leave all
        gates open. A loop of one's own must take its steps by `train_on_batch` or `train_step`,
        which move the gates; gradients that are applied by hand do not.

        Args:
            total_steps: Number of training steps of the whole run.

        Raises:
            InvalidArgumentError: If it is no integer >= 1, or the model is not compiled.

        Examples:
            >>> pm.plan_phases(total_steps=10 * len(batches))
            >>> for epoch in range(10):
            ...     pm.fit(batches, epochs=1)
        """
        require_count("PrunableModel.plan_phases", "total_steps", total_steps)
        if self._trainee is None:
            raise InvalidArgumentError(
                f"Model {self.name!r} is not compiled: call `compile` before `plan_phases`, for "
                "the learning rate is part of the plan."
            )
        if self.controller is not None:
            rate = self.constant_learning_rate
            self.controller.schedule(total_steps, rate, is_whole=True)

    @property
    def has_settled(self) -> bool:
        """Whether the network is on its budget for good; also true if it has none."""
        return self.controller is None or self.controller.has_settled

    @property
    def is_settled_at_next_step(self) -> bool:
        if self.controller is None or self.controller.has_settled:
            return True
        step = int(keras.ops.convert_to_numpy(self.controller.step))
        return self.controller.due_phase(step) == GatePhase.SETTLED

    @property
    def decaying_learning_rate(self) -> float | None:
        if self.controller is None or not self.controller.decays_sooner_or_later:
            return None
        return self.constant_learning_rate

    def begin_run(self, call: FitCall) -> None:
        controller = self.controller
        self._run.callbacks_act_on_batches = call.callbacks_act_on_batches
        if controller is None or controller.is_within_plan:
            return
        if call.total_steps is None:
            raise InvalidArgumentError(
                "PrunableModel.fit must know the number of steps to lay out its phases, and the "
                "data do not tell how many batches they have. Received: steps_per_epoch=None. Say "
                "the length of the run beforehand: `model.plan_phases(epochs * batches)`. With "
                "data that go on without end, such as `dataset.repeat()`, pass "
                "`steps_per_epoch=...` instead."
            )
        rate = self.constant_learning_rate
        if call.sets_rate:
            rate = None
            controller.leave_learning_rate()
        is_loop = call.is_one_epoch and controller.has_pruned_within(call.epoch_steps)
        first_rate = controller.schedule(call.total_steps, rate)
        if first_rate is not None:
            warnings.warn(
                f"{self.name!r} has finished a run, which left a learning rate of {rate:.2g} of "
                f"{first_rate:.2g}: hardly anything will be trained. Set "
                "`model.optimizer.learning_rate`, compile again, or go on with the same run by "
                f"`fit(epochs=more, initial_epoch=done)`. {_SEVERAL_CALLS}",
                stacklevel=2,
            )
        elif is_loop and not self._run.is_told_of_loop:
            self._run.is_told_of_loop = True
            warnings.warn(
                f"{self.name!r} was pruned and has settled within the one epoch of an earlier call "
                f"of `fit`; this one trains what is left. {_SEVERAL_CALLS}",
                stacklevel=2,
            )

    def begin_epoch(self, steps_left: int | None) -> None:
        run = self._run
        run.is_in_epoch, run.steps_left = True, 0
        if run.shrunk is None and can_shrink(self, steps_left or 0):
            try:
                self.start_shrunk()
            except UnsupportedModelError as error:
                self.shrink = False
                warnings.warn(
                    f"Model {self.name!r} is trained on at its full size: {error}", stacklevel=2
                )
        if run.shrunk is not None:
            run.shrunk.fetch()  # a callback may have changed them

    def end_epoch(self) -> None:
        self._run.is_in_epoch, self._run.steps_left = False, 0
        if self._run.shrunk is not None:
            self._run.shrunk.write_back()

    def end_run(self) -> None:
        self.end_epoch()
        self.stop_shrunk()
        self._run.had_settled = self.has_settled

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        try:
            history = super().fit(*args, **kwargs)
        except BaseException:  # Ctrl-C, too: the network has what was trained in its copy
            self.end_run()
            raise
        controller = self.controller
        # Callbacks may have put back weights when the training ended.
        if controller is None or controller.has_settled:
            return history
        if self._run.had_settled:
            warnings.warn(
                f"Gates of {self.name!r} had settled, but a callback has put back weights of an "
                "epoch before that: the network is not on its budget. Restore only weights of "
                "epochs after which `model.has_settled` is true.",
                stacklevel=2,
            )
        elif not bool(keras.ops.convert_to_numpy(controller.is_whole)):
            warnings.warn(
                f"Training of {self.name!r} ended before its gates settled: the network is "
                "not on its budget. Go on with `fit(..., initial_epoch=...)`.",
                stacklevel=2,
            )
        return history

    @property
    def trainee(self) -> Trainee:
        """What training steps work on at the moment: the gated network, or its compact copy."""
        return super().trainee if self._run.shrunk is None else self._run.shrunk.trainee

    @property
    def was_shrunk(self) -> bool:
        """Whether a compact copy has been trained in this run, perhaps before a resume."""
        return self._run.shrunk_state is not None

    @property
    def callbacks_act_on_batches(self) -> bool:
        """Whether a callback may read or change weights between the batches of this `fit`."""
        return self._run.callbacks_act_on_batches

    @property
    def shrunk(self) -> Shrunk | None:
        """The compact copy that is trained at the moment in place of the settled network."""
        return self._run.shrunk

    def start_shrunk(self) -> None:
        """Goes on training through a compact copy; called by `fit` between two epochs."""
        run = self._run
        if run.gated is None:
            return
        run.shrunk = Shrunk(run.gated, super().trainee, self.curvature, self.seed_generator)
        if run.shrunk_state is not None:
            run.shrunk.restore(run.shrunk_state)
        self.make_train_function(force=True)

    def stop_shrunk(self) -> None:
        """Goes back to the network itself; what the copy's optimizer knows is kept."""
        run = self._run
        if run.shrunk is not None:
            run.shrunk_state = run.shrunk.state()
            run.shrunk = None
            self.train_function = None

    # ---- one training step

    def make_train_function(self, force: bool = False) -> Any:
        """Compiles the step twice: for the prune phase, when it comes, and for the others.

        What moves gates need not be traced before, nor slow down the steps afterwards.
        """
        if self.train_function is not None and not force:
            return self.train_function
        super().make_train_function(force=True)
        controller = self.controller
        replicas = self.distribute_strategy.num_replicas_in_sync
        if controller is None or self.steps_per_execution > 1 or replicas > 1:
            return self.train_function  # phases change within it
        compiled: dict[bool, Any] = {}

        def of_phase(iterator: Any) -> Any:
            run = self._run
            run.prunes = self._enter_due_phase(controller)  # read by `train_step` when it is traced
            if run.prunes not in compiled:
                super(PrunableModel, self).make_train_function(force=True)
                compiled[run.prunes] = self.train_function
                self.train_function = of_phase
            try:
                return compiled[run.prunes](iterator)
            finally:
                run.prunes = None

        self.train_function = of_phase
        return of_phase

    def _enter_due_phase(self, controller: PruningController) -> bool:
        """Enters the phase of the step to come, and says whether it is the prune phase.

        Within an epoch nobody else changes phases, so that the device need not be asked each time.
        """
        run = self._run
        if run.steps_left <= 0:
            phase = controller.due_phase(int(keras.ops.convert_to_numpy(controller.step)))
            if controller.phase_now() != phase:
                controller.enter_due_phase()
            run.is_pruning = phase == GatePhase.PRUNING
            run.steps_left = controller.steps_left_in_phase() if run.is_in_epoch else 1
        run.steps_left -= 1
        return run.is_pruning

    def _step(self) -> TrainingStep:
        return TrainingStep(
            self.trainee,
            self.guard,
            self._loss_of_replica,
            controller=self.controller,
            prunes=self._run.prunes,
        )

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.controller is not None:
            figures.update(self.controller.figures())
        if self.trainee.penalty is not None:
            figures.update(self.trainee.penalty.figures())
        return {**figures, **super()._figures()}

    # ---- saving

    def save_own_variables(self, store: Any) -> None:
        """Saves also what the compact copy is trained with, in the middle of a run."""
        super().save_own_variables(store)
        state = self._run.shrunk_state
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
            self._run.shrunk = None
            self.make_train_function(force=True)
        self._run.shrunk_state = state or None

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


class _Run:
    """Where a training stands, and what the network is taken for; plain, so not tracked.

    Attributes:
        gated: Analysis of the gated network, or None.
        groups: How many gates of each group may stay open, or None.
        prunes: Whether a step of the prune phase is being traced, or None if it may be any.
        is_pruning: Whether the last step was one of the prune phase.
        steps_left: How many steps from now on are of the same phase, as far as is known.
        is_in_epoch: Whether steps are those of an epoch of `fit`.
        shrunk: The compact copy that is trained at the moment, or None.
        shrunk_state: What a copy was trained with before, or None.
        callbacks_act_on_batches: Whether a callback may read or change weights between batches.
        is_told_of_loop: Whether it was said what calls of one epoch each need.
        had_settled: Whether gates had settled when the last `fit` ended, before callbacks saw that.
    """

    def __init__(self, gated: GatedNetwork | None, groups: GateGroups | None) -> None:
        self.gated = gated
        self.groups = groups
        self.prunes: bool | None = None
        self.is_pruning = False
        self.steps_left: float = 0
        self.is_in_epoch = False
        self.shrunk: Shrunk | None = None
        self.shrunk_state: list[np.ndarray] | None = None
        self.callbacks_act_on_batches = False
        self.is_told_of_loop = False
        self.had_settled = False


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


def _check_reachable(
    budget: Budget, fractions: Budget, gated: GatedNetwork, groups: GateGroups
) -> None:
    check_countable(gated.channels, budget.targets, gated.net.name)
    warn_of_unconfirmed(gated.channels, budget.targets, gated.net.name)
    for measure, target in budget.targets.items():
        if not gated.cost.dense(measure):
            raise BudgetError(
                f"Budget {measure}={target} bounds nothing on model {gated.net.name!r}: none of "
                f"its layers costs {measure}. Bound something else, such as params or bytes."
            )
        least = float(gated.cost.least(measure, groups.least))
        if fractions.targets[measure] < least:
            least *= budget.unit(measure, gated.cost)
            frozen = what_stays(gated.channels, gated.cost, measure)
            raise BudgetError(
                f"Budget {measure}={target} cannot be reached on model {gated.net.name!r}: the "
                f"least that pruning can reach is {measure}={least:.4g}, with {groups.floor}. "
                f"Channels that cannot be pruned: {frozen}. Ask for at least {least:.4g}, "
                "or unfreeze channels (`inspect` tells how)."
            )

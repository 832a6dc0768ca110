r"""K-FAC as a Keras optimizer.

=========  ================================================================  ==============
symbol     meaning                                                           shape
=========  ================================================================  ==============
`A`        Kronecker factor of a layer's inputs, exponential average         (*k, n_a, n_a)
`G`        Kronecker factor of its pre-activation gradients, likewise        (*k, n_out, n_out)
`dW`       gradient of kernel and bias as one matrix                         (*k, n_a, n_out)
`P`        preconditioned gradient                                           as dW
`d`        damping                                                           scalar
`kappa`    KL clip                                                           scalar
`eta`      learning rate                                                     scalar
=========  ================================================================  ==============

    P  = (A + pi sqrt(d) I)^-1 dW (G + sqrt(d)/pi I)^-1
    nu = min(1, sqrt(kappa / (eta^2 sum_l <P_l, dW_l>)))
    m <- momentum m + eta nu P,    W <- W - m

or, with `learning_rate="auto"`, `m <- alpha P + mu m` with both coefficients from the exact
quadratic model of the Gauss-Newton matrix. Variables outside of Kronecker blocks take Adam steps.

References:
    Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", sections 4-7. Ba, Grosse, Martens 2017, "Distributed Second-Order Optimization
    using Kronecker-Factored Approximations", section 5 (KL clip). Kingma & Ba 2015 (Adam).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature import KroneckerBlock, Record
from tf_kfacprune.distribution import (
    ReplicaLocal,
    cond,
    num_replicas,
    replica_id,
    sum_over_replicas,
    weighted_mean,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers.block_states import STATES
from tf_kfacprune.optimizers.hyperparameters import (
    Hyperparameter,
    LevenbergMarquardt,
    check_hyperparameter,
    value_at,
)
from tf_kfacprune.optimizers.kfac_state import Binding, Layout, summary_lines
from tf_kfacprune.optimizers.quadratic_model import best_coefficients, model_change
from tf_kfacprune.validation import require

__all__ = ["KFAC"]

_ADAM_BETA_1 = 0.9
_ADAM_BETA_2 = 0.999
_ADAM_EPSILON = 1e-7
_TINY = 1e-20
_FIXED_DAMPING = 0.03
# What Adam steps are scaled by where the learning rate is not a number.
_ADAPTIVE_ADAM_BASE = 1e-2

QuadraticForm = Callable[[Sequence[Sequence[Any]]], Any]
"""Directions (each a list of tensors like `block_variables`) -> matrix of products D^T F D."""


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class KFAC(keras.optimizers.Optimizer):
    """Kronecker-factored approximate curvature (K-FAC).

    The factors come from the model: `KFACModel` and `PrunableModel` compute them in their
    `train_step`. In a model that does not, every variable takes an Adam step, and `summary()`
    says so.

    Args:
        learning_rate: Step size: a float, a Keras schedule, or `"auto"`, which takes step size and
            momentum of every step from the exact quadratic model of the loss.
        momentum: Momentum of the preconditioned gradient, in [0, 1). With `"auto"`, 0 switches
            momentum off, any other value means the one that is best for the quadratic model.
        damping: Tikhonov damping d > 0 of the Fisher: a number, a schedule of it, or
            `LevenbergMarquardt`. None means 0.03, and `LevenbergMarquardt()` with `"auto"`.
        kl_clip: Bound kappa on the change that one step makes to the model's predictions, > 0,
            or None for no bound. Not used with `"auto"`.
        norm_constraint: Bound on the Frobenius norm of each block's part of a step (before
            momentum), > 0, or None for no bound. Not used with `"auto"`.
        factor_decay: Decay of the factors' averages, in [0, 1); debiased.
        factor_every: Steps between updates of the factors.
        inverse_every: Steps between updates of the inverses; in the first `inverse_every` steps
            every update of the factors is followed by one.
        batch_fraction: Share of the batch that factors (and the quadratic model) are computed on,
            in (0, 1].
        labels: `"sampled"` from the model (true Fisher), `"data"` (empirical Fisher) or `"exact"`
            (Gauss-Newton matrix, one backward pass per output, for models with few of them).
        inverse: `"cholesky"` (factored damping), `"eigen"` (exact damping in the eigenbasis) or
            `"ekfac"` (second moments of single gradients in the eigenbasis).
        weight_sharing: `"expand"` or `"reduce"`: how locations (pixels, tokens) enter factors.
        max_factor_dim: Dimension above which only the diagonal of a factor is kept, or None.
        adam_ratio: Learning rate of the Adam steps as a multiple of `learning_rate` (of 0.01 with
            `"auto"`).
        shard_inverses: Under `tf.distribute`, whether each replica computes the inverses of some
            blocks only and they are exchanged, instead of each computing all.
        weight_decay: Decoupled weight decay, or None.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`: clipping, EMA, loss scale.

    `momentum`, `kl_clip`, `norm_constraint`, `factor_decay` and `adam_ratio` may be Keras
    schedules, too.

    Raises:
        InvalidArgumentError: If an argument is out of range or not supported.

    Example:
        >>> model = kp.KFACModel(network)
        >>> model.compile(optimizer=kp.KFAC(1e-2), loss="sparse_categorical_crossentropy")

    References:
        Martens & Grosse 2015; Grosse & Martens 2016; Ba, Grosse, Martens 2017; George et al. 2018
        (EKFAC); Eschenhagen et al. 2023 (expand and reduce).
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule | str = 1e-2,
        momentum: Hyperparameter = 0.9,
        damping: Hyperparameter | LevenbergMarquardt | None = None,
        kl_clip: Hyperparameter | None = 1e-3,
        norm_constraint: Hyperparameter | None = None,
        factor_decay: Hyperparameter = 0.95,
        factor_every: int = 10,
        inverse_every: int = 50,
        batch_fraction: float = 0.25,
        labels: str = "sampled",
        inverse: str = "cholesky",
        weight_sharing: str = "expand",
        max_factor_dim: int | None = 4096,
        adam_ratio: Hyperparameter = 0.1,
        shard_inverses: bool = False,
        weight_decay: float | None = None,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        is_auto = isinstance(learning_rate, str)
        check = functools.partial(require, "KFAC")
        check(
            not is_auto or learning_rate == "auto",
            "learning_rate",
            "a float, a schedule or 'auto'",
            learning_rate,
        )
        hyper = functools.partial(check_hyperparameter, "KFAC")
        hyper("momentum", momentum, lambda v: 0 <= v < 1, "in [0, 1)")
        if damping is not None and not isinstance(damping, LevenbergMarquardt):
            hyper("damping", damping, lambda v: v > 0, "> 0")
        for argument, value in (("kl_clip", kl_clip), ("norm_constraint", norm_constraint)):
            if value is not None:
                hyper(argument, value, lambda v: v > 0, "> 0 or None")
        hyper("factor_decay", factor_decay, lambda v: 0 <= v < 1, "in [0, 1)")
        hyper("adam_ratio", adam_ratio, lambda v: v > 0, "> 0")
        check(_is_count(factor_every), "factor_every", "an integer >= 1", factor_every)
        check(_is_count(inverse_every), "inverse_every", "an integer >= 1", inverse_every)
        check(0 < batch_fraction <= 1, "batch_fraction", "in (0, 1]", batch_fraction)
        for argument, option, options in (
            ("labels", labels, ("sampled", "data", "exact")),
            ("inverse", inverse, tuple(STATES)),
            ("weight_sharing", weight_sharing, ("expand", "reduce")),
        ):
            check(option in options, argument, f"one of {options}", option)
        check(
            max_factor_dim is None or _is_count(max_factor_dim),
            "max_factor_dim",
            "an integer >= 1 or None",
            max_factor_dim,
        )
        check(isinstance(shard_inverses, bool), "shard_inverses", "True or False", shard_inverses)
        accumulation = kwargs.get("gradient_accumulation_steps")
        check(
            accumulation is None,
            "gradient_accumulation_steps",
            "None (factors would be updated on every micro-step; use larger batches)",
            accumulation,
        )
        super().__init__(
            1.0 if is_auto else learning_rate, weight_decay=weight_decay, name=name, **kwargs
        )
        self.is_adaptive = is_auto
        if damping is None:
            damping = LevenbergMarquardt() if is_auto else _FIXED_DAMPING
        self.momentum = momentum
        self.damping = damping
        self.kl_clip = kl_clip
        self.norm_constraint = norm_constraint
        self.factor_decay = factor_decay
        self.factor_every = factor_every
        self.inverse_every = inverse_every
        self.batch_fraction = batch_fraction
        self.labels = labels
        self.inverse = inverse
        self.weight_sharing = weight_sharing
        self.max_factor_dim = max_factor_dim
        self.adam_ratio = adam_ratio
        self.shard_inverses = shard_inverses
        self._layout = Layout([], 0)
        self._bound = Binding(None, {})
        self._quadratic_form = ReplicaLocal()

    # ---- building

    def bind(
        self, blocks: Sequence[KroneckerBlock], reasons: Mapping[str, str] | None = None
    ) -> None:
        """Tells the optimizer which layers have Kronecker blocks; called before it is built.

        Args:
            blocks: Blocks whose statistics the model will hand to `update_factors`.
            reasons: Path of a variable -> why it is in no block; shown by `summary`.

        Raises:
            InvalidArgumentError: If the optimizer is built already, for other blocks.
        """
        if self.built:
            if [id(b.kernel) for b in self.blocks] != [id(b.kernel) for b in blocks]:
                raise InvalidArgumentError(
                    f"Optimizer {self.name!r} was built for the layers "
                    f"{[b.name for b in self.blocks]} and cannot be bound to "
                    f"{[b.name for b in blocks]}. Give each model an optimizer of its own."
                )
            return
        self._bound = Binding(tuple(blocks), reasons or {})

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        index_of = {id(v): i for i, v in enumerate(variables)}
        states = [
            STATES[self.inverse](block, index_of, self.add_variable, self.max_factor_dim)
            for block in self._bound.blocks or ()
        ]
        self._layout = Layout(states, len(variables))
        # What makes the average unbiased: 1 - product of all decays so far.
        self._average_weight = self.add_variable((), dtype="float32", name="average_weight")
        self._damping_value: keras.Variable | None = None
        if isinstance(self.damping, LevenbergMarquardt):
            initializer = keras.initializers.Constant(self.damping.initial)
            self._damping_value = self.add_variable(
                (), initializer, dtype="float32", name="damping"
            )
            self._predicted_change = self.add_variable((), dtype="float32", name="predicted_change")
        # The last step of what is in blocks, Adam's first moment of what is not.
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        for index in self._layout.rest:
            velocity = self.add_variable_from_reference(variables[index], "velocity")
            self._layout.velocities[index] = velocity

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """The Kronecker blocks, in the order of the statistics that `update_factors` takes."""
        return [state.block for state in self._layout.states]

    @property
    def block_variables(self) -> list[keras.Variable]:
        """The trainable variables in Kronecker blocks, the order of `QuadraticForm`."""
        return [self._trainable_variables[i] for i in self._layout.in_blocks]

    @property
    def current_damping(self) -> Any:
        """The damping d at this step, a scalar tensor or a number."""
        if self._damping_value is not None:
            return tf.convert_to_tensor(self._damping_value)
        return value_at(self.damping, self.iterations)

    # ---- factors and inverses

    def factors_due(self) -> Any:
        """Boolean scalar tensor: whether the factors are to be updated at this step."""
        return tf.equal(tf.convert_to_tensor(self.iterations) % self.factor_every, 0)

    def statistics(
        self, records: Sequence[Record], probes: Sequence[Sequence[Any]]
    ) -> list[list[Any]]:
        """What a batch says about the curvature, to be handed to `update_factors`.

        Args:
            records: Uses of the blocks' layers in one forward pass.
            probes: For each loss whose Fishers add up (one, unless labels are `"exact"`),
                per-example gradients, one per record.

        Returns:
            For each block `[A, G]` in the form in which they are kept, and for EKFAC the second
            moments in the eigenbasis.
        """
        found = []
        for state in self._layout.states:
            uses = [k for k, r in enumerate(records) if r.layer is state.block.layer]
            found.append(
                state.statistics(
                    [records[k] for k in uses],
                    [[gradients[k] for k in uses] for gradients in probes],
                    self.weight_sharing == "reduce",
                )
            )
        return found

    def update_factors(self, statistics: Sequence[Sequence[Any]], examples: Any = 1) -> None:
        """Averages in the statistics of a batch, and updates the inverses when they are due.

        Statistics with NaN or infinite entries are left out.

        Args:
            statistics: For each block `[A, G]`, as returned by `statistics`.
            examples: Number of examples that they are means over, a scalar tensor; under
                `tf.distribute`, those of this replica.
        """
        flat = weighted_mean([moment for block in statistics for moment in block], examples)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(f)) for f in flat])
        tf.cond(finite, lambda: self._average_in(flat), lambda: None)
        step = tf.convert_to_tensor(self.iterations)
        due = tf.logical_or(
            step < self.inverse_every, step % self.inverse_every < self.factor_every
        )
        cond(tf.logical_and(due, finite), self._update_inverses, lambda: None)

    def _average_in(self, flat: Sequence[Any]) -> None:
        decay = value_at(self.factor_decay, self.iterations)
        variables = [v for state in self._layout.states for v in state.averages]
        for variable, new in zip(variables, flat, strict=True):
            old = tf.convert_to_tensor(variable)
            self.assign(variable, decay * old + (1.0 - decay) * new)
        weight = tf.convert_to_tensor(self._average_weight)
        self._average_weight.assign(1.0 - decay * (1.0 - weight))

    def _update_inverses(self) -> None:
        debias = 1.0 / tf.convert_to_tensor(self._average_weight)
        damping = self.current_damping
        if self.shard_inverses and num_replicas() > 1:
            values = self._sharded_inverses(debias, damping)
        else:
            states = self._layout.states
            values = [new for state in states for new in state.refreshed(debias, damping)]
        variables = [v for state in self._layout.states for v in state.inverting]
        for variable, new in zip(variables, values, strict=True):
            variable.assign(new)

    def _sharded_inverses(self, debias: Any, damping: Any) -> list[Any]:
        """New values of what inverts all blocks; block j is computed by replica `j % n` alone."""
        found: list[Any] = []
        for j, state in enumerate(self._layout.states):
            found += tf.cond(
                tf.equal(replica_id(), j % num_replicas()),
                functools.partial(state.refreshed, debias, damping),
                functools.partial(_zeros, state.inverting),
            )
        return sum_over_replicas(found)

    # ---- the quadratic model and damping

    @property
    def needs_quadratic_form(self) -> bool:
        """Whether steps are measured against the exact quadratic model."""
        return bool(self._layout.states) and (
            self.is_adaptive or isinstance(self.damping, LevenbergMarquardt)
        )

    @contextmanager
    def measured_by(self, quadratic_form: QuadraticForm | None) -> Iterator[None]:
        """Within this context `apply` takes the quadratic model of its steps from a function.

        Args:
            quadratic_form: As `QuadraticForm`, or None.
        """
        self._quadratic_form.value = quadratic_form
        try:
            yield
        finally:
            self._quadratic_form.value = None

    def damping_due(self) -> Any:
        """Boolean scalar tensor: whether the last step is to be judged now, before the next."""
        if not isinstance(self.damping, LevenbergMarquardt) or not self._layout.states:
            return tf.constant(False)
        step = tf.convert_to_tensor(self.iterations)
        return tf.logical_and(step > 0, tf.equal(step % self.damping.every, 0))

    @contextmanager
    def last_step_undone(self) -> Iterator[None]:
        """Within this context the variables in blocks are where they were before the last step."""
        variables = self.block_variables
        values = [tf.convert_to_tensor(v) for v in variables]
        for variable, value, index in zip(variables, values, self._layout.in_blocks, strict=True):
            last = tf.convert_to_tensor(self._momentums[index])
            variable.assign(value + tf.cast(last, value.dtype))
        yield
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def adapt_damping(self, loss_change: Any) -> None:
        """Moves the damping by how well the change that the last step made was predicted.

        Args:
            loss_change: Loss after the last step minus loss before it, on the same batch. On a
                batch that the step was not computed from, steps that fit noise count as bad.
        """
        if isinstance(self.damping, LevenbergMarquardt) and self._damping_value is not None:
            predicted = tf.convert_to_tensor(self._predicted_change)
            old = tf.convert_to_tensor(self._damping_value)
            self._damping_value.assign(self.damping.adapted(old, loss_change, predicted))

    def _quadratic_model(
        self, gradients: Sequence[Any], directions: Sequence[Sequence[Any]]
    ) -> tuple[Any, Any]:
        """K and b of the quadratic model along the given directions."""
        quadratic_form = self._quadratic_form.value
        if quadratic_form is None:
            raise InvalidArgumentError(
                f"Optimizer {self.name!r} needs the quadratic model of the loss "
                "(learning_rate='auto' or damping=LevenbergMarquardt(...)), and the model does not "
                "provide it. Train with kp.KFACModel or kp.PrunableModel."
            )
        k = quadratic_form(directions)
        gram = tf.stack([tf.stack([_dot(p, q) for q in directions]) for p in directions])
        b = tf.stack([_dot(p, gradients) for p in directions])
        return k + self.current_damping * gram, b

    # ---- steps

    def _precondition(self, gradients: Sequence[Any]) -> list[Any]:
        """Preconditioned gradients P of what is in Kronecker blocks, others as they are."""
        preconditioned = list(gradients)
        for state in self._layout.states:
            tensors = [gradients[i] for i in state.indices]
            if any(g is None for g in tensors):
                continue
            matrix = state.block.to_matrix([tf.cast(g, "float32") for g in tensors])
            step = state.precondition(matrix, self.current_damping)
            for index, tensor in zip(state.indices, state.block.from_matrix(step), strict=True):
                preconditioned[index] = tensor
        return preconditioned

    def _bounded(self, steps: list[Any], gradients: Sequence[Any], learning_rate: Any) -> list[Any]:
        """Applies KL clip and norm constraint to preconditioned gradients."""
        members = [i for i in self._layout.in_blocks if gradients[i] is not None]
        eta = tf.cast(learning_rate, "float32")
        if self.kl_clip is not None and members:
            kappa = value_at(self.kl_clip, self.iterations)
            change = _dot([steps[i] for i in members], [gradients[i] for i in members])
            nu = tf.minimum(1.0, tf.sqrt(kappa / (tf.square(eta) * change + _TINY)))
            for i in members:
                steps[i] *= nu
        if self.norm_constraint is not None:
            bound = value_at(self.norm_constraint, self.iterations)
            for state in self._layout.states:
                own = [steps[i] for i in state.indices if gradients[i] is not None]
                norm = eta * tf.sqrt(_dot(own, own)) if own else 0.0
                scale = tf.minimum(1.0, bound / (norm + _TINY))
                for i in state.indices:
                    steps[i] = None if steps[i] is None else steps[i] * scale
        return steps

    def _adaptive_steps(self, steps: list[Any], gradients: Sequence[Any]) -> list[Any]:
        """`alpha P + mu m` of the variables in blocks."""
        members = self._layout.in_blocks
        directions = [[steps[i] for i in members]]
        if self.momentum != 0:
            directions.append([tf.convert_to_tensor(self._momentums[i]) for i in members])
        k, b = self._quadratic_model([gradients[i] for i in members], directions)
        coefficients = best_coefficients(k, b)
        if isinstance(self.damping, LevenbergMarquardt):
            self._predicted_change.assign(model_change(k, b, coefficients))
        self._learning_rate.assign(coefficients[0])
        for i, *parts in zip(members, *directions, strict=True):
            steps[i] = tf.add_n([coefficients[j] * part for j, part in enumerate(parts)])
        return steps

    def _fixed_steps(self, steps: list[Any], gradients: Sequence[Any], eta: Any) -> list[Any]:
        """`momentum m + eta P` of the variables in blocks."""
        momentum = value_at(self.momentum, self.iterations)
        members = [i for i in self._layout.in_blocks if gradients[i] is not None]
        for i in members:
            old = tf.convert_to_tensor(self._momentums[i])
            steps[i] = momentum * old + tf.cast(eta, "float32") * steps[i]
        if self.needs_quadratic_form:
            self._predict([steps[i] for i in members], [gradients[i] for i in members])
        return steps

    def _predict(self, step: Sequence[Any], gradients: Sequence[Any]) -> None:
        def predict() -> None:
            k, b = self._quadratic_model(gradients, [step])
            self._predicted_change.assign(model_change(k, b, tf.ones((1,))))

        # Fixed steps need their prediction only if the next step begins with judging them.
        following = tf.convert_to_tensor(self.iterations) + 1
        is_judged = isinstance(self.damping, LevenbergMarquardt) and tf.equal(
            following % self.damping.every, 0
        )
        cond(is_judged, predict, lambda: None)

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None
    ) -> None:
        # The base class would sum gradients last of all, after clipping them part by part; clipping
        # and preconditioning are about the gradient of the whole batch.
        super().apply(sum_over_replicas(grads), trainable_variables)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        # The one hook of the base class that sees the (unscaled, clipped) gradients of all
        # variables at once; `update_step` sees a kernel without its bias.
        if callable(learning_rate):
            learning_rate = learning_rate()
        places = [self._get_variable_index(v) for v in trainable_variables]
        gradients: list[Any] = [None] * len(self._trainable_variables)
        for place, gradient in zip(places, grads, strict=True):
            gradients[place] = tf.convert_to_tensor(gradient)
        for index in self._layout.in_blocks:
            if gradients[index] is not None:
                gradients[index] = tf.cast(gradients[index], "float32")
        steps = self._precondition(gradients)
        if self.is_adaptive and self._layout.states:
            steps = self._adaptive_steps(steps, gradients)
        else:
            steps = self._bounded(steps, gradients, learning_rate)
            steps = self._fixed_steps(steps, gradients, learning_rate)
        if num_replicas() > 1:
            # They are the same on all replicas, and each has variables of its own.
            for place, variable in zip(places, trainable_variables, strict=True):
                self.update_step(steps[place], variable, learning_rate)
            return
        # In a branch of tf.cond the all-reduce of the base class wants its arguments from that
        # branch, not some of them from outside.
        applied = [tf.identity(steps[place]) for place in places]
        super()._backend_update_step(applied, trainable_variables, learning_rate)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        gradient = ops.cast(gradient, variable.dtype)
        if index in self._layout.velocities:
            if self.is_adaptive:
                learning_rate = _ADAPTIVE_ADAM_BASE
            ratio = value_at(self.adam_ratio, self.iterations)
            learning_rate = ops.cast(ratio * ops.cast(learning_rate, "float32"), variable.dtype)
            self._adam_step(gradient, variable, learning_rate, index)
            return
        self.assign(self._momentums[index], gradient)
        self.assign_sub(variable, gradient)

    def _adam_step(self, gradient: Any, variable: Any, learning_rate: Any, index: int) -> None:
        step = ops.cast(tf.convert_to_tensor(self.iterations) + 1, variable.dtype)
        m, v = self._momentums[index], self._layout.velocities[index]
        self.assign_add(m, (gradient - tf.convert_to_tensor(m)) * (1.0 - _ADAM_BETA_1))
        self.assign_add(v, (ops.square(gradient) - tf.convert_to_tensor(v)) * (1.0 - _ADAM_BETA_2))
        m_hat = tf.convert_to_tensor(m) / (1.0 - ops.power(_ADAM_BETA_1, step))
        v_hat = tf.convert_to_tensor(v) / (1.0 - ops.power(_ADAM_BETA_2, step))
        self.assign_sub(variable, learning_rate * m_hat / (ops.sqrt(v_hat) + _ADAM_EPSILON))

    # ---- reporting and saving

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints what takes K-FAC steps, with memory, and what takes Adam steps, with the reason.

        It may be called as soon as the model is compiled, before any training.

        Args:
            print_fn: Receives the text line by line.

        Raises:
            InvalidArgumentError: If the optimizer is not built yet.
        """
        if not self.built:
            raise InvalidArgumentError(
                f"Optimizer {self.name!r} is not built yet: compile the model with it first."
            )
        for line in summary_lines(self.name, self._layout, self._bound, self._trainable_variables):
            print_fn(line)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.is_adaptive:
            config["learning_rate"] = "auto"
        serialize = keras.saving.serialize_keras_object
        for name in _SERIALIZED:
            config[name] = serialize(getattr(self, name))
        for name in _PLAIN:
            config[name] = getattr(self, name)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> KFAC:
        deserialize = keras.saving.deserialize_keras_object
        objects = {
            name: deserialize(config[name], custom_objects=custom_objects)
            for name in (*_SERIALIZED, "learning_rate")
            if isinstance(config.get(name), dict)
        }
        return cls(**{**config, **objects})


_SERIALIZED = (
    "momentum",
    "damping",
    "kl_clip",
    "norm_constraint",
    "factor_decay",
    "adam_ratio",
)
_PLAIN = (
    "factor_every",
    "inverse_every",
    "batch_fraction",
    "labels",
    "inverse",
    "weight_sharing",
    "max_factor_dim",
    "shard_inverses",
)


def _zeros(variables: Sequence[keras.Variable]) -> list[Any]:
    return [tf.zeros(variable.shape, variable.dtype) for variable in variables]


def _dot(left: Sequence[Any], right: Sequence[Any]) -> Any:
    return tf.add_n([tf.reduce_sum(a * b) for a, b in zip(left, right, strict=True)])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

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
from numbers import Real
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature import KroneckerBlock, Look
from tf_kfacprune.distribution import (
    ReplicaLocal,
    cond,
    num_replicas,
    sum_over_replicas,
    weighted_mean,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers.arguments import check_arguments
from tf_kfacprune.optimizers.damping import (
    AdaptiveDamping,
    Hyperparameter,
    LevenbergMarquardt,
    value_at,
)
from tf_kfacprune.optimizers.kronecker_curvature import KroneckerCurvature
from tf_kfacprune.optimizers.quadratic_model import QuadraticModel
from tf_kfacprune.optimizers.steps import clipped, constrained, dot

__all__ = ["KFAC", "QuadraticForm"]

QuadraticForm = Callable[[Sequence[Sequence[Any]]], tuple[Any, Any]]
"""Directions, each like `block_variables` -> products D^T F D on a batch, and its examples."""

_ADAM_BETA_1 = 0.9
_ADAM_BETA_2 = 0.999
_ADAM_EPSILON = 1e-7
_FIXED_DAMPING = 0.03
_FACTOR_EVERY = 10
_FACTOR_EVERY_ADAPTIVE = 3
# What Adam steps are scaled by where the learning rate is not a number.
_ADAPTIVE_ADAM_BASE = 1e-2
# Steps of batches below this share of the largest one are judged, whatever the period.
_SMALL_BATCH = 0.5


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
        factor_every: Steps between updates of the factors; the first period has some more. None
            means 10, and 3 with `"auto"`, whose steps cost more and go further.
        inverse_every: Steps between updates of the inverses; in the first `inverse_every` steps
            every update of the factors is followed by one.
        batch_fraction: Share of the batch that factors (and the quadratic model) are computed on,
            in (0, 1]; with BatchNormalization at least 16 examples, as far as there are so many.
        location_fraction: Share of the locations of a layer (pixels, tokens) that factors are
            computed on, in (0, 1], evenly spaced and beginning anywhere; convolutions choose
            whole rows of pixels. Not with `weight_sharing="reduce"`.
        labels: `"sampled"` (probes with the second moments of labels drawn from the model: the true
            Fisher), `"data"` (empirical Fisher) or `"exact"` (Gauss-Newton matrix, one backward
            pass per output, for models with few of them).
        inverse: `"cholesky"` (factored damping), `"eigen"` (exact damping in the eigenbasis) or
            `"ekfac"` (second moments of single gradients in the eigenbasis).
        weight_sharing: `"expand"` or `"reduce"`: how locations (pixels, tokens) enter factors.
        max_factor_dim: Dimension above which a factor is not kept as a whole, or None.
        large_factors: What is kept of such a factor: its `"diagonal"`, or diagonal blocks of at
            most that dimension (`"split"`).
        adam_ratio: Learning rate of the Adam steps as a multiple of `learning_rate` (of 0.01 with
            `"auto"`).
        shard_inverses: Under `tf.distribute`, whether each replica computes the inverses of some
            blocks only and they are exchanged, instead of each computing all.
        weight_decay: Decoupled weight decay, or None: each variable shrinks by this share of its
            own learning rate.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`: clipping, EMA, loss scale.

    `momentum`, `kl_clip`, `norm_constraint`, `factor_decay` and `adam_ratio` may be Keras
    schedules, too.

    Raises:
        InvalidArgumentError: If an argument is out of range or not supported.

    Examples:
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
        factor_every: int | None = None,
        inverse_every: int = 50,
        batch_fraction: float = 0.25,
        location_fraction: float = 1.0,
        labels: str = "sampled",
        inverse: str = "cholesky",
        weight_sharing: str = "expand",
        max_factor_dim: int | None = 4096,
        large_factors: str = "diagonal",
        adam_ratio: Hyperparameter = 0.1,
        shard_inverses: bool = False,
        weight_decay: float | None = None,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        is_auto = isinstance(learning_rate, str)
        # Keras refuses whole numbers and those of NumPy.
        rate = float(learning_rate) if isinstance(learning_rate, Real) else learning_rate
        super().__init__(1.0 if is_auto else rate, weight_decay=weight_decay, name=name, **kwargs)
        self.is_adaptive = is_auto
        self.adaptive_damping: AdaptiveDamping | None = None
        self._make_curvature = functools.partial(KroneckerCurvature, None, {})
        self._curvature: Any = None  # a KroneckerCurvature, once built
        self._measure = ReplicaLocal()
        self._unclipped = ReplicaLocal()
        if damping is None:
            damping = LevenbergMarquardt() if is_auto else _FIXED_DAMPING
        self.momentum = momentum
        self.damping = damping
        self.kl_clip = kl_clip
        self.norm_constraint = norm_constraint
        self.factor_decay = factor_decay
        if factor_every is None:
            factor_every = _FACTOR_EVERY_ADAPTIVE if is_auto else _FACTOR_EVERY
        self.factor_every = factor_every
        self.inverse_every = inverse_every
        self.batch_fraction = batch_fraction
        self.location_fraction = location_fraction
        self.labels = labels
        self.inverse = inverse
        self.weight_sharing = weight_sharing
        self.max_factor_dim = max_factor_dim
        self.large_factors = large_factors
        self.adam_ratio = adam_ratio
        self.shard_inverses = shard_inverses
        check_arguments(learning_rate, {**kwargs, **self._settings()})

    # ---- what belongs to it

    def bind(
        self, blocks: Sequence[KroneckerBlock], reasons: Mapping[str, str] | None = None
    ) -> None:
        """Tells the optimizer which layers have Kronecker blocks; called before it is built.

        Args:
            blocks: Blocks that the model will look at for `update_factors`.
            reasons: Path of a variable -> why it is in no block; shown by `summary`.

        Raises:
            InvalidArgumentError: If the optimizer is built already, for other blocks.
        """
        if self.built:
            if [id(b.kernel) for b in self.blocks] != [id(b.kernel) for b in blocks]:
                raise InvalidArgumentError(
                    f"Optimizer {self.name!r} was built for the layers "
                    f"{[b.name for b in self.blocks]} and cannot be bound to "
                    f"{[b.name for b in blocks]}. Give each model an optimizer of its own, and a "
                    "new one after layers were frozen or freed."
                )
            return
        self._make_curvature = functools.partial(
            KroneckerCurvature, tuple(blocks), dict(reasons or {})
        )

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._curvature = self._make_curvature(
            variables,
            self.add_variable,
            inverse=self.inverse,
            max_factor_dim=self.max_factor_dim,
            large_factors=self.large_factors,
        )
        if isinstance(self.damping, LevenbergMarquardt) and self.blocks:
            self._refuse_constraints()
            self.adaptive_damping = AdaptiveDamping(self.damping, self.add_variable)
        if self.needs_quadratic_form:
            self._largest_batch = self.add_variable((), dtype="float32", name="largest_batch")
        # The last step of what is in blocks, Adam's first moment of what is not.
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        of_rest = [variables[index] for index in self._curvature.rest]
        self._velocities = [self.add_variable_from_reference(v, "velocity") for v in of_rest]

    def _refuse_constraints(self) -> None:
        constrained = [v.path for v in self.block_variables if v.constraint is not None]
        if constrained:
            raise InvalidArgumentError(
                f"Optimizer {self.name!r} judges its steps (learning_rate='auto' or "
                "damping=LevenbergMarquardt(...)), and cannot take back one that a constraint has "
                f"moved. Constraints: on {constrained}. Take a fixed learning rate and a fixed "
                "damping, or leave the constraints out."
            )

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """The Kronecker blocks."""
        return [] if self._curvature is None else [s.block for s in self._curvature.states]

    @property
    def block_variables(self) -> list[keras.Variable]:
        """The trainable variables in Kronecker blocks, the order of directions."""
        return [self._trainable_variables[i] for i in self._curvature.in_blocks]

    @property
    def current_damping(self) -> Any:
        """The damping d at this step, a scalar tensor or a number."""
        if self.adaptive_damping is not None:
            return self.adaptive_damping.value
        if isinstance(self.damping, LevenbergMarquardt):
            return self.damping.initial or 0.0  # there is nothing to be damped
        return value_at(self.damping, self.iterations)

    @property
    def needs_quadratic_form(self) -> bool:
        """Whether steps are measured against the exact quadratic model."""
        return bool(self.blocks) and (self.is_adaptive or self.adaptive_damping is not None)

    # ---- curvature

    def factors_due(self) -> Any:
        """Boolean scalar tensor: whether the factors are to be updated at this step.

        That is every `factor_every` steps, and in the first half of the first period at steps 1, 2,
        4, 8 and so on: a network changes fastest in the beginning.
        """
        step = tf.convert_to_tensor(self.iterations)
        early = [1 << k for k in range((self.factor_every // 2).bit_length())]
        return tf.reduce_any([step % self.factor_every == 0, *(step == k for k in early)])

    def statistics(self, look: Look) -> list[Any]:
        """What a batch says about the curvature, for `update_factors`.

        Args:
            look: A pass that recorded the blocks' layers.
        """
        return self._curvature.statistics(
            look,
            reduce=self.weight_sharing == "reduce",
            location_fraction=self.location_fraction,
            step=self.iterations,
        )

    def update_factors(self, statistics: Sequence[Any], examples: Any = 1) -> None:
        """Averages in the statistics of a batch, and updates the inverses when they are due.

        Statistics with NaN or infinite entries are left out.

        Args:
            statistics: As returned by `statistics`.
            examples: Number of examples that they are means over, a scalar tensor; under
                `tf.distribute`, those of this replica.
        """
        means = weighted_mean(statistics, examples)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(mean)) for mean in means])
        tf.cond(finite, lambda: self._average_in(means), lambda: None)
        step = tf.convert_to_tensor(self.iterations)
        due = tf.logical_or(
            step < self.inverse_every, step % self.inverse_every < self.factor_every
        )
        cond(tf.logical_and(due, finite), self._update_inverses, lambda: None)

    def _average_in(self, means: Sequence[Any]) -> None:
        decay = value_at(self.factor_decay, self.iterations)
        # Of moments that began anew with the inverses, all count the same until decay sets in.
        updates = tf.convert_to_tensor(self.iterations) % self.inverse_every // self.factor_every
        updates = tf.cast(updates, "float32")
        before = self._curvature.typical_eigenvalue()
        self._curvature.average_in(means, decay, tf.minimum(decay, updates / (updates + 1.0)))
        damping = self.adaptive_damping
        if damping is not None and damping.rule.initial is None:
            typical = self._curvature.typical_eigenvalue()
            # A batch without weight or behind a mask has no curvature to begin with.
            begins = tf.logical_and(before <= 0.0, typical > 0.0)
            tf.cond(begins, lambda: damping.begin(typical), lambda: None)

    def _update_inverses(self) -> None:
        self._curvature.update_inverses(self.current_damping, is_sharded=self.shard_inverses)

    # ---- the rule

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None
    ) -> None:
        # The base class would sum gradients last of all, after clipping them part by part; clipping
        # and preconditioning are about the gradient of the whole batch. Those of embeddings are
        # slices, one for each token: their norm is not that of their sum.
        whole = sum_over_replicas(grads)
        whole = [None if g is None else tf.convert_to_tensor(g) for g in whole]
        super().apply(whole, trainable_variables)
        self._unclipped.value = None

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        clipped = super()._clip_gradients(grads)
        self._unclipped.value = None if clipped is grads else list(grads)
        return clipped

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        # The one hook of the base class that sees the (unscaled, clipped) gradients of all
        # variables at once; `update_step` sees a kernel without its bias.
        if callable(learning_rate):
            learning_rate = learning_rate()
        places = [self._get_variable_index(v) for v in trainable_variables]
        gradients = self._by_place(places, grads)
        if self._unclipped.value is not None:
            unclipped = self._by_place(places, self._unclipped.value)
            self._unclipped.value = [unclipped[i] for i in self._curvature.in_blocks]
        steps = self._curvature.preconditioned(gradients, self.current_damping)
        if self.is_adaptive and self.blocks:
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

    def _by_place(self, places: Sequence[int], grads: Sequence[Any]) -> list[Any]:
        """One gradient per variable of the optimizer, float32 in blocks; None where there is none.

        Args:
            places: Place of each gradient's variable among those of the optimizer.
            grads: The gradients.
        """
        gradients: list[Any] = [None] * len(self._trainable_variables)
        for place, gradient in zip(places, grads, strict=True):
            gradients[place] = gradient
        for index in self._curvature.in_blocks:
            if gradients[index] is not None:
                gradients[index] = tf.cast(gradients[index], "float32")
            elif self.needs_quadratic_form:  # which is one of all blocks
                gradients[index] = tf.zeros(self._trainable_variables[index].shape)
        return gradients

    def _bounded(self, steps: list[Any], gradients: Sequence[Any], learning_rate: Any) -> list[Any]:
        """Applies KL clip and norm constraint to preconditioned gradients."""
        eta = tf.cast(learning_rate, "float32")
        if self.kl_clip is not None:
            kappa = value_at(self.kl_clip, self.iterations)
            steps = clipped(steps, gradients, self._curvature.in_blocks, eta, kappa)
        if self.norm_constraint is not None:
            bound = value_at(self.norm_constraint, self.iterations)
            blocks = [state.indices for state in self._curvature.states]
            steps = constrained(steps, gradients, blocks, eta, bound)
        return steps

    def _adaptive_steps(self, steps: list[Any], gradients: Sequence[Any]) -> list[Any]:
        """`alpha P + mu m` of the variables in blocks."""
        members = self._curvature.in_blocks
        directions = [[steps[i] for i in members]]
        if self.momentum != 0:
            directions.append([self._last_step(i) for i in members])
        model = self._quadratic_model([gradients[i] for i in members], directions)
        coefficients = model.coefficients()
        if self.adaptive_damping is not None:
            self.adaptive_damping.expect(model.change(coefficients))
        self._learning_rate.assign(coefficients[0])
        for i, *parts in zip(members, *directions, strict=True):
            steps[i] = tf.add_n([coefficients[j] * part for j, part in enumerate(parts)])
        return steps

    def _fixed_steps(self, steps: list[Any], gradients: Sequence[Any], eta: Any) -> list[Any]:
        """`momentum m + eta P` of the variables in blocks."""
        momentum = value_at(self.momentum, self.iterations)
        members = [i for i in self._curvature.in_blocks if gradients[i] is not None]
        for i in members:
            steps[i] = momentum * self._last_step(i) + tf.cast(eta, "float32") * steps[i]
        self._predict([steps[i] for i in members], [gradients[i] for i in members])
        return steps

    def _last_step(self, index: int) -> Any:
        return tf.cast(tf.convert_to_tensor(self._momentums[index]), "float32")

    def _predict(self, step: Sequence[Any], gradients: Sequence[Any]) -> None:
        damping = self.adaptive_damping
        if damping is None:
            return

        def predict() -> None:
            model = self._quadratic_model(gradients, [step])
            damping.expect(model.change(tf.ones((1,))))

        # Fixed steps need their prediction only if the next step begins with judging them.
        following = tf.convert_to_tensor(self.iterations) + 1
        cond(damping.is_due(following), predict, lambda: None)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        gradient = ops.cast(gradient, variable.dtype)
        if index in self._curvature.rest:
            rate = ops.cast(self._adam_rate(learning_rate), variable.dtype)
            self._adam_step(gradient, variable, rate, index)
            return
        self.assign(self._momentums[index], gradient)
        self.assign_sub(variable, gradient)

    def _adam_rate(self, learning_rate: Any) -> Any:
        """Learning rate of the variables outside of blocks."""
        base = _ADAPTIVE_ADAM_BASE if self.is_adaptive else learning_rate
        return value_at(self.adam_ratio, self.iterations) * ops.cast(base, "float32")

    def _adam_step(self, gradient: Any, variable: Any, learning_rate: Any, index: int) -> None:
        step = ops.cast(tf.convert_to_tensor(self.iterations) + 1, variable.dtype)
        m, v = self._momentums[index], self._velocities[self._curvature.rest.index(index)]
        self.assign_add(m, (gradient - tf.convert_to_tensor(m)) * (1.0 - _ADAM_BETA_1))
        self.assign_add(v, (ops.square(gradient) - tf.convert_to_tensor(v)) * (1.0 - _ADAM_BETA_2))
        m_hat = tf.convert_to_tensor(m) / (1.0 - ops.power(_ADAM_BETA_1, step))
        v_hat = tf.convert_to_tensor(v) / (1.0 - ops.power(_ADAM_BETA_2, step))
        self.assign_sub(variable, learning_rate * m_hat / (ops.sqrt(v_hat) + _ADAM_EPSILON))

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        if self.weight_decay is None:
            return
        rate = ops.cast(self.learning_rate, "float32")
        in_blocks = set(self._curvature.in_blocks)
        of_blocks = rate
        if self.is_adaptive:
            # The step size of this step is not known yet; that of the last one may be of any sign.
            of_blocks = tf.where(self.iterations > 0, tf.maximum(rate, 0.0), 0.0)
        for variable in variables:
            if self._use_weight_decay(variable):
                is_in_block = self._get_variable_index(variable) in in_blocks
                own = of_blocks if is_in_block else self._adam_rate(rate)
                share = ops.cast(self.weight_decay * own, variable.dtype)
                self.assign_sub(variable, share * tf.convert_to_tensor(variable))

    # ---- steps that are measured

    @contextmanager
    def measured_by(
        self, quadratic_form: QuadraticForm, of_loss: Sequence[Any] | None = None
    ) -> Iterator[None]:
        """Within this context `apply` takes the quadratic model of its steps from a function.

        Args:
            quadratic_form: As `QuadraticForm`.
            of_loss: Gradients of the loss alone with respect to `block_variables`, if those that
                are applied are also of something else, which is not in the model; under
                `tf.distribute`, this replica's part of them.
        """
        self._measure.value = quadratic_form, of_loss
        try:
            yield
        finally:
            self._measure.value = None

    def _quadratic_model(
        self, gradients: Sequence[Any], directions: Sequence[Sequence[Any]]
    ) -> QuadraticModel:
        """The quadratic model along the given directions.

        A batch smaller than the largest so far, such as the last of an epoch, stands for one of
        that size: of the examples that it lacks nothing is known but their average curvature, which
        the Kronecker factors hold. Two examples alone would make for steps without end.
        """
        if self._measure.value is None:
            raise InvalidArgumentError(
                f"Optimizer {self.name!r} needs the quadratic model of the loss "
                "(learning_rate='auto' or damping=LevenbergMarquardt(...)), and the model does not "
                "provide it. Train with kp.KFACModel or kp.PrunableModel."
            )
        quadratic_form, of_loss = self._measure.value
        k, examples = quadratic_form(directions)
        largest = tf.maximum(tf.convert_to_tensor(self._largest_batch), examples)
        self._largest_batch.assign(largest)
        share = examples / largest
        is_small = tf.logical_and(share < 1.0, self._curvature.is_known)
        average = tf.cond(is_small, lambda: self._curvature.form(directions), lambda: k)
        if self.adaptive_damping is not None:
            step = tf.convert_to_tensor(self.iterations)
            self.adaptive_damping.watch_next(step, share < _SMALL_BATCH)
        gram = tf.stack([tf.stack([dot(p, q) for q in directions]) for p in directions])
        k = share * k + (1.0 - share) * average + self.current_damping * gram

        def along(parts: Sequence[Any]) -> Any:
            return share * tf.stack([dot(p, parts) for p in directions])

        b, unclipped = along(gradients), self._unclipped.value
        if of_loss is None:
            return QuadraticModel(k, b, unclipped=None if unclipped is None else along(unclipped))
        of_loss = sum_over_replicas([tf.cast(g, "float32") for g in of_loss])
        if unclipped is None:
            return QuadraticModel(k, along(of_loss), b - along(of_loss))
        # The gradient of the loss counts for as much as clipping has left of the whole.
        left = along(
            [
                tf.where(whole == 0.0, 1.0, tf.math.divide_no_nan(clipped, whole)) * g
                for g, clipped, whole in zip(of_loss, gradients, unclipped, strict=True)
            ]
        )
        return QuadraticModel(k, left, b - left, along(of_loss))

    @contextmanager
    def last_step_undone(self) -> Iterator[None]:
        """Within this context the variables in blocks are where they were before the last step."""
        variables = self.block_variables
        values = [tf.convert_to_tensor(v) for v in variables]
        for variable, value, index in zip(
            variables, values, self._curvature.in_blocks, strict=True
        ):
            variable.assign(value + tf.cast(self._last_step(index), value.dtype))
        yield
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def take_back_last_step(self) -> None:
        """Puts the variables in blocks back to before the last step, and stands still there."""
        for variable, index in zip(self.block_variables, self._curvature.in_blocks, strict=True):
            last = self._momentums[index]
            variable.assign(variable + tf.cast(tf.convert_to_tensor(last), variable.dtype))
            last.assign(tf.zeros(last.shape, last.dtype))
        if self.adaptive_damping is not None:
            self.adaptive_damping.taken_back(tf.convert_to_tensor(self.iterations))
            # With inverses of the old damping the next step would go the same way.
            cond(self._curvature.is_known, self._update_inverses, lambda: None)

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
        for line in self._curvature.summary(self.name):
            print_fn(line)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.is_adaptive:
            config["learning_rate"] = "auto"
        serialize = keras.saving.serialize_keras_object
        hyperparameters = {name: serialize(getattr(self, name)) for name in _SERIALIZED}
        return {**config, **self._settings(), **hyperparameters}

    def _settings(self) -> dict[str, Any]:
        """The arguments that the base class does not know, by name."""
        return {name: getattr(self, name) for name in (*_SERIALIZED, *_PLAIN)}

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
    "location_fraction",
    "labels",
    "inverse",
    "weight_sharing",
    "max_factor_dim",
    "large_factors",
    "shard_inverses",
)

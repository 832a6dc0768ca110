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

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.distribution import cond, num_replicas, sum_over_replicas
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers.arguments import check_arguments
from tf_kfacprune.optimizers.hyperparameters import (
    Hyperparameter,
    LevenbergMarquardt,
    value_at,
)
from tf_kfacprune.optimizers.kfac_state import summary_lines
from tf_kfacprune.optimizers.measured_steps import MeasuredSteps
from tf_kfacprune.optimizers.quadratic_model import best_coefficients, model_change
from tf_kfacprune.optimizers.steps import clipped, constrained, preconditioned

__all__ = ["KFAC"]

_ADAM_BETA_1 = 0.9
_ADAM_BETA_2 = 0.999
_ADAM_EPSILON = 1e-7
_FIXED_DAMPING = 0.03
_FACTOR_EVERY = 10
_FACTOR_EVERY_ADAPTIVE = 3
# What Adam steps are scaled by where the learning rate is not a number.
_ADAPTIVE_ADAM_BASE = 1e-2


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class KFAC(MeasuredSteps):
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
            in (0, 1].
        location_fraction: Share of the locations of a layer (pixels, tokens) that factors are
            computed on, in (0, 1], evenly spaced and beginning anywhere; convolutions choose
            whole rows of pixels. Not with `weight_sharing="reduce"`.
        labels: `"sampled"` from the model (true Fisher), `"data"` (empirical Fisher) or `"exact"`
            (Gauss-Newton matrix, one backward pass per output, for models with few of them).
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

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        # The last step of what is in blocks, Adam's first moment of what is not.
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        for index in self._layout.rest:
            velocity = self.add_variable_from_reference(variables[index], "velocity")
            self._layout.velocities[index] = velocity

    # ---- steps

    def _bounded(self, steps: list[Any], gradients: Sequence[Any], learning_rate: Any) -> list[Any]:
        """Applies KL clip and norm constraint to preconditioned gradients."""
        eta = tf.cast(learning_rate, "float32")
        if self.kl_clip is not None:
            kappa = value_at(self.kl_clip, self.iterations)
            steps = clipped(self._layout, steps, gradients, eta, kappa)
        if self.norm_constraint is not None:
            bound = value_at(self.norm_constraint, self.iterations)
            steps = constrained(self._layout, steps, gradients, eta, bound)
        return steps

    def _adaptive_steps(self, steps: list[Any], gradients: Sequence[Any]) -> list[Any]:
        """`alpha P + mu m` of the variables in blocks."""
        members = self._layout.in_blocks
        directions = [[steps[i] for i in members]]
        if self.momentum != 0:
            directions.append([self._last_step(i) for i in members])
        k, b = self._quadratic_model([gradients[i] for i in members], directions)
        coefficients = best_coefficients(k, b)
        if self.adaptive_damping is not None:
            self.adaptive_damping.expect(model_change(k, b, coefficients))
        self._learning_rate.assign(coefficients[0])
        for i, *parts in zip(members, *directions, strict=True):
            steps[i] = tf.add_n([coefficients[j] * part for j, part in enumerate(parts)])
        return steps

    def _fixed_steps(self, steps: list[Any], gradients: Sequence[Any], eta: Any) -> list[Any]:
        """`momentum m + eta P` of the variables in blocks."""
        momentum = value_at(self.momentum, self.iterations)
        members = [i for i in self._layout.in_blocks if gradients[i] is not None]
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
            k, b = self._quadratic_model(gradients, [step])
            damping.expect(model_change(k, b, tf.ones((1,))))

        # Fixed steps need their prediction only if the next step begins with judging them.
        following = tf.convert_to_tensor(self.iterations) + 1
        cond(damping.is_due(following), predict, lambda: None)

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        if not self.is_adaptive:
            super()._apply_weight_decay(variables)
            return
        # The step size of this step is not known yet; that of the last one may be of any sign.
        last = tf.where(self.iterations > 0, tf.maximum(self._learning_rate, 0.0), 0.0)
        in_blocks = set(self._layout.in_blocks)
        for variable in variables if self.weight_decay is not None else ():
            if self._use_weight_decay(variable):
                is_in_block = self._get_variable_index(variable) in in_blocks
                rate = last if is_in_block else _ADAPTIVE_ADAM_BASE * self._adam_ratio()
                share = tf.cast(self.weight_decay * rate, variable.dtype)
                self.assign_sub(variable, share * tf.convert_to_tensor(variable))

    def _adam_ratio(self) -> Any:
        return value_at(self.adam_ratio, self.iterations)

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
            elif self.needs_quadratic_form:  # which is one of all blocks
                gradients[index] = tf.zeros(self._trainable_variables[index].shape)
        steps = preconditioned(self._layout, gradients, self.current_damping)
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
            rate = self._adam_ratio() * ops.cast(learning_rate, "float32")
            learning_rate = ops.cast(rate, variable.dtype)
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

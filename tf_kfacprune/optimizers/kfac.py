r"""K-FAC as a Keras optimizer.

=========  ================================================================  ==============
symbol     meaning                                                           shape
=========  ================================================================  ==============
`A`        Kronecker factor of a layer's inputs, exponential average         (n_a, n_a)
`G`        Kronecker factor of its pre-activation gradients, likewise        (n_out, n_out)
`dW`       gradient of kernel and bias as one matrix                         (n_a, n_out)
`P`        preconditioned gradient                                           (n_a, n_out)
`d`        damping                                                           scalar
`kappa`    KL clip                                                           scalar
`eta`      learning rate                                                     scalar
=========  ================================================================  ==============

    P  = (A + pi sqrt(d) I)^-1 dW (G + sqrt(d)/pi I)^-1
    nu = min(1, sqrt(kappa / (eta^2 sum_l <P_l, dW_l>)))
    m <- momentum m + nu P,    W <- W - eta m

Variables outside of Kronecker blocks take Adam steps at `adam_ratio * eta`.

References:
    Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", sections 4-6. Ba, Grosse, Martens 2017, "Distributed Second-Order Optimization
    using Kronecker-Factored Approximations", section 5 (KL clip). Kingma & Ba 2015 (Adam).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature import KroneckerBlock
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.linalg import damped_inverse, factored_damping, kronecker_matvec
from tf_kfacprune.optimizers.kfac_state import Binding, BlockState, Layout, summary_lines
from tf_kfacprune.validation import require

__all__ = ["KFAC"]

_ADAM_BETA_1 = 0.9
_ADAM_BETA_2 = 0.999
_ADAM_EPSILON = 1e-7
_TINY = 1e-20


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class KFAC(keras.optimizers.Optimizer):
    """Kronecker-factored approximate curvature (K-FAC) for Dense and convolution layers.

    The factors come from the model: `PrunableModel` computes them in its `train_step`. In a model
    that does not, every variable takes an Adam step, and `summary()` says so.

    Args:
        learning_rate: Step size: a float or a Keras schedule.
        momentum: Momentum of the preconditioned gradient, in [0, 1).
        damping: Tikhonov damping d > 0 of the Fisher, split between the factors.
        kl_clip: Bound kappa on the change that one step makes to the model's predictions, > 0,
            or None for no bound.
        factor_decay: Decay of the factors' averages, in [0, 1); debiased.
        factor_every: Steps between updates of the factors.
        inverse_every: Steps between updates of the inverses; in the first `inverse_every` steps
            every update of the factors is followed by one.
        batch_fraction: Share of the batch that factors are computed on, in (0, 1].
        labels: `"sampled"` from the model (true Fisher) or `"data"` (empirical Fisher).
        adam_ratio: Learning rate of the Adam steps as a multiple of `learning_rate`.
        weight_decay: Decoupled weight decay, or None.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`: clipping, EMA, loss scale.

    Raises:
        InvalidArgumentError: If an argument is out of range or not supported.

    Example:
        >>> model = kp.PrunableModel(network, budget=kp.Budget(macs=0.1))
        >>> model.compile(optimizer=kp.KFAC(1e-2), loss="sparse_categorical_crossentropy")

    References:
        Martens & Grosse 2015; Grosse & Martens 2016; Ba, Grosse, Martens 2017.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-2,
        momentum: float = 0.9,
        damping: float = 0.03,
        kl_clip: float | None = 1e-3,
        factor_decay: float = 0.95,
        factor_every: int = 10,
        inverse_every: int = 50,
        batch_fraction: float = 0.25,
        labels: str = "sampled",
        adam_ratio: float = 0.1,
        weight_decay: float | None = None,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        check = functools.partial(require, "KFAC")
        check(0 <= momentum < 1, "momentum", "in [0, 1)", momentum)
        check(damping > 0, "damping", "> 0", damping)
        check(kl_clip is None or kl_clip > 0, "kl_clip", "> 0 or None", kl_clip)
        check(0 <= factor_decay < 1, "factor_decay", "in [0, 1)", factor_decay)
        check(_is_count(factor_every), "factor_every", "an integer >= 1", factor_every)
        check(_is_count(inverse_every), "inverse_every", "an integer >= 1", inverse_every)
        check(0 < batch_fraction <= 1, "batch_fraction", "in (0, 1]", batch_fraction)
        check(labels in ("sampled", "data"), "labels", "'sampled' or 'data'", labels)
        check(adam_ratio > 0, "adam_ratio", "> 0", adam_ratio)
        accumulation = kwargs.get("gradient_accumulation_steps")
        check(
            accumulation is None,
            "gradient_accumulation_steps",
            "None (factors would be updated on every micro-step; use larger batches)",
            accumulation,
        )
        super().__init__(learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        self.momentum = momentum
        self.damping = damping
        self.kl_clip = kl_clip
        self.factor_decay = factor_decay
        self.factor_every = factor_every
        self.inverse_every = inverse_every
        self.batch_fraction = batch_fraction
        self.labels = labels
        self.adam_ratio = adam_ratio
        self._layout = Layout([], 0)
        self._bound = Binding(None, {})

    # ------------------------------------------------------------------ building

    def bind(
        self, blocks: Sequence[KroneckerBlock], reasons: Mapping[str, str] | None = None
    ) -> None:
        """Tells the optimizer which layers have Kronecker blocks; called before it is built.

        Args:
            blocks: Blocks whose factors the model will hand to `update_factors`, in this order.
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
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            raise InvalidArgumentError(
                f"KFAC does not support tf.distribute yet. Received: a strategy with {replicas} "
                "replicas. Train on one device, or use an optimizer of Keras."
            )
        super().build(variables)
        index_of = {id(v): i for i, v in enumerate(variables)}
        states = [BlockState(b, index_of, self.add_variable) for b in self._bound.blocks or ()]
        self._layout = Layout(states, len(variables))
        self._factor_updates = self.add_variable((), dtype="int32", name="factor_updates")
        # Momentum of preconditioned gradients inside blocks, Adam's first moment outside.
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        for index in self._layout.rest:
            velocity = self.add_variable_from_reference(variables[index], "velocity")
            self._layout.velocities[index] = velocity

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """The Kronecker blocks, in the order of the factors that `update_factors` takes."""
        return [state.block for state in self._layout.states]

    # ------------------------------------------------------------------ factors and inverses

    def factors_due(self) -> Any:
        """Boolean scalar tensor: whether the factors are to be updated at this step."""
        return tf.equal(tf.convert_to_tensor(self.iterations) % self.factor_every, 0)

    def update_factors(self, factors: Sequence[tuple[Any, Any]]) -> None:
        """Averages in the factors of a batch, and updates the inverses when they are due.

        Factors with NaN or infinite entries are left out.

        Args:
            factors: `(A, G)` of each block, of shapes `(n_a, n_a)` and `(n_out, n_out)`.
        """
        flat = [factor for pair in factors for factor in pair]
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(f)) for f in flat])
        tf.cond(finite, lambda: self._average_in(flat), lambda: None)
        step = tf.convert_to_tensor(self.iterations)
        due = tf.logical_or(
            step < self.inverse_every, step % self.inverse_every < self.factor_every
        )
        tf.cond(tf.logical_and(due, finite), self._update_inverses, lambda: None)

    def _average_in(self, flat: Sequence[Any]) -> None:
        variables = [v for state in self._layout.states for v in (state.a, state.g)]
        for variable, new in zip(variables, flat, strict=True):
            old = tf.convert_to_tensor(variable)
            self.assign(variable, self.factor_decay * old + (1.0 - self.factor_decay) * new)
        self._factor_updates.assign_add(1)

    def _update_inverses(self) -> None:
        updates = tf.cast(tf.convert_to_tensor(self._factor_updates), "float32")
        debias = 1.0 / (1.0 - tf.pow(self.factor_decay, updates))
        for state in self._layout.states:
            a = tf.convert_to_tensor(state.a) * debias
            g = tf.convert_to_tensor(state.g) * debias
            damping_a, damping_g = factored_damping(a, g, self.damping)
            self.assign(state.a_inverse, damped_inverse(a, damping_a))
            self.assign(state.g_inverse, damped_inverse(g, damping_g))

    # ------------------------------------------------------------------ steps

    def _precondition(self, gradients: list[Any], learning_rate: Any) -> list[Any]:
        """Replaces the gradients of Kronecker blocks by `nu P`.

        Args:
            gradients: One gradient per trainable variable the optimizer was built with, or None.
            learning_rate: Scalar eta.
        """
        preconditioned = list(gradients)
        inner_products = []
        for state in self._layout.states:
            if any(gradients[i] is None for i in state.indices):
                continue
            kernel = tf.cast(gradients[state.kernel_index], "float32")
            bias = state.bias_index
            matrix = state.block.to_matrix(
                kernel, None if bias is None else tf.cast(gradients[bias], "float32")
            )
            step = kronecker_matvec(
                tf.convert_to_tensor(state.a_inverse),
                tf.convert_to_tensor(state.g_inverse),
                matrix,
            )
            inner_products.append(tf.reduce_sum(step * matrix))
            kernel_step, bias_step = state.block.from_matrix(step)
            preconditioned[state.kernel_index] = kernel_step
            if bias is not None:
                preconditioned[bias] = bias_step
        if self.kl_clip is None or not inner_products:
            return preconditioned
        change = tf.square(tf.cast(learning_rate, "float32")) * tf.add_n(inner_products)
        nu = tf.minimum(1.0, tf.sqrt(self.kl_clip / (change + _TINY)))
        for index in (i for state in self._layout.states for i in state.indices):
            if preconditioned[index] is not None:
                preconditioned[index] *= nu
        return preconditioned

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        # The one hook of the base class that sees the (unscaled, clipped) gradients of all
        # variables at once; `update_step` sees a kernel without its bias.
        if callable(learning_rate):
            learning_rate = learning_rate()
        places = [self._get_variable_index(v) for v in trainable_variables]
        by_place: list[Any] = [None] * len(self._trainable_variables)
        for place, gradient in zip(places, grads, strict=True):
            by_place[place] = gradient
        preconditioned = self._precondition(by_place, learning_rate)
        # In a branch of tf.cond the all-reduce of the base class wants its arguments from that
        # branch, not some of them from outside.
        steps = [tf.identity(preconditioned[place]) for place in places]
        super()._backend_update_step(steps, trainable_variables, learning_rate)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        gradient = ops.cast(gradient, variable.dtype)
        learning_rate = ops.cast(learning_rate, variable.dtype)
        momentum = self._momentums[index]
        if index in self._layout.velocities:
            self._adam_step(gradient, variable, self.adam_ratio * learning_rate, index)
            return
        self.assign(momentum, self.momentum * tf.convert_to_tensor(momentum) + gradient)
        self.assign_sub(variable, learning_rate * tf.convert_to_tensor(momentum))

    def _adam_step(self, gradient: Any, variable: Any, learning_rate: Any, index: int) -> None:
        step = ops.cast(tf.convert_to_tensor(self.iterations) + 1, variable.dtype)
        m, v = self._momentums[index], self._layout.velocities[index]
        self.assign_add(m, (gradient - tf.convert_to_tensor(m)) * (1.0 - _ADAM_BETA_1))
        self.assign_add(v, (ops.square(gradient) - tf.convert_to_tensor(v)) * (1.0 - _ADAM_BETA_2))
        m_hat = tf.convert_to_tensor(m) / (1.0 - ops.power(_ADAM_BETA_1, step))
        v_hat = tf.convert_to_tensor(v) / (1.0 - ops.power(_ADAM_BETA_2, step))
        self.assign_sub(variable, learning_rate * m_hat / (ops.sqrt(v_hat) + _ADAM_EPSILON))

    # ------------------------------------------------------------------ reporting and saving

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints what takes K-FAC steps, with memory, and what takes Adam steps, with the reason.

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
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "damping": self.damping,
            "kl_clip": self.kl_clip,
            "factor_decay": self.factor_decay,
            "factor_every": self.factor_every,
            "inverse_every": self.inverse_every,
            "batch_fraction": self.batch_fraction,
            "labels": self.labels,
            "adam_ratio": self.adam_ratio,
        }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1

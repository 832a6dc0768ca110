r"""Peers that put noise on every neuron and cut out those that the noise drowns.

`vibnet`: the variational information bottleneck (Dai, Zhu, Guo & Wipf 2018). `bc_gnj`, `bc_ghs`:
Bayesian compression with group normal-Jeffreys and group horseshoe priors (Louizos, Ullrich &
Welling 2017). All multiply what a layer reads from a neuron by z, drawn anew for every example,
and pay for what z tells of the neuron:

=========  ======================================  ===========================================
method     z                                       price of a neuron
=========  ======================================  ===========================================
`vibnet`   N(mu, sigma^2)                          w/2 log(1 + mu^2 / sigma^2)
`bc_gnj`   N(mu, sigma^2)                          KL to the log-uniform prior
`bc_ghs`   sqrt(s_a s_b a b), each log-normal      KL to gamma and inverse gamma priors
=========  ======================================  ===========================================

A neuron goes where its log dropout rate is high: log(sigma^2 / mu^2), for `bc_ghs` the negative
log mode of z. The threshold is 0 for `vibnet`, as in the paper. For Bayesian compression the
authors choose it by eye for each layer: here it is -3 for `bc_gnj`, about what their code has, and
what best splits a layer's rates in two for `bc_ghs`, whose layers differ in scale. The weights of
the neurons that stay take up the mean of z, and the noise is off. There is no fine-tuning.

The weights of Bayesian compression are normal variables, too, N(w, v) with prior N(0, 1). Every
example draws the sum that they lead to (local reparametrization, Kingma et al. 2015); the kernels
of convolutions are drawn once for a batch, where the authors draw for every example and position,
which takes twice as long. The objective is the evidence bound; the strength multiplies the KL
divergence, and 1 is the bound itself.

Means of weights are trained as those of the other peers, but without weight decay where they have
a prior. Noise has an Adam of its own, whose steps add up to about twice what the weights' could:
within these epochs small variances would not grow large otherwise.
"""

import math

import keras
import numpy as np
import peers
import tensorflow as tf
from keras import ops

import tf_kfacprune as kp
from tf_kfacprune.gates import GateBank, GatedNetwork, GateEdge, insert_gates

# What the steps of means and log variances of noise would add up to if all went the same way.
NOISE_TRAVEL = 30.0
INITIAL_LOG_VARIANCE = -9.0  # of all noise, as in the code of both groups of authors
WARM_UP = 0.25  # part of the steps in which the KL divergence of Bayesian compression sets in
# Neurons go from these log dropout rates on.
VIBNET_THRESHOLD = 0.0
GNJ_THRESHOLD = -3.0
HORSESHOE_SCALE = 1e-5  # tau_0 of the half-Cauchy prior of a layer's scale, as in the paper


class NoisyGates(keras.layers.Layer):
    """Noise in place of a bank of gates: one value for every example and neuron.

    Args:
        bank: The bank; its groups of neurons are those here.
    """

    def __init__(self, bank):
        super().__init__(name=f"noisy_{bank.name}")
        self.group_sizes = tuple(bank.group_sizes)
        self.size = sum(self.group_sizes)
        self.seed_generator = keras.random.SeedGenerator(bank.seed)

    def call(self, inputs, training=None):
        """Values of shape `(batch, neurons)`, twice as a bank's outputs are two."""
        if training:
            z = self.sample(ops.shape(inputs)[0])
        else:
            z = ops.broadcast_to(self.mean(), (ops.shape(inputs)[0], self.size))
        return z, z

    def compute_output_spec(self, inputs, training=None):
        spec = keras.KerasTensor((inputs.shape[0], self.size))
        return spec, spec

    def normal(self, batch, size):
        """Standard normal noise of shape `(batch, size)`."""
        return keras.random.normal((batch, size), seed=self.seed_generator)


class GaussianNoise(NoisyGates):
    """z ~ N(mu, sigma^2), with a price that is a function of log(sigma^2 / mu^2).

    Args:
        bank: The bank.
        price: The function, element by element.
    """

    def __init__(self, bank, price):
        super().__init__(bank)
        self.price = price

    def build(self, input_shape):
        self.mu = self.add_weight(shape=(self.size,), initializer="ones", name="mu")
        start = keras.initializers.Constant(INITIAL_LOG_VARIANCE)
        self.log_variance = self.add_weight((self.size,), start, name="log_variance")

    def sample(self, batch):
        deviation = ops.exp(0.5 * self.log_variance)
        return self.mu + deviation * self.normal(batch, self.size)

    def mean(self):
        return ops.convert_to_tensor(self.mu)

    def log_dropout_rate(self):
        return self.log_variance - ops.log(ops.square(self.mu) + 1e-8)

    def prices(self):
        """What each neuron pays, shape `(neurons,)`."""
        return self.price(self.log_dropout_rate())


def bottleneck_price(log_rate):
    """KL from N(mu, sigma^2) to the nearest N(0, xi) (Dai et al. 2018, eq. 8)."""
    return 0.5 * ops.softplus(-log_rate)


def normal_jeffreys_price(log_rate):
    """KL from N(mu, sigma^2) to the log-uniform prior (Molchanov et al. 2017, eq. 14)."""
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 - k1 * ops.sigmoid(k2 + k3 * log_rate) + 0.5 * ops.softplus(-log_rate)


class HorseshoeNoise(NoisyGates):
    """z = s t, where s of a layer and t of a neuron are half-Cauchy variables a priori.

    The square of a half-Cauchy variable of scale tau is a gamma(1/2, tau^2) variable times an
    inverse gamma(1/2, 1) variable; a posteriori all are independent log-normal variables (Louizos
    et al. 2017, section 4.2). `layers` and `neurons` have their means and log variances, shape
    `(2, 2, number)`: first the mean, then the log variance, of the gamma, then the inverse gamma
    variable.
    """

    def build(self, input_shape):
        def start(log_scale):
            means = [[log_scale], [-log_scale]]
            return np.array([means, np.full((2, 1), INITIAL_LOG_VARIANCE)], "float32")

        self.layers, self.neurons = (
            self.add_weight(
                shape=(2, 2, number),
                initializer=lambda shape, dtype, at=at: ops.broadcast_to(
                    ops.cast(at, dtype), shape
                ),
                name=name,
            )
            for name, number, at in (
                ("layers", len(self.group_sizes), start(2.0 * math.log(HORSESHOE_SCALE))),
                ("neurons", self.size, start(0.0)),
            )
        )

    def moments(self, variables):
        """Mean and variance of the logarithm of half-Cauchy variables."""
        return 0.5 * ops.sum(variables[0], axis=0), 0.25 * ops.sum(ops.exp(variables[1]), axis=0)

    def by_neuron(self, values):
        """Values of layers, along the last axis, for each of their neurons."""
        layer = np.repeat(np.arange(len(self.group_sizes)), self.group_sizes)
        return ops.take(values, layer.astype("int32"), axis=-1)

    def sample(self, batch):
        s_mean, s_variance = self.moments(self.layers)
        t_mean, t_variance = self.moments(self.neurons)
        log_s = s_mean + ops.sqrt(s_variance) * self.normal(batch, len(self.group_sizes))
        log_t = t_mean + ops.sqrt(t_variance) * self.normal(batch, self.size)
        return ops.exp(self.by_neuron(log_s) + log_t)

    def log_moments(self):
        """Mean and variance of log z."""
        of_s, of_t = self.moments(self.layers), self.moments(self.neurons)
        return tuple(self.by_neuron(s) + t for s, t in zip(of_s, of_t, strict=True))

    def mean(self):
        mean, variance = self.log_moments()
        return ops.exp(mean + 0.5 * variance)

    def log_dropout_rate(self):
        mean, variance = self.log_moments()
        return variance - mean

    def prices(self):
        """What each variable pays: those of the layers, then those of the neurons."""
        of_layers = half_cauchy_price(self.layers, HORSESHOE_SCALE)
        return ops.concatenate([of_layers, half_cauchy_price(self.neurons, 1.0)])


def half_cauchy_price(variables, scale):
    """KL from two log-normal variables to gamma(1/2, scale^2) and inverse gamma(1/2, 1).

    Args:
        variables: As in `HorseshoeNoise`, shape `(2, 2, n)`.
        scale: Scale of the half-Cauchy variable that is the root of their product.

    Returns:
        Sums of both, shape `(n,)`.
    """
    gamma, inverse = variables[0, 0], variables[0, 1]
    gamma_log_variance, inverse_log_variance = variables[1, 0], variables[1, 1]

    def price(mean, log_variance):
        to_gamma = ops.exp(mean + 0.5 * ops.exp(log_variance))
        return to_gamma - 0.5 * (mean + log_variance + 1.0 + math.log(2.0))

    log_scale = 2.0 * math.log(scale)
    return price(gamma - log_scale, gamma_log_variance) + price(-inverse, inverse_log_variance)


class NoisyEdge(keras.layers.Layer):
    """What a `GateEdge` does, with other values for every example.

    Args:
        edge: The `GateEdge`.
    """

    def __init__(self, edge):
        super().__init__(name=f"noisy_{edge.name}")
        self.indices, self.axis = edge.indices, edge.axis

    def call(self, inputs):
        x, z = inputs
        first, last = self.indices[0], self.indices[-1] + 1
        if last <= z.shape[1] and np.array_equal(self.indices, np.arange(first, last)):
            z = z[:, first:last]  # twice as fast
        else:
            always_open = ops.ones_like(z[:, :1])
            z = ops.take(ops.concatenate([z, always_open], axis=1), self.indices, axis=1)
        shape = [-1, *(1 for _ in x.shape[1:])]
        shape[self.axis] = len(self.indices)
        return x * ops.reshape(z, shape)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs[0].shape)


class NoisyWeights(keras.layers.Layer):
    """A Dense or convolution layer whose weights are independent normal variables.

    Args:
        layer: The layer; its weights are the means.
    """

    def __init__(self, layer):
        super().__init__(name=f"noisy_{layer.name}")
        self.layer = layer
        self.seed_generator = keras.random.SeedGenerator()
        start = keras.initializers.Constant(INITIAL_LOG_VARIANCE)
        self.log_variances = [
            self.add_weight(w.shape, start, name=f"{w.name}_log_variance")
            for w in layer.trainable_weights
        ]

    def call(self, inputs, training=None):
        """Draws what the layer computes: sums for every example, kernels for a batch."""
        if not training:
            return self.layer(inputs)
        means = [ops.convert_to_tensor(w) for w in self.layer.trainable_weights]
        variances = [ops.exp(log_variance) for log_variance in self.log_variances]
        if hasattr(self.layer, "convolution_op"):
            drawn = [self._drawn(*moments) for moments in zip(means, variances, strict=True)]
            outputs = self._applied(self.layer.convolution_op, inputs, drawn)
        else:
            mean = self._applied(ops.matmul, inputs, means)
            variance = self._applied(ops.matmul, ops.square(inputs), variances)
            outputs = self._drawn(mean, variance + 1e-12)  # the root has no derivative at 0
        return self.layer.activation(outputs)

    def compute_output_spec(self, inputs, training=None):
        return self.layer.compute_output_spec(inputs)

    def _drawn(self, mean, variance):
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.sqrt(variance) * noise

    def _applied(self, linear, inputs, weights):
        outputs = linear(inputs, weights[0])
        return outputs + weights[1] if len(weights) > 1 else outputs

    def prices(self):
        """KL of each kind of weights to N(0, 1): a list of scalars."""
        pairs = zip(self.layer.trainable_weights, self.log_variances, strict=True)
        return [ops.sum(standard_normal_price(w, log_v)) for w, log_v in pairs]


def standard_normal_price(mean, log_variance):
    """KL from normal variables to N(0, 1), element by element."""
    return 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)


class NoisyNetwork(keras.Model):
    """A gated network with noise in place of its gates.

    Args:
        gated: A `GatedNetwork` of one bank.
        noise: What takes the place of the bank.
        steps: Steps of training.
        price_of_neurons: What a neuron's price is multiplied by, a scalar or `(neurons,)`.
        price_of_weights: The same for weights; they have no noise at 0.
        warm_up: Part of the steps in which prices set in.
    """

    def __init__(self, gated, noise, steps, price_of_neurons, price_of_weights=0.0, warm_up=0.0):
        super().__init__()
        self.noise = noise
        self.noisy_weights = []
        self.price_of_neurons, self.price_of_weights = price_of_neurons, price_of_weights
        self.warm_up_steps = warm_up * steps
        self.net = keras.models.clone_model(gated.net, clone_function=self._replaced)
        rate = keras.optimizers.schedules.CosineDecay(2.0 * NOISE_TRAVEL / steps, steps)
        self.noise_optimizer = keras.optimizers.Adam(rate, name="noise_optimizer")
        self.noise_variables = [
            *noise.trainable_weights,
            *(v for layer in self.noisy_weights for v in layer.log_variances),
        ]
        self.noise_optimizer.build(self.noise_variables)

    def _replaced(self, layer):
        if isinstance(layer, GateBank):
            return self.noise
        if isinstance(layer, GateEdge):
            return NoisyEdge(layer)
        if self.price_of_weights and hasattr(layer, "kernel"):
            self.noisy_weights.append(NoisyWeights(layer))
            return self.noisy_weights[-1]
        return layer

    def call(self, inputs, training=None):
        return self.net(inputs, training=training)

    def price(self):
        """What all noise costs."""
        of_neurons = ops.sum(self.price_of_neurons * self.noise.prices())
        of_weights = sum(sum(layer.prices()) for layer in self.noisy_weights)
        return of_neurons + self.price_of_weights * of_weights

    def train_step(self, data):
        x, y = data
        noisy = {id(v) for v in self.noise_variables}
        weights = [v for v in self.net.trainable_variables if id(v) not in noisy]
        step = ops.cast(self.noise_optimizer.iterations, "float32")
        begun = ops.minimum(1.0, (step + 1.0) / max(1.0, self.warm_up_steps))
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True)) + begun * self.price()
        values = [[v.value for v in variables] for variables in (weights, self.noise_variables)]
        of_weights, of_noise = tape.gradient(loss, values)
        self.optimizer.apply(of_weights, weights)
        self.noise_optimizer.apply(of_noise, self.noise_variables)
        return {"loss": loss}


def vibnet(run):
    """Trains with the information bottleneck; `run.strength` is gamma.

    As in the authors' code a channel of a map pays for as many values as the map is wide.
    """
    gated = gated_network(run)
    noise = GaussianNoise(gated.sources[0], bottleneck_price)
    prices = run.strength * np.sqrt(positions(gated))
    steps = run.steps(run.case.epochs)
    noisy = NoisyNetwork(gated, noise, steps, prices.astype("float32"))
    noisy.compile(peers.adam(run, run.case.epochs), loss=run.case.loss)
    run.fit(noisy, run.case.epochs)
    return cut_out(gated, noise, rates_of(noise) < VIBNET_THRESHOLD)


def bc_gnj(run):
    """Bayesian compression with the normal-Jeffreys prior."""
    gated = gated_network(run)
    noise = GaussianNoise(gated.sources[0], normal_jeffreys_price)
    maximize_evidence(run, gated, noise)
    return cut_out(gated, noise, rates_of(noise) < GNJ_THRESHOLD)


def bc_ghs(run):
    """Bayesian compression with the horseshoe prior."""
    gated = gated_network(run)
    noise = HorseshoeNoise(gated.sources[0])
    maximize_evidence(run, gated, noise)
    ends = np.cumsum(noise.group_sizes)[:-1]
    keep = [lower_part(rates) for rates in np.split(rates_of(noise), ends)]
    return cut_out(gated, noise, np.concatenate(keep))


def maximize_evidence(run, gated, noise):
    """Trains with noise on weights, too; `run.strength` multiplies the KL divergence."""
    price = run.strength / len(run.x)
    steps = run.steps(run.case.epochs)
    noisy = NoisyNetwork(gated, noise, steps, price, price, WARM_UP)
    rate = keras.optimizers.schedules.CosineDecay(run.case.adam_rate, steps)
    noisy.compile(keras.optimizers.Adam(rate), loss=run.case.loss)
    run.fit(noisy, run.case.epochs)


def lower_part(values):
    """Which values are in the lower of the two parts with the least squares around their means."""
    ordered = np.sort(values)
    below = np.arange(1, len(values))
    sums = np.cumsum(ordered)
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / below[::-1]
    last = np.argmax(below * below[::-1] * apart**2)  # most of the variance is between the parts
    return values <= ordered[last]


def gated_network(run):
    """The network of a run with gates."""
    return GatedNetwork(insert_gates(run.model, prune_inputs=run.case.prune_inputs))


def positions(gated):
    """How many values of an example each gate multiplies, shape `(num_gates,)`."""
    count = np.zeros(gated.num_gates)
    for edge in gated.channels.edges:
        is_gated = edge.slots >= 0
        others = [n for k, n in enumerate(edge.value.shape) if k not in (0, edge.axis)]
        np.add.at(count, edge.slots[is_gated], math.prod(others))
    return count


def rates_of(noise):
    """Log dropout rates as an array."""
    return ops.convert_to_numpy(noise.log_dropout_rate())


def cut_out(gated, noise, keep):
    """Multiplies weights by the means of the noise they read, and removes the other neurons."""
    means = np.append(ops.convert_to_numpy(noise.mean()), 1.0)  # slot -1 has no gate
    for edge in gated.channels.edges:
        kernel = edge.layer.kernel
        kernel.assign(kernel * means[edge.slots][:, None])
    gated.sources[0].set_values(keep)
    return kp.compact(gated.net)

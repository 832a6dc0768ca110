"""The methods that ours is compared with, on the same gates and the same compaction.

`one_shot`: train the dense network, close the neurons with the lowest scores at once, fine-tune.
`hard_concrete`: L0 regularization at a fixed price (Louizos et al. 2018). `slimming`: an L1 penalty
on the scale of every channel, then the smallest go, then fine-tuning (Liu et al. 2017; the scale is
a gate of its own, so that networks without BatchNormalization take part, and begins at a half;
every layer loses the same share: with one threshold for all, a layer lost all channels but one).
All are trained by AdamW with cosine decay, and fine-tuning starts a cosine of its own. Gates have
an Adam of their own, whose steps add up to many times their range: at the rate of the weights they
would not get from open to closed within these runs. Runs that differ in score or size only share
the training before (`SharedStarts`). `narrowed` is for those who prune nothing.
"""

import time

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import tf_kfacprune as kp
from tf_kfacprune.gates import GatedNetwork, GatePhase, insert_gates
from tf_kfacprune.pruning import GateGroups, land_on_budget

TRAINED = 2 / 3  # of all epochs; the rest is for fine-tuning
SCORED = 10_000  # images that scores are averaged over
COMPENSATED = 2_000  # images that second moments are averaged over
# What the gates' steps would add up to if all went the same way; they close below -2.4 and at 0.
HARD_CONCRETE_TRAVEL = 60.0
SCALE_TRAVEL = 10.0


class SharedStarts:
    """Weights after the first part of a run, for all runs that begin alike.

    Attributes:
        seconds_spared: What has not been trained again so far.
    """

    def __init__(self):
        self.seconds_spared = 0.0
        self._known = {}

    def train(self, name, model, fit):
        """Trains a model by `fit()`, or gives it the weights that this once led to."""
        if name in self._known:
            weights, seconds = self._known[name]
            model.set_weights(weights)
            self.seconds_spared += seconds
            return
        start = time.perf_counter()
        fit()
        self._known[name] = model.get_weights(), time.perf_counter() - start


class PenalizedGates(keras.Model):
    """A gated network whose gates cost a fixed price each.

    Args:
        net: A network with gates inserted.
        prices: What each gate costs, times its probability to be open; shape `(num_gates,)`.
        travel: Sum of the learning rates of the gates, which decay along a cosine.
        steps: Steps of training.
    """

    def __init__(self, net, prices, travel, steps):
        super().__init__()
        self.net = net
        (self.bank,) = GatedNetwork(net).sources
        self.bank.phase.assign(int(GatePhase.PRUNING))
        self.prices = np.asarray(prices, "float32")
        rate = keras.optimizers.schedules.CosineDecay(2.0 * travel / steps, steps)
        self.gate_optimizer = keras.optimizers.Adam(rate, name="gate_optimizer")
        self.gate_optimizer.build([self.bank.parameters])

    def call(self, inputs, training=None):
        return self.net(inputs, training=training)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + ops.sum(self.prices * self.bank.open_probability())

    def train_step(self, data):
        x, y = data
        gates = [self.bank.parameters]
        weights = [v for v in self.net.trainable_variables if v is not self.bank.parameters]
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        values = [[v.value for v in variables] for variables in (weights, gates)]
        of_weights, of_gates = tape.gradient(loss, values)
        self.optimizer.apply(of_weights, weights)
        self.gate_optimizer.apply(of_gates, gates)
        return {"loss": loss}


def adam(run, epochs):
    """AdamW with cosine decay over so many epochs."""
    rate = keras.optimizers.schedules.CosineDecay(run.case.adam_rate, run.steps(epochs))
    return keras.optimizers.AdamW(rate, weight_decay=run.case.adam_decay)


def one_shot(run, criterion, compensate=False):
    """Trains, prunes at once by `"magnitude"` or `"taylor"`, and fine-tunes."""
    case, first = run.case, round(TRAINED * run.case.epochs)
    run.model.compile(adam(run, first), loss=case.loss)
    run.starts.train("dense", run.model, lambda: run.fit(run.model, first))
    keras.utils.set_random_seed(run.seed)
    pm = kp.PrunableModel(
        run.model,
        budget=run.budget,
        policy=kp.ScheduledClosing(criterion, every=len(run.x)),  # only at the end of the phase
        prune_inputs=case.prune_inputs,
        phases=kp.Phases(0.0, 0.95),
        seed=run.seed,
    )
    # Scores are averages over steps; at learning rate zero the network stays what it is.
    pm.compile(keras.optimizers.SGD(0.0), case.loss)
    x = run.x[:SCORED]
    pm.fit(x, run.y[:SCORED], batch_size=case.batch_size, verbose=0)
    data = x[:COMPENSATED] if compensate else None
    return fine_tuned(run, kp.compact(pm, compensate=compensate, data=data), first)


def fine_tuned(run, small, first):
    """Trains a compact network for what is left after the first epochs."""
    epochs = run.case.epochs - first
    small.compile(adam(run, epochs), loss=run.case.loss)
    run.fit(small, epochs)
    return small


def hard_concrete(run):
    """Trains with hard-concrete gates; `run.strength` prices the weights that a neuron frees."""
    net = insert_gates(run.model, prune_inputs=run.case.prune_inputs)
    gated = GatedNetwork(net)
    freed = np.array([freed_params(gated, k) for k in range(gated.channels.num_neurons)])
    prices = np.zeros(gated.num_gates)
    prices[gated.neuron_gates[:, 0]] = run.strength * freed / gated.cost.params_dense
    steps = run.steps(run.case.epochs)
    penalized = PenalizedGates(net, prices, HARD_CONCRETE_TRAVEL, steps)
    penalized.compile(adam(run, run.case.epochs), loss=run.case.loss)
    run.fit(penalized, run.case.epochs)
    return kp.compact(net)


def freed_params(gated, neuron):
    """Parameters that go with one neuron of the dense network."""
    openness = np.ones(gated.channels.num_neurons)
    openness[neuron] = 0.0
    return gated.cost.params_dense - gated.cost.count("params", openness)


def slimming(run, penalty):
    """Trains with an L1 penalty on channel scales, cuts the smallest, and fine-tunes."""
    case, first = run.case, round(TRAINED * run.case.epochs)
    net = insert_gates(run.model, prune_inputs=case.prune_inputs, kind="deterministic")
    gated = GatedNetwork(net)
    prices = np.full(gated.num_gates, penalty / gated.num_gates)
    penalized = PenalizedGates(net, prices, SCALE_TRAVEL, run.steps(first))
    penalized.bank.parameters.assign(np.full(gated.num_gates, 0.5))
    penalized.compile(adam(run, first), loss=case.loss)
    run.starts.train("slimming", penalized, lambda: run.fit(penalized, first))
    keras.utils.set_random_seed(run.seed)
    close_the_same_share(gated, ops.convert_to_numpy(penalized.bank.parameters), run.budget)
    return fine_tuned(run, kp.compact(net), first)


def narrowed(run):
    """What anybody would do first: the same network with fewer units in every layer, untrained.

    Every layer keeps the same share, the largest one that obeys the budget; inputs stay. The
    initial weights are drawn for the small network.
    """
    net = insert_gates(run.model, kind="deterministic")
    gated = GatedNetwork(net)
    close_the_same_share(gated, np.arange(gated.num_gates), run.budget)
    return keras.models.clone_model(kp.compact(net))


def close_the_same_share(gated, values, budget):
    """Closes the same share of the gates of every group, those with the smallest values."""
    groups = GateGroups(gated)
    (bank,) = gated.sources
    keep = land_on_budget(
        ranks_in_groups(values, groups.of_gate),
        groups.of_gate,
        groups.counts,
        lambda measure, gates: gated.cost.fraction(measure, gated.openness(gates)),
        budget.targets,
    )
    bank.settle(keep)


def ranks_in_groups(values, groups):
    """For each value the share of its group that is smaller."""
    ranks = np.zeros(len(values), "float32")
    for group in np.unique(groups):
        (members,) = np.nonzero(groups == group)
        ranks[members[np.argsort(values[members])]] = np.arange(len(members)) / len(members)
    return ranks

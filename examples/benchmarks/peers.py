"""The methods that ours is compared with, on the same gates and the same compaction.

`one_shot`: train the dense network, close the neurons with the lowest scores at once, fine-tune.
`hard_concrete`: L0 regularization at a fixed price (Louizos et al. 2018). `slimming`: an L1 penalty
on the scale of every channel, then a global threshold, then fine-tuning (Liu et al. 2017; the scale
is a gate of its own, so that networks without BatchNormalization take part). All are trained by
Adam with cosine decay, and fine-tuning starts a cosine of its own.
"""

import math

import keras
import numpy as np
from keras import ops

import tf_kfacprune as kp
from tf_kfacprune.gates import GatedNetwork, GatePhase, insert_gates
from tf_kfacprune.pruning import GateGroups, land_on_budget

TRAINED = 2 / 3  # of all epochs; the rest is for fine-tuning


@keras.saving.register_keras_serializable(package="benchmarks")
class TwoCosines(keras.optimizers.schedules.LearningRateSchedule):
    """One cosine decay for training, and one for fine-tuning."""

    def __init__(self, rate, first_steps, total_steps):
        self.rate, self.first_steps, self.total_steps = rate, first_steps, total_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        first, rest = float(self.first_steps), float(self.total_steps - self.first_steps)
        progress = ops.where(step < first, step / first, (step - first) / max(rest, 1.0))
        return self.rate * 0.5 * (1.0 + ops.cos(math.pi * ops.clip(progress, 0.0, 1.0)))

    def get_config(self):
        return {
            "rate": self.rate,
            "first_steps": self.first_steps,
            "total_steps": self.total_steps,
        }


class PenalizedGates(keras.Model):
    """A gated network whose gates cost a fixed price each.

    Args:
        net: A network with gates inserted.
        prices: What each gate costs, times its probability to be open; shape `(num_gates,)`.
    """

    def __init__(self, net, prices):
        super().__init__()
        self.net = net
        (self.bank,) = GatedNetwork(net).sources
        self.bank.phase.assign(int(GatePhase.PRUNING))
        self.prices = np.asarray(prices, "float32")

    def call(self, inputs, training=None):
        return self.net(inputs, training=training)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + ops.sum(self.prices * self.bank.open_probability())


def steps_of(case, x):
    """Steps of a whole run."""
    return -(-len(x) // case.batch_size) * case.epochs


def one_shot(case, model, x, y, seed, criterion, budget):
    """Trains, prunes at once by `"magnitude"` or `"taylor"`, and fine-tunes."""
    total = steps_of(case, x)
    scored = 0.02  # of all steps, for the average of the scores
    pm = kp.PrunableModel(
        model,
        budget=budget,
        policy=kp.ScheduledClosing(criterion, every=10 * total),  # only at the end of the phase
        prune_inputs=case.prune_inputs,
        phases=kp.Phases(TRAINED - scored, scored),
        seed=seed,
    )
    schedule = TwoCosines(case.adam_rate, round(TRAINED * total), total)
    pm.compile(keras.optimizers.Adam(schedule), loss=case.loss)
    pm.fit(x, y, batch_size=case.batch_size, epochs=case.epochs, verbose=0)
    return kp.compact(pm)


def hard_concrete(case, model, x, y, strength):
    """Trains with hard-concrete gates; `strength` prices the weights that a neuron frees."""
    net = insert_gates(model, prune_inputs=case.prune_inputs)
    gated = GatedNetwork(net)
    freed = np.array([freed_params(gated, k) for k in range(gated.channels.num_neurons)])
    prices = np.zeros(gated.num_gates)
    prices[gated.neuron_gates[:, 0]] = strength * freed / gated.cost.params_dense
    penalized = PenalizedGates(net, prices)
    schedule = keras.optimizers.schedules.CosineDecay(case.adam_rate, steps_of(case, x))
    penalized.compile(keras.optimizers.Adam(schedule), loss=case.loss)
    penalized.fit(x, y, batch_size=case.batch_size, epochs=case.epochs, verbose=0)
    return kp.compact(net)


def freed_params(gated, neuron):
    """Parameters that go with one neuron of the dense network."""
    openness = np.ones(gated.channels.num_neurons)
    openness[neuron] = 0.0
    return gated.cost.params_dense - gated.cost.count("params", openness)


def slimming(case, model, x, y, strength, budget):
    """Trains with an L1 penalty on channel scales, cuts the smallest, and fine-tunes."""
    net = insert_gates(model, prune_inputs=case.prune_inputs, kind="deterministic")
    gated = GatedNetwork(net)
    penalized = PenalizedGates(net, np.full(gated.num_gates, strength / gated.num_gates))
    total = steps_of(case, x)
    schedule = TwoCosines(case.adam_rate, round(TRAINED * total), total)
    penalized.compile(keras.optimizers.Adam(schedule), loss=case.loss)
    first = round(TRAINED * case.epochs)
    penalized.fit(x, y, batch_size=case.batch_size, epochs=first, verbose=0)
    bank, groups = penalized.bank, GateGroups(gated)
    keep = land_on_budget(
        ops.convert_to_tensor(bank.logits),
        groups.of_gate,
        groups.counts,
        lambda measure, gates: gated.cost.fraction(measure, gated.openness(gates)),
        budget.targets,
    )
    bank.settle(keep)
    penalized.fit(
        x, y, batch_size=case.batch_size, initial_epoch=first, epochs=case.epochs, verbose=0
    )
    return kp.compact(net)

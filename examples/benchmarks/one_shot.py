"""One-shot pruning of a trained network, with and without compensated removal.

    python examples/benchmarks/one_shot.py [--seeds=3] [--epochs=15]

Trains the digits CNN without gates, closes the gates of the channels whose removal changes their
readers least, and compacts, without any training afterwards. Accuracy is that of the test images.
One line per seed and share of neurons kept is appended to results/one_shot.jsonl.
"""

import keras
import numpy as np
from absl import app, flags
from records import Records

import tf_kfacprune as kp
from tf_kfacprune.gates import GatedNetwork, insert_gates

SEEDS = flags.DEFINE_integer("seeds", 3, "Number of networks.")
EPOCHS = flags.DEFINE_integer("epochs", 15, "Passes over the training data.")
KEPT = flags.DEFINE_list("kept", ["0.75", "0.5", "0.35", "0.25"], "Shares of neurons that stay.")
NETWORK = flags.DEFINE_string("network", "digits_cnn", "Name of a built-in network.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/.")


def saliency(gated, x):
    """For each neuron the mean square of what its channels add to their readers' pre-activations.

    For a Dense layer w^T w E[a^2] per channel, relative to the sum over all channels of the layer.
    """
    scores = np.zeros(gated.channels.num_neurons + 1)
    reads = {edge.call: edge for edge in gated.channels.edges}
    seen = {}

    def call_operation(call, args, kwargs):
        if call in reads:
            value = keras.ops.convert_to_numpy(args[0])
            seen[call] = np.mean(value**2, axis=tuple(range(value.ndim - 1)))
        return call.execute(args, kwargs)

    gated.graph.run(x, call_operation, training=False)
    for call, energy in seen.items():
        kernel = keras.ops.convert_to_numpy(call.operation.kernel)
        power = np.sum(kernel**2, axis=tuple(k for k in range(kernel.ndim) if k != kernel.ndim - 2))
        share = power * energy / np.sum(power * energy)
        np.add.at(scores, reads[call].neurons, share)
    return scores[:-1]


def close_least(gated, scores, kept):
    """Closes the gates of all but the given share of each group's neurons."""
    values = np.zeros(gated.num_gates)
    for group in gated.channels.groups:
        best = np.argsort(scores[group.neurons])[::-1][: max(1, round(kept * group.size))]
        values[gated.neuron_gates[group.start + best, 0]] = 1.0
    (bank,) = gated.sources
    bank.set_values(values)


def accuracy(model, x, y):
    """Share of correct classifications."""
    return float(np.mean(np.argmax(model.predict(x, verbose=0), axis=-1) == y))


def run(seed, records):
    """Trains one network and prunes it to each share."""
    keras.utils.set_random_seed(seed)
    data = kp.data.load("digits")
    model = kp.zoo.build(NETWORK.value, data.input_shape, data.num_classes, seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    model.fit(data.x_train, data.y_train, batch_size=32, epochs=EPOCHS.value, verbose=0)
    dense = accuracy(model, data.x_test, data.y_test)
    net = insert_gates(model)
    gated = GatedNetwork(net)
    scores = saliency(gated, data.x_train[:512])
    for kept in map(float, KEPT.value):
        key = {"network": NETWORK.value, "seed": seed, "epochs": EPOCHS.value, "kept": kept}
        if key in records:
            continue
        close_least(gated, scores, kept)
        plain = kp.compact(net)
        compensated = kp.compact(net, compensate=True, data=data.x_train)
        values = {
            "params": plain.count_params() / model.count_params(),
            "dense": dense,
            "plain": accuracy(plain, data.x_test, data.y_test),
            "compensated": accuracy(compensated, data.x_test, data.y_test),
        }
        records.add(key, values)


def main(argv):
    """Runs what is not yet recorded."""
    del argv
    records = Records("one_shot.jsonl", OUTPUT.value)
    for seed in range(SEEDS.value):
        run(seed, records)


if __name__ == "__main__":
    app.run(main)

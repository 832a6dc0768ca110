"""Whether budgets are obeyed: short runs of three networks at targets from 50 % to 2 %.

    python examples/benchmarks/budgets.py --data_dir=DIR [--measure=latency --latency_of=int8]

Every run trains and prunes a network on a small part of the data, for as many steps as it takes to
see where the policy leads; accuracy is not the point. DIR holds mnist.npz; ResNet-20 sees the
same digits as 16 x 16 images in three colors. One line per run goes to results/budgets.jsonl:
budget asked and achieved, with the reason where they differ; `before`, the cost of the network
just before it lands; `closed` and `reopened`, the gates that landing switched, of `gates`; and,
where bytes or latency were asked for, `measured`: the size of the compact network's .tflite file,
or its time in LiteRT, relative to the dense network's. (`latency.py` compares predicted latencies
with measured ones for more networks, without training any.)
"""

import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from absl import app, flags
from records import Records

import tf_kfacprune as kp
from tf_kfacprune.reporting import tflite_size

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder with mnist.npz; Keras downloads it without it.")
flags.DEFINE_list("networks", ["lenet300", "lenet5", "resnet20"], "Built-in networks.")
flags.DEFINE_list("targets", ["0.5", "0.2", "0.1", "0.05", "0.02"], "Fractions to keep.")
MEASURES = ["macs", "params", "bytes", "latency"]
flags.DEFINE_enum("measure", "macs", MEASURES, "What the budget bounds.")
flags.DEFINE_enum("latency_of", "float32", ["float32", "int8"], "File that a latency is of.")
flags.DEFINE_string("policy", "kfac", "Closing policy.")
flags.DEFINE_enum("optimizer", "kfac", ["adam", "kfac"], "Optimizer.")
flags.DEFINE_integer("seeds", 3, "Runs of each kind.")
flags.DEFINE_integer("images", 1024, "Training images.")
flags.DEFINE_integer("epochs", 8, "Passes over them.")
flags.DEFINE_integer("batch_size", 64, "Images per step.")
flags.DEFINE_string("output", None, "Folder of the records; default: results/.")

SETTINGS = ("measure", "policy", "optimizer", "images", "epochs", "batch_size")


class Landing(keras.callbacks.Callback):
    """Looks at the gates just before and just after the step in which the network lands."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.figures: dict = {}

    def on_train_batch_begin(self, batch, logs=None) -> None:
        """Remembers the network that the pruning phase leaves."""
        if self.step == int(self.model.controller.prune_end):
            outcome = next(iter(self.model.budget_outcomes().values()))
            self.figures["before"] = outcome.achieved
            self.open_before = self.model.gated.gate_values() > 0

    def on_train_batch_end(self, batch, logs=None) -> None:
        """Counts what landing changed."""
        if self.step == int(self.model.controller.prune_end):
            is_open = self.model.gated.gate_values() > 0
            self.figures["gates"] = len(is_open)
            self.figures["closed"] = int((self.open_before & ~is_open).sum())
            self.figures["reopened"] = int((is_open & ~self.open_before).sum())
        self.step += 1


def images(name, data):
    """The training images as the network takes them, and its input shape."""
    x = data.x_train[: FLAGS.images]
    if name != "resnet20":
        return (x.reshape(len(x), -1), (784,)) if name == "lenet300" else (x, x.shape[1:])
    small = np.asarray(keras.ops.image.resize(x, (16, 16)))
    return np.repeat(small, 3, axis=-1), (16, 16, 3)


def int8_file(model, file, x):
    """The model's full int8 file."""
    return kp.export.tflite(
        model, file, quantization="int8", representative_data=x, batch_size=1, verify=False
    )


def measured(dense, compact, x):
    """What a budget in bytes or latency comes to on this machine: compact relative to dense."""
    if FLAGS.measure == "bytes":
        for bias in dense.trainable_variables:  # a file holds equal ones, as all are yet, only once
            if bias.shape.rank == 1:
                bias.assign(np.random.default_rng(0).uniform(0.5, 1.5, bias.shape))
        return {"measured": tflite_size(compact).raw / tflite_size(dense).raw}
    if FLAGS.measure == "latency":
        models = {"dense": dense, "compact": compact}
        with tempfile.TemporaryDirectory() as folder:
            if FLAGS.latency_of == "int8":
                models = {
                    name: int8_file(model, Path(folder) / f"{name}.tflite", x)
                    for name, model in models.items()
                }
            return {"measured": kp.export.latency(models).ratios["compact"]}
    return {}


def run(name, target, seed, data):
    """Trains, prunes and looks at the outcome."""
    keras.utils.set_random_seed(seed)
    x, shape = images(name, data)
    dense, table = kp.zoo.build(name, shape, data.num_classes, seed), None
    if FLAGS.measure == "latency":
        table = kp.export.latency_table(dense, of=FLAGS.latency_of)
    model = kp.PrunableModel(
        dense,
        kp.Budget(**{FLAGS.measure: target}),
        policy=FLAGS.policy,
        prune_inputs=name == "lenet300",
        latency_table=table,
        seed=seed,
    )
    optimizer = keras.optimizers.Adam(1e-3) if FLAGS.optimizer == "adam" else kp.KFAC(1e-2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    landing = Landing()
    start = time.time()
    history = model.fit(
        x,
        data.y_train[: FLAGS.images],
        batch_size=FLAGS.batch_size,
        epochs=FLAGS.epochs,
        callbacks=[landing],
        verbose=0,
    ).history
    seconds = time.time() - start
    outcome = model.budget_outcomes()[FLAGS.measure]
    return {
        "achieved": outcome.achieved,
        "ratio": outcome.ratio,
        **measured(dense, kp.compact(model), x[:64]),
        **landing.figures,
        "reason": outcome.reason,
        "train_accuracy": history["accuracy"][-1],
        "seconds": seconds,
    }


def main(argv) -> None:
    """Runs what is not yet recorded, seed by seed."""
    del argv
    records = Records("budgets.jsonl", FLAGS.output)
    data = kp.data.load("mnist", FLAGS.data_dir)
    settings = {name: FLAGS[name].value for name in SETTINGS}
    if FLAGS.measure == "latency":
        settings["latency_of"] = FLAGS.latency_of
    for seed in range(FLAGS.seeds):
        for network in FLAGS.networks:
            for target in map(float, FLAGS.targets):
                key = {"network": network, "seed": seed, "asked": target, **settings}
                if key in records:
                    continue
                try:
                    result = run(network, target, seed, data)
                except kp.errors.BudgetError as error:  # less than pruning can reach
                    result = {"achieved": None, "reason": str(error)}
                keras.backend.clear_session()
                records.add(key, result)


if __name__ == "__main__":
    app.run(main)

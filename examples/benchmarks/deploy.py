"""Deploys pruned networks in every format, and the models of `keras.applications` in two.

    python examples/benchmarks/deploy.py networks [--networks=lenet5,resnet20] [--data_dir=DIR]
    python examples/benchmarks/deploy.py latency  [--networks=lenet5,resnet20]
    python examples/benchmarks/deploy.py applications [--models=MobileNet,VGG16]

`networks` trains and prunes on real data, compacts, writes every format and compares the accuracy
of each file on the test images with that of the compact Keras model. `latency` times the compact
against the dense networks of that size; weights do not matter for it, so that it needs no training
and takes minutes: run it on a quiet machine. `applications` closes random gates of every model,
compacts it, and writes it as float32 and full int8 files that must agree with the Keras model; what
the converter cannot do is recorded with its message. Records are appended to results/*.jsonl, one
line each; what is there already is skipped.
"""

import gc
import inspect
import os
import platform
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from absl import app, flags
from records import Records

import tf_kfacprune as kp
from tf_kfacprune.compaction import random_inputs
from tf_kfacprune.gates import GatedNetwork, insert_gates

NETWORKS = flags.DEFINE_list("networks", None, "Networks; default: all.")
MODELS = flags.DEFINE_list("models", None, "Names in keras.applications; default: all.")
SIZE = flags.DEFINE_integer("size", 64, "Height and width of images for keras.applications.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of MNIST and CIFAR-10; else downloaded.")
EXAMPLES = flags.DEFINE_integer("examples", None, "Training images; default: all.")
EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs; default: 10 for LeNet-5, else 5.")
THREADS = flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads to time with.")
BLOCKS = flags.DEFINE_integer("blocks", 30, "Interleaved blocks of the time measurement.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the records; default: results/ beside.")

FORMATS = (None, "float16", "dynamic", "int8", "int16x8")


# Network: builder, data set, shape of an example, budget.
CASES = {
    "lenet5": (kp.zoo.lenet5, "mnist", (28, 28, 1), kp.Budget(params=0.0092)),
    "resnet20": (kp.zoo.resnet20, "cifar10", (32, 32, 3), kp.Budget(macs=0.1)),
    "mobilenetv2": (kp.zoo.mobilenetv2, "cifar10", (32, 32, 3), kp.Budget(macs=0.3)),
}
# What `latency` times: network, and the share of neurons kept, or their number in the first layer
# name that fits. 5-10-16 is a LeNet-5 of 4,095 weights. The two ResNet-20 have a tenth of the MACs:
# with the same share of channels everywhere, and with numbers of channels that fill registers.
TIMED = {
    "lenet5": ("lenet5", {"conv1": 5, "conv2": 10, "fc1": 16}),
    "resnet20": ("resnet20", 0.31),
    "resnet20_by_8": (
        "resnet20",
        {
            "stem": 8,
            "stage1_block3_a": 4,
            "stage1_": 8,
            "stage2_": 8,
            "stage3_block1_b": 16,
            "stage3_": 8,
        },
    ),
    "mobilenetv2": ("mobilenetv2", 0.5),
}


def weights_of(model):
    """Number of weights without biases."""
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights if "kernel" in w.path)


def settle_statistics(model, x):
    """Moves an untrained network half the way to the statistics of a batch.

    Without them the activations of a deep one vanish, and nothing is left to quantize; all the way,
    every layer magnifies the small differences between examples, and rounding errors with them.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5
    model(x, training=True)


def closed_at_random(model, kept, seed=0):
    """A compact model with a share of the neurons of every group, or a count for named layers."""
    rng = np.random.default_rng(seed)
    net = insert_gates(model)
    gated = GatedNetwork(net)
    values = np.zeros(gated.num_gates)
    for group in gated.channels.groups:
        count = round(kept * group.size) if np.isscalar(kept) else None
        if count is None:
            count = next((kept[name] for name in kept if name in str(group.producers)), group.size)
        chosen = rng.permutation(group.size)[: max(1, count)]
        values[gated.neuron_gates[group.start + chosen, 0]] = 1.0
    (bank,) = gated.sources
    bank.set_values(values)
    return kp.compact(net, verify=False)


def networks():
    """Prunes on real data and checks the accuracy of every format."""
    records = Records("deploy_networks.jsonl", OUTPUT.value)
    for name in NETWORKS.value or CASES:
        build, data_name, _, budget = CASES[name]
        epochs = EPOCHS.value or (10 if name == "lenet5" else 5)
        key = {"network": name, "epochs": epochs, "examples": EXAMPLES.value}
        if key in records:
            continue
        data = kp.data.load(data_name, DATA_DIR.value)
        keras.utils.set_random_seed(0)
        x, y = data.x_train[: EXAMPLES.value], data.y_train[: EXAMPLES.value]
        pm = kp.PrunableModel(build(data.input_shape, 10, seed=0), budget=budget, seed=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        pm.compile(keras.optimizers.Adam(2e-3), loss=loss, metrics=["accuracy"])
        pm.fit(x, y, batch_size=128, epochs=epochs, verbose=2)
        small = kp.compact(pm)
        start = time.perf_counter()
        measured = kp.export.benchmark(
            {"compact": small},
            quantizations=FORMATS,
            representative_data=x,
            data=(data.x_test, data.y_test),
            blocks=1,
        )
        records.add(
            key,
            {
                "budget": budget.targets,
                "weights": weights_of(small),
                "macs": kp.inspect(small).macs,
                "keras_accuracy": kp.reporting.accuracy(small, data.x_test, data.y_test),
                "formats": {
                    row.quantization or "float32": {
                        "accuracy": row.accuracy,
                        "bytes": row.size.raw,
                        "gzip": row.size.gzip,
                        "activations": row.activations,
                    }
                    for row in measured.rows
                },
                "failures": measured.failures,
                "export_and_verify_s": round(time.perf_counter() - start, 1),
            },
        )


def latency():
    """Times compact against dense networks in every format."""
    records = Records("deploy_latency.jsonl", OUTPUT.value)
    for name in NETWORKS.value or TIMED:
        network, kept = TIMED[name]
        build, _, shape, _ = CASES[network]
        key = {"network": name, "threads": THREADS.value, "blocks": BLOCKS.value}
        if key in records:
            continue
        dense = build(shape, 10, seed=0)
        images = np.random.default_rng(0).random((64, *shape), "float32")
        settle_statistics(dense, images)
        small = closed_at_random(dense, kept)
        measured = kp.export.benchmark(
            {"dense": dense, "compact": small},
            quantizations=FORMATS,
            representative_data=images,
            threads=[int(count) for count in THREADS.value],
            blocks=BLOCKS.value,
        )
        print(measured, flush=True)
        machine = {"processor": processor(), "versions": kp.reporting.versions()}
        records.add(key, {"weights": weights_of(small), **machine, **measured.to_dict()})


def processor():
    """Name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def applications():
    """Converts compact models of keras.applications."""
    records = Records("deploy_applications.jsonl", OUTPUT.value)
    every = dict(inspect.getmembers(keras.applications, inspect.isfunction))
    for name in MODELS.value or every:
        for quantization in (None, "int8"):
            key = {"model": name, "size": SIZE.value, "quantization": quantization}
            if key not in records:
                start = time.perf_counter()
                values = converted(every[name], quantization)
                records.add(key, values | {"seconds": round(time.perf_counter() - start, 1)})
            keras.backend.clear_session()
            gc.collect()


def converted(constructor, quantization):
    """Writes one compact model as a file that agrees, or says why not."""
    keras.utils.set_random_seed(0)
    size = SIZE.value
    try:
        model = constructor(
            weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
        )
    except ValueError:  # a network with a least size of its own
        size = 96 if "NASNet" not in constructor.__name__ else 224
        model = constructor(
            weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
        )
    model(random_inputs(model, batch_size=8), training=True)  # moves the statistics a little
    params = model.count_params()
    small = closed_at_random(model, 0.5)
    del model
    x = np.asarray(random_inputs(small, batch_size=16))
    options = {"representative_data": x} if quantization else {"verify_data": x}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        record = {"size": size, "params": params, "compact_params": small.count_params()}
        try:
            kp.export.tflite(small, path, quantization=quantization, batch_size=1, **options)
        except kp.errors.KFACPruneError as error:
            # The error behind it does not name the log; a record names no folder of this machine.
            behind = isinstance(error.__cause__, kp.errors.KFACPruneError)
            message = str(error.__cause__ if behind else error).replace(f"{folder}{os.sep}", "")
            return record | {"agrees": False, "message": message[:500]}
        expected = small.predict(x, verbose=0)
        found = kp.export.run_tflite(path, x)
        rms = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
        return record | {"agrees": True, "bytes": path.stat().st_size, "rms_error": float(rms)}


def main(argv):
    """Runs the part that the command line names."""
    parts = {"networks": networks, "latency": latency, "applications": applications}
    if len(argv) != 2 or argv[1] not in parts:
        raise app.UsageError(f"Name one part: {', '.join(parts)}.")
    parts[argv[1]]()


if __name__ == "__main__":
    app.run(main)

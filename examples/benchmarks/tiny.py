"""ResNet-8 of MLPerf Tiny on all of CIFAR-10: pruned, narrow from the start, and what peers make.

    python examples/benchmarks/tiny.py --data_dir=DIR [--epochs=20] [--methods=ours,narrow_kfac]

Images are augmented as in the reference: turned by up to 15 degrees, moved by up to a tenth, and
mirrored. The reference trains for 500 epochs; this takes as many as are asked for, the same for
all. Networks are written as int8 files, which run on all test images with LiteRT, on 16 of them
with TensorFlow Lite Micro, and are timed here on one thread. Each finished run appends one line to
`results/tiny.jsonl`; what is in there is not run again.

References:
    Banbury et al. 2021, "MLPerf Tiny Benchmark"; ``image_classification/train.py`` of its
    reference implementation (https://github.com/mlcommons/tiny).
"""

import gc
import tempfile
from pathlib import Path

import frontier
import keras
import numpy as np
from absl import app, flags
from peers import SharedStarts
from records import Records

import tf_kfacprune as kp

SIZES = flags.DEFINE_list("sizes", ["0.5", "0.3", "0.15"], "Shares of the MACs to prune to.")

METHODS = (
    *("dense", "dense_kfac", "ours", "ours_penalty", "narrow", "narrow_kfac"),
    *("taylor", "slimming", "magnitude"),
)
DENSE = ("dense", "dense_kfac")
SEEDS = (0, 1, 2)
EPOCHS = 20
ON_MICRO = 16  # its reference kernels are slow


def augmented(batches):
    """Batches of images that are turned, moved and mirrored at random."""
    turn, move, mirror = (
        keras.layers.RandomRotation(15 / 360, fill_mode="nearest", seed=0),
        keras.layers.RandomTranslation(0.1, 0.1, fill_mode="nearest", seed=1),
        keras.layers.RandomFlip("horizontal", seed=2),
    )

    def change(images, labels):
        for layer in (turn, move, mirror):
            images = layer(images, training=True)
        return images, labels

    return batches.map(change)


CASE = frontier.Case(
    kp.zoo.resnet8,
    "cifar10",
    targets={},
    epochs=EPOCHS,
    batch_size=128,
    augment=augmented,
)


def deployed(small, data, folder):
    """Accuracy, sizes and time of the int8 file of a network."""
    path = Path(folder) / "net.tflite"
    kp.export.tflite(
        small,
        path,
        quantization="int8",
        representative_data=data.x_train[:500],
        batch_size=1,
        verify_data=(data.x_test[:200], data.y_test[:200]),
        max_accuracy_drop=1.0,  # it is what is measured here
        tolerance=10.0,
    )
    outputs = kp.export.run_tflite(path, data.x_test)
    micro = kp.export.check_micro(
        path, small, data.x_test[:ON_MICRO], max_examples=ON_MICRO, tolerance=10.0
    )
    times = kp.export.latency({"int8": path, "float32": small}).microseconds
    return {
        "int8_error": round(100 * float(np.mean(outputs.argmax(axis=-1) != data.y_test)), 3),
        "flash": micro.flash_bytes,
        "ram": micro.arena_bytes,
        "microseconds": {name: round(time, 1) for name, time in times.items()},
    }


def main(argv):
    """All runs that are not recorded yet."""
    del argv
    records = Records("tiny.jsonl", frontier.OUTPUT.value)
    case = frontier.chosen(CASE)
    data = frontier.load(case, "test")
    for seed in map(int, frontier.SEEDS.value or SEEDS):
        starts = SharedStarts()
        for method in frontier.METHODS_FLAG.value or METHODS:
            for size in [1.0] if method in DENSE else map(float, SIZES.value):
                key = {"method": method, "macs": size, "seed": seed}
                key |= {"epochs": case.epochs, "examples": case.examples}
                if key in records:
                    continue
                budget = None if method in DENSE else kp.Budget(macs=size)
                small, seconds = frontier.trained(case, data, method, seed, starts, budget)
                with tempfile.TemporaryDirectory() as folder:
                    figures = frontier.measured(small, data) | deployed(small, data, folder)
                records.add(key, figures | {"seconds": round(seconds, 1)})
                keras.backend.clear_session()
                gc.collect()


if __name__ == "__main__":
    app.run(main)

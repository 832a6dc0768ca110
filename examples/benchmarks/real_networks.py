"""What K-FAC costs on real networks, against plain Keras with Adam: start-up, step, memory.

    python examples/benchmarks/real_networks.py            # finished runs are skipped
    python examples/benchmarks/real_networks.py --networks=ds_cnn,resnet8

Each run is a process of its own, with one thread, that takes a few steps on random data. *Start-up*
is the processor time from the finished network to the end of the first step, tracing included;
*step* that of the steps after the first period, over a whole period of factors and inverses, the
least of two; *memory* the peak resident set of the process, TensorFlow included. Appends to
`results/real_networks.jsonl`.
"""

import json
import resource
import subprocess
import sys
import time

from absl import app, flags
from records import Records

NETWORKS = {  # input shape, batch size
    "ds_cnn": ((49, 10, 1), 100),
    "resnet8": ((32, 32, 3), 32),
    "mobilenet_v1_025": ((96, 96, 3), 32),
    "fc_autoencoder": ((640,), 512),
    "MobileNetV2": ((96, 96, 3), 32),
    "ResNet50": ((96, 96, 3), 16),
    "EfficientNetB0": ((96, 96, 3), 16),
}
VARIANTS = ("adam", "kfac", "pruned")
PERIODS = 2

WHICH = flags.DEFINE_list("networks", list(NETWORKS), "Networks to measure.")
KINDS = flags.DEFINE_list("variants", list(VARIANTS), "adam, kfac (KFACModel), pruned.")
STEPS = flags.DEFINE_integer("steps", 50, "Steps that are timed: whole periods of the inverses.")
ONE = flags.DEFINE_string("one", None, "network/variant to run in this process.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where results go; default: results/.")


def network_of(name):
    """A network with ten classes, or the autoencoder."""
    import keras

    import tf_kfacprune as kp

    shape, batch = NETWORKS[name]
    if name == "fc_autoencoder":
        return kp.zoo.fc_autoencoder(shape, seed=0), batch
    if hasattr(kp.zoo, name):
        return getattr(kp.zoo, name)(shape, 10, seed=0), batch
    build = getattr(keras.applications, name)
    return build(weights=None, input_shape=shape, classes=10, classifier_activation=None), batch


def model_of(variant, network):
    """The network, wrapped, and the optimizer."""
    import keras

    import tf_kfacprune as kp

    if variant == "adam":
        return network, keras.optimizers.Adam(1e-3)
    if variant == "kfac":
        return kp.KFACModel(network, seed=0), kp.KFAC(1e-3)
    return kp.PrunableModel(network, kp.Budget(macs=0.5), seed=0), kp.KFAC(1e-3)


def memory():
    """Peak resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name, variant):
    """Start-up, step and memory of one network, printed as JSON."""
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)  # those that wait count as busy
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    network, batch = network_of(name)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(batch, *NETWORKS[name][0])).astype("float32")
    is_autoencoder = name == "fc_autoencoder"
    y = x if is_autoencoder else rng.integers(0, 10, batch)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    start = time.process_time()
    model, optimizer = model_of(variant, network)
    model.compile(optimizer, "mse" if is_autoencoder else loss, jit_compile=False)
    if variant == "pruned":
        model.plan_phases(10**6)
    model.make_train_function()
    model.train_function(data)
    start_up = time.process_time() - start
    for _ in range(STEPS.value - 1):  # the first period has more updates than others
        model.train_function(data)
    periods = []
    for _ in range(PERIODS):
        start = time.process_time()
        for _ in range(STEPS.value):
            model.train_function(data)
        periods.append((time.process_time() - start) / STEPS.value)
    figures = {"start_up": start_up, "step": min(periods), "memory": memory()}
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


def main(argv):
    """Runs what is missing and prints the ratios."""
    del argv
    if ONE.value:
        measure(*ONE.value.split("/"))
        return
    records = Records("real_networks.jsonl", OUTPUT_DIR.value)
    for name in WHICH.value:
        for variant in KINDS.value:
            key = f"{name}/{variant}"
            if key not in records:
                command = [sys.executable, __file__, f"--one={key}", f"--steps={STEPS.value}"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{key} failed:\n{done.stderr[-2000:]}")
                records.add(key, json.loads(done.stdout.splitlines()[-1]))
        adam = records.get(f"{name}/adam")
        for variant in KINDS.value:
            found = records.get(f"{name}/{variant}")
            ratios = {k: round(found[k] / adam[k], 2) for k in ("start_up", "step", "memory")}
            print(f"{name:<20} {variant:<8} {ratios}", flush=True)


if __name__ == "__main__":
    app.run(main)

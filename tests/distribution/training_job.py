"""A small training job, run by the tests in processes of their own: `training_job.py '<json>'`.

TensorFlow fixes devices and cluster when a process begins, so no test can share one.
"""

import contextlib
import json
import os
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tf_kfacprune as kp

RNG = np.random.default_rng(0)
X = RNG.normal(size=(21, 6)).astype("float32")
Y = (X[:, :3].sum(axis=1) > 0).astype("int32") + (X[:, 3] > 1)


def network():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.LayerNormalization()(x)))


class Dies(keras.callbacks.Callback):
    """Ends this process without warning, as a lost machine does."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def strategy_of(job):
    if job["strategy"] == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        return tf.distribute.MirroredStrategy(
            ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    if job["strategy"] == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy()
    return None


def train(strategy, case):
    settings = {"learning_rate": 0.05, "factor_every": 1, "inverse_every": 2, **case["kfac"]}
    if "adapt_every" in case:
        settings["damping"] = kp.LevenbergMarquardt(0.1, every=case["adapt_every"])
    x, y = X.copy(), Y
    if case.get("poison"):
        x[case["poison"]] = np.nan
    with strategy.scope() if strategy else contextlib.nullcontext():
        net = network()
        if "macs" in case:
            budget = kp.Budget(macs=case["macs"])
            model = kp.PrunableModel(net, budget, seed=0)
        else:
            model = kp.KFACModel(net, seed=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(kp.KFAC(**settings), loss, metrics=["accuracy"])
    callbacks = []
    if "backup" in case:
        callbacks.append(keras.callbacks.BackupAndRestore(case["backup"], delete_checkpoint=False))
    if "dies" in case:
        callbacks.append(Dies(case["dies"]))
    batch, epochs = case.get("batch", 5), case.get("epochs", 2)
    model.fit(x, y, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model


def main(job):
    strategy = strategy_of(job)
    found = {}
    for name, case in job["cases"].items():
        model = train(strategy, case)
        values = [(v.path, v.value) for v in [*model.net.weights, *model.optimizer.variables]]
        for k, (path, value) in enumerate(values):
            copies = getattr(value, "values", [value])
            for replica, copy in enumerate(copies):
                found[f"{name}|{k}:{path}|{replica}"] = np.asarray(tf.convert_to_tensor(copy))
        found[f"{name}|skipped|0"] = np.asarray(tf.convert_to_tensor(model.guard.skipped))
    np.savez(job["results"], **found)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

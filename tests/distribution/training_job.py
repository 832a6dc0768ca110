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
from tf_kfacprune.distribution import ReplicaSeedGenerator, cond, replica_id, sum_over_replicas

RNG = np.random.default_rng(0)
X = RNG.normal(size=(21, 6)).astype("float32")
Y = (X[:, :3].sum(axis=1) > 0).astype("int32") + (X[:, 3] > 1)
WEIGHTS = RNG.uniform(0.2, 3.0, size=21).astype("float32")


def network():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    # With names of their own: Keras numbers layers through, and paths are compared.
    x = keras.layers.Dense(8, activation="tanh", name="hidden")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


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
    settings = {"learning_rate": 0.05, "factor_every": 1, "inverse_every": 2}
    settings |= case.get("kfac", {})
    if "adapt_every" in case:
        settings["damping"] = kp.LevenbergMarquardt(0.1, every=case["adapt_every"])
    x, y = X.copy(), Y
    if case.get("poison"):
        x[case["poison"]] = np.nan
    with strategy.scope() if strategy else contextlib.nullcontext():
        net = network()
        if "macs" in case or "penalty" in case:
            budget = kp.Budget(macs=case["macs"]) if "macs" in case else None
            penalty = kp.SpectralRadius(**case["penalty"]) if "penalty" in case else None
            policy = case.get("policy", "hard_concrete")
            if "every" in case:
                policy = kp.ScheduledClosing(policy, case["every"])
            model = kp.PrunableModel(net, budget, penalty, policy=policy, seed=0)
        else:
            model = kp.KFACModel(net, seed=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = kp.KFAC(**settings) if "kfac" in case else keras.optimizers.Adam(0.05)
        model.compile(optimizer, loss, metrics=["accuracy"])
    callbacks = []
    if "backup" in case:
        callbacks.append(keras.callbacks.BackupAndRestore(case["backup"], delete_checkpoint=False))
    if "dies" in case:
        callbacks.append(Dies(case["dies"]))
    how = {"batch_size": 5, "epochs": case.get("epochs", 2), "shuffle": False, "verbose": 0}
    weights = WEIGHTS if case.get("weights") else None
    model.fit(x, y, sample_weight=weights, callbacks=callbacks, **how)
    return model


def chosen_by_replicas(strategy):
    """What branches with an all-reduce in them return to each replica."""

    def branch(scale):
        own = tf.cast(replica_id(), "float32") + 1.0
        return [scale * own, sum_over_replicas([own])[0]]

    @tf.function
    def step(which):
        return cond(which, lambda: branch(1.0), lambda: branch(10.0))

    found = {}
    for which in (True, False):
        returned = strategy.run(step, [tf.constant(which)])
        copies = [strategy.experimental_local_results(value) for value in returned]
        for k, of_replica in enumerate(zip(*copies, strict=True)):
            found[f"chosen|{which}|{k}"] = np.array(of_replica)
    return found


def refusals(strategy):
    """What `compile` says to what cannot work."""
    with strategy.scope():
        inside = network()
        normalized = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(3),
                keras.layers.BatchNormalization(synchronized=True),
            ]
        )
        optimizer = kp.KFAC()
    outside, attempts = network(), {}

    def attempt(name, net=inside, optimizer=optimizer, **arguments):
        try:
            with strategy.scope():
                kp.KFACModel(net).compile(optimizer, "mse", **arguments)
        except kp.errors.InvalidArgumentError as error:
            attempts[name] = str(error)

    attempt("steps_per_execution=2", steps_per_execution=2)
    attempt("jit_compile=True", jit_compile=True)
    with strategy.scope():
        attempt("ema", optimizer=kp.KFAC(use_ema=True, ema_overwrite_frequency=2))
        attempt("accumulation", optimizer=keras.optimizers.SGD(gradient_accumulation_steps=2))
    attempt("synchronized", net=normalized)
    attempt("model outside", net=outside)
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        other = keras.optimizers.SGD()
    attempt("optimizer outside", optimizer=other)
    return attempts


def main(job):
    strategy = strategy_of(job)
    found = {}
    if job.get("refusals"):
        found = {f"refused|{name}|0": text for name, text in refusals(strategy).items()}
        with strategy.scope():
            generator = ReplicaSeedGenerator(0)
        seeds = strategy.experimental_local_results(strategy.run(generator.next))
        found |= {f"seeds|seeds|{k}": np.asarray(seed) for k, seed in enumerate(seeds)}
        found |= chosen_by_replicas(strategy)
    for name, case in job["cases"].items():
        model = train(strategy, case)
        penalty = getattr(model, "curvature_penalty", None)
        of_penalty = [] if penalty is None else penalty.weights
        variables = [*model.net.weights, *model.optimizer.variables, *of_penalty]
        values = [(v.path, v.value) for v in variables]
        for k, (path, value) in enumerate(values):
            copies = getattr(value, "values", [value])
            for replica, copy in enumerate(copies):
                found[f"{name}|{k}:{path}|{replica}"] = np.asarray(tf.convert_to_tensor(copy))
        if "macs" in case:
            found[f"{name}|cost|0"] = np.asarray(
                tf.convert_to_tensor(model.controller.fraction("macs"))
            )
            found[f"{name}|settled|0"] = np.asarray(model.controller.has_settled)
        found[f"{name}|skipped|0"] = np.asarray(tf.convert_to_tensor(model.guard.skipped))
    np.savez(job["results"], **found)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

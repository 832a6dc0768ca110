"""Training on several replicas takes the steps of one device with the whole batch."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

JOB = Path(__file__).with_name("training_job.py")
EXACT = {"batch_fraction": 1.0, "labels": "exact"}
# So strong that it is as long as it may be in some variables, and in some it is not.
PENALTY = {"strength": 0.1, "every": 2, "batch_fraction": 1.0, "labels": "data"}
# 21 examples in batches of 5: parts of 3 and 2, and at last a batch that leaves a replica idle.
CASES = {
    "clipped": {
        "kfac": {**EXACT, "clipnorm": 0.05, "weight_decay": 1e-3, "factor_every": 2},
        "epochs": 3,
    },
    "ekfac, inverses sharded": {
        "kfac": {**EXACT, "labels": "data", "inverse": "ekfac", "shard_inverses": True}
    },
    "adaptive": {"kfac": {**EXACT, "learning_rate": "auto"}, "adapt_every": 2},
    "poisoned": {"kfac": {**EXACT, "inverse": "eigen", "use_ema": True}, "poison": 4},
    "pruned": {"kfac": EXACT, "macs": 0.5, "epochs": 4},
    "switched": {"macs": 0.5, "epochs": 4, "policy": "taylor", "every": 3},
    "flattened": {"penalty": PENALTY, "weights": True},
    "flattened and pruned": {
        "penalty": {**PENALTY, "relative": False, "reduction": "max"},
        "kfac": EXACT,
        "macs": 0.5,
        "epochs": 4,
    },
}
# Replicas sample labels of their own, so that one device cannot take the same steps.
SAMPLED = {"curvature": {"macs": 0.5, "epochs": 4, "policy": "kfac", "every": 3}}
# What the quick job finds; each other case takes ten seconds of tracing more.
QUICK = ("poisoned", "pruned", "flattened", "refused", "seeds", "chosen")
TIMEOUT = 400
# The first test waits for both jobs, minutes on a slow machine.
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def _start(job, **environment):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": str(JOB.parents[2]),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, str(JOB), json.dumps(job)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process):
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


def _results(path):
    """case -> variable -> its copies on the replicas."""
    found = defaultdict(lambda: defaultdict(list))
    for key, value in np.load(path).items():
        case, variable, _ = key.split("|")
        found[case][variable].append(value)
    return found


def _run(strategy, is_quick, folder):
    """Exit code and output of a job, and where its results are."""
    path = folder / f"{strategy}{is_quick}.npz"
    cases = CASES if strategy == "none" else {**CASES, **SAMPLED}
    cases = {name: case for name, case in cases.items() if (name in QUICK) == is_quick}
    job = {"strategy": strategy, "results": str(path), "cases": cases}
    ended = _end(_start({**job, "refusals": strategy == "mirrored" and is_quick}))
    return *ended, path


def _found(ended):
    code, output, path = ended
    assert code == 0, output
    return _results(path)


def _ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    except OSError as error:
        pytest.skip(f"no ports on 127.0.0.1 can be opened: {error}")
    finally:
        for each in sockets:
            each.close()


def _run_workers(cases_of_workers, folder, tag=""):
    """Runs one process per worker; returns exit codes, outputs and where results would be."""
    hosts = [f"127.0.0.1:{port}" for port in _ports(len(cases_of_workers))]
    processes, paths = [], []
    for index, cases in enumerate(cases_of_workers):
        paths.append(folder / f"worker{tag}{index}.npz")
        task = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        job = {"strategy": "workers", "results": str(paths[-1]), "cases": cases}
        processes.append(_start(job, TF_CONFIG=json.dumps(task)))
    try:
        ended = [_end(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [code for code, _ in ended], [output for _, output in ended], paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distribution")


@pytest.fixture(scope="module")
def one_device(folder):
    """case -> what one device has found."""
    job = functools.cache(lambda is_quick: _run("none", is_quick, folder))
    return lambda case: _found(job(case in QUICK))[case]


@pytest.fixture(scope="module")
def mirrored(folder):
    """case -> what two replicas have found."""
    job = functools.cache(lambda is_quick: _run("mirrored", is_quick, folder))
    return lambda case: _found(job(case in QUICK))[case]


def _each(*cases):
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "case", [case if case in QUICK else pytest.param(case, marks=slow) for case in cases]
    )


def _assert_same(found, expected):
    assert list(found) == list(expected)
    for name, (value, *_) in expected.items():
        scale = max(1.0, np.abs(value).max())
        pair = found[name][0], value
        if "eigenvectors" in name:  # their signs are free
            pair = tuple(map(np.abs, pair))
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=3e-5 * scale, err_msg=name)


@_each(*CASES)
def test_two_replicas_train_as_one_device_does(case, one_device, mirrored):
    _assert_same(mirrored(case), one_device(case))


@_each(*CASES, *SAMPLED)
def test_replicas_stay_equal_to_the_bit(case, mirrored):
    for name, (first, *others) in mirrored(case).items():
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=name)


def test_a_step_is_skipped_everywhere_if_one_replica_meets_a_nan(mirrored):
    assert mirrored("poisoned")["skipped"][0] == 2  # one batch in each of two epochs


def test_replicas_draw_different_labels(mirrored):
    first, second = mirrored("seeds")["seeds"]
    assert not np.array_equal(first, second)


def test_branches_that_all_reduce_return_values_of_each_replica(mirrored):
    sums = 1.0 + 2.0
    for which, scale in (("True", 1.0), ("False", 10.0)):
        for k, found in enumerate(mirrored("chosen")[which]):
            np.testing.assert_array_equal(found, [scale * (k + 1), sums])


@_each("pruned", "switched", "curvature", "flattened and pruned")
def test_a_pruned_network_lands_on_its_budget_on_several_replicas(case, mirrored):
    assert mirrored(case)["settled"][0]
    assert mirrored(case)["cost"][0] <= 0.5


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("steps_per_execution=2", "does not support steps_per_execution=2"),
        ("jit_compile=True", "does not support jit_compile=True"),
        ("ema", "does not support ema_overwrite_frequency=2"),
        ("accumulation", "does not support gradient_accumulation_steps=2"),
        ("synchronized", "does not support BatchNormalization(synchronized=True)"),
        ("model outside", "does not support a model whose variables live on one device"),
        ("optimizer outside", "does not support an optimizer created outside"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(attempt, message, mirrored):
    (said,) = mirrored("refused")[attempt]
    assert message in str(said)
    assert "on one device" in str(said)


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(one_device, folder):
    cases = {name: CASES[name] for name in ("ekfac, inverses sharded", "flattened")}
    codes, outputs, paths = _run_workers([cases, cases], folder)
    assert codes == [0, 0], outputs
    workers = [_results(path) for path in paths]
    for case in cases:
        _assert_same(workers[0][case], one_device(case))
        for name, (value,) in workers[0][case].items():
            np.testing.assert_array_equal(workers[1][case][name][0], value, err_msg=name)


@pytest.mark.slow
def test_a_lost_worker_ends_the_job_and_nothing_is_lost_when_it_resumes(one_device, folder):
    case = CASES["clipped"]
    backups = [{**case, "backup": str(folder / f"backup{k}")} for k in range(2)]
    dying = {**backups[1], "dies": 2}
    codes, outputs, _ = _run_workers([{"case": backups[0]}, {"case": dying}], folder, "dying")
    assert codes[0] not in (0, None)
    assert codes[1] == -9
    assert "WorkerLostError: Another worker of the training has died" in outputs[0]
    codes, outputs, paths = _run_workers([{"case": each} for each in backups], folder, "resumed")
    assert codes == [0, 0], outputs
    _assert_same(_results(paths[0])["case"], one_device("clipped"))

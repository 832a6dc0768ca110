"""`kfacprune train`: one run that trains, prunes, compacts, exports and reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
from absl import flags

from tf_kfacprune import zoo
from tf_kfacprune.cli.command import Command
from tf_kfacprune.cli.shared import (
    add_data_flags,
    add_output_flags,
    add_selection_flags,
    fitted_inputs,
    load_data,
    loss_for,
    model_named,
)
from tf_kfacprune.compaction import compact
from tf_kfacprune.curvature import SpectralRadius
from tf_kfacprune.data import validation_split
from tf_kfacprune.export import Metadata, keras_file, latency_table, saved_model, tflite
from tf_kfacprune.export.atomic import atomic_directory
from tf_kfacprune.pruning import POLICIES, Budget
from tf_kfacprune.reporting import record, report, write_json_atomic
from tf_kfacprune.training import PrunableModel

__all__ = ["command"]

# As `compile` takes them; None is the library's own.
_OPTIMIZERS = {"kfac": None, "adam": "adam", "sgd": "sgd"}
RECORD = "record.json"


def command() -> Command:
    """The command, with flags of its own."""
    return Command("train", "Train and prune a network, compact and export it.", _define, _execute)


def _define(values: flags.FlagValues) -> None:
    add_data_flags(values)
    flags.DEFINE_string(
        "model",
        "digits_cnn",
        f"Network: {', '.join(zoo.NAMES)}, or the path of a .keras file of your own.",
        flag_values=values,
    )
    for measure, meaning, absolute in [
        ("macs", "multiply-accumulates", ""),
        ("params", "parameters", ""),
        ("bytes", ".tflite bytes", ", or a number of bytes above 1"),
        ("latency", "latency on this machine", ", or microseconds above 1"),
    ]:
        flags.DEFINE_float(
            f"budget_{measure}",
            None,
            f"Fraction of the dense network's {meaning} to keep, in (0, 1]{absolute}. Without any "
            "budget nothing is pruned.",
            flag_values=values,
        )
    for name, meaning in [
        ("flash", "the int8 .tflite file, which lies in flash memory"),
        ("ram", "the tensor arena that it needs in TensorFlow Lite Micro"),
    ]:
        flags.DEFINE_string(
            name,
            None,
            f"Most bytes of {meaning}: 64kB, 64KiB, a number of bytes, or a fraction of the dense "
            "network's in (0, 1].",
            flag_values=values,
        )
    flags.DEFINE_enum(
        "policy", "kfac", POLICIES, "How gates find out whether to close.", flag_values=values
    )
    flags.DEFINE_bool("prune_inputs", False, "Prune input features too.", flag_values=values)
    add_selection_flags(values)
    flags.DEFINE_integer(
        "round_to",
        None,
        "Keep channels in multiples of this number, e.g. 8.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "min_channels",
        None,
        "Keep at least so many channels per layer, and no residual branch goes as a whole.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "curvature",
        0.0,
        "Strength of the penalty on the spectral radius of the curvature; 0 for none.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_enum("optimizer", "kfac", list(_OPTIMIZERS), "Optimizer.", flag_values=values)
    flags.DEFINE_float(
        "learning_rate", None, "Learning rate; the optimizer's own if left out.", flag_values=values
    )
    for name, default, meaning in [
        ("epochs", 30, "Passes over the training data, all phases together."),
        ("batch_size", 128, "Examples per step."),
    ]:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "validation",
        0,
        "Hold out this many training examples and measure on them instead of the test set.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "compare_dense", False, "Train the dense network too, to compare with.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", flag_values=values)
    add_output_flags(
        values,
        "output_dir",
        "Folder for model.keras, compact.keras, compact.tflite, saved_model and record.json.",
    )


def _execute(values: flags.FlagValues) -> None:
    # The folder appears whole at the end, or not at all; a wrong one is refused before training.
    with atomic_directory(values.output_dir, marker=RECORD, overwrite=values.overwrite) as folder:
        comparison = _train_into(folder, values)
    print(comparison)
    print(f"Wrote {values.output_dir}{os.sep}")


def _train_into(folder: Path, values: flags.FlagValues) -> Any:
    keras.utils.set_random_seed(values.seed)
    budget = _budget(values)
    asked = budget.targets if budget else {}
    dataset = load_data(values)
    if values.validation:
        dataset = validation_split(dataset, values.validation)
    network = model_named(values.model, dataset, values.seed)
    x_train = fitted_inputs(network, dataset.x_train)
    x_test = fitted_inputs(network, dataset.x_test)
    loss = loss_for(network)
    dense = None
    if values.compare_dense:
        dense = model_named(values.model, dataset, values.seed)
        _fit(PrunableModel(dense, seed=values.seed), loss, x_train, dataset.y_train, values)
    pruned = PrunableModel(
        network,
        budget=budget,
        latency_table=latency_table(network) if "latency" in asked else None,
        curvature=SpectralRadius(values.curvature) if values.curvature else None,
        policy=values.policy,
        prune_inputs=values.prune_inputs,
        include=values.include or None,
        exclude=values.exclude,
        round_to=values.round_to,
        min_channels=values.min_channels,
        seed=values.seed,
    )
    _fit(pruned, loss, x_train, dataset.y_train, values)
    small = compact(pruned)
    keras_file(pruned, folder / "model.keras")
    keras_file(small, folder / "compact.keras")
    saved_model(small, folder / "saved_model", verify_data=x_test[:256])
    comparison = report(pruned, small, dense=dense, data=(x_test, dataset.y_test))
    content = record(
        comparison,
        data=dataset.name,
        seed=values.seed,
        budget=asked,
        model=values.model,
        epochs=values.epochs,
        batch_size=values.batch_size,
    )
    write_json_atomic(folder / RECORD, content)
    metadata = Metadata.of_record(content, labels=dataset.labels, scale=dataset.scale)
    tflite(small, folder / "compact.tflite", verify_data=x_test[:256], metadata=metadata)
    return comparison


def _budget(values: flags.FlagValues) -> Budget | None:
    """The budget that the flags state; None if they state none."""
    targets = {m: values[f"budget_{m}"].value for m in ("macs", "params", "bytes", "latency")}
    if targets["bytes"] is not None and targets["bytes"].is_integer():
        targets["bytes"] = int(targets["bytes"])
    board = {}
    for name in ("flash", "ram"):
        size = values[name].value
        if size is not None and _is_fraction(size):
            targets[name] = float(size)
        elif size is not None:
            board[name] = size
    if board:
        targets |= Budget.for_board(**board).targets
    asked = {measure: target for measure, target in targets.items() if target is not None}
    return Budget(**asked) if asked else None


def _is_fraction(text: str) -> bool:
    try:
        return float(text) <= 1.0
    except ValueError:
        return False


def _fit(model: PrunableModel, loss: Any, x: Any, y: Any, values: flags.FlagValues) -> None:
    model.compile(optimizer=_OPTIMIZERS[values.optimizer], loss=loss, metrics=["accuracy"])
    if values.learning_rate is not None:
        model.optimizer.learning_rate = values.learning_rate
    model.fit(x, y, batch_size=values.batch_size, epochs=values.epochs, verbose=2)

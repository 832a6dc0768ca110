"""`kfacprune train`: one run that trains, prunes, compacts, exports and reports."""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from tf_kfacprune.cli import train_flags
from tf_kfacprune.cli.backup import Backup, progress
from tf_kfacprune.cli.batches import EpochBatches
from tf_kfacprune.cli.command import Command, UsageError, import_modules, naming
from tf_kfacprune.cli.kept_run import DENSE, MODEL, RECORD, KeptRun
from tf_kfacprune.cli.models import fitted_inputs, model_named
from tf_kfacprune.cli.objectives import kind_asked_for, objective_for
from tf_kfacprune.cli.progress_lines import ProgressLines, wrapped
from tf_kfacprune.cli.shared import load_data
from tf_kfacprune.cli.stopping import Stopping, stop_signals
from tf_kfacprune.compaction import compact
from tf_kfacprune.curvature import SpectralRadius
from tf_kfacprune.data import validation_split
from tf_kfacprune.errors import BudgetError, NonFiniteError
from tf_kfacprune.export import Metadata, keras_file, latency_table, load_keras, saved_model, tflite
from tf_kfacprune.export.atomic import atomic_directory
from tf_kfacprune.pruning import Budget
from tf_kfacprune.reporting import Comparison, record, report, write_json_atomic
from tf_kfacprune.training import TRACING, KFACModel, PrunableModel

__all__ = ["command"]


def command() -> Command:
    """The command, with flags of its own."""
    return Command(
        "train", "Train and prune a network, compact and export it.", train_flags.define, _execute
    )


def _execute(values: flags.FlagValues) -> None:
    with stop_signals() as stopping, KeptRun(values) as run:
        if run.is_complete:
            print(f"{values.output_dir} is complete.")
            return
        if values.resume:
            import_modules(values)
            run.check_output()
            if not run.is_resumed:
                print(f"Nothing to resume in {run.folder}: the run starts at its beginning.")
        _Run(values, run, stopping).execute()
    print(f"Wrote {values.output_dir}{os.sep}")


class _Run:
    """The steps of a run, each of which is left out if the interrupted run has done it."""

    def __init__(self, values: flags.FlagValues, kept: KeptRun, stopping: Stopping) -> None:
        self._values = values
        self._kept = kept
        self._stopping = stopping
        keras.utils.set_random_seed(values.seed)
        self._budget = _budget(values)
        loaded = load_data(values, kind_asked_for(values))
        if values.validation:
            with naming("validation"):
                loaded = validation_split(loaded, values.validation)
        self._network = model_named(values.model, loaded, values.seed)
        if isinstance(self._network, KFACModel):
            raise UsageError(
                f"--model={values.model} is a {type(self._network).__name__}, saved by an earlier "
                "run. Train the network that it was made from; `kfacprune compact` makes a plain "
                "network of what was pruned, `kfacprune train --resume` goes on with a run."
            )
        self._objective, self._dataset = objective_for(values, self._network, loaded)
        self._x_train = fitted_inputs(self._network, loaded.x_train)
        self._x_test = fitted_inputs(self._network, loaded.x_test)
        if (
            self._budget is not None
            and values.epochs == 1
            and values.batch_size >= len(loaded.x_train)
        ):
            raise UsageError(
                f"--epochs=1 --batch_size={values.batch_size}: that is one step, and pruning takes "
                f"one, the network that is left another. Data set {loaded.name!r} has "
                f"{len(loaded.x_train)} examples: choose smaller batches, or more epochs."
            )

    def execute(self) -> None:
        """Everything from the untrained network to the written folder."""
        values = self._values
        self._kept.begin(self._dataset)
        pruned, dense = self._prunable(), None
        if values.compare_dense:
            whole = model_named(values.model, self._dataset, values.seed)
            dense = self._trained("dense", DENSE, PrunableModel(whole, seed=values.seed)).net
        pruned = self._trained("pruned", MODEL, pruned)
        output = atomic_directory(values.output_dir, marker=RECORD, overwrite=values.overwrite)
        with output as folder:
            comparison, more = self._write(folder, pruned, dense)
        print(comparison, *filter(None, [more]), sep="\n")

    def _prunable(self) -> PrunableModel:
        values, network, budget = self._values, self._network, self._budget
        table = None
        if budget is not None and budget.latency is not None:
            table = self._kept.remembered(
                "latency_table", lambda: latency_table(network, of=values.latency_of)
            )
        with naming(*map(train_flags.flag_of, _targets(values)), of=BudgetError):
            model = PrunableModel(
                network,
                budget=budget,
                latency_table=table,
                curvature=SpectralRadius(values.curvature) if values.curvature else None,
                policy=values.policy,
                prune_inputs=values.prune_inputs,
                prune_features=values.prune_features,
                include=values.include or None,
                exclude=values.exclude,
                round_to=values.round_to,
                min_channels=values.min_channels,
                seed=values.seed,
            )
        _refuse_loose_bounds(model)
        return model

    def _trained(self, name: str, file: str, model: PrunableModel) -> PrunableModel:
        """The model after its training, which is kept."""
        path = self._kept.folder / file
        if path.is_file():
            return load_keras(path)
        values, state = self._values, self._kept.folder / name
        model.compile(
            optimizer=train_flags.OPTIMIZERS[values.optimizer],
            loss=self._objective.loss,
            metrics=self._objective.metrics(),
        )
        if values.learning_rate is not None:
            model.optimizer.learning_rate = values.learning_rate
        batches = EpochBatches(self._x_train, self._dataset.y_train, values.batch_size, values.seed)
        done = f" It goes on after {progress(state)}." if progress(state) else ""
        about = (
            f"Training the {name} network on {len(self._x_train)} examples, loss "
            f"{self._objective.loss.name}.{done} {TRACING}"
        )
        print(wrapped(about), flush=True)
        lines = ProgressLines(batches, is_live=sys.stdout.isatty())
        try:
            model.fit(
                batches.dataset,
                shuffle=False,
                epochs=values.epochs,
                verbose=0,
                callbacks=[batches, lines, Backup(state, batches, self._stopping)],
            )
        finally:
            self._stopping.deferred = False
        outputs = model.net(self._x_train[: values.batch_size], training=False)
        if not np.isfinite(keras.ops.convert_to_numpy(outputs)).all():
            shutil.rmtree(state, ignore_errors=True)  # there is nothing to go on from
            raise NonFiniteError(
                f"The {name} network returns NaN or infinite values after its training, which has "
                "diverged. Lower --learning_rate and --curvature, and scale the inputs of --data "
                "to about 1."
            )
        keras_file(model, path)
        shutil.rmtree(state, ignore_errors=True)
        return model

    def _write(self, folder: Path, pruned: PrunableModel, dense: Any) -> tuple[Comparison, str]:
        """Writes everything into the folder; returns the comparison, and what it has no row for."""
        values, dataset, objective = self._values, self._dataset, self._objective
        x_test = self._x_test
        shutil.copyfile(self._kept.folder / MODEL, folder / MODEL)
        small = compact(pruned)
        keras_file(small, folder / "compact.keras")
        saved_model(small, folder / "saved_model", verify_data=x_test[:256])
        has_classes = objective.metric == "accuracy" and small.output_shape[-1] > 1
        comparison = report(
            pruned,
            small,
            dense=dense,
            data=(x_test, dataset.y_test) if has_classes else None,
            flatness=objective.loss if has_classes and values.curvature else None,
            html=folder / "report.html",
        )
        measures = {
            side: objective.measure(model.predict(x_test, verbose=0), dataset.y_test)
            for side, model in (("dense", dense), ("compact", small))
            if model is not None
        }
        if objective.metric == "accuracy":
            comparison = replace(
                comparison,
                **{
                    side: replace(getattr(comparison, side), accuracy=measure)
                    for side, measure in measures.items()
                },
            )
        content = record(
            comparison,
            data=dataset.name,
            seed=values.seed,
            budget=_targets(values),
            command=self._kept.command(),
            model=values.model,
            epochs=values.epochs,
            batch_size=values.batch_size,
            loss=objective.loss.name,
            metric={"name": objective.metric, **measures},
        )
        write_json_atomic(folder / RECORD, content)
        metadata = Metadata.of_record(content, labels=dataset.labels, scale=dataset.scale)
        tflite(small, folder / "compact.tflite", verify_data=x_test[:256], metadata=metadata)
        words = ", ".join(f"{side} {measure:.6g}" for side, measure in measures.items())
        return comparison, f"{objective.metric}: {words}" if objective.metric != "accuracy" else ""


def _targets(values: flags.FlagValues) -> dict[str, float]:
    """The bounds that were asked for, by measure."""
    given = {m: values[f"budget_{m}"].value for m in train_flags.MEASURES}
    targets = {measure: target for measure, target in given.items() if target is not None}
    if targets.get("bytes", 0.5).is_integer():
        targets["bytes"] = int(targets["bytes"])
    for name in train_flags.BOARD:
        size = values[name].value
        if size is not None:
            with naming(train_flags.flag_of(name)):
                targets[name] = _board_size(name, size)
    return targets


def _board_size(name: str, size: str) -> float:
    """A bound on flash or RAM: a fraction, or a number of bytes with or without a unit."""
    try:
        fraction = float(size)
    except ValueError:
        fraction = math.inf
    if fraction <= 1:
        return fraction
    sizes: dict[str, Any] = {name: size}
    return Budget.for_board(**sizes).targets[name]


def _budget(values: flags.FlagValues) -> Budget | None:
    targets = _targets(values)
    with naming(*map(train_flags.flag_of, targets)):
        return Budget(**targets) if targets else None


def _refuse_loose_bounds(model: PrunableModel) -> None:
    """An absolute bound that the dense network meets asks for nothing, and is a mistyped one.

    What a board has is given as it is: only if it holds the whole network nothing is asked for.
    """
    if model.budget is None or model.gated is None:
        return
    cost, targets = model.gated.cost, model.budget.targets
    dense = {m: float(cost.dense(m)) for m, target in targets.items() if target > 1}
    loose = [measure for measure in dense if targets[measure] >= dense[measure]]
    if len(loose) < len(targets):
        loose = [measure for measure in loose if measure not in train_flags.BOARD]
    for measure in loose:
        raise UsageError(
            f"--{train_flags.flag_of(measure)}={targets[measure]:g}: the network costs "
            f"{dense[measure]:,.0f} before pruning, so that nothing would have to be pruned. Ask "
            "for less, or leave the flag out."
        )

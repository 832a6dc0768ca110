"""`PruningLog`: the pruning of a `PrunableModel` in TensorBoard, while it happens."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.callbacks.pruning_state import PruningState, pruning_state
from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.training import PrunableModel
from tf_kfacprune.validation import is_count, require

__all__ = ["PruningLog"]

_RUN = "pruning"
_NAMES = {"macs": "macs", "params": "parameters"}


class PruningLog(keras.callbacks.Callback):
    """Writes what becomes of a network during `fit`, for TensorBoard.

    | tag | what it is |
    | --- | --- |
    | `pruning/macs`, `pruning/parameters` | counts of the network as it is now |
    | `pruning/macs_left`, `pruning/parameters_left` | the same over the dense network, in [0, 1] |
    | `pruning/phase` | 0 warm-up, 1 prune, 2 settle |
    | `pruning/spectral_radius` | of the K-FAC curvature; only with `curvature=` |
    | `neurons/<group>` | neurons left of every group |
    | `budget/<measure>_asked`, `_achieved`, `_ratio` | bound, cost in its unit, cost over bound |
    | `scores/<group>` | histogram of how much the neurons deserve to stay |
    | `budget` (text) | outcomes with their reasons, at the end of training |

    The events lie in the folder `pruning` inside `log_dir`, beside `train` and `validation` of
    `keras.callbacks.TensorBoard`, which may be given the same `log_dir`.

    Args:
        log_dir: Folder for the event files. Every worker of a distributed training needs one of
            its own.
        update_freq: `"epoch"`, to write after every epoch, with the number of the epoch as step;
            or a number n >= 1, to write after every n batches, with the optimizer's count of steps
            as step. Scores and outcomes are computed anew each time: on a large network, n well
            above 1 saves time.
        histograms: Whether to write the histograms of scores.

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value, or, when training begins,
            if the model is not a `PrunableModel`.
        ExportError: If TensorBoard, which brings the format of the events, is not installed.

    Examples:
        >>> log = kp.callbacks.PruningLog("logs")
        >>> pm.fit(x, y, epochs=30, callbacks=[log, keras.callbacks.TensorBoard("logs")])

        and in a shell ``tensorboard --logdir logs``.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        update_freq: str | int = "epoch",
        histograms: bool = True,
    ) -> None:
        super().__init__()
        is_path = isinstance(log_dir, str | os.PathLike) and os.fspath(log_dir) != ""
        require("PruningLog", is_path, "log_dir", "the path of a folder", log_dir)
        require(
            "PruningLog",
            update_freq == "epoch" or is_count(update_freq),
            "update_freq",
            '"epoch" or an integer >= 1',
            update_freq,
        )
        if importlib.util.find_spec("tensorboard") is None:
            raise ExportError(
                "PruningLog writes events of TensorBoard, which is not installed. Install it with "
                "pip install tensorboard."
            )
        self.log_dir = os.fspath(log_dir)
        self.update_freq = update_freq
        self.histograms = histograms
        self._writer: Any = None
        self._earlier = self._seen = 0  # batches of the epochs before, and of all so far

    def set_model(self, model: Any) -> None:
        if not isinstance(model, PrunableModel):
            raise InvalidArgumentError(
                f"PruningLog logs the pruning of a PrunableModel. Received: model {model.name!r} "
                f"of type {type(model).__name__}. Use keras.callbacks.TensorBoard for it."
            )
        super().set_model(model)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._earlier = self._seen = 0
        self._writer = tf.summary.create_file_writer(os.path.join(self.log_dir, _RUN))

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if isinstance(self.update_freq, str):
            return
        # Several steps may have passed since the last call (steps_per_execution).
        before, self._seen = self._seen, self._earlier + batch + 1
        if self._seen // self.update_freq > before // self.update_freq:
            self._write(self._steps_taken(), logs or {})

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._earlier = self._seen
        if self.update_freq == "epoch":
            self._write(epoch, logs or {})
        self._writer.flush()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        outcomes = self.model.budget_outcomes()
        if outcomes:
            by_epoch = self.update_freq == "epoch"
            last = self.params["epochs"] - 1 if by_epoch else self._steps_taken()
            lines = "\n".join(f"- {measure}: {outcome}" for measure, outcome in outcomes.items())
            with self._writer.as_default(), tf.summary.record_if(True):
                tf.summary.text("budget", lines, step=last)
        self._writer.close()

    def _steps_taken(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _write(self, step: int, logs: Mapping[str, Any]) -> None:
        state = pruning_state(self.model)
        # keras.callbacks.TensorBoard records some steps only, and would decide for us, too.
        with self._writer.as_default(), tf.summary.record_if(True):
            if "spectral_radius" in logs:
                tf.summary.scalar("pruning/spectral_radius", logs["spectral_radius"], step=step)
            if state is not None:
                self._write_state(step, state)

    def _write_state(self, step: int, state: PruningState) -> None:
        phases = ("warm-up", "prune", "settle")
        scalars: dict[str, float] = {"pruning/phase": phases.index(state.phase)}
        for measure, name in _NAMES.items():
            scalars[f"pruning/{name}"] = state.costs[measure]
            scalars[f"pruning/{name}_left"] = state.costs[measure] / max(state.dense[measure], 1)
        scalars |= {f"neurons/{group.name}": group.kept for group in state.groups}
        for measure, outcome in state.outcomes.items():
            scalars[f"budget/{measure}_asked"] = outcome.asked
            scalars[f"budget/{measure}_achieved"] = outcome.achieved
            scalars[f"budget/{measure}_ratio"] = outcome.ratio
        for tag, value in scalars.items():
            tf.summary.scalar(tag, float(value), step=step)
        for group in state.groups if self.histograms else ():
            if group.scores is not None and len(group.scores):
                tf.summary.histogram(f"scores/{group.name}", group.scores, step=step)

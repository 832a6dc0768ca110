"""Runs a written .tflite file on TensorFlow Lite Micro and compares it with the Keras model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError
from tf_kfacprune.export.arena import arena_of
from tf_kfacprune.export.file_interface import FileInterface, read_interface
from tf_kfacprune.export.half_precision import float32_twin
from tf_kfacprune.export.model_graph import FileGraph, read_graph
from tf_kfacprune.export.options import refuse_text
from tf_kfacprune.export.running import micro_job, require_micro
from tf_kfacprune.export.samples import Examples, Named, labelled_examples
from tf_kfacprune.export.serving import Signature, check_exportable
from tf_kfacprune.export.verification import (
    Verification,
    compute_tolerance,
    finite_reference,
    verify_outputs,
)
from tf_kfacprune.validation import is_count

__all__ = ["MicroCheck", "check_micro"]


@dataclass(frozen=True)
class MicroCheck:
    """What TensorFlow Lite Micro says about a file.

    Attributes:
        flash_bytes: bytes of the file, which lie in flash memory as they are.
        arena_bytes: least size of the tensor arena in which the file runs, a multiple of 16; 0 if
            it does not run.
        activation_bytes: bytes of it that hold activations.
        record_bytes: bytes of it that hold the runtime's own records.
        lacking: operations of the file that the runtime does not have, by their names in the
            schema; with any, the file does not run.
        verification: how closely the outputs follow the Keras model's; None if no model was given.
    """

    flash_bytes: int
    arena_bytes: int
    activation_bytes: int
    record_bytes: int
    lacking: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def runs(self) -> bool:
        """Whether the runtime can run the file."""
        return not self.lacking


def check_micro(
    file: str | os.PathLike[str],
    model: keras.Model | None = None,
    data: Any = None,
    *,
    max_examples: int = 64,
    tolerance: float | None = None,
    max_accuracy_drop: float = 0.01,
) -> MicroCheck:
    """Runs a ``.tflite`` file on TensorFlow Lite Micro, in a process without TensorFlow.

    With a model and data the outputs are compared, by the rules of `tflite`; the file runs in an
    arena of just the size that is reported. The reference kernels are slow: some examples do.

    Args:
        file: the file, usually full ``"int8"`` with ``batch_size=1``.
        model: the Keras model that the file was written of.
        data: inputs to compare on, given like ``verify_data`` of `tflite`; with labels, ``(x, y)``,
            accuracies are compared too.
        max_examples: the most examples to run.
        tolerance: largest relative error allowed; by default that of the format.
        max_accuracy_drop: how much lower the accuracy may be than that of the model, in [0, 1].

    Returns:
        Sizes, and how closely the outputs follow. Operations that the runtime lacks are reported,
        not raised.

    Raises:
        InvalidArgumentError: if only one of ``model`` and ``data`` is given, or ``max_examples`` is
            not a positive integer.
        DataError: if the data do not fit the model.
        ExportError: if the runtime is not installed, the file is missing or damaged or cannot be
            run for another reason than an operation that is lacking, or its outputs do not agree
            with the model.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.check_micro("net.tflite").arena_bytes  # doctest: +SKIP
        6640
    """
    if (model is None) != (data is None):
        raise InvalidArgumentError(
            "check_micro compares outputs with model and data, and needs both. Received: "
            f"{'model' if data is None else 'data'} only."
        )
    if not is_count(max_examples):
        raise InvalidArgumentError(
            f"max_examples must be a positive integer. Received: max_examples={max_examples!r}."
        )
    path = Path(file)
    if not path.is_file():
        raise ExportError(f"{path}: no such file. Write it with tf_kfacprune.export.tflite.")
    if model is not None:
        check_exportable(model)
    require_micro()
    arena = arena_of(path)
    verification = None
    if model is not None and not arena.lacking:
        signature = Signature.of(model, 1).in_float32()
        refuse_text(model, signature.input_dtypes)
        examples = labelled_examples(data, signature, "data")
        labels = None if examples.labels is None else examples.labels[:max_examples]
        inputs = {name: values[:max_examples] for name, values in examples.inputs.items()}
        verification = _compared(
            path,
            model,
            signature,
            Examples(inputs, labels),
            arena.bytes,
            tolerance=tolerance,
            max_accuracy_drop=max_accuracy_drop,
        )
    return MicroCheck(
        flash_bytes=path.stat().st_size,
        arena_bytes=arena.bytes,
        activation_bytes=arena.activations,
        record_bytes=arena.records,
        lacking=arena.lacking,
        verification=verification,
    )


def _compared(
    path: Path,
    model: keras.Model,
    signature: Signature,
    examples: Examples,
    arena: int,
    *,
    tolerance: float | None,
    max_accuracy_drop: float,
) -> Verification:
    """Holds the outputs of the file to the model's, as `tflite` does."""
    content = path.read_bytes()
    quantization = _format(read_graph(content))
    twin = float32_twin(model)
    reference = trained = finite_reference(model, signature, examples.inputs)
    if twin is not model:
        reference = finite_reference(twin, signature, examples.inputs)
    try:
        return verify_outputs(
            reference,
            _outputs(path, read_interface(content), examples.inputs, arena, reference),
            examples,
            tolerance=compute_tolerance(twin, quantization) if tolerance is None else tolerance,
            quantization=quantization,
            max_accuracy_drop=max_accuracy_drop,
            what=f"{path}, run by TensorFlow Lite Micro,",
            trained=trained,
        )
    except ExportError as error:
        raise ExportError(str(error).replace(" Nothing was kept.", "")) from error


def _outputs(path: Path, file: FileInterface, inputs: Named, arena: int, reference: Named) -> Named:
    """Outputs of the file by name; the runtime counts inputs and outputs and knows no names."""
    names = [tensor.name for tensor in file.inputs]
    if set(names) != set(inputs):
        raise DataError(f"{path} has inputs {sorted(names)}. The model has {sorted(inputs)}.")
    job = {"file": os.fspath(path), "arena": arena, "outputs": len(file.outputs)}
    ordered = {name: np.asarray(inputs[name]) for name in names}
    found = micro_job("run", job, ordered, what=f"{path}, in TensorFlow Lite Micro,")
    by_name = {tensor.name: found[str(place)] for place, tensor in enumerate(file.outputs)}
    if len(by_name) == 1 and len(reference) == 1:
        return dict(zip(reference, by_name.values(), strict=True))
    return by_name


def _format(graph: FileGraph) -> str | None:
    """The format of a file that the runtime can run: integers of one kind, or float32."""
    activations = [
        tensor.dtype for tensor in graph.tensors if not tensor.is_constant and tensor.scales
    ]
    if not activations:
        return None
    return "int16x8" if "int16" in activations else "int8"

"""What a program must know of a .tflite file to run it: inputs, outputs and operators.

Programs in C number inputs and outputs by their place in the file; programs that use a signature
name them. Neither need be the order of the Keras model.
"""

from __future__ import annotations

from dataclasses import dataclass

from tf_kfacprune.export.model_graph import GraphTensor, read_graph

__all__ = ["FileInterface", "FileTensor", "read_interface"]


@dataclass(frozen=True)
class FileTensor:
    """One input or output of a file.

    Attributes:
        name: its name in the signature; that of the tensor, if the file has none.
        dtype: element type.
        shape: sizes in the file, where a free size is 1.
        free: which axes have a free size.
        scale: real value of one step of a quantized tensor; None if it is not quantized.
        zero_point: the quantized value of zero; None likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    free: tuple[int, ...] = ()
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class FileInterface:
    """Inputs, outputs and operators of a file.

    Attributes:
        inputs: in the order of the file, which is that of ``interpreter->input(i)``.
        outputs: likewise.
        operators: names of the operators it uses, each once; of custom ones their own names.
    """

    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    operators: tuple[str, ...]


def read_interface(content: bytes) -> FileInterface:
    """Inputs, outputs and operators of a ``.tflite`` file.

    Args:
        content: the whole file.

    Returns:
        What its first subgraph, which is the one that is run, takes and returns.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or is damaged.
    """
    graph = read_graph(content)
    return FileInterface(
        tuple(_tensor(graph.tensors[i], graph.input_names.get(i)) for i in graph.inputs),
        tuple(_tensor(graph.tensors[i], graph.output_names.get(i)) for i in graph.outputs),
        tuple(dict.fromkeys(graph.operators)),
    )


def _tensor(tensor: GraphTensor, name: str | None) -> FileTensor:
    is_quantized = bool(tensor.scales)
    return FileTensor(
        tensor.name if name is None else name,
        tensor.dtype,
        tensor.shape,
        tensor.free,
        tensor.scales[0] if is_quantized else None,
        (tensor.zero_points or (0,))[0] if is_quantized else None,
    )

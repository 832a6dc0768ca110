"""Cuts a .tflite file whose outputs do not depend on each other into one file for each."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["file_parts"]

_IDENTIFIER = b"TFL3"


def file_parts(content: bytes, outputs: tuple[str, ...]) -> list[bytes]:
    """One file for each output, with what it is computed from.

    Converting twenty small models as one takes a quarter of the time of converting them one by one.

    Args:
        content: a file with a single graph.
        outputs: names of outputs in its signature.

    Returns:
        The files, without signatures, in the order of the names.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content)
    (graph,) = model.subgraphs
    tensor_of = {entry.name.decode(): entry.tensorIndex for entry in model.signatureDefs[0].outputs}
    maker = {tensor: step for step in graph.operators for tensor in step.outputs}
    files = []
    for name in outputs:
        tensors = _needed(tensor_of[name], maker)
        number = {tensor: new for new, tensor in enumerate(tensors)} | {-1: -1}
        buffers = [0, *dict.fromkeys(graph.tensors[tensor].buffer for tensor in tensors)]
        part = copy.copy(graph)
        part.tensors = []
        for tensor in tensors:
            part.tensors.append(copy.copy(graph.tensors[tensor]))
            part.tensors[-1].buffer = buffers.index(graph.tensors[tensor].buffer)
        part.operators = []
        for step in graph.operators:
            if step.outputs[0] in number:
                part.operators.append(copy.copy(step))
                part.operators[-1].inputs = [number[tensor] for tensor in step.inputs]
                part.operators[-1].outputs = [number[tensor] for tensor in step.outputs]
        part.inputs = [number[tensor] for tensor in graph.inputs if tensor in number]
        part.outputs = [number[tensor_of[name]]]
        whole = copy.copy(model)
        whole.subgraphs, whole.buffers = [part], [model.buffers[buffer] for buffer in buffers]
        whole.signatureDefs = whole.metadata = whole.metadataBuffer = None
        builder = flatbuffers.Builder(len(content) // len(outputs))
        builder.Finish(whole.Pack(builder), _IDENTIFIER)
        files.append(bytes(builder.Output()))
    return files


def _needed(output: int, maker: dict[int, Any]) -> list[int]:
    """The tensors that an output is computed from, itself included, in order."""
    found: set[int] = set()
    waiting = [output]
    while waiting:
        tensor = waiting.pop()
        if tensor < 0 or tensor in found:
            continue
        found.add(tensor)
        if tensor in maker:
            waiting += [*maker[tensor].inputs, *maker[tensor].outputs]
    return sorted(found)

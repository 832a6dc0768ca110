"""What is read from a file is what the official readers find in it."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export import Port, tflite
from tf_kfacprune.export.file_interface import read_interface
from tf_kfacprune.export.operators import micro_method, operator_name
from tf_kfacprune.export.ports import ports_of
from tf_kfacprune.export.serving import Signature

L = keras.layers


@pytest.fixture(scope="module")
def model():
    """Three inputs and two outputs, named against the order of the alphabet."""
    z, a, m = (keras.Input((size,), name=name) for name, size in [("z-1", 3), ("a", 4), ("m", 5)])
    wide = L.Dense(6, name="wide")(L.Concatenate()([z, a, m]))
    return keras.Model([z, a, m], [L.Dense(2, name="narrow")(wide), wide])


@pytest.fixture(scope="module", params=[None, "int8"])
def file(request, model, tmp_path_factory):
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(30, size)) for size in (3, 4, 5)] if request.param else None
    path = tmp_path_factory.mktemp("files") / "net.tflite"
    options = {"quantization": request.param, "representative_data": data}
    return tflite(model, path, verify=False, **options)


def test_it_is_what_litert_finds(file):
    from ai_edge_litert.interpreter import Interpreter

    found = read_interface(file.read_bytes())
    interpreter = Interpreter(model_path=str(file))
    runner = interpreter.get_signature_runner()
    for tensors, listed, named in [
        (found.inputs, interpreter.get_input_details(), runner.get_input_details()),
        (found.outputs, interpreter.get_output_details(), runner.get_output_details()),
    ]:
        assert len(tensors) == len(listed)
        for tensor, details in zip(tensors, listed, strict=True):
            assert named[tensor.name]["index"] == details["index"]
            assert tensor.dtype == np.dtype(details["dtype"]).name
            assert tensor.shape == tuple(details["shape"])
            assert tensor.free == (0,)
            scale, zero_point = details["quantization"]
            assert (tensor.scale or 0.0, tensor.zero_point or 0) == (scale, zero_point)
    used = {operation["op_name"] for operation in interpreter._get_ops_details()}
    assert set(found.operators) == used - {"DELEGATE"}


def test_every_port_is_found_in_the_order_of_the_model(file, model):
    from ai_edge_litert.interpreter import Interpreter

    signature = Signature.of(model)
    inputs, outputs = ports_of(model, signature, file.read_bytes())
    assert [(port.keras, port.name) for port in inputs] == [("z-1", "z_1"), ("a", "a"), ("m", "m")]
    assert [(port.keras, port.name) for port in outputs] == [
        ("narrow", "output_0"),
        ("wide", "output_1"),
    ]
    interpreter = Interpreter(model_path=str(file))
    sizes = [details["shape"][-1] for details in interpreter.get_input_details()]
    assert [sizes[port.index] for port in inputs] == [3, 4, 5]
    sizes = [details["shape"][-1] for details in interpreter.get_output_details()]
    assert [sizes[port.index] for port in outputs] == [2, 6]


def test_ports_of_dictionaries_are_called_by_their_keys(tmp_path):
    a, b = keras.Input((2,), name="a-side"), keras.Input((3,), name="b-side")
    model = keras.Model({"b-side": b, "a-side": a}, {"out-b": L.Dense(1)(b), "out-a": L.ReLU()(a)})
    content = tflite(model, tmp_path / "net.tflite", verify=False).read_bytes()
    inputs, outputs = ports_of(model, Signature.of(model), content)
    assert [(port.keras, port.name) for port in inputs] == [
        ("a-side", "a_side"),
        ("b-side", "b_side"),
    ]
    assert [(port.keras, port.name) for port in outputs] == [("out-a", "out_a"), ("out-b", "out_b")]


def test_port_of_a_sequential_model(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="last")])
    content = tflite(model, tmp_path / "net.tflite", verify=False).read_bytes()
    (source,), outputs = ports_of(model, Signature.of(model), content)
    assert (source.name, source.index) == ("input", 0)
    assert outputs == (Port("last", "output", 0),)


def test_operators_have_the_names_of_the_schema():
    from tensorflow.lite.python.schema_py_generated import BuiltinOperator

    codes = {name: code for name, code in vars(BuiltinOperator).items() if isinstance(code, int)}
    for name, code in codes.items():
        if not name.startswith("STABLEHLO") and code <= codes["RIGHT_SHIFT"]:
            assert operator_name(code) == name
    assert operator_name(9999) == "OPERATOR_9999"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("CONV_2D", "AddConv2D"),
        ("FULLY_CONNECTED", "AddFullyConnected"),
        ("DEPTHWISE_CONV_2D", "AddDepthwiseConv2D"),
        ("BATCH_MATMUL", "AddBatchMatMul"),
        ("PADV2", "AddPadV2"),
        ("UNIDIRECTIONAL_SEQUENCE_LSTM", "AddUnidirectionalSequenceLSTM"),
        ("RELU6", "AddRelu6"),
        ("SIGN", None),
        ("my op", None),
    ],
)
def test_methods_of_the_resolver(name, method):
    assert micro_method(name) == method


def test_damaged_content_is_refused(file):
    content = file.read_bytes()
    for part in (b"", content[:30], content[:4] + b"ELSE" + content[8:]):
        with pytest.raises(ExportError, match=r"damaged|identifier is missing"):
            read_interface(part)

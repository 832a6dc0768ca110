"""Names of the served inputs and outputs, and the models that are refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export.serving import Signature, check_exportable, layers_within
from tf_kfacprune.gates import NeuronGate


def functional(inputs, outputs):
    return keras.Model(inputs, outputs)


def test_unnamed_input_gets_the_same_name_in_every_session():
    for _ in range(2):
        x = keras.Input((3,))
        signature = Signature.of(functional(x, keras.layers.Dense(2)(x)))
        assert signature.inputs == {"input": ((None, 3), "float32")}
        assert signature.outputs == ("output",)


def test_given_names_are_kept_as_identifiers():
    a, b = keras.Input((3,), name="left-eye"), keras.Input((3,), name="right")
    out = keras.layers.Add()([a, b])
    signature = Signature.of(functional([a, b], [out, a]))
    assert list(signature.inputs) == ["left_eye", "right"]
    assert signature.outputs == ("output_0", "output_1")


def test_dictionaries_are_named_by_key_and_keep_their_values():
    a, b = keras.Input((2,), name="first"), keras.Input((3,), name="second")
    model = functional(
        {"second": b, "first": a},
        {"wide": keras.layers.Dense(4)(b), "narrow": keras.layers.Dense(1)(a)},
    )
    signature = Signature.of(model)
    assert signature.inputs["first"][0] == (None, 2)
    assert signature.inputs["second"][0] == (None, 3)
    named = {"first": np.ones((5, 2), "float32"), "second": np.ones((5, 3), "float32")}
    outputs = signature.predict(model, named)
    assert outputs["wide"].shape == (5, 4)
    assert outputs["narrow"].shape == (5, 1)
    expected = keras.ops.convert_to_numpy(model(named)["wide"])
    np.testing.assert_allclose(outputs["wide"], expected, rtol=1e-6)


def test_batch_size_is_fixed_on_request():
    model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])
    assert Signature.of(model, 4).inputs == {"x": ((4, 3), "float32")}


def test_model_of_fixed_batch_size_keeps_it():
    x = keras.Input((3,), batch_size=4, name="x")
    model = functional(x, keras.layers.Reshape((3, 1))(x))
    signature = Signature.of(model)
    assert signature.inputs == {"x": ((4, 3), "float32")}
    values = np.arange(18, dtype="float32").reshape(6, 3)
    outputs = signature.predict(model, {"x": values})
    np.testing.assert_array_equal(outputs["output"], values[..., None])
    check_exportable(model, 4)
    with pytest.raises(InvalidArgumentError, match="built for batches of 4"):
        check_exportable(model, 1)


def test_inputs_with_one_name_are_refused():
    a, b = keras.Input((3,), name="x-1"), keras.Input((3,), name="x_1")
    with pytest.raises(UnsupportedModelError, match="different names"):
        Signature.of(functional([a, b], keras.layers.Add()([a, b])))


def gated():
    x = keras.Input((3,))
    return functional(x, keras.layers.Dense(2)(NeuronGate(name="gate")(x)))


def nested_gated():
    x = keras.Input((3,))
    return functional(x, gated()(x))


def wrapped_gated():
    x = keras.Input((4, 3))
    return functional(x, keras.layers.TimeDistributed(gated())(x))


class Stack(keras.layers.Layer):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def listed_gated():
    x = keras.Input((3,))
    return functional(x, Stack([NeuronGate(name="gate"), keras.layers.Dense(2)])(x))


@pytest.mark.parametrize("build", [gated, nested_gated, wrapped_gated, listed_gated])
def test_gated_model_is_refused_with_the_remedy(build):
    with pytest.raises(UnsupportedModelError, match=r"'gate' \(NeuronGate\).*compact\(model\)"):
        check_exportable(build())


def test_model_without_symbolic_inputs_is_refused():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    for model in [Subclassed(), keras.Sequential([keras.layers.Dense(2)])]:
        with pytest.raises(UnsupportedModelError, match=r"no symbolic inputs.*keras\.Input"):
            check_exportable(model)
    with pytest.raises(UnsupportedModelError, match="Received: str"):
        check_exportable("model.keras")


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_bad_batch_size_is_refused(batch_size):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        check_exportable(model, batch_size)


def test_layers_are_found_once_in_models_and_wrappers():
    inner = keras.layers.LSTM(2, name="inner")
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.Bidirectional(inner)])
    names = [layer.name for layer in layers_within(model)]
    assert sum(isinstance(layer, keras.layers.LSTM) for layer in layers_within(model)) >= 2
    assert len(names) == len({id(layer) for layer in layers_within(model)})

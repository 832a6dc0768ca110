"""Networks in half precision are exported through a float32 twin, and stay as they are."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import ExportError, UnsupportedModelError
from tf_kfacprune.export import run_tflite, saved_model, saved_models, tflite, tflite_files
from tf_kfacprune.export.half_precision import float32_twin, half_dtypes
from tf_kfacprune.export.timing import latency

L = keras.layers
X = np.random.default_rng(0).normal(size=(40, 3, 4)).astype("float32")


@pytest.fixture
def policy(request):
    """A dtype policy in force while a network is built, as it is where people train."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@keras.saving.register_keras_serializable("tests")
class Mixer(L.Layer):
    """A layer with a layer of its own, which gets the policy of the process."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = L.Dense(4)

    def call(self, x):
        return self.inner(x) + x


def network(cast="float16"):
    """Whatever a copy could get wrong: shared, nested, wrapped and own layers, a cast, a lambda."""
    inner_input = keras.Input((3, 4))
    inner = keras.Model(inner_input, L.Dense(4, name="twice")(L.LayerNormalization()(inner_input)))
    x = keras.Input((3, 4), name="x", dtype=cast)
    shared = L.Dense(4, activation="tanh", name="twice")
    y = shared(inner(shared(x)))
    y = L.Bidirectional(L.SimpleRNN(3, unroll=True))(Mixer()(y))
    y = keras.ops.cast(L.Lambda(lambda t: 2.0 * t)(y), cast)
    y = L.BatchNormalization()(y)
    net = keras.Model(x, L.Dense(3, dtype="float32")(y), name="net")
    for weight in net.weights:  # biases and statistics, too
        weight.assign(weight + 0.1 * np.random.default_rng(1).random(weight.shape))
    return net


def small():
    """Twelve inputs, a hidden layer, three classes."""
    return keras.Sequential(
        [keras.Input((3, 4), name="x"), L.Flatten(), L.Dense(8, "relu"), L.Dense(3)], name="net"
    )


def state(model):
    weights = [np.array(keras.ops.convert_to_numpy(weight)) for weight in model.weights]
    layers = [(x.name, x.dtype_policy.name, len(x._inbound_nodes)) for x in model.layers]
    return weights, layers, keras.config.dtype_policy().name


HALF = pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float16"], indirect=True
)


@HALF
def test_twin_computes_in_float32_with_the_same_weights(policy):
    model = network()
    before = state(model)
    twin = float32_twin(model)
    assert not half_dtypes(twin)
    assert {tensor.dtype for tensor in [*twin.inputs, *twin.outputs]} == {"float32"}
    assert {weight.dtype for weight in twin.weights} == {"float32"}
    keras.config.set_dtype_policy("float32")
    reference = network(cast="float32")
    keras.config.set_dtype_policy(policy)
    reference.set_weights(before[0])
    np.testing.assert_allclose(twin(X), reference(X), rtol=1e-5, atol=1e-6)
    for old, new in zip(before[0], state(model)[0], strict=True):
        np.testing.assert_array_equal(new, old)
    assert state(model)[1:] == before[1:]


def test_model_in_float32_is_its_own_twin():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    assert float32_twin(model) is model


@pytest.mark.parametrize(
    ("policy", "build", "quantization"),
    [("mixed_float16", network, None), ("mixed_bfloat16", small, "int8")],
    indirect=["policy"],
)
def test_file_is_written_from_the_twin(policy, build, quantization, tmp_path):
    model = build()
    data = {"representative_data": X} if quantization else {"verify_data": X}
    path = tflite(model, tmp_path / "net.tflite", quantization=quantization, **data)
    expected = keras.ops.convert_to_numpy(float32_twin(model)(X))
    error = np.abs(run_tflite(path, X) - expected).max() / np.abs(expected).max()
    assert error < (0.1 if quantization else 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_saved_model_is_the_same_function(policy, tmp_path, monkeypatch):
    import tensorflow as tf

    def run_here(folder, inputs, what):
        serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
        return {name: y.numpy() for name, y in serve(x=tf.constant(inputs["x"])).items()}

    monkeypatch.setattr(saved_models, "run_saved_model", run_here)
    saved_model(small(), tmp_path / "net", verify_data=X)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_twin_is_held_to_the_model_and_accuracy_to_the_models_own(policy, tmp_path, monkeypatch):
    model = small()
    original = tflite_files.float32_twin

    def other(model):
        twin = original(model)
        twin.layers[-1].bias.assign([0.0, 9.0, 0.0])
        return twin

    monkeypatch.setattr(tflite_files, "float32_twin", other)
    with pytest.raises(ExportError, match=r"float32 twin of 'net' does not agree.*allowed 1e-02"):
        tflite(model, tmp_path / "net.tflite", verify_data=X)
    labels = keras.ops.convert_to_numpy(model(X)).argmax(axis=1)
    with pytest.raises(ExportError, match=r"loses too much accuracy.*100\.00 % of the Keras"):
        tflite(model, tmp_path / "net.tflite", verify_data=(X, labels), tolerance=1e9)
    assert not list(tmp_path.iterdir())


def test_overflow_of_float16_is_named(tmp_path):
    model = keras.Sequential([keras.Input((2,)), L.Dense(1, dtype="mixed_float16")])
    model.layers[0].kernel.assign([[60000.0], [60000.0]])
    with pytest.raises(ExportError, match="overflows beyond 65504"):
        tflite(model, tmp_path / "net.tflite", verify_data=np.ones((2, 2)))


class Fixed(L.Layer):
    """A layer whose argument no config can hold."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_layer_that_cannot_be_built_anew_is_named(policy, tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, Fixed(keras.ops.abs, name="fixed")(x))
    with pytest.raises(UnsupportedModelError, match=r"'fixed' \(Fixed\).*float32.*get_config"):
        tflite(model, tmp_path / "net.tflite")


def test_cast_inside_a_function_is_named_and_select_ops_are_not_advised(tmp_path):
    x = keras.Input((4,))
    half = L.Lambda(lambda t: keras.ops.tanh(keras.ops.cast(t, "float16")))
    model = keras.Model(x, L.Dense(2)(half(x)))
    with pytest.raises(ExportError, match=r"tf\.Tanh compute in float16") as caught:
        tflite(model, tmp_path / "net.tflite")
    assert "select_ops" not in str(caught.value)


@pytest.mark.parametrize("policy", ["mixed_bfloat16"], indirect=True)
def test_times_are_taken_of_the_twin_too(policy):
    assert set(latency({"net": small()}, blocks=1, runs=1).ratios.values()) == {1.0}

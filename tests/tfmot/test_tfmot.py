"""Quantization-aware training, clusters and sparsity on translated models, and the way back."""

from __future__ import annotations

import importlib.util
import os

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.tfmot.legacy import is_legacy_model, legacy_packages

# Looked for, not imported: importing it changes the process, see `tf_kfacprune.tfmot.legacy`.
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_model_optimization") is None,
        reason="needs the extra: pip install .[tfmot]",
    ),
    # Of the extra's own packages.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*NumPy.*"),
]


@pytest.fixture(scope="module")
def digits():
    return kp.data.load("digits")


def build():
    image = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Conv2D(12, 3, padding="same", use_bias=False)(image)
    x = keras.layers.BatchNormalization()(x)
    skip = x = keras.layers.ReLU()(x)
    x = keras.layers.Conv2D(12, 3, padding="same")(x)
    x = keras.layers.Activation("relu")(keras.layers.Add()([x, skip]))
    x = keras.layers.MaxPooling2D()(x)
    return keras.Model(image, keras.layers.Dense(10)(keras.layers.Flatten()(x)), name="net")


@pytest.fixture(scope="module")
def trained(digits):
    keras.utils.set_random_seed(0)
    model = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    model.fit(digits.x_train, digits.y_train, batch_size=64, epochs=4, verbose=0)
    return model


def fit(trainee, digits, callbacks=()):
    import tf_keras

    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainee.compile(tf_keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    trainee.fit(
        digits.x_train,
        digits.y_train,
        batch_size=64,
        epochs=1,
        verbose=0,
        callbacks=list(callbacks),
    )
    return trainee


def copy_of(model):
    copy = keras.Model.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy


def weights_in(file):
    """Integer kernels of a file, output channel first."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    return [
        interpreter.get_tensor(tensor["index"])
        for tensor in interpreter.get_tensor_details()
        if tensor["dtype"] == np.int8 and tensor["shape"][0] == 12 and len(tensor["shape"]) == 4
    ]


def test_import_leaves_the_process_as_it_found_it(monkeypatch):
    import tensorflow as tf

    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    legacy_packages()
    assert "TF_USE_LEGACY_KERAS" not in os.environ
    assert tf.keras.__version__.startswith("3.")
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "0")
    legacy_packages()
    assert os.environ["TF_USE_LEGACY_KERAS"] == "0"


def test_quantization_aware_training_ends_in_an_integer_file(trained, digits, tmp_path):
    trainee = fit(kp.tfmot.quantize_aware(trained), digits)
    assert is_legacy_model(trainee)
    assert not is_legacy_model(trained)
    file = kp.export.tflite(
        trainee,
        tmp_path / "net.tflite",
        quantization="qat",
        verify_data=(digits.x_test, digits.y_test),
    )
    from ai_edge_litert.interpreter import Interpreter

    tensors = Interpreter(model_path=str(file)).get_tensor_details()
    assert {np.dtype(tensor["dtype"]).name for tensor in tensors} == {"int8", "int32"}
    right = kp.export.run_tflite(file, digits.x_test).argmax(axis=1) == digits.y_test
    assert right.mean() > 0.9


@pytest.mark.slow
def test_clusters_survive_quantization_aware_training(trained, digits, tmp_path):
    clustered = fit(kp.tfmot.cluster(trained, 8), digits)
    model = kp.tfmot.copy_back(clustered, copy_of(trained))
    kernels = [layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel")]
    assert max(len(np.unique(kernel)) for kernel in kernels) == 8
    trainee = fit(kp.tfmot.quantize_aware(model, preserve_clusters=True), digits)
    file = kp.export.tflite(trainee, tmp_path / "net.tflite", quantization="qat")
    for weights in weights_in(file):
        assert max(len(np.unique(channel)) for channel in weights) <= 8


@pytest.mark.slow
def test_zeros_survive_clusters_and_quantization_aware_training(trained, digits, tmp_path):
    steps = -(-len(digits.x_train) // 64)
    sparse = fit(
        kp.tfmot.sparsify(trained, 0.5, end_step=steps - 2),
        digits,
        [kp.tfmot.sparsity_callback()],
    )
    model = kp.tfmot.copy_back(sparse, copy_of(trained))
    assert zeros(model) == pytest.approx(0.5, abs=0.01)
    clustered = fit(kp.tfmot.cluster(model, 8, preserve_sparsity=True), digits)
    kp.tfmot.copy_back(clustered, model)
    assert zeros(model) >= 0.49
    for options in ({"preserve_sparsity": True}, PRESERVE_BOTH):
        trainee = fit(kp.tfmot.quantize_aware(model, **options), digits)
        file = kp.export.tflite(
            trainee, tmp_path / "net.tflite", quantization="qat", overwrite=True
        )
        assert np.mean(np.concatenate([w.ravel() for w in weights_in(file)]) == 0) >= 0.45
        if options is PRESERVE_BOTH:
            assert max(len(np.unique(c)) for w in weights_in(file) for c in w) <= 9


PRESERVE_BOTH = {"preserve_sparsity": True, "preserve_clusters": True}


def zeros(model):
    kernels = [layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel")]
    return np.mean(np.concatenate([kernel.ravel() for kernel in kernels]) == 0)


def test_report_lists_what_stays_float_and_why():
    x = keras.Input((8, 8, 4), name="x")
    y = keras.layers.Conv2D(4, 3, padding="same", name="conv")(x)
    y = keras.layers.BatchNormalization(name="folded")(y)
    y = keras.layers.Add(name="add")([x, y])
    y = keras.layers.BatchNormalization(name="behind_add")(y)
    y = keras.layers.Conv2D(4, 3, groups=2, name="grouped")(y)
    y = keras.layers.LayerNormalization(name="norm")(y)
    shared = keras.layers.Dense(4, name="shared")
    model = keras.Model(x, shared(shared(y)))
    report = kp.tfmot.quantization_report(model)
    assert [layer.name for layer in report.floating] == [
        "behind_add",
        "grouped",
        "norm",
        "shared",
    ]
    text = str(report)
    assert "3 of 7 layers are quantized." in text
    assert "behind_add (BatchNormalization) stays float: only a BatchNormalization right" in text
    with pytest.warns(UserWarning, match="grouped convolutions have no quantized form"):
        kp.tfmot.quantize_aware(model)


def test_model_with_float_layers_is_exported(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 4), name="x")
    y = keras.layers.Conv2D(8, 3, activation="relu6")(x)
    y = keras.layers.Conv2D(8, 3)(keras.layers.LayerNormalization()(y))
    model = keras.Model(x, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(y)))
    with pytest.warns(UserWarning, match="layer_normalization"):
        trainee = kp.tfmot.quantize_aware(model)
    data = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")
    trainee.compile("sgd", "mse")
    trainee.fit(data, np.zeros((64, 3)), epochs=3, verbose=0)
    file = kp.export.tflite(trainee, tmp_path / "net.tflite", quantization="qat", verify_data=data)
    kernels = [weights for weights in weights_of_convolutions(file) if weights.shape[0] == 8]
    assert [kernel.dtype for kernel in kernels] == [np.int8, np.int8]


def weights_of_convolutions(file):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    indices = [
        int(operation["inputs"][1])
        for operation in interpreter._get_ops_details()
        if operation["op_name"] == "CONV_2D"
    ]
    return [interpreter.get_tensor(index) for index in indices]


def test_wrong_models_are_refused(trained, digits, tmp_path):
    path = tmp_path / "net.tflite"
    with pytest.raises(UnsupportedModelError, match=r"takes the trained result of kp\.tfmot"):
        kp.export.tflite(trained, path, quantization="qat")
    legacy = kp.tfmot.to_tf_keras(trained)
    with pytest.raises(UnsupportedModelError, match=r"quantization='qat'.*copy_back"):
        kp.export.tflite(legacy, path)
    with pytest.raises(UnsupportedModelError, match="not been made quantization-aware"):
        kp.export.tflite(legacy, path, quantization="qat")
    with pytest.raises(InvalidArgumentError, match=r"Received: Functional"):
        kp.tfmot.copy_back(trained, trained)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="other")])
    with pytest.raises(InvalidArgumentError, match=r"no layer 'other'"):
        kp.tfmot.copy_back(legacy, other)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda model: kp.tfmot.cluster(model, 1),
        lambda model: kp.tfmot.sparsify(model, 1.0, end_step=10),
        lambda model: kp.tfmot.sparsify(model, 0.5, begin_step=10, end_step=10),
    ],
)
def test_arguments_that_mean_nothing_are_refused(trained, call):
    with pytest.raises(InvalidArgumentError, match="Received"):
        call(trained)

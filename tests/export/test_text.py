"""Models that take text: a verified SavedModel, and no .tflite file."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export import saved_model, saved_models, tflite, with_head
from tf_kfacprune.export.samples import labelled_examples, named_examples, random_examples
from tf_kfacprune.export.serving import Signature, served_module

L = keras.layers
TEXT = np.array([["hello there"], ["Äpfel"], ["random"]])
BYTES = np.char.encode(TEXT, "utf-8")
ONE = Signature({"words": ((None, 1), "string")}, ("output",))


@pytest.fixture(scope="module")
def model():
    """A classifier of text and a number, which returns logits and the name of the class.

    Its vocabulary is learned from text, so that no config holds it.
    """
    keras.utils.set_random_seed(0)
    split = L.TextVectorization(output_sequence_length=4)
    split.adapt(["hello there", "random Äpfel"])
    words = keras.Input((1,), dtype="string", name="words")
    number = keras.Input((2,), name="number")
    vector = L.GlobalAveragePooling1D()(L.Embedding(6, 4)(split(words)))
    logits = L.Dense(3)(L.Concatenate()([vector, number]))
    return keras.Model([words, number], {"logits": logits, "name": named(logits)}, name="net")


def named(logits):
    """The name of the largest."""
    best = keras.ops.cast(keras.ops.top_k(logits, k=1)[1], "int64")
    return L.StringLookup(vocabulary=["kött", "fisk"], invert=True)(best)


def test_saved_model_is_verified_on_the_strings_given(model, tmp_path, monkeypatch):
    seen = {}
    original = saved_models.run_saved_model

    def run(folder, inputs, what):
        seen["inputs"], seen["outputs"] = inputs, original(folder, inputs, what=what)
        return seen["outputs"]

    monkeypatch.setattr(saved_models, "run_saved_model", run)
    numbers = np.eye(3, 2, dtype="float32")
    saved_model(model, tmp_path / "net", verify_data={"words": TEXT, "number": numbers})
    np.testing.assert_array_equal(seen["inputs"]["words"], BYTES)
    expected = model([keras.ops.convert_to_tensor(x) for x in (TEXT, numbers)])
    logits = keras.ops.convert_to_numpy(expected["logits"])
    np.testing.assert_allclose(seen["outputs"]["logits"], logits, rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in logits}) == 3
    names = np.array(["[UNK]", "kött", "fisk"])[logits.argmax(axis=1)]
    assert [name.decode() for (name,) in seen["outputs"]["name"]] == names.tolist()
    seen["outputs"]["name"][0] = b"fowl"
    monkeypatch.setattr(saved_models, "run_saved_model", lambda *a, **k: seen["outputs"])
    with pytest.raises(ExportError, match=r"at output 'name': relative error 3\.33e-01"):
        saved_model(model, tmp_path / "other", verify_data={"words": TEXT, "number": numbers})


def test_text_that_comes_out_is_refused_by_tflite(tmp_path):
    logits = keras.Input((3,), name="x")
    model = keras.Model(logits, named(logits), name="names")
    with pytest.raises(UnsupportedModelError, match=r"'names' has text .*at output 'output'"):
        tflite(model, tmp_path / "net.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{}, {"verify": False}, {"verify_data": [TEXT, np.ones((3, 2))]}]
)
def test_tflite_refuses_text_by_name(model, tmp_path, options):
    said = r"'net' has text \(dtype string\) at input 'words'.*kp\.export\.saved_model"
    with pytest.raises(UnsupportedModelError, match=said):
        tflite(model, tmp_path / "net.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_tables_in_every_place_are_tracked():
    """Where a table is not, TensorFlow cannot write the SavedModel."""
    words = keras.Input((1,), dtype="string", name="words")
    look = L.StringLookup(vocabulary=["a", "b"])
    inner = keras.Model(words, look(words))
    other = keras.Input((1,), dtype="string", name="other")
    numbers = L.IntegerLookup(vocabulary=[1, 2])
    model = keras.Model(other, numbers(L.Identity()(inner(other))))
    module, _ = served_module(model, Signature.of(model))
    assert {id(table) for table in module.tables} == {
        id(look.lookup_table),
        id(numbers.lookup_table),
    }


@pytest.mark.parametrize(
    "data",
    [
        TEXT,
        BYTES,
        TEXT.astype(object),
        [text for (text,) in TEXT.tolist()],
        tuple(text for (text,) in TEXT.tolist()),
        {"words": TEXT},
        iter([TEXT[:1], TEXT[1:]]),
        ([text for (text,) in TEXT.tolist()], [0, 1, 1]),
        (TEXT, np.array([0, 1, 1])),
    ],
    ids=["array", "bytes", "objects", "list", "tuple", "dict", "batches", "list and y", "x and y"],
)
def test_strings_are_taken_in_any_form(data):
    found = labelled_examples(data, ONE, "verify_data")
    np.testing.assert_array_equal(found.inputs["words"], BYTES)
    assert found.labels is None or found.labels.tolist() == [0, 1, 1]


def test_tensorflow_strings_are_taken():
    import tensorflow as tf

    for data in (tf.constant(TEXT), tf.data.Dataset.from_tensor_slices(TEXT).batch(2)):
        found = named_examples(data, ONE, "verify_data")
        np.testing.assert_array_equal(found["words"], BYTES)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("hello", "Received: str"),
        (np.ones((3, 1)), "must hold strings.*Found float: 1.0"),
        (np.array([["a"], [None]]), "must hold strings.*NoneType"),
        (np.array([["a", "b"]]), r"shape \('n', 1\). Found \(1, 2\)"),
        (np.array([[b"raw\0"]], dtype=object), "zero byte"),
        ([], "empty"),
    ],
)
def test_what_is_no_text_is_refused(data, said):
    with pytest.raises(DataError, match=said):
        named_examples(data, ONE, "verify_data")


def test_text_cannot_be_guessed_and_numbers_are_no_text(model, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"'words' takes text.*as verify_data"):
        random_examples(ONE)
    with pytest.raises(InvalidArgumentError, match=r"'words' takes text.*verify=False"):
        saved_model(model, tmp_path / "net")
    with pytest.raises(DataError, match="must hold numbers"):
        saved_model(model, tmp_path / "net", verify_data=[TEXT, np.array([["a", "b"]] * 3)])
    assert not list(tmp_path.iterdir())


def test_text_is_not_scaled_but_may_have_a_head():
    words = keras.Input((1,), dtype="string", name="words")
    found = L.TextVectorization(vocabulary=["a"], output_mode="multi_hot")(words)
    net = keras.Model(words, L.Dense(2)(found))
    assert Signature.of(with_head(net, "softmax")).inputs == ONE.inputs
    with pytest.raises(InvalidArgumentError, match="takes text, which cannot be scaled"):
        with_head(net, scale=0.5)

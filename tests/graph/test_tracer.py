from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import insert_gates
from tf_kfacprune.graph import trace


def to_numpy(x):
    return np.asarray(keras.ops.convert_to_tensor(x))


def block(name, units=6):
    return keras.Sequential(
        [
            keras.Input((units,)),
            layers.Dense(units, name=f"{name}_dense"),
            layers.BatchNormalization(name=f"{name}_bn"),
            layers.Dropout(0.5, seed=3, name=f"{name}_drop"),
        ],
        name=name,
    )


def nested_and_shared(inner_training=None):
    inputs = keras.Input((6,))
    shared, inner = layers.Dense(6, name="shared"), block("inner")
    x = shared(layers.Activation("relu")(shared(inputs)))
    x = inner(x) if inner_training is None else inner(x, training=inner_training)
    x = layers.Dropout(0.3, seed=1)(x) + 2.0 * inputs
    return keras.Model(inputs, inner(layers.Dense(6)(x)))


def deep_nest():
    inputs = keras.Input((6,))
    middle_in = keras.Input((6,))
    middle = keras.Model(middle_in, [block("leaf")(middle_in), middle_in * 0.5], name="middle")
    a, b = middle(inputs)
    return keras.Model(inputs, {"sum": a + b, "only": b})


def masked_text():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 6, mask_zero=True)(tokens)
    tail_in = keras.Input((7, 6))
    tail = keras.Model(tail_in, layers.LSTM(4, return_sequences=True)(layers.Dropout(0.2)(tail_in)))
    tail.supports_masking = True
    x = tail(x)
    return keras.Model(
        tokens, layers.GlobalAveragePooling1D()(layers.GRU(3, return_sequences=True)(x))
    )


def other_input_dtype_and_shape():
    inner_in = keras.Input((None, None, 3))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, padding="same")(inner_in), name="any_size")
    inputs = keras.Input((9, 8, 3), dtype="uint8")
    return keras.Model(inputs, layers.Flatten()(inner(inputs)))


def lenet():
    return keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(5, activation="softmax"),
        ]
    )


def dict_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    return keras.Model({"a": a, "b": b}, [layers.Add()([layers.Dense(4)(a), b])])


def gated_transformer():
    inputs, mask = keras.Input((7, 6)), keras.Input((7, 7), dtype="bool", name="attention_mask")
    x = layers.Dense(6)(inputs)
    y = layers.LayerNormalization()(x)
    y = layers.MultiHeadAttention(2, 3, dropout=0.1, seed=1)(
        query=y, value=y, attention_mask=mask, use_causal_mask=True
    )
    x = layers.RMSNormalization()(x + y)
    x = layers.GroupQueryAttention(2, 4, 2)(x, x)
    return insert_gates(keras.Model([inputs, mask], layers.Dense(2)(x)))


def gated_text():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 6, mask_zero=True)(tokens)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    x, *states = layers.LSTM(3, return_sequences=True, return_state=True)(x, training=False)
    x = layers.LSTM(3, dropout=0.2, seed=2)(layers.LayerNormalization()(x), initial_state=states)
    return insert_gates(keras.Model(tokens, layers.Dense(2)(x)))


MODELS = [
    gated_transformer,
    gated_text,
    nested_and_shared,
    lambda: nested_and_shared(False),
    lambda: nested_and_shared(True),
    deep_nest,
    masked_text,
    other_input_dtype_and_shape,
    lenet,
    dict_inputs,
]


def inputs_for(model, batch=5):
    rng = np.random.default_rng(0)

    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    def draw(tensor):
        shape = [batch, *[9 if size is None else size for size in tensor.shape[1:]]]
        if "int" in tensor.dtype:
            return rng.integers(0, 11, shape).astype(tensor.dtype)
        return rng.normal(size=shape).astype(tensor.dtype)

    return keras.tree.map_structure(draw, structure)


def states(model):
    variables = [*model.variables, *(v for x in model._flatten_layers() for v in x.variables)]
    return list({id(v): v for v in variables}.values())


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("training", [None, False, True])
def test_run_equals_the_model_to_the_bit(build, training):
    keras.utils.set_random_seed(1)
    model = build()
    x = inputs_for(model)
    variables = states(model)
    before = [to_numpy(v) for v in variables]
    expected = keras.tree.map_structure(to_numpy, model(x, training=training))
    after = [to_numpy(v) for v in variables]
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    found = keras.tree.map_structure(to_numpy, trace(model).run(x, training=training))
    keras.tree.assert_same_structure(found, expected)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    for variable, value in zip(variables, after, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


@pytest.mark.parametrize("build", MODELS)
def test_rebuilt_model_equals_the_model_to_the_bit(build):
    model = build()
    x = inputs_for(model)
    rebuilt = trace(model).rebuild()
    variables = states(model)
    before = [to_numpy(v) for v in variables]
    expected = model(x)
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    found = rebuilt(x)
    keras.tree.assert_same_structure(found, expected)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


def test_explicit_training_of_a_nested_call_reaches_its_inner_calls():
    model = nested_and_shared(inner_training=True)
    seen = {}

    def record(call, args, kwargs):
        seen.setdefault(call.path, []).append(kwargs.get("training"))
        return call.operation(*args, **kwargs)

    trace(model).run(inputs_for(model), record)
    assert seen["inner/inner_bn"][0] is True
    assert seen["inner/inner_drop"][0] is True
    assert seen["inner/inner_bn"][1] is not True


def test_masks_of_the_output_are_those_of_the_model():
    model = masked_text()
    embedded = keras.Model(model.input, model.layers[-2].output)
    x = inputs_for(embedded)
    expected = keras.src.backend.get_keras_mask(embedded(x))
    assert expected is not None
    found = keras.src.backend.get_keras_mask(trace(embedded).run(x))
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))


def test_shared_layers_keep_their_identity_and_nested_calls_get_paths():
    graph = trace(nested_and_shared())
    dense = [call for call in graph.calls if call.path == "shared"]
    assert len(dense) == 2
    assert dense[0].operation is dense[1].operation
    assert [c.path for c in graph.calls if c.path.endswith("inner_bn")] == ["inner/inner_bn"] * 2


def public_edges(model):
    """(producer, consumer) pairs of a flat model by the public route."""
    edges = set()
    for layer in model.get_config()["layers"]:
        for node in layer["inbound_nodes"]:

            def visit(leaf, name=layer["name"]):
                if isinstance(leaf, dict) and leaf.get("class_name") == "__keras_tensor__":
                    edges.add((leaf["config"]["keras_history"][0], name))
                elif isinstance(leaf, dict):
                    for inner in leaf.values():
                        visit(inner)
                elif isinstance(leaf, (list, tuple)):
                    for inner in leaf:
                        visit(inner)

            visit([node["args"], node["kwargs"]])
    return edges


def traced_edges(graph):
    producer = dict(zip(graph.inputs, graph.input_names, strict=True))
    for call in graph.calls:
        producer.update(dict.fromkeys(call.outputs, call.operation.name))
    edges = set()
    for call in graph.calls:
        leaves = keras.tree.flatten((call.args, call.kwargs))
        values = [leaf for leaf in leaves if type(leaf).__name__ == "Value"]
        edges |= {(producer[value], call.operation.name) for value in values}
    return edges


@pytest.mark.parametrize("build", MODELS)
def test_edges_agree_with_the_public_config(build):
    flat = trace(build()).rebuild()
    assert traced_edges(trace(flat)) == public_edges(flat)


def test_shapes_inside_a_nested_model_follow_the_outer_call():
    graph = trace(other_input_dtype_and_shape())
    conv = next(call for call in graph.calls if call.path.startswith("any_size/conv"))
    assert conv.outputs[0].shape == (None, 9, 8, 4)


def test_run_works_inside_a_tf_function():
    import tensorflow as tf

    model = nested_and_shared()
    graph, x = trace(model), inputs_for(model)
    run = tf.function(lambda x: graph.run(x, training=False), jit_compile=False)
    np.testing.assert_allclose(run(x), model(x, training=False), rtol=1e-5, atol=1e-5)


def test_unbuilt_sequential_is_refused_with_the_remedy():
    with pytest.raises(UnsupportedModelError, match=r"keras\.Input\(shape="):
        trace(keras.Sequential([layers.Dense(3)]))


def test_subclassed_model_is_refused():
    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(UnsupportedModelError, match="Functional API"):
        trace(Mine())


def test_something_else_than_a_model_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"Expected a keras\.Model"):
        trace(42)

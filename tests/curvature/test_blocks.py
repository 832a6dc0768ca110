"""Every Kronecker block against the layer itself: products, gradients and second moments."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import LocationSample, Record, blocks_of, capture
from tf_kfacprune.linalg import conv_patches

L = keras.layers
BATCH = 3
to_numpy = keras.ops.convert_to_numpy

# name -> (layer, input shape)
CONTRACTIONS = {
    "Dense": (lambda: L.Dense(3, activation="tanh"), (5,)),
    "Dense on sequences": (lambda: L.Dense(3), (4, 5)),
    "Dense without bias": (lambda: L.Dense(3, use_bias=False), (5,)),
    "Einsum to heads": (lambda: L.EinsumDense("abc,cde->abde", (4, 2, 3), bias_axes="de"), (4, 5)),
    "Einsum from heads": (lambda: L.EinsumDense("abcd,cde->abe", (4, 5), bias_axes="e"), (4, 2, 3)),
    "Einsum per group": (lambda: L.EinsumDense("abc,bcd->abd", (4, 6), bias_axes="bd"), (4, 5)),
    "Einsum that swaps": (lambda: L.EinsumDense("abcd,de->acbe", (3, 4, 2)), (4, 3, 5)),
    "Einsum with ellipsis": (lambda: L.EinsumDense("...x,xy->...y", 3, bias_axes="y"), (4, 2, 5)),
    "Conv2D": (lambda: L.Conv2D(4, (3, 2), activation="relu"), (7, 6, 2)),
    "Conv2D same": (lambda: L.Conv2D(4, (3, 2), padding="same"), (7, 6, 2)),
    "Conv2D strided": (lambda: L.Conv2D(4, 3, strides=2, use_bias=False), (7, 6, 2)),
    "Conv2D dilated": (lambda: L.Conv2D(4, 3, dilation_rate=2), (7, 6, 2)),
    "Conv2D grouped": (lambda: L.Conv2D(6, 3, groups=2, padding="same"), (5, 6, 4)),
    "Conv1D causal": (lambda: L.Conv1D(3, 4, padding="causal", dilation_rate=2), (9, 2)),
    "Conv3D": (lambda: L.Conv3D(2, 2, padding="same", strides=2), (4, 5, 4, 2)),
    "Depthwise": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (5, 6, 3)),
    "Depthwise strided": (lambda: L.DepthwiseConv2D(3, strides=2, use_bias=False), (5, 6, 3)),
    "Depthwise 1D": (lambda: L.DepthwiseConv1D(3), (9, 3)),
    "Transposed": (lambda: L.Conv2DTranspose(4, (3, 2), strides=2, padding="same"), (4, 5, 2)),
    "Transposed valid": (lambda: L.Conv2DTranspose(4, 2, strides=3), (4, 5, 2)),
    "Transposed wide": (lambda: L.Conv2DTranspose(4, 5, strides=(2, 1), padding="same"), (4, 5, 2)),
    "Transposed output padding": (
        lambda: L.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=1),
        (4, 5, 2),
    ),
    "Transposed 1D": (lambda: L.Conv1DTranspose(3, 4, strides=2), (5, 2)),
    "Transposed 3D": (lambda: L.Conv3DTranspose(2, 2, strides=2, padding="same"), (2, 3, 2, 2)),
}


def _recorded(make, shape, seed=0):
    """A layer with random weights, one record of it on random inputs, and a random g."""
    rng = np.random.default_rng(seed)
    layer = make()
    layer.build((None, *shape))
    for weight in layer.weights:
        if weight.trainable:
            weight.assign(rng.normal(size=weight.shape))
    x = tf.constant(rng.normal(size=(BATCH, *shape)).astype("float32"))
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    found = blocks_of(layer).blocks
    _, (record,) = capture(model, x, found, training=True)
    g = tf.constant(rng.normal(size=record.s.shape).astype("float32"))
    return found, record, g


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_rows_times_matrix_is_the_preactivation(name):
    (block,), record, _ = _recorded(*CONTRACTIONS[name])
    rows = to_numpy(block.homogeneous(block.rows_a(record))).astype("float64")
    matrix = to_numpy(block.to_matrix([v.value for v in block.variables])).astype("float64")
    product = rows @ matrix[..., None, :, :]
    np.testing.assert_allclose(product, to_numpy(block.rows_g(record, record.s)), atol=2e-5)


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_rows_give_the_gradient_of_the_weights(name):
    (block,), record, g = _recorded(*CONTRACTIONS[name])
    layer = block.layer
    plain = layer.activation
    layer.__dict__["activation"] = keras.activations.linear
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(record.x) * g)
    layer.__dict__["activation"] = plain
    gradients = tape.gradient(loss, [v.value for v in block.variables])
    rows_a = to_numpy(block.homogeneous(block.rows_a(record))).astype("float64")
    rows_g = to_numpy(block.rows_g(record, g)).astype("float64")
    expected = np.einsum("...bti,...btj->...ij", rows_a, rows_g)
    np.testing.assert_allclose(to_numpy(block.to_matrix(gradients)), expected, atol=1e-4)


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_matrix_layout_round_trips(name):
    (block,), _, _ = _recorded(*CONTRACTIONS[name])
    tensors = [v.value for v in block.variables]
    matrix = block.to_matrix(tensors)
    assert matrix.shape == (*block.group_shape, block.n_a, block.n_out)
    for there, back in zip(tensors, block.from_matrix(matrix), strict=True):
        np.testing.assert_array_equal(to_numpy(there), to_numpy(back))


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
@pytest.mark.parametrize("name", CONTRACTIONS)
def test_factors_are_the_second_moments_of_the_rows(name, reduce):
    (block,), record, g = _recorded(*CONTRACTIONS[name])
    a = to_numpy(block.homogeneous(block.rows_a(record))).astype("float64")
    s = to_numpy(block.rows_g(record, g)).astype("float64")
    locations = a.shape[-2]
    if reduce:
        a, s, locations = a.mean(-2, keepdims=True), s.sum(-2, keepdims=True), 1
    expected_a = np.einsum("...bti,...btj->...ij", a, a) / BATCH
    expected_g = np.einsum("...bti,...btj->...ij", s, s) / (BATCH * locations)
    got = to_numpy(block.factor_a(record, g, reduce=reduce))
    np.testing.assert_allclose(got, expected_a, rtol=1e-4, atol=1e-4)
    got = to_numpy(block.factor_g(record, g, reduce=reduce))
    np.testing.assert_allclose(got, expected_g, rtol=1e-4, atol=1e-4)


SAMPLED = [name for name, (_, shape) in CONTRACTIONS.items() if len(shape) > 1]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SAMPLED[1::2]]


@pytest.mark.parametrize("name", [*SAMPLED[::2], *SLOW])
def test_factors_on_a_sample_of_locations_are_right_on_average(name):
    """Every beginning once is the exact expectation: to rounding the full factor."""
    (block,), record, g = _recorded(*CONTRACTIONS[name])
    per_block = {"A": (block.factor_a, _beginnings(block)), "G": (block.factor_g, None)}
    for factor, beginnings in per_block.values():
        total = beginnings or to_numpy(block.rows_g(record, g)).shape[-2]
        noises = (np.arange(total) + 0.5) / total
        samples = [LocationSample(0.4, tf.constant(r, "float32")) for r in noises]
        drawn = [to_numpy(factor(record, g, sample=sample)).astype("float64") for sample in samples]
        full = to_numpy(factor(record, g))
        np.testing.assert_allclose(np.mean(drawn, axis=0), full, rtol=1e-4, atol=1e-4)
        if total > 1:
            assert not np.allclose(drawn[0], full, rtol=1e-2)


def test_locations_are_sampled_under_xla_as_elsewhere():
    (block,), record, g = _recorded(*CONTRACTIONS["Conv2D same"])

    def factors(noise):
        sample = LocationSample(0.4, noise)
        return block.factor_a(record, g, sample=sample), block.factor_g(record, g, sample=sample)

    noise = tf.constant(0.6)
    for plain, compiled in zip(
        factors(noise), tf.function(factors, jit_compile=True)(noise), strict=True
    ):
        np.testing.assert_allclose(to_numpy(compiled), to_numpy(plain), rtol=1e-4, atol=1e-5)


def _beginnings(block):
    """Output rows that convolutions choose from, None for blocks that choose any location."""
    layer = block.layer
    if type(layer).__name__ in ("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"):
        return int(layer.output.shape[1])
    return None


@pytest.mark.parametrize(("total", "fraction"), [(1, 0.1), (7, 0.3), (12, 0.25), (5, 1.0)])
@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_sampled_locations_are_distinct_and_evenly_spaced(total, fraction, is_known):
    sample = LocationSample(fraction, tf.constant(0.999))
    got = np.array(sample.positions(total if is_known else tf.constant(total)))
    assert len(set(got)) == len(got) == np.ceil(fraction * total)
    assert got.min() >= 0
    gaps = np.diff([*sorted(got), min(got) + total])
    assert set(gaps) <= {total // len(got), -(-total // len(got))}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_projection_is_the_rows_times_a_vector(name):
    (block,), record, _ = _recorded(*CONTRACTIONS[name])
    u = np.random.default_rng(1).normal(size=(*block.group_shape, block.n_a)).astype("float32")
    rows = to_numpy(block.homogeneous(block.rows_a(record))).astype("float64")
    expected = np.einsum("...bti,...i->...bt", rows, u.astype("float64"))
    got = to_numpy(block.project(record, tf.constant(u))).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def _per_example_gradients(layer, block, x, g, training):
    """Gradients of `sum s g` by example, float64, `(batch, *k, n_a, n_out)`."""
    rows = []
    for i in range(BATCH):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((layer(x, **training) * g)[i])
        gradients = [tf.convert_to_tensor(t) for t in tape.gradient(loss, layer_values(block))]
        rows.append(to_numpy(block.to_matrix(gradients)).astype("float64"))
    return np.stack(rows)


def layer_values(block):
    return [v.value for v in block.variables]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: L.SeparableConv2D(4, 3, depth_multiplier=2, padding="same"), (5, 6, 3)),
        (lambda: L.SeparableConv2D(4, 3, strides=2, use_bias=False), (7, 6, 3)),
        (lambda: L.SeparableConv1D(4, 3, activation="relu"), (7, 3)),
    ],
    ids=["same", "strided", "1D"],
)
def test_both_halves_of_a_separable_convolution_give_its_gradients(make, shape):
    found, record, g = _recorded(make, shape)
    assert [block.name.split("/")[1] for block in found] == ["depthwise", "pointwise"]
    layer = found[0].layer
    layer.__dict__["activation"] = keras.activations.linear
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(layer(record.x) * g)
    for block in found:
        gradient = block.to_matrix(tape.gradient(loss, layer_values(block)))
        rows_a = to_numpy(block.homogeneous(block.rows_a(record))).astype("float64")
        rows_g = to_numpy(block.rows_g(record, g)).astype("float64")
        expected = np.einsum("...bti,...btj->...ij", rows_a, rows_g)
        np.testing.assert_allclose(to_numpy(gradient), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: L.BatchNormalization(), (4, 5)),
        (lambda: L.BatchNormalization(scale=False, axis=2), (4, 5)),
        (lambda: L.LayerNormalization(), (4, 5)),
        (lambda: L.LayerNormalization(center=False), (5,)),
        (lambda: L.RMSNormalization(), (4, 5)),
    ],
    ids=["batch", "batch, no scale", "layer", "layer, no shift", "rms"],
)
def test_the_block_of_scale_and_shift_is_their_exact_fisher_by_channel(make, shape):
    (block,), record, g = _recorded(make, shape)
    is_batch = isinstance(block.layer, L.BatchNormalization)
    training = {"training": True} if is_batch else {}
    d = _per_example_gradients(block.layer, block, record.x, g, training)[..., 0]
    expected = np.einsum("bki,bkj->kij", d, d) / BATCH
    np.testing.assert_allclose(to_numpy(block.factor_a(record, g)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(to_numpy(block.factor_g(record, g)), np.ones((5, 1, 1)))


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
def test_the_input_factor_of_an_embedding_is_the_diagonal_of_token_frequencies(reduce):
    layer = L.Embedding(6, 2)
    inputs = keras.Input((4,), dtype="int32")
    model = keras.Model(inputs, layer(inputs))
    (block,) = blocks_of(layer).blocks
    x = np.array([[0, 1, 1, 5], [2, 2, 2, 0], [3, 3, 1, 0]])
    _, (record,) = capture(model, tf.constant(x), [block], training=True)
    one_hot = np.eye(6)[x]
    if reduce:
        one_hot = one_hot.mean(1, keepdims=True)
    expected = np.einsum("bti,btj->ij", one_hot, one_hot) / 3
    got = to_numpy(block.factor_a(record, None, reduce=reduce))
    np.testing.assert_allclose(got, np.diag(expected), rtol=1e-6)


@pytest.mark.parametrize("kind", ["multi-head", "grouped-query"])
def test_attention_has_a_block_per_projection(kind):
    if kind == "multi-head":
        layer = L.MultiHeadAttention(2, 3, name="attention")
    else:
        layer = L.GroupQueryAttention(3, 4, 2, name="attention")
    inputs = keras.Input((4, 5))
    model = keras.Model(inputs, layer(inputs, inputs))
    found = blocks_of(layer)
    assert [block.name for block in found.blocks] == [
        f"attention/{part}" for part in ("query", "key", "value", "output")
    ]
    assert not found.reasons
    x = np.random.default_rng(0).normal(size=(BATCH, 4, 5)).astype("float32")
    _, records = capture(model, x, found.blocks, training=True)
    for block in found.blocks:
        (record,) = [r for r in records if r.layer is block.layer]
        rows = to_numpy(block.homogeneous(block.rows_a(record)))
        matrix = to_numpy(block.to_matrix(layer_values(block)))
        expected = to_numpy(block.rows_g(record, record.s))
        np.testing.assert_allclose(rows @ matrix, expected, atol=1e-5)


def test_channels_first_gives_the_factors_of_channels_last():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(2, 5, 6, 4))
    last, first = (
        blocks_of(_built(L.Conv2D(4, 3, padding="same", data_format=order), shape)).blocks[0]
        for order, shape in [("channels_last", (5, 6, 3)), ("channels_first", (3, 5, 6))]
    )
    there = Record(last.layer, tf.constant(x), tf.constant(g))
    swap = (0, 3, 1, 2)
    here = Record(first.layer, tf.constant(x.transpose(swap)), tf.constant(g.transpose(swap)))
    np.testing.assert_allclose(
        to_numpy(first.factor_a(here, here.s)), to_numpy(last.factor_a(there, there.s)), rtol=1e-5
    )
    np.testing.assert_allclose(
        to_numpy(first.factor_g(here, here.s)), to_numpy(last.factor_g(there, there.s)), rtol=1e-5
    )


def _built(layer, shape):
    layer.build((None, *shape))
    return layer


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (L.Dense(4, trainable=False), (8,), "not trainable"),
        (L.GroupNormalization(2), (8,), "no Kronecker block"),
        (L.BatchNormalization(axis=1), (8, 4), "not the last one"),
        (L.LSTM(3), (8, 4), "no Kronecker block"),
        (L.EinsumDense("abc,cd->abd", (8, 3), bias_axes="bd"), (8, 4), "bias"),
        (L.EinsumDense("abc,cd->ad", (3,)), (8, 4), "not a product of matrices"),
    ],
    ids=["frozen", "group", "axis", "recurrent", "bias per position", "summed"],
)
def test_layers_without_a_block_give_the_reason(layer, shape, reason):
    found = blocks_of(_built(layer, shape))
    assert not found.blocks
    assert set(found.reasons) == {v.path for v in layer.weights}
    assert all(reason in given for given in found.reasons.values())


def test_a_block_needs_all_of_its_weights():
    layer = _built(L.Dense(3), (4,))
    layer.bias.trainable = False
    found = blocks_of(layer)
    assert not found.blocks
    assert "another weight" in found.reasons[layer.kernel.path]
    assert len(blocks_of(layer, with_frozen=True).blocks) == 1


def test_a_subclass_of_a_supported_layer_is_not_guessed():
    class MyDense(keras.layers.Dense):
        pass

    found = blocks_of(_built(MyDense(3), (4,)))
    assert not found.blocks
    assert all("MyDense" in given for given in found.reasons.values())


def test_patches_of_a_transposed_convolution_hold_no_zeros_between_for_stride_one():
    (block,), record, _ = _recorded(lambda: L.Conv2DTranspose(2, 1), (3, 3, 2))
    plain = conv_patches(record.x, (1, 1))
    np.testing.assert_array_equal(to_numpy(block.rows_a(record)), to_numpy(plain))

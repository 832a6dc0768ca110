"""Custom layers as people write them, for tests of their opening."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import layers, ops


class FeedForward(layers.Layer):
    """Two Dense layers of the same names in every block, with a residual connection."""

    def __init__(self, units, activation="relu", **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.up = layers.Dense(units, activation=activation, name="dense", dtype=self.dtype_policy)

    def build(self, shape):
        self.down = layers.Dense(shape[-1], name="dense_out", dtype=self.dtype_policy)
        self.up.build(shape)
        self.down.build((*shape[:-1], self.units))
        self.built = True

    def call(self, x):
        return x + self.down(self.up(x))


class Scale(layers.Layer):
    """Weights of its own: a factor and a shift per channel, the factor read in a computation."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(shape[-1],), name="beta")
        self.built = True

    def call(self, x):
        return ops.softplus(self.gamma) * x + self.beta


class Block(layers.Layer):
    """Nested custom layers, state, noise, `training` and a keyword argument."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.ffn = FeedForward(units, name="ffn")
        self.scale = Scale(name="scale")
        self.bn = layers.BatchNormalization(name="bn")
        self.drop = layers.Dropout(0.5, seed=3, name="drop")

    def build(self, shape):
        for layer in (self.ffn, self.scale, self.bn):
            layer.build(shape)
        self.built = True

    def call(self, x, twice=False, training=None):
        y = self.ffn(x)
        if twice:
            y = self.ffn(y)
        y = self.drop(self.bn(self.scale(y), training=training), training=training)
        return ops.relu(x + y)


class SilentMode(layers.Layer):
    """Its `call` has no `training`, a layer inside has; it returns None, for it keeps no cache."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drop = layers.Dropout(0.5, seed=3, name="drop")
        self.dense = layers.Dense(4, name="dense")

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x, cache=None):
        return self.drop(self.dense(x)), cache


class AroundSilentMode(layers.Layer):
    """Calls a layer that returns None; puts out a constant besides."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = SilentMode(name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        y, _ = self.inner(x)
        return y, ops.zeros((0,))


class Tokens(layers.Layer):
    """As many learned tokens as the tests have examples, in front of a sequence."""

    def build(self, shape):
        self.tokens = self.add_weight(shape=(1, 4, shape[-1]), name="tokens")
        self.built = True

    def call(self, x):
        return ops.concatenate([ops.tile(self.tokens, (ops.shape(x)[0], 1, 1)), x], axis=1)


class SizeOfData(layers.Layer):
    """Sizes known only at run time, and positions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Dense(6, name="table")

    def build(self, shape):
        self.table.build(shape)
        self.positions = self.add_weight(shape=(64, shape[-1]), name="positions")
        self.built = True

    def call(self, x):
        batch, length, channels = ops.shape(x)
        x = x + ops.broadcast_to(
            ops.slice(self.positions, (0, 0), (length, channels)), (batch, length, channels)
        )
        x = x + ops.sin(ops.arange(length, dtype="float32"))[:, None]
        x = x + self.positions[:length] / ops.cast(length, "float32")
        heads = ops.reshape(self.table(x), (batch, length, 2, 3))
        return ops.reshape(2.0 * heads, (batch, length, 6)) + ops.ones((batch, length, 1))


class Masked(layers.Layer):
    """Takes the Keras mask of its input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lstm = layers.LSTM(5, return_sequences=True, name="lstm")
        self.supports_masking = True

    def build(self, shape):
        self.lstm.build(shape)
        self.built = True

    def call(self, x, mask=None):
        y = self.lstm(x)
        return y if mask is None else ops.where(mask[..., None], y, 0.5)


class Branching(layers.Layer):
    """Does something else in training than in inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, name="dense")

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x, training=None):
        return self.dense(x) * 2.0 if training else self.dense(x)


class Baking(layers.Layer):
    """Reads a weight of another layer past Keras, so its value would be baked into the graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, name="dense")

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        return self.dense(x) + ops.mean(ops.convert_to_tensor(self.dense.kernel))


class Drawing(layers.Layer):
    """Draws random numbers of a fixed shape."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal((1, x.shape[-1]), seed=self.seed)


class Counting(layers.Layer):
    """Changes a weight of its own in its call."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), trainable=False, name="count")
        self.built = True

    def call(self, x):
        self.count.assign_add(1.0)
        return x * self.count


class Deciding(layers.Layer):
    """Decides by its data."""

    def call(self, x):
        return x if ops.sum(x) > 0 else -x

    def compute_output_shape(self, shape):
        return shape


class DropsPaths(layers.Layer):
    """Noise that is one number per example, drawn in training alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x, training=None):
        if not training:
            return x
        kept = keras.random.uniform((ops.shape(x)[0], *[1] * (len(x.shape) - 1)), seed=self.seed)
        return x * ops.cast(kept > 0.5, x.dtype)


class CentersInTraining(layers.Layer):
    """Does nothing in inference but mixes channels in training: no noise."""

    def call(self, x, training=None):
        return x - ops.mean(x, axis=-1, keepdims=True) if training else x


class NoiseInTraining(layers.Layer):
    """Calls noise in training alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(5, name="dense")
        self.dropout = layers.Dropout(0.5, seed=1, name="dropout")

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x, training=None):
        x = self.dense(x)
        return self.dropout(x, training=training) if training else x


class Windows(layers.Layer):
    """Functions of TensorFlow on sizes known only at run time; weights of other layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(6, use_bias=False, name="first")
        self.second = layers.Dense(6, use_bias=False, name="second")

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)
        self.built = True

    def call(self, x):
        batch, length, channels = ops.shape(x)
        x = ops.matmul(x, self.first.kernel) + ops.matmul(x, self.second.kernel)
        near = tf.linalg.band_part(ops.ones((length, length), "bool"), 1, ops.minimum(length, 2))
        kept = tf.linalg.band_part(ops.ones((length, length)), -1, 0)
        weights = ops.where(near, kept, 0.0)
        places = ops.repeat(ops.arange(length)[None, :, None], batch, axis=0)
        places = ops.broadcast_to(ops.mod(places, 6), (batch, length, 6))
        x = x + tf.gather(x, indices=places, batch_dims=2)
        flat = ops.reshape(ops.einsum("st,btc->bsc", weights, x), (-1, channels))
        rows = ops.reshape(ops.tanh(flat), (batch, length, channels))
        return ops.reshape(ops.reshape(rows, (batch, length, 2, -1)), ops.shape(rows))[..., None]


class Pair(layers.Layer):
    """Returns one tensor."""

    def call(self, x):
        return 2.0 * x

    def compute_output_shape(self, shape):
        return shape


class Pairs(Pair):
    """Returns two, but inherits what it says about shapes."""

    def call(self, x):
        return 2.0 * x, 3.0 * x


class CallsMistaken(layers.Layer):
    """Calls a layer that is mistaken about what it returns."""

    def __init__(self, inner=Pairs, **kwargs):
        super().__init__(**kwargs)
        self.pairs = inner(name="pairs")

    def build(self, shape):
        self.built = True

    def call(self, x):
        first, second = self.pairs(x)
        return first + second

    def compute_output_shape(self, shape):
        return shape


class DecidingPairs(Pairs):
    """Cannot be opened, either."""

    def call(self, x):
        return (x, x) if ops.sum(x) > 0 else (-x, x)


class Stacked(layers.Layer):
    """Its first input has several tensors in one, before the batch."""

    def call(self, stacked, x):
        return ops.sum(stacked, axis=0) * x


class TableOfPositions(layers.Layer):
    """Takes sequences of one length alone."""

    def build(self, shape):
        self.positions = self.add_weight(shape=(7, shape[-1]), name="positions")
        self.built = True

    def call(self, x):
        return x + self.positions

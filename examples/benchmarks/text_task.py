"""The next character of Python's own manual: data and a small causal transformer."""

import keras
import numpy as np


def manual_text(window=32):
    """Windows of characters of Python's own manual, and the character that follows each."""
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    tokens = np.frombuffer(text, np.uint8).astype("int32")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, window + 1)[::7]
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


def text_network():
    """A small causal transformer over 128 characters."""
    inputs = keras.Input((32,), dtype="int32")
    x = keras.layers.Embedding(128, 64)(inputs)
    places = keras.layers.Embedding(32, 64)
    x = x + places(keras.ops.arange(32))
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(4, 16)(y, y, use_causal_mask=True)
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(128, activation="gelu")(y)
        x = x + keras.layers.Dense(64)(y)
    return keras.Model(inputs, keras.layers.Dense(128)(keras.layers.LayerNormalization()(x)))

"""What the transformers of keras_hub learn in the example: data that are already there, networks.

    digits      a ViT on the handwritten digits of scikit-learn
    packages    a BERT that reads 32 words of source code and names the package they are from
    characters  a GPT-2 that predicts the next character of docstrings

Texts are those of Python's own standard library, so they differ a little between its versions.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from pathlib import Path

import keras
import numpy as np

import tf_kfacprune as kp

TASKS = ("digits", "packages", "characters")
PACKAGES = [
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
]
LENGTHS, VOCABULARY = {"packages": 32, "characters": 64}, 1000


def sources(package: str) -> list[str]:
    """The source files of a package of the standard library."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


def windows(tokens: list[int], length: int) -> np.ndarray:
    """Tokens cut into pieces of a length."""
    return np.array(tokens[: len(tokens) // length * length], "int32").reshape(-1, length)


def packages() -> tuple[np.ndarray, np.ndarray]:
    """Words of source code, and the packages they are from."""
    words = [re.findall(r"\w+|[^\w\s]", "\n".join(sources(package))) for package in PACKAGES]
    known = Counter(word for part in words for word in part).most_common(VOCABULARY - 1)
    number = {word: place for place, (word, _) in enumerate(known, start=1)}
    numbers = [[number.get(word, 0) for word in part] for part in words]
    pieces = [windows(part, LENGTHS["packages"])[:1000] for part in numbers]
    return np.concatenate(pieces), np.repeat(np.arange(len(PACKAGES)), [*map(len, pieces)])


def characters() -> tuple[np.ndarray, np.ndarray]:
    """Characters of docstrings, and the ones that follow them."""
    nodes = [node for p in PACKAGES for text in sources(p) for node in ast.walk(ast.parse(text))]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    codes = [min(ord(character), 127) for character in "\n\n".join(filter(None, texts))]
    pieces = windows(codes, LENGTHS["characters"] + 1)
    return pieces[:, :-1], pieces[:, 1:]


def data(task: str, examples: int | None, validation: bool) -> tuple[np.ndarray, ...]:
    """Training and test data, `x_train, y_train, x_test, y_test`.

    Args:
        task: `digits`, `packages` or `characters`.
        examples: Use so many training examples; None for all.
        validation: Whether a fifth of the training data is held out and takes the place of the
            test data.
    """
    if task == "digits":
        digits = kp.data.load("digits")
        parts = (digits.x_train, digits.y_train, digits.x_test, digits.y_test)
    else:
        x, y = {"packages": packages, "characters": characters}[task]()
        order = np.random.default_rng(0).permutation(len(x))
        train, test = np.split(order, [4 * len(x) // 5])
        parts = (x[train], y[train], x[test], y[test])
    x, y = parts[0][:examples], parts[1][:examples]
    kept = 4 * len(x) // 5
    return (x[:kept], y[:kept], x[kept:], y[kept:]) if validation else (x, y, *parts[2:])


def network(task: str, hidden: int) -> keras.Model:
    """A transformer of two layers with a Dense layer behind it."""
    import keras_hub

    size = {"num_layers": 2, "num_heads": 4, "hidden_dim": hidden}
    if task == "digits":
        image = keras.Input((8, 8, 1), name="image")
        vit = keras_hub.models.ViTBackbone(
            image_shape=(8, 8, 1), patch_size=(2, 2), mlp_dim=2 * hidden, **size
        )
        return keras.Model(image, keras.layers.Dense(10, name="digit")(vit(image)[:, 0]))
    size |= {"intermediate_dim": 2 * hidden, "max_sequence_length": LENGTHS[task]}
    tokens = keras.Input((LENGTHS[task],), dtype="int32", name="tokens")
    inputs = {"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)}
    if task == "packages":
        bert = keras_hub.models.BertBackbone(vocabulary_size=VOCABULARY, **size)
        read = bert({**inputs, "segment_ids": keras.ops.zeros_like(tokens)})["pooled_output"]
        return keras.Model(tokens, keras.layers.Dense(len(PACKAGES), name="package")(read))
    gpt2 = keras_hub.models.GPT2Backbone(vocabulary_size=128, **size)
    return keras.Model(tokens, keras.layers.Dense(128, name="character")(gpt2(inputs)))

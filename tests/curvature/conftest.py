"""A network whose curvature NumPy computes from scratch, in float64."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.curvature import Batch, CompiledObjective, CurvatureEstimator, find_blocks


class TwoLayers:
    """`f = [tanh([x; 1] U); 1] V` for every row of x, with one V per output.

    Parameters are U and all V, each flattened by rows, in this order.
    """

    width, hidden = 4, 5

    def __init__(self, *outputs: int) -> None:
        rng = np.random.default_rng(5)
        self.u = rng.normal(size=(self.width + 1, self.hidden)).astype("float32")
        self.v = [rng.normal(size=(self.hidden + 1, n)).astype("float32") for n in outputs]

    @property
    def size(self) -> int:
        return self.u.size + sum(v.size for v in self.v)

    def inputs(self, *leading: int) -> np.ndarray:
        return np.random.default_rng(6).normal(size=(*leading, self.width)).astype("float32")

    def network(self, *leading, activations=None, masked=False, names=None) -> keras.Model:
        """The Keras model; `masked` masks locations whose inputs are all zero."""
        inputs = x = keras.Input((*leading, self.width))
        if masked:
            x = keras.layers.Masking()(x)
        x = keras.layers.Dense(self.hidden, activation="tanh", name="hidden")(x)
        names = names or [f"output{k}" for k in range(len(self.v))]
        activations = activations or [None] * len(self.v)
        heads = [
            keras.layers.Dense(v.shape[1], activation=activation, name=name)(x)
            for v, activation, name in zip(self.v, activations, names, strict=True)
        ]
        model = keras.Model(inputs, heads if len(heads) > 1 else heads[0])
        for name, w in zip(["hidden", *names], [self.u, *self.v], strict=True):
            model.get_layer(name).set_weights([w[:-1], w[-1]])
        return model

    def outputs(self, x) -> list[np.ndarray]:
        """f of each output, before its activation, `(N, D)`; x of any shape `(..., width)`."""
        return [self._rows(x)[1] @ v.astype("float64") for v in self.v]

    def jacobians(self, x) -> list[np.ndarray]:
        """d f / d parameters of each output, `(N, D, size)`."""
        a, h = self._rows(x)
        start, found = self.u.size, []
        for v in self.v:
            slopes = (1 - h[:, :-1] ** 2)[:, :, None] * v[:-1].astype("float64")
            n, d = len(a), v.shape[1]
            whole = np.zeros((n, d, self.size))
            whole[:, :, : self.u.size] = np.einsum("ni,njd->ndij", a, slopes).reshape(n, d, -1)
            own = np.einsum("nj,de->ndje", h, np.eye(d)).reshape(n, d, -1)
            whole[:, :, start : start + v.size] = own
            start += v.size
            found.append(whole)
        return found

    def _rows(self, x):
        rows = np.asarray(x, "float64").reshape(-1, self.width)
        a = np.hstack([rows, np.ones((len(rows), 1))])
        h = np.tanh(a @ self.u.astype("float64"))
        return a, np.hstack([h, np.ones((len(h), 1))])


class UnitNoise:
    """Stands for `keras.random.normal`: 1 at one place of one output, the same in each example.

    The sum over all places is the expectation over normal noise, without its error.
    """

    def __init__(self, output: int, place: int) -> None:
        self.output, self.place, self.calls = output, place, 0

    def __call__(self, shape, dtype="float32", seed=None):
        shape = [int(n) for n in shape]
        noise = np.zeros((shape[0], int(np.prod(shape[1:]))))
        if self.calls == self.output:
            noise[:, self.place] = 1.0
        self.calls += 1
        return keras.ops.convert_to_tensor(noise.reshape(shape), dtype)


@pytest.fixture
def two_layers():
    """The class `TwoLayers`."""
    return TwoLayers


@pytest.fixture
def expected_looks(monkeypatch):
    """`(estimator, batch, layers, sizes) -> looks` whose probes add up to the expectation.

    `sizes` are the numbers of entries of one example in the predictions of each output.
    """

    def looks(estimator, batch, layers, sizes):
        found = []
        for output, size in enumerate(sizes):
            for place in range(size):
                with monkeypatch.context() as patched:
                    patched.setattr(keras.random, "normal", UnitNoise(output, place))
                    found.append(estimator.look(batch, layers, "sampled", training=True))
        return found

    return looks


@pytest.fixture
def fisher_of(expected_looks):
    """`(model, batch, labels) -> (1/B) sum_examples g g^T` of the parameters, in float64."""

    def fisher(model: keras.Model, batch: Batch, labels: str, sizes=None) -> np.ndarray:
        blocks = find_blocks(model).blocks
        estimator = CurvatureEstimator(model, CompiledObjective(model))
        if labels == "sampled":
            sizes = sizes or [int(np.prod(output.shape[1:])) for output in model.outputs]
            looks = expected_looks(estimator, batch, blocks, sizes)
        else:
            looks = [estimator.look(batch, blocks, labels, training=True)]
        total = 0.0
        for look in looks:
            for k in range(len(look.probes)):
                parts = []
                for block in blocks:
                    uses = look.of(block.layer)
                    rows = [
                        np.einsum(
                            "bti,bto->bio",
                            np.asarray(block.homogeneous(block.rows_a(record)), "float64"),
                            np.asarray(block.rows_g(record, g), "float64"),
                        )
                        for record, g in zip(uses.records, uses.probes[k], strict=True)
                    ]
                    parts.append(sum(rows).reshape(len(rows[0]), -1))
                gradients = np.concatenate(parts, axis=1)
                total = total + gradients.T @ gradients / len(gradients)
        return total

    return fisher

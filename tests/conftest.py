"""Every test starts from the same random state, so that what passed once passes again."""

from __future__ import annotations

import keras
import pytest


# What the oldest supported version of Keras does not have yet.
NEW_IN_KERAS = {
    "AdaptiveAveragePooling2D",
    "ReversibleEmbedding",
    "depth_to_space",
    "layer_normalization",
    "space_to_depth",
}


def pytest_addoption(parser):
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="Random seed of every test. Try others to find a test that passes by luck.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """For the fixtures that several tests share, made by whichever of them comes first."""
    keras.utils.set_random_seed(item.config.getoption("seed"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Tests of what the installed version of Keras does not have yet are skipped."""
    try:
        return (yield)
    except AttributeError as error:
        if error.obj in (keras.layers, keras.ops) and error.name in NEW_IN_KERAS:
            pytest.skip(f"Keras {keras.__version__} has no {error.name}.")
        raise


@pytest.fixture(autouse=True)
def random_state(request):
    """Again after those fixtures, so that it does not matter which test came first."""
    keras.utils.set_random_seed(request.config.getoption("seed"))

"""Every test starts from the same random state, so that what passed once passes again."""

from __future__ import annotations

import keras
import pytest

# What Keras 3.12 does not have yet, or cannot do: names, and tests that need more than a name.
NEW_NAMES = {
    "AdaptiveAveragePooling2D",
    "depth_to_space",
    "space_to_depth",
}
NEW_ABILITIES = {
    "test_attention_layers.py::test_compact_equals_gated[gate]": "use_gate",
    "test_attention_layers.py::test_compact_equals_gated[grouped, gate]": "use_gate",
    "test_opened_layers.py::test_compact_equals_gated[grouped_attention-prunable7]": "groups",
    "test_operations.py::test_compact_equals_gated[transposed 1D]": "output_padding in configs",
    "test_operations.py::test_compact_equals_gated[transposed 2D]": "output_padding in configs",
}
IS_NEWEST_KERAS = keras.version() >= "3.15"


def pytest_addoption(parser):
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="Random seed of every test. Try others to find a test that passes by luck.",
    )


def pytest_collection_modifyitems(items):
    """Tests of what the installed version of Keras cannot do are skipped."""
    for item in items:
        lacking = NEW_ABILITIES.get(item.nodeid.rpartition("/")[2])
        if lacking and not IS_NEWEST_KERAS:
            item.add_marker(pytest.mark.skip(reason=f"Keras {keras.version()} lacks {lacking}."))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """For the fixtures that several tests share, made by whichever of them comes first."""
    keras.utils.set_random_seed(item.config.getoption("seed"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Tests of layers and functions that the installed Keras does not have are skipped."""
    try:
        return (yield)
    except AttributeError as error:
        if error.obj in (keras.layers, keras.ops) and error.name in NEW_NAMES:
            pytest.skip(f"Keras {keras.__version__} has no {error.name}.")
        raise


@pytest.fixture(autouse=True)
def random_state(request):
    """Again after those fixtures, so that it does not matter which test came first."""
    keras.utils.set_random_seed(request.config.getoption("seed"))

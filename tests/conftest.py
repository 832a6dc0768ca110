"""Every test starts from the same random state, so that what passed once passes again."""

from __future__ import annotations

import re

import keras
import pytest

# What Keras 3.12 does not have yet, or cannot do: names, and tests that need more than a name.
NEW_NAMES = {
    "AdaptiveAveragePooling2D",
    "depth_to_space",
    "renorm",
    "space_to_depth",
    "use_gate",
}
NEWER_FILES = "arguments that are in files of newer versions"
NEW_ABILITIES = {
    "test_opened_layers.py::test_compact_equals_gated[grouped_attention-prunable7]": "groups",
    "test_operations.py::test_compact_equals_gated[transposed 1D]": "output_padding in configs",
    "test_operations.py::test_compact_equals_gated[transposed 2D]": "output_padding in configs",
    "test_saved_models.py::test_accuracy_is_that_of_the_record[compact.keras-digits]": NEWER_FILES,
    "test_saved_models.py::test_layers_have_the_sizes_of_the_record[digits]": NEWER_FILES,
}
IS_NEWEST_KERAS = tuple(map(int, keras.version().split(".")[:2])) >= (3, 15)
MISSING = re.compile(
    r"(?:module 'keras[\w.]*' has no attribute|Unrecognized keyword arguments passed to \w+:)"
    r" {?'(\w+)'"
)


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
    except (AttributeError, ValueError) as error:
        missing = MISSING.match(str(error))
        if missing and missing[1] in NEW_NAMES and not IS_NEWEST_KERAS:
            pytest.skip(f"Keras {keras.version()} has no {missing[1]}.")
        raise


@pytest.fixture(autouse=True)
def random_state(request):
    """Again after those fixtures, so that it does not matter which test came first."""
    keras.utils.set_random_seed(request.config.getoption("seed"))

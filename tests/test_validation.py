"""Arguments are numbers of Python or NumPy in an interval; everything else is refused by name."""

import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.validation import is_number_in, require_count


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (0, "[0, 1)", True),
        (0, "(0, 1)", False),
        (1, "(0, 1]", True),
        (1.0, "[0, 1)", False),
        (np.float32(0.5), "(0, 1)", True),
        (np.int64(3), "[0, inf)", True),
        (float("inf"), "[0, inf)", False),
        (float("inf"), "[0, inf]", True),
        (float("nan"), "[0, inf]", False),
        (True, "[0, 1]", False),
        ("0.5", "[0, 1]", False),
        (None, "[0, 1]", False),
    ],
)
def test_numbers_in_intervals(value, interval, expected):
    assert is_number_in(value, interval) is expected


def test_counts_may_be_of_numpy():
    require_count("owner", "every", np.int64(1))
    for value in (np.int64(0), np.float64(1.0), 2.0, True, "3"):
        with pytest.raises(InvalidArgumentError, match="`every` of owner"):
            require_count("owner", "every", value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: kp.Phases(warmup="a"), "warmup"),
        (lambda: kp.SpectralRadius("strong"), "strength"),
        (lambda: kp.SpectralRadius(reduction_to="half"), "reduction_to"),
        (lambda: kp.SpectralRadius(threshold=None), "threshold"),
        (lambda: kp.SpectralRadius(batch_fraction="all"), "batch_fraction"),
        (lambda: kp.LevenbergMarquardt(initial="big"), "initial"),
        (lambda: kp.LevenbergMarquardt(decay=None), "decay"),
        (lambda: kp.KFACSaliency(batch_fraction=None), "batch_fraction"),
        (lambda: kp.TaylorSaliency(gradient_decay="slow"), "gradient_decay"),
        (lambda: kp.KFAC(batch_fraction="all"), "batch_fraction"),
        (lambda: kp.KFAC(momentum="high"), "momentum"),
        (lambda: kp.KFAC(float("inf")), "learning_rate"),
        (lambda: kp.inspect("lenet5"), "model"),
        (lambda: kp.data.batches(np.zeros((2, 2)), np.zeros(2), "8"), "batch_size"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_by_name(make, name):
    with pytest.raises(InvalidArgumentError, match=f"{name}.*Received"):
        make()


def test_numbers_of_numpy_are_arguments():
    optimizer = kp.KFAC(
        np.float32(0.1), momentum=np.float32(0.5), damping=np.float32(1.0), factor_every=np.int64(2)
    )
    assert optimizer.momentum == 0.5
    assert float(optimizer.learning_rate) == np.float32(0.1)
    assert float(kp.KFAC(1).learning_rate) == 1.0
    assert kp.SpectralRadius(every=np.int64(2)).every == 2

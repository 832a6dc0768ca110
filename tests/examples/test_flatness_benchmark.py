"""What the benchmark on flatness does to images and labels, and how it compares ranks."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(name="flatness", scope="module")
def benchmark(load_benchmark):
    return load_benchmark("flatness")


@pytest.fixture(name="images")
def some_images():
    images = np.zeros((3, 28, 28, 1), "float32")
    images[:, 10:18, 10:18] = 1.0
    return images


@pytest.mark.parametrize("name", ["noise", "blur", "contrast", "shift"])
def test_corruptions_are_the_same_in_every_call_and_stay_images(flatness, images, name):
    spoilt = flatness.corrupted(images, name)
    assert set(flatness.CORRUPTIONS) == {"noise", "blur", "contrast", "shift"}
    assert (spoilt.shape, spoilt.dtype) == (images.shape, images.dtype)
    assert 0 <= spoilt.min() < spoilt.max() <= 1 + 1e-6
    assert not np.array_equal(spoilt, images)
    np.testing.assert_array_equal(spoilt, flatness.corrupted(images, name))


def test_blur_keeps_the_light_and_shift_moves_it(flatness, images):
    assert flatness.corrupted(images, "blur").sum() == pytest.approx(images.sum(), rel=1e-3)
    np.testing.assert_array_equal(flatness.corrupted(images, "shift")[:, 11:19, 11:19], 1.0)


def test_wrong_labels_are_other_labels_at_the_rate_asked_for(flatness):
    labels = np.arange(20_000) % 10
    noisy = flatness.with_wrong_labels(labels, 0.4, seed=0)
    assert set(noisy) == set(range(10))
    assert np.mean(noisy != labels) == pytest.approx(0.4, abs=0.02)
    np.testing.assert_array_equal(flatness.with_wrong_labels(labels, 0.0, seed=0), labels)


def test_rank_correlation_is_that_of_spearman(flatness):
    assert flatness.rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert flatness.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (0, 1, 1, 0)
    assert flatness.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def test_compact_networks_are_as_small_as_the_page_says(flatness):
    sizes = {n: s["compact"](0).count_params() for n, s in flatness.NETWORKS.items()}
    assert sizes == {"mlp": 8910, "lenet": 3350}


def test_labels_of_the_plot_stand_apart(flatness, figures, overlapping):
    flatness.run_plot()
    (figure,) = figures
    assert overlapping(figure) == []

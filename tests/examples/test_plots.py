"""The picture of the README, and the check that no label of a picture stands on another."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_of_the_picture_in_the_readme_stand_apart(
    load_benchmark, figures, overlapping, scheme
):
    load_benchmark("readme_picture").draw(scheme)
    (figure,) = figures
    assert overlapping(figure) == []


def test_the_check_notices_labels_that_overlap(overlapping):
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.set_xticks([0, 1])
    axis.text(0.5, 0.5, "one")
    axis.text(0.51, 0.5, "two")
    assert overlapping(figure) == [("one", "two")]

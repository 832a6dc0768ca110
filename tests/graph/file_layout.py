"""A mark for tests of predicted bytes: predictions were fitted to files of TensorFlow 2.21."""

from __future__ import annotations

import pytest
import tensorflow as tf

FITTED = tuple(int(part) for part in tf.__version__.split(".")[:2]) >= (2, 21)

needs_fitted_layout = pytest.mark.skipif(
    not FITTED, reason="Older converters lay files out otherwise, some hundred bytes smaller."
)

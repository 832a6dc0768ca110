"""File sizes, raw and compressed."""

from __future__ import annotations

import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export import file_size


def test_file_sizes_are_bytes_as_stored_and_compressed(tmp_path):
    path = tmp_path / "zeros"
    path.write_bytes(bytes(10_000))
    assert file_size(path).raw == 10_000
    assert file_size(path).gzip < 100


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ExportError, match="none: no such file"):
        file_size(tmp_path / "none")

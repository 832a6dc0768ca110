"""Without the extra everything else works, and the message says what to install."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import keras
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import UnsupportedModelError


def test_missing_packages_are_named_and_the_process_stays_as_it_was():
    program = """
        import os, sys
        sys.modules["tensorflow_model_optimization"] = None
        import keras, tensorflow as tf, tf_kfacprune as kp
        net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        try:
            kp.tfmot.to_tf_keras(net)
        except kp.errors.ExportError as error:
            print(error)
        print("legacy" if "TF_USE_LEGACY_KERAS" in os.environ else "clean")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "pip install 'tf_kfacprune[tfmot]'" in done.stdout
    assert done.stdout.splitlines()[-1] == "clean"


def test_qat_of_a_keras_model_is_refused_with_the_remedy(tmp_path):
    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(UnsupportedModelError, match=r"kp\.tfmot\.quantize_aware\(model\).*'int8'"):
        kp.export.tflite(net, tmp_path / "net.tflite", quantization="qat")

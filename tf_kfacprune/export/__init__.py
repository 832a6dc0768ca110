"""From the Keras model to the device: SavedModel and TFLite files, each verified."""

from tf_kfacprune.export.saved_models import saved_model
from tf_kfacprune.export.tflite_files import run_tflite, tflite

__all__ = ["run_tflite", "saved_model", "tflite"]

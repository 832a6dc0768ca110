"""From the Keras model to the device: SavedModel and TFLite files, each verified."""

from tf_kfacprune.export.keras_files import keras_file, load_keras
from tf_kfacprune.export.saved_models import saved_model
from tf_kfacprune.export.tflite_files import run_tflite, tflite
from tf_kfacprune.export.timing import Latency, latency

__all__ = [
    "Latency",
    "keras_file",
    "latency",
    "load_keras",
    "run_tflite",
    "saved_model",
    "tflite",
]

"""From the Keras model to the device: SavedModel and TFLite files, each verified."""

from tf_kfacprune.export.arena import activation_bytes, arena_bytes
from tf_kfacprune.export.benchmarking import Benchmark, BenchmarkRow, benchmark
from tf_kfacprune.export.c_arrays import c_array
from tf_kfacprune.export.file_sizes import FileSize, file_size
from tf_kfacprune.export.heads import with_head
from tf_kfacprune.export.keras_files import keras_file, load_keras
from tf_kfacprune.export.layer_latency import latency_table
from tf_kfacprune.export.metadata import Metadata, read_metadata
from tf_kfacprune.export.micro import MicroCheck, check_micro
from tf_kfacprune.export.ports import Port
from tf_kfacprune.export.saved_models import saved_model
from tf_kfacprune.export.tflite_files import run_tflite, tflite
from tf_kfacprune.export.timing import Latency, latency
from tf_kfacprune.graph import LatencyTable

__all__ = [
    "Benchmark",
    "BenchmarkRow",
    "FileSize",
    "Latency",
    "LatencyTable",
    "Metadata",
    "MicroCheck",
    "Port",
    "activation_bytes",
    "arena_bytes",
    "benchmark",
    "c_array",
    "check_micro",
    "file_size",
    "keras_file",
    "latency",
    "latency_table",
    "load_keras",
    "read_metadata",
    "run_tflite",
    "saved_model",
    "tflite",
    "with_head",
]

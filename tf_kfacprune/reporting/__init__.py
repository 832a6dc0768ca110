"""Tables and records: what can be pruned, what was pruned, and how to make it again."""

from tf_kfacprune.reporting.benchmark_plot import check_picture, plot_benchmark
from tf_kfacprune.reporting.comparison import Comparison, before_after_table
from tf_kfacprune.reporting.figures import Flatness, ModelFigures, accuracy, tflite_size
from tf_kfacprune.reporting.inspection import FrozenChannels, GroupSummary, Inspection, inspect
from tf_kfacprune.reporting.pruning_report import report
from tf_kfacprune.reporting.records import record, versions, write_json_atomic

__all__ = [
    "Comparison",
    "Flatness",
    "FrozenChannels",
    "GroupSummary",
    "Inspection",
    "ModelFigures",
    "accuracy",
    "before_after_table",
    "check_picture",
    "inspect",
    "plot_benchmark",
    "record",
    "report",
    "tflite_size",
    "versions",
    "write_json_atomic",
]

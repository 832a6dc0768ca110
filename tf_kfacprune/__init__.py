"""Train and prune Keras networks at the same time, toward flat minima.

    import tf_kfacprune as kp

    pm = kp.PrunableModel(network, budget=kp.Budget(macs=0.1))
    pm.compile(kp.KFAC(1e-2), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    pm.fit(x_train, y_train, epochs=30)
    small = kp.compact(pm)
    kp.export.tflite(small, "small.tflite")

References:
    Ebrahimi & Klabjan, "Neuron-based Pruning of Deep Neural Networks with Better Generalization
    using Kronecker Factored Curvature Approximation", arXiv 2111.08577.
"""

from tf_kfacprune import (
    callbacks,
    data,
    diagnostics,
    errors,
    export,
    layers,
    reporting,
    tfmot,
    zoo,
)
from tf_kfacprune.compaction import compact, compaction_report, compensate
from tf_kfacprune.curvature import SpectralRadius
from tf_kfacprune.graph import ChannelRule, keep_opaque, register_channel_rule
from tf_kfacprune.optimizers import KFAC, LevenbergMarquardt
from tf_kfacprune.pruning import (
    Budget,
    HardConcreteGates,
    KFACSaliency,
    MagnitudeSaliency,
    Phases,
    ProximalGates,
    RandomSaliency,
    ScheduledClosing,
    TaylorSaliency,
)
from tf_kfacprune.reporting import inspect, report
from tf_kfacprune.training import KFACModel, PrunableModel

__all__ = [
    "KFAC",
    "Budget",
    "ChannelRule",
    "HardConcreteGates",
    "KFACModel",
    "KFACSaliency",
    "LevenbergMarquardt",
    "MagnitudeSaliency",
    "Phases",
    "ProximalGates",
    "PrunableModel",
    "RandomSaliency",
    "ScheduledClosing",
    "SpectralRadius",
    "TaylorSaliency",
    "callbacks",
    "compact",
    "compaction_report",
    "compensate",
    "data",
    "diagnostics",
    "errors",
    "export",
    "inspect",
    "keep_opaque",
    "layers",
    "register_channel_rule",
    "report",
    "reporting",
    "tfmot",
    "zoo",
]
__version__ = "0.1.0"

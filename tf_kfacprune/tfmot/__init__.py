"""tensorflow-model-optimization on Keras 3 models: quantization-aware training and more.

Needs the extra: ``pip install 'tf_kfacprune[tfmot]'``. That library works on models of the legacy
package ``tf_keras`` only; models are translated, and the translation is checked. The models
returned are ``tf_keras`` models, to be compiled and trained with what ``tf_keras`` offers.
"""

from tf_kfacprune.tfmot.compression import cluster, copy_back, sparsify, sparsity_callback
from tf_kfacprune.tfmot.decisions import LayerDecision, QuantizationReport
from tf_kfacprune.tfmot.quantization import quantization_report, quantize_aware
from tf_kfacprune.tfmot.translation import to_tf_keras

__all__ = [
    "LayerDecision",
    "QuantizationReport",
    "cluster",
    "copy_back",
    "quantization_report",
    "quantize_aware",
    "sparsify",
    "sparsity_callback",
    "to_tf_keras",
]

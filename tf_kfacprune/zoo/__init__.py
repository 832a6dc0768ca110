"""Built-in networks for the examples, the command line and benchmarks."""

from tf_kfacprune.zoo.building import NAMES, build
from tf_kfacprune.zoo.mlperf_tiny import ds_cnn, fc_autoencoder, mobilenet_v1_025, resnet8
from tf_kfacprune.zoo.networks import digits_cnn, lenet5, lenet300, mobilenetv2, resnet20

__all__ = [
    "NAMES",
    "build",
    "digits_cnn",
    "ds_cnn",
    "fc_autoencoder",
    "lenet5",
    "lenet300",
    "mobilenet_v1_025",
    "mobilenetv2",
    "resnet8",
    "resnet20",
]

"""Built-in networks for the examples, the command line and benchmarks."""

from tf_kfacprune.zoo.networks import (
    NAMES,
    build,
    default_input_shape,
    digits_cnn,
    lenet5,
    lenet300,
    mobilenetv2,
    resnet20,
)

__all__ = [
    "NAMES",
    "build",
    "default_input_shape",
    "digits_cnn",
    "lenet5",
    "lenet300",
    "mobilenetv2",
    "resnet20",
]

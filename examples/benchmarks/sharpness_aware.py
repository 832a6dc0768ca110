"""SAM and ASAM around any optimizer of Keras, K-FAC included: two passes a step.

=======  ===============================================================  ========
symbol   meaning                                                          shape
=======  ===============================================================  ========
`w`      weights                                                          any
`g`      gradient of the loss of the batch at w                           as w
`T`      scales of the weights: 1 in SAM, `|w| + eta` of kernels in ASAM  as w
`rho`    how far away the loss is looked at                               scalar
=======  ===============================================================  ========

The step is that of the gradient at `w + e`, where the loss is worst nearby, to first order:

    e = rho T^2 g / |T g|.

References:
    Foret, Kleiner, Mobahi, Neyshabur 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", equations 2 and 3. Kwon, Kim, Park, Choi 2021, "ASAM: Adaptive Sharpness-Aware
    Minimization for Scale-Invariant Learning of Deep Neural Networks", with its eta.
"""

import keras
import tensorflow as tf

import tf_kfacprune as kp

ETA = 0.01
TINY = 1e-12


class SharpnessAware(kp.KFACModel):
    """A network that is trained by SAM or ASAM.

    The weights are moved by e for the time of an ordinary step. So the figures that are shown are
    those at `w + e`, and weight decay, too, sees e (a change of `rate * decay * e`).

    Args:
        model: A built Keras model, without normalization by batches.
        rho: Radius, > 0.
        is_adaptive: ASAM instead of SAM.
        **kwargs: Arguments of `KFACModel`.
    """

    def __init__(self, model, rho, *, is_adaptive=False, **kwargs):
        super().__init__(model, **kwargs)
        self.rho = rho
        self.is_adaptive = is_adaptive

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        weights = self.net.trainable_variables
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs, sample_weight, training=True)
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        values = [tf.convert_to_tensor(weight) for weight in weights]
        away = ascent(gradients, values, self.rho, is_adaptive=self.is_adaptive)
        for weight, step in zip(weights, away, strict=True):
            weight.assign_add(step)
        results = super().train_step(data)
        for weight, step in zip(weights, away, strict=True):
            weight.assign_sub(step)
        return results


def ascent(gradients, weights, rho, *, is_adaptive):
    """e, one tensor per weight; biases have the scale 1 in ASAM, too.

    Args:
        gradients: g, one tensor per weight.
        weights: w, tensors.
        rho: The radius.
        is_adaptive: ASAM instead of SAM.
    """
    scales = [
        tf.abs(weight) + ETA if is_adaptive and len(weight.shape) > 1 else tf.ones_like(weight)
        for weight in weights
    ]
    scaled = [scale * gradient for scale, gradient in zip(scales, gradients, strict=True)]
    share = rho / (tf.linalg.global_norm(scaled) + TINY)
    return [share * scale * direction for scale, direction in zip(scales, scaled, strict=True)]

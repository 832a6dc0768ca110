"""Channel rules for layers that prepare data: augmentation of images, encodings of categories."""

from __future__ import annotations

from collections.abc import Sequence

from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule
from tf_kfacprune.graph.rules.channelwise import SpatialRule
from tf_kfacprune.graph.rules.registry import register_channel_rule

__all__: list[str] = []


class AugmentationRule(SpatialRule):
    """Base of the rules for augmentation of images, which is absent in inference."""

    is_absent = True

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        if len(call.inputs) != 1:  # images with labels or boxes
            return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)
        return super().propagate(call, flow)

    def is_homogeneous(self, call: Call) -> bool:
        return False  # brighter, inverted or filled with a color, a closed channel is not zero


@register_channel_rule(
    *(layers.RandomFlip, layers.RandomRotation, layers.RandomTranslation, layers.RandomZoom),
    *(layers.RandomShear, layers.RandomPerspective, layers.RandomElasticTransform),
    *(layers.RandomCrop, layers.RandomErasing, layers.RandomGaussianBlur, layers.RandomSharpness),
    *(layers.RandomBrightness, layers.RandomContrast, layers.RandomInvert),
    *(layers.RandomPosterization, layers.Solarization),
    *(layers.CutMix, layers.MixUp),
)
class ChannelwiseAugmentationRule(AugmentationRule):
    """Augmentation of every channel by itself, absent in inference: channels pass."""


@register_channel_rule(
    *(layers.RandomGrayscale, layers.RandomHue, layers.RandomSaturation),
    *(layers.RandomColorJitter, layers.RandomColorDegeneration),
    *(layers.AugMix, layers.RandAugment),
)
class ColorAugmentationRule(AugmentationRule):
    """Augmentation that mixes the colors of an image, absent in inference: channels are frozen."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        return self.freeze_all(call, flow, reasons.MIXED_COLORS)


@register_channel_rule(
    *(layers.CategoryEncoding, layers.Discretization, layers.Hashing, layers.HashedCrossing),
    *(layers.IntegerLookup, layers.StringLookup, layers.TextVectorization),
)
class CategoryRule(ChannelRule):
    """Encodings of categories: what they read stays; if that is an input, so is what they make."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        return self.freeze_all(call, flow, reasons.CATEGORIES)

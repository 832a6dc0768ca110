"""Channel rules: one class per layer type, in a registry that users can extend."""

from tf_kfacprune.graph.rules import (
    activations,
    attention,
    channelwise,
    contractions,
    einsum,
    merging,
    normalizations,
    own_weights,
    preprocessing,
    products,
    recurrent,
    reshaping,
    sequences,
    slicing,
    wrappers,
)
from tf_kfacprune.graph.rules.base import ChannelRule, Extent, InnerGates, weight_extents, weight_of
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import (
    register_channel_rule,
    register_internal_rule,
    registered_rules,
    rule_for,
)

__all__ = [
    "ChannelRule",
    "ContractionRule",
    "Extent",
    "InnerGates",
    "activations",
    "attention",
    "channelwise",
    "contractions",
    "einsum",
    "merging",
    "normalizations",
    "own_weights",
    "preprocessing",
    "products",
    "recurrent",
    "register_channel_rule",
    "register_internal_rule",
    "registered_rules",
    "reshaping",
    "rule_for",
    "sequences",
    "slicing",
    "weight_extents",
    "weight_of",
    "wrappers",
]

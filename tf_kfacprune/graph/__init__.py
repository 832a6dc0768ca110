"""The graph of a model: calls, channels, groups of neurons, cost."""

from tf_kfacprune.graph.branches import Branches
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.channel_graph import ChannelGraph, Edge, Frozen, NeuronGroup, analyze
from tf_kfacprune.graph.cost import CostModel
from tf_kfacprune.graph.keras_internals import fresh_operation, maker_of
from tf_kfacprune.graph.labels import LabelFlow
from tf_kfacprune.graph.latency import LatencyTable, layer_signature
from tf_kfacprune.graph.microcontroller import (
    lacking_on_micro,
    unconfirmed_on_micro,
    warn_of_unconfirmed,
)
from tf_kfacprune.graph.network import HoldsNetwork, network_of
from tf_kfacprune.graph.opening import keep_opaque, opaque_layers, trace_opened
from tf_kfacprune.graph.reachability import check_countable, what_stays
from tf_kfacprune.graph.rules import ChannelRule, ContractionRule, register_channel_rule, rule_for
from tf_kfacprune.graph.tracer import Graph, trace
from tf_kfacprune.graph.unread import unread_weights
from tf_kfacprune.graph.weight_layer import Weight

__all__ = [
    "Branches",
    "Call",
    "ChannelGraph",
    "ChannelRule",
    "ContractionRule",
    "CostModel",
    "Edge",
    "Frozen",
    "Graph",
    "HoldsNetwork",
    "LabelFlow",
    "LatencyTable",
    "NeuronGroup",
    "Value",
    "Weight",
    "analyze",
    "check_countable",
    "fresh_operation",
    "keep_opaque",
    "lacking_on_micro",
    "layer_signature",
    "maker_of",
    "network_of",
    "opaque_layers",
    "register_channel_rule",
    "rule_for",
    "trace",
    "trace_opened",
    "unconfirmed_on_micro",
    "unread_weights",
    "warn_of_unconfirmed",
    "what_stays",
]

"""Why channels are frozen: one named constant per reason, with what would unfreeze them."""

from __future__ import annotations

__all__ = [
    "ALL_COUPLED",
    "ARRAY_CONSTANT",
    "BROADCAST",
    "CATEGORIES",
    "CROSS_CHANNEL_ACTIVATION",
    "EXCLUDED",
    "INPUT_FEATURES",
    "KEPT_STATE",
    "MIXED_AXES",
    "MIXED_COLORS",
    "MODEL_OUTPUT",
    "NORMALIZED_ACROSS_CHANNELS",
    "NOT_A_CHANNEL_AXIS",
    "NOT_GATED",
    "NOT_INCLUDED",
    "NOT_READ",
    "NOT_READ_BY_DENSE",
    "ONLY_NEURON",
    "PICKED",
    "REDUCED",
    "UNKNOWN_ACTIVATION",
    "UNKNOWN_CELL",
    "UNKNOWN_OPERATION",
    "UNTRACKED_OPERAND",
    "WEIGHTS_NOT_PLAIN",
    "WRAPPED_UNKNOWN",
    "remedy",
]

MODEL_OUTPUT = "part of a model output, whose shape is fixed"
EXCLUDED = "excluded by the caller"
NOT_INCLUDED = "not included by the caller"
INPUT_FEATURES = "joined with input features, which are pruned only with prune_inputs=True"
ONLY_NEURON = "the only neuron of its layer; a layer keeps at least one"
ALL_COUPLED = "all channels of the layer are coupled, so they could only go together"
NOT_GATED = "read without a gate; gate every layer that multiplies, mixes or feeds back channels"
NOT_READ = "not read by any Dense or convolution layer, so there is no edge to gate"
NOT_READ_BY_DENSE = "flattened features that no Dense layer with a single call reads directly"
UNKNOWN_OPERATION = "no channel rule for this operation; add one with register_channel_rule"
WRAPPED_UNKNOWN = "wrapper around a layer or model without a channel rule"
UNKNOWN_CELL = "recurrent layer around a cell of unknown formula, or around several cells"
UNKNOWN_ACTIVATION = "activation function not known to treat channels one by one"
CROSS_CHANNEL_ACTIVATION = "activation mixes channels (softmax and its kin)"
NORMALIZED_ACROSS_CHANNELS = "normalized over several axes at once"
KEPT_STATE = "recurrent state that is kept from batch to batch (stateful=True)"
PICKED = "single channels are picked by number"
REDUCED = "summed, averaged or compared over channels"
ARRAY_CONSTANT = "combined with an array constant that has one entry per channel"
UNTRACKED_OPERAND = "combined with a tensor whose channels cannot be removed"
BROADCAST = "a single channel broadcast over all channels of another tensor"
MIXED_COLORS = "read as the colors of an image, which the layer mixes in training"
CATEGORIES = "read as categories, whose numbers or names must stay as they are"
MIXED_AXES = "a reshape mixes several channel axes"
NOT_A_CHANNEL_AXIS = "the axis is read as positions (space or time), not as channels"
WEIGHTS_NOT_PLAIN = "the layer's weights are quantized or adapted by LoRA"

# What a caller can do about each reason; nothing where an entry is missing.
_REMEDIES = {
    EXCLUDED: "leave the layer out of `exclude`",
    NOT_INCLUDED: "add the layer, and all it is coupled with, to `include`",
    INPUT_FEATURES: "pass prune_inputs=True",
    ALL_COUPLED: "compute them apart: a reshape or a broadcast ties them (see what they meet)",
    NOT_GATED: "put a NeuronGate on every such edge, or let PrunableModel place the gates",
    NOT_READ_BY_DENSE: "read them with a Dense layer that is called once; what treats every entry "
    "alone may stand between",
    UNKNOWN_OPERATION: "use layers and operations that have a channel rule, or write one: "
    "@kp.register_channel_rule, see docs/channels.md",
    WRAPPED_UNKNOWN: "wrap every layer by itself, or write a rule: register_channel_rule",
    UNKNOWN_CELL: "use SimpleRNN, GRU or LSTM layers, one per level",
    UNKNOWN_ACTIVATION: "use a function of keras.activations, or a layer with a channel rule",
    CROSS_CHANNEL_ACTIVATION: "nothing, if this is the model's output; else a sigmoid or a ReLU",
    NORMALIZED_ACROSS_CHANNELS: "normalize over the channel axis alone",
    KEPT_STATE: "pass stateful=False",
    PICKED: "cut out a range, x[..., a:b], instead of single channels",
    REDUCED: "reduce over positions, or read the channels with a Dense or 1x1 convolution",
    ARRAY_CONSTANT: "use a scalar, or a layer with a weight per channel (BatchNormalization)",
    UNTRACKED_OPERAND: "pass the other operand through a Dense or 1x1 convolution; if it is an "
    "input, pass prune_inputs=True",
    BROADCAST: "compute as many channels as the other tensor has",
    MIXED_COLORS: "augment images before the first layer with weights",
    CATEGORIES: "encode inputs, not what layers with weights make",
    MIXED_AXES: "reshape such that channels stay apart from positions",
    NOT_A_CHANNEL_AXIS: "transpose such that channels are on the channel axis of the layer",
    WEIGHTS_NOT_PLAIN: "prune before quantizing or adding LoRA",
}


def remedy(reason: str) -> str | None:
    """What would unfreeze channels that are frozen for a reason, or None if nothing would."""
    return _REMEDIES.get(reason)

"""Why channels are frozen: one named constant per reason, with what would unfreeze them."""

from __future__ import annotations

__all__ = [
    "ARRAY_CONSTANT",
    "BROADCAST",
    "CROSS_CHANNEL_ACTIVATION",
    "EXCLUDED",
    "INPUT_FEATURES",
    "KEPT_STATE",
    "MIXED_AXES",
    "MODEL_OUTPUT",
    "NORMALIZED_ACROSS_CHANNELS",
    "NOT_A_CHANNEL_AXIS",
    "NOT_GATED",
    "NOT_INCLUDED",
    "NOT_READ",
    "ONLY_NEURON",
    "PICKED",
    "REDUCED",
    "UNKNOWN_ACTIVATION",
    "UNKNOWN_CELL",
    "UNKNOWN_OPERATION",
    "UNTRACKED_OPERAND",
    "WEIGHTS_NOT_PLAIN",
]

MODEL_OUTPUT = "part of a model output, whose shape is fixed"
EXCLUDED = "excluded by the caller"
NOT_INCLUDED = "not included by the caller"
INPUT_FEATURES = "joined with input features, which are pruned only with prune_inputs=True"
ONLY_NEURON = "the only neuron of its layer; a layer keeps at least one"
NOT_GATED = "read without a gate; gate every layer that multiplies, mixes or feeds back channels"
NOT_READ = "not read by any Dense or convolution layer, so there is no edge to gate"
UNKNOWN_OPERATION = "no channel rule for this operation; add one with register_channel_rule"
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
MIXED_AXES = "a reshape mixes several channel axes"
NOT_A_CHANNEL_AXIS = "the axis is read as positions (space or time), not as channels"
WEIGHTS_NOT_PLAIN = "the layer's weights are quantized or adapted by LoRA"

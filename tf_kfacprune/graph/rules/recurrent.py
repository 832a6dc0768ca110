"""Channel rules for recurrent layers.

Their output channels are their units (or filters). Besides the layers that follow, the layer itself
reads them at the next time step, through the rows of its recurrent kernel. A unit whose row is zero
has no effect on the others, so the rows are gated; the states that belong to the unit alone (LSTM
carry, GRU mixing) go with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
from keras import layers, ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.activations import activation_reason
from tf_kfacprune.graph.rules.base import Count, Extent, Gates, Roles, Shape, extents, weight_of
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import register_channel_rule
from tf_kfacprune.graph.rules.substitution import substituted

__all__: list[str] = []

UNITS = "out"
_CELLS = (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell)
_RECURRENT = (layers.SimpleRNN, layers.GRU, layers.LSTM, layers.RNN)


class RecurrentRule(ContractionRule):
    """Base of the rules for layers made of recurrent cells: all have the same units.

    The weights of a cell hold one block of units per internal gate, side by side (role
    `"blocks"`).
    """

    cells: ClassVar[tuple[str, ...]] = ("cell",)
    folded: ClassVar = {
        f"{prefix}cell.{kernel}": role
        for prefix in ("", "forward_layer.", "backward_layer.")
        for kernel, role in (("kernel", "in"), ("recurrent_kernel", UNITS))
    }

    def weight_roles(self, layer: Any) -> Roles:
        roles: dict[str, Sequence[str | None]] = {}
        for name in self.cells if self.is_known(layer) else ():
            cell = weight_of(layer, name)
            space = [None] * (len(cell.kernel.shape) - 2)
            roles[f"{name}.kernel"] = (*space, "in", "blocks")
            roles[f"{name}.recurrent_kernel"] = (*space, UNITS, "blocks")
            if cell.bias is not None:  # GRU may have two of them
                roles[f"{name}.bias"] = (*[None] * (len(cell.bias.shape) - 1), "blocks")
        return roles

    def channel_axis(self, call: Call) -> int:
        first = getattr(call.operation, "data_format", None) == "channels_first"
        return 2 if first else len(self.sequence(call).shape) - 1

    def sequence(self, call: Call) -> Value:
        """The sequence that a call reads; the other inputs are initial states."""
        return call.args[0] if call.args else call.kwargs["sequences"]

    def why_frozen(self, layer: Any) -> str | None:
        """Why the units of a layer cannot be removed, or None if they can."""
        if layer.stateful:
            return reasons.KEPT_STATE
        for name in self.cells:
            cell = weight_of(layer, name)
            for attribute in ("activation", "recurrent_activation"):
                reason = activation_reason(getattr(cell, attribute, None))
                if reason is not None:
                    return reason
        return None

    def is_known(self, layer: Any) -> bool:
        """Whether the layer is made of cells whose formula is known."""
        del layer
        return True

    def why_opaque(self, layer: Any) -> str | None:
        return None if self.is_known(layer) else reasons.UNKNOWN_CELL

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, sequence, axis = call.operation, self.sequence(call), self.channel_axis(call)
        if not self.is_known(layer):
            return self.freeze_all(call, flow, reasons.UNKNOWN_CELL)
        for k, labels in enumerate(flow.of(sequence)):
            if k != axis:
                flow.freeze(labels, reasons.NOT_A_CHANNEL_AXIS, call.path)
        flow.role(layer, "in", flow.read(call, sequence, axis), call.path)
        recurrent_kernel = weight_of(layer, self.cells[0]).recurrent_kernel
        size, blocks = recurrent_kernel.shape[-2:]
        units = flow.created(call, UNITS, size)
        flow.role(layer, "blocks", np.tile(units, blocks // size), call.path)
        flow.read_inside(call, UNITS, units)
        reason = self.why_frozen(layer)
        if reason is not None:
            flow.freeze(units, reason, call.path)
        for state in call.inputs:
            if state is not sequence:
                flow.unite(flow.of(state)[self._axis_of(call, state)], units, call.path)
        return [self._made(call, value, units) for value in call.outputs]

    def _axis_of(self, call: Call, value: Value) -> int:
        """The channel axis of an output or a state, which may lack the time axis."""
        return self.channel_axis(call) - len(self.sequence(call).shape) + len(value.shape)

    def _made(self, call: Call, value: Value, units: np.ndarray) -> Axes:
        axes: Axes = [None] * len(value.shape)
        axis = self._axis_of(call, value)
        axes[axis] = np.tile(units, (value.shape[axis] or 0) // len(units))
        return axes

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        _shrink(config, count(UNITS))

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        with ExitStack() as stack:
            for name in self.cells:
                cell = weight_of(layer, name)
                kernel = ops.convert_to_tensor(cell.recurrent_kernel)
                kernel = kernel * ops.cast(gates[UNITS].z, kernel.dtype)[:, None]
                kernel = ops.cast(kernel, cell.compute_dtype)
                stack.enter_context(substituted(cell, recurrent_kernel=kernel))
            return layer(*args, **kwargs)

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        if not self.is_known(call.operation):
            return []
        steps = extents(self.sequence(call), flow, [1])
        return [
            [
                *steps,
                *self.positions(call, flow),
                *self.role_extents(call, flow, f"{name}.{kernel}"),
            ]
            for name in self.cells
            for kernel in ("kernel", "recurrent_kernel")
        ]

    def positions(self, call: Call, flow: LabelFlow) -> list[Extent]:
        return []


def _shrink(config: dict[str, Any], units: int | None) -> None:
    """Edits the configuration of a recurrent layer, or of the cell in it.

    The shapes that an inner layer was built for are forgotten, or it would be built for them anew.
    """
    if "cell" in config:
        config["cell"].pop("build_config", None)
        config = config["cell"]["config"]
    if units is not None:
        config["filters" if "filters" in config else "units"] = units


@register_channel_rule(layers.SimpleRNN, layers.GRU, layers.LSTM, layers.RNN)
class RecurrentLayerRule(RecurrentRule):
    """`SimpleRNN`, `GRU`, `LSTM`, and `RNN` around one of their cells: unit by unit."""

    def is_known(self, layer: Any) -> bool:
        return type(layer.cell) in _CELLS


@register_channel_rule(layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)
class ConvLSTMRule(RecurrentRule):
    """Convolutional LSTM layers: filter by filter."""

    def positions(self, call: Call, flow: LabelFlow) -> list[Extent]:
        value = call.outputs[0]
        space = range(2 - len(self.sequence(call).shape) + len(value.shape), len(value.shape))
        return extents(value, flow, [k for k in space if k != self._axis_of(call, value)])


@register_channel_rule(layers.Bidirectional)
class BidirectionalRule(RecurrentRule):
    """`Bidirectional`: a unit of the forward layer goes with the same unit of the backward layer.

    Keras computes output shapes from the forward layer alone, so both must stay equally large;
    sums and products of the two need that anyway.
    """

    cells: ClassVar = ("forward_layer.cell", "backward_layer.cell")

    def is_known(self, layer: Any) -> bool:
        both = (layer.forward_layer, layer.backward_layer)
        known = all(type(one) in _RECURRENT and type(one.cell) in _CELLS for one in both)
        return known and both[0].cell.units == both[1].cell.units

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        for direction in ("layer", "backward_layer"):
            config[direction].pop("build_config", None)
            _shrink(config[direction]["config"], count(UNITS))

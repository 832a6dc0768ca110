"""Gates: where neurons are switched on and off."""

from tf_kfacprune.gates.gate_aware import GateAware
from tf_kfacprune.gates.gate_source import GATE_KINDS, GatePhase, GateSource
from tf_kfacprune.gates.gated_layers import (
    Gated,
    GatedConv1D,
    GatedConv1DTranspose,
    GatedConv2D,
    GatedConv2DTranspose,
    GatedConv3D,
    GatedConv3DTranspose,
    GatedDense,
    GatedSeparableConv1D,
    GatedSeparableConv2D,
)
from tf_kfacprune.gates.gated_network import GatedNetwork
from tf_kfacprune.gates.hard_concrete import HardConcrete
from tf_kfacprune.gates.insertion import insert_gates
from tf_kfacprune.gates.neuron_gate import FeatureEdge, GateBank, GateEdge, NeuronGate
from tf_kfacprune.gates.proximal import Proximal, UnitInterval

__all__ = [
    "GATE_KINDS",
    "FeatureEdge",
    "GateAware",
    "GateBank",
    "GateEdge",
    "GatePhase",
    "GateSource",
    "Gated",
    "GatedConv1D",
    "GatedConv1DTranspose",
    "GatedConv2D",
    "GatedConv2DTranspose",
    "GatedConv3D",
    "GatedConv3DTranspose",
    "GatedDense",
    "GatedNetwork",
    "GatedSeparableConv1D",
    "GatedSeparableConv2D",
    "HardConcrete",
    "NeuronGate",
    "Proximal",
    "UnitInterval",
    "insert_gates",
]

"""Layers of any spec."""

from glazoo.layers.attention import GatedLinearAttention, LayerOutput
from glazoo.layers.conversion import gates, layers_of, set_plasticity
from glazoo.layers.operands import LayerState
from glazoo.layers.plasticity import ImportanceGate
from glazoo.layers.sizes import Sizes

__all__ = [
    "GatedLinearAttention",
    "ImportanceGate",
    "LayerOutput",
    "LayerState",
    "Sizes",
    "gates",
    "layers_of",
    "set_plasticity",
]

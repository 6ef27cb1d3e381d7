"""Layers of any spec."""

from glazoo.layers.attention import GatedLinearAttention, LayerOutput, LayerState, Sizes
from glazoo.layers.conversion import gates, layers_of, set_plasticity
from glazoo.layers.plasticity import ImportanceGate

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

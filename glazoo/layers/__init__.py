"""Layers of any spec."""

from glazoo.layers.attention import GatedLinearAttention, LayerOutput, LayerState, Sizes
from glazoo.layers.conversion import layers_of, metaplasticize, set_plasticity

__all__ = [
    "GatedLinearAttention",
    "LayerOutput",
    "LayerState",
    "Sizes",
    "layers_of",
    "metaplasticize",
    "set_plasticity",
]

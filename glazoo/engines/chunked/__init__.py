"""The chunked engine: every core operation as matmuls over chunks of tokens, on any device."""

from .delta import delta
from .importance import importance
from .linear import linear
from .synapse import synapse
from .synapse_delta import synapse_delta

__all__ = ["delta", "importance", "linear", "synapse", "synapse_delta"]

"""The chunked engine: every core operation as matmuls over chunks of tokens, on any device."""

from glazoo.engines.chunked.delta import delta
from glazoo.engines.chunked.full import full
from glazoo.engines.chunked.importance import importance
from glazoo.engines.chunked.linear import linear
from glazoo.engines.chunked.synapse import synapse
from glazoo.engines.chunked.synapse_delta import synapse_delta

__all__ = ["delta", "full", "importance", "linear", "synapse", "synapse_delta"]

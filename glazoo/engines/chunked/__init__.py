"""The chunked engine: every core operation as matmuls over chunks of tokens, on any device."""

from glazoo.engines.chunked.covariance import covariance
from glazoo.engines.chunked.delta import delta
from glazoo.engines.chunked.importance import importance
from glazoo.engines.chunked.linear import linear
from glazoo.engines.chunked.riccati import riccati
from glazoo.engines.chunked.solve import solve
from glazoo.engines.chunked.synapse import synapse
from glazoo.engines.chunked.synapse_delta import synapse_delta
from glazoo.program.core import PosteriorStep, Whiten, WhitenedLinear

posterior_step: PosteriorStep | None = None
"""A token of decoding takes the same few operations here, in one piece or in several."""
whiten: Whiten | None = None
whitened_linear: WhitenedLinear | None = None
"""Keys are divided by steps here, which a compiler fuses."""

__all__ = [
    "covariance",
    "delta",
    "importance",
    "linear",
    "posterior_step",
    "riccati",
    "solve",
    "synapse",
    "synapse_delta",
    "whiten",
    "whitened_linear",
]

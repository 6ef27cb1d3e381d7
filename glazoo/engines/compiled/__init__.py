"""The compiled engine: the chunked one, with loops compiled by numba for what matrix products do
not express, on a CPU."""

from glazoo.engines.chunked import covariance, solve, whiten, whitened_linear
from glazoo.engines.compiled.importance import importance
from glazoo.engines.compiled.riccati import riccati
from glazoo.engines.compiled.step import delta, linear, posterior_step
from glazoo.engines.compiled.synapse import synapse
from glazoo.engines.compiled.synapse_delta import synapse_delta

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

"""Triton kernels of the recurrence classes, and nothing else."""

from .delta import delta
from .full import full
from .importance import importance
from .linear import linear
from .step import delta_step, importance_step, linear_step, posterior_step
from .synapse import synapse, synapse_step
from .synapse_delta import synapse_delta, synapse_delta_step

__all__ = [
    "delta",
    "delta_step",
    "full",
    "importance",
    "importance_step",
    "linear",
    "linear_step",
    "posterior_step",
    "synapse",
    "synapse_delta",
    "synapse_delta_step",
    "synapse_step",
]

"""Triton kernels of the recurrence classes whose gates are shaped by head or key."""

from .delta import delta
from .importance import importance
from .linear import linear
from .step import delta_step, importance_step, linear_step

__all__ = ["delta", "delta_step", "importance", "importance_step", "linear", "linear_step"]

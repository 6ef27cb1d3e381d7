"""Triton kernels of the recurrence classes; their loops and registrations need torch alone.

The operations are imported when first asked for, so that `loops` and `register` serve without
Triton.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .delta import delta
    from .importance import importance
    from .linear import linear
    from .loops import covariance
    from .riccati import riccati
    from .solve import solve
    from .step import delta_step, importance_step, linear_step, posterior_step
    from .synapse import synapse, synapse_step
    from .synapse_delta import synapse_delta, synapse_delta_step
    from .whiten import whiten
    from .whitened_linear import whitened_linear

__all__ = [
    "covariance",
    "delta",
    "delta_step",
    "importance",
    "importance_step",
    "linear",
    "linear_step",
    "posterior_step",
    "riccati",
    "solve",
    "synapse",
    "synapse_delta",
    "synapse_delta_step",
    "synapse_step",
    "whiten",
    "whitened_linear",
]
# Modules that hold them; the loops have what has no kernel.
_PLACES = [
    "delta",
    "importance",
    "linear",
    "riccati",
    "solve",
    "step",
    "synapse",
    "synapse_delta",
    "whiten",
    "whitened_linear",
    "loops",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for place in _PLACES:
        found = vars(importlib.import_module(f"{__name__}.{place}"))
        globals().update({x: found[x] for x in __all__ if x in found and x not in globals()})
    return globals()[name]


class _Package(types.ModuleType):
    """Importing the module `linear` does not hide the operation of that name, and so on."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__ or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

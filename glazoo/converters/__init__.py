"""Converters into metaplastic form: live models in place, and checkpoint folders.

Importing this package imports neither torch nor transformers; its functions import what they need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glazoo.converters.checkpoint import (
        convert_checkpoint,
        inspect_checkpoint,
        revert_checkpoint,
    )
    from glazoo.converters.errors import ConversionError
    from glazoo.converters.examine import inspect_model
    from glazoo.converters.imports.folder import import_original
    from glazoo.converters.module import metaplasticize_model
    from glazoo.converters.report import (
        ConversionReport,
        InspectReport,
        RevertReport,
        TuneReport,
        VerifyReport,
    )
    from glazoo.converters.tune import tune_checkpoint
    from glazoo.converters.verify import verify_checkpoint, verify_models

__all__ = [
    "ConversionError",
    "ConversionReport",
    "InspectReport",
    "RevertReport",
    "TuneReport",
    "VerifyReport",
    "convert_checkpoint",
    "import_original",
    "inspect_checkpoint",
    "inspect_model",
    "metaplasticize_model",
    "revert_checkpoint",
    "tune_checkpoint",
    "verify_checkpoint",
    "verify_models",
]

_HOMES = {
    "ConversionError": "errors",
    "ConversionReport": "report",
    "InspectReport": "report",
    "RevertReport": "report",
    "TuneReport": "report",
    "VerifyReport": "report",
    "convert_checkpoint": "checkpoint",
    "import_original": "imports.folder",
    "inspect_checkpoint": "checkpoint",
    "inspect_model": "examine",
    "metaplasticize_model": "module",
    "revert_checkpoint": "checkpoint",
    "tune_checkpoint": "tune",
    "verify_checkpoint": "verify",
    "verify_models": "verify",
}


def __getattr__(name: str) -> Any:
    # glazoo.models needs the families, and the converters need glazoo.models: resolving names late
    # breaks the circle.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

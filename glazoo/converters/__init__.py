"""Converters into metaplastic form: live models in place, and checkpoint folders.

Importing this package does not import transformers; its functions import what they need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# The name of 0.1 stays for one release.
from glazoo.metaplastic import metaplasticize as metaplasticize_model

if TYPE_CHECKING:
    from glazoo.converters.convert import convert_checkpoint
    from glazoo.converters.examine import inspect_model
    from glazoo.converters.imports.folder import import_original
    from glazoo.converters.report import (
        ConversionReport,
        InspectReport,
        RevertReport,
        TuneReport,
        VerifyReport,
    )
    from glazoo.converters.revert import revert_checkpoint
    from glazoo.converters.source import inspect_checkpoint
    from glazoo.converters.tune import tune_checkpoint
    from glazoo.converters.verify import verify_checkpoint, verify_models
    from glazoo.errors import ConversionError

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
    "ConversionError": "glazoo.errors",
    "ConversionReport": "glazoo.converters.report",
    "InspectReport": "glazoo.converters.report",
    "RevertReport": "glazoo.converters.report",
    "TuneReport": "glazoo.converters.report",
    "VerifyReport": "glazoo.converters.report",
    "convert_checkpoint": "glazoo.converters.convert",
    "import_original": "glazoo.converters.imports.folder",
    "inspect_checkpoint": "glazoo.converters.source",
    "inspect_model": "glazoo.converters.examine",
    "revert_checkpoint": "glazoo.converters.revert",
    "tune_checkpoint": "glazoo.converters.tune",
    "verify_checkpoint": "glazoo.converters.verify",
    "verify_models": "glazoo.converters.verify",
}


def __getattr__(name: str) -> Any:
    # What these names stand for imports transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

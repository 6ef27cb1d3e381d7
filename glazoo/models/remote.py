"""Code in a saved folder for loaders that do not know glazoo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glazoo.families import Family

__all__ = ["REMOTE_CODE", "REMOTE_MODULE", "carry_code", "remote_map", "without_model_code"]

REMOTE_CODE = "modeling_glazoo.py"
"""File of the module that loaders with `trust_remote_code` import."""
REMOTE_MODULE = '''"""Loads the converted model without `import glazoo.models`; needs glazoo."""

from glazoo import models


def __getattr__(name):
    return getattr(models, name)
'''


def remote_map(family: Family) -> dict[str, str]:
    """Return the entry `auto_map` of config.json that names the classes of `REMOTE_CODE`."""
    module = REMOTE_CODE.removesuffix(".py")
    models = {
        auto: f"{module}.{family.converted_architecture(cls.__name__)}"
        for auto, cls in family.auto_models().items()
    }
    config = family.converted_architecture(family.source_config().__name__)
    return {"AutoConfig": f"{module}.{config}"} | models


def carry_code(config: Any, family: Family, folder: Path) -> None:
    """Writes the module `REMOTE_CODE` into the folder that a configuration is saved to, if its
    `auto_map` names such a module."""
    if mapped := getattr(config, "auto_map", None):
        # A hub's name may stand before the module's: from now on it is in this folder.
        config.auto_map = {**mapped, **remote_map(family)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REMOTE_CODE).write_text(REMOTE_MODULE, "utf-8")


def without_model_code(named: Any) -> Any:
    """Return an entry `auto_map` without the code that a folder brings for its model: the converted
    model has classes of its own, and that file does not come along."""
    if not isinstance(named, Mapping):
        return named
    return {k: v for k, v in named.items() if not k.startswith(("AutoConfig", "AutoModel"))}

"""Loading a source and what was converted from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glazoo.converters.folders import (
    CONFIG,
    read_json,
)
from glazoo.errors import ConversionError, extra
from glazoo.families import Family, families, find_family
from glazoo.families.settings import Settings
from glazoo.layers import gates
from glazoo.metaplastic import metaplasticize

if TYPE_CHECKING:
    from glazoo.converters.source import Checkpoint

__all__ = [
    "load_converted",
    "load_metaplastic",
    "load_model",
    "load_to_observe",
    "quiet",
    "read_pair",
]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing warnings and bars inside a `with` block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_pair(source: Path, destination: Path) -> tuple[Family, str, Settings | None]:
    """Reads both configurations; gives the family, the source's class and the conversion's
    settings, which models that are metaplastic by their specs do not need.

    Raises:
        ConversionError: one was not made from the other's kind of model, or cannot be read.
    """
    for folder in (source, destination):
        if not folder.is_dir():
            raise ConversionError(f"{folder}: there is no such folder")
    raw = read_json(source / CONFIG, CONFIG)
    family = find_family(raw.get("model_type"))
    converted = read_json(destination / CONFIG, CONFIG)
    if family.native and "metaplastic" not in converted:
        made_from, settings = converted.get("model_type"), None
    else:
        settings = Settings.from_block(converted.get("metaplastic"))
        made_from = settings.base_model_type
    if made_from != family.model_type:
        raise ConversionError(
            f"{destination} was made from a {made_from!r} model, {source} is {family.model_type!r}"
        )
    named = raw.get("architectures") if settings is None else settings.base_architectures
    return family, (named or family.architectures)[0], settings


def load_model(cls: type[Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the model of a class that a folder holds.

    Raises:
        ConversionError: it does not load, or lacks a tensor.
    """
    try:
        with quiet():
            model, info = cls.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                # Fused products of experts know no float64, and round on their own.
                experts_implementation="eager",
            )
            # What a quantised checkpoint is unpacked to may have a dtype of its own.
            if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
                model.to(dtype)
    except ConversionError:
        raise
    except Exception as e:
        # Loaders raise whatever their libraries do: the caller gets one line, the traceback has the
        # rest.
        raise ConversionError(f"cannot load {folder}: {' '.join(str(e).split())}") from e
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(f"{folder} lacks the tensor {missing[0]}")
    loaded: nn.Module = model
    return loaded


def load_metaplastic(
    family: Family, architecture: str, folder: Path, dtype: torch.dtype
) -> nn.Module:
    """Return the converted model of a source's class that a folder holds.

    Raises:
        ConversionError: it does not load, or lacks a tensor.
    """
    from glazoo.models.metaplastic import model_class

    return load_model(model_class(family.source_model(architecture), family), folder, dtype)


def load_to_observe(checkpoint: Checkpoint, settings: Settings) -> nn.Module:
    """Loads a source and turns it, in memory, into a form at kappa = 0, whose layers can be
    observed and compute what the source's do.

    Raises:
        ConversionError: it does not load, or lacks a tensor.
    """
    cls = checkpoint.family.source_model(checkpoint.architecture)
    return metaplasticize(
        load_model(cls, checkpoint.folder, torch.float32),
        rank=settings.rank,
        layers=settings.layers,
        seed=settings.seed,
        **settings.form,
    )


def load_converted(folder: str | Path, **options: Any) -> nn.Module:
    """Loads a folder of a metaplastic model: converted, or metaplastic by its specs.

    Raises:
        ConversionError: it is none, or does not load.
    """
    with extra("models"):
        import transformers

    import glazoo.models  # noqa: F401 - registers the architectures

    folder = Path(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: there is no such folder")
    raw = read_json(folder / CONFIG, CONFIG)
    known = families().get(str(raw.get("model_type")))
    if known is not None and known.native:
        loader = known.loaders(known.architectures[0])[0]
    else:
        settings = Settings.from_block(raw.get("metaplastic"))
        family = find_family(settings.base_model_type)
        loader = family.loaders(settings.base_architectures[0])[0]
    try:
        auto = getattr(transformers, loader)
        model: nn.Module = auto.from_pretrained(folder, local_files_only=True, **options)
    except ConversionError:
        raise
    except Exception as e:
        raise ConversionError(f"cannot load {folder}: {' '.join(str(e).split())}") from e
    if next(gates(model), None) is None:
        raise ConversionError(
            f"{folder} has no importance gates: its layers are not metaplastic. `glazoo convert` "
            "gives them, and so does a [metaplastic] table of `glazoo train`"
        )
    return model

"""How files spell the names of a model's tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from glazoo.families import Family, Found


def as_stored(model: Any, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """Return a model's tensors by the names that files have for them, and whether that could be
    worked out."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(model, state), True
    except (ImportError, AttributeError, TypeError):
        # Not a public function: another transformers may lack it or take other arguments.
        return {}, False


def stored_shapes(model: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Return the shapes of a model's tensors by the names that files have for them, and whether
    that could be worked out."""
    state, known = as_stored(model, model.state_dict())
    return {key: tuple(t.shape) for key, t in state.items()}, known


def without_text_prefix(family: Family, key: str) -> str:
    """Return a name as it is in a text model, if multimodal checkpoints may hold it under
    another."""
    return key if family.multimodal else re.sub(r"^model\.language_model\.", "model.", key)


def mixer_shapes(model: Any, mixer: Found) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a mixer, by the names that files have for them, with their shapes."""
    own = f"{mixer.path}."
    state = {key: t for key, t in model.state_dict().items() if key.startswith(own)}
    stored, known = as_stored(model, state)
    return {key: tuple(t.shape) for key, t in (stored if known else state).items()}


def joined_ends(model: Any, found: Mapping[int, Found]) -> tuple[str, ...]:
    """Return the ends of the names of tensors that loaders lay end to end: only their lengths
    together count, as some savers cut what they loaded into equal parts."""
    mixer = next(iter(found.values()))
    files = mixer_shapes(model, mixer)
    ends: list[str] = []
    for key, t in model.state_dict().items():
        if not key.startswith(f"{mixer.path}.") or key in files:
            continue
        try:
            parts, known = as_stored(model, {key: t})
        except Exception:  # a tensor that files hold as a part of another
            continue
        if known and len(parts) > 1:
            ends += [f".{name.rpartition('.')[0].rpartition('.')[2]}.weight" for name in parts]
    return tuple(ends)


def common_prefix(names: Iterable[str]) -> str:
    """Return the dotted name that all of several names begin with."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, parts))

"""Telling checkpoints of other packages apart by their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FLA", "STATE_SPACES", "layout_of"]

STATE_SPACES = "the original state-spaces/mamba code"
FLA = "flash-linear-attention"

_FLA_TYPES = ("gla", "retnet", "linear_attn", "hgrn2", "delta_net", "gated_deltanet", "kda")


def layout_of(config: Mapping[str, Any]) -> str | None:
    """Names the package that a config.json is of, if it has to be imported; None for all others.

    The original code has no model_type. A model_type that transformers has too is
    flash-linear-attention's if the epsilon has that package's name.
    """
    if "model_type" not in config and "d_model" in config and "n_layer" in config:
        return STATE_SPACES
    kind = config.get("model_type")
    if kind in _FLA_TYPES:
        return FLA
    own = ("norm_eps", "fuse_norm", "fuse_cross_entropy")
    if kind == "mamba2" and any(name in config for name in own):
        return FLA
    return None

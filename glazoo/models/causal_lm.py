"""Registration of the language model with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from glazoo.models.configuration import GlazooConfig
from glazoo.models.modeling import GlazooForCausalLM, GlazooModel

__all__ = ["GlazooConfig", "GlazooForCausalLM", "GlazooModel", "register"]


def register() -> None:
    """Makes transformers' Auto classes know `model_type` "glazoo"."""
    AutoConfig.register(GlazooConfig.model_type, GlazooConfig, exist_ok=True)
    AutoModel.register(GlazooConfig, GlazooModel, exist_ok=True)
    AutoModelForCausalLM.register(GlazooConfig, GlazooForCausalLM, exist_ok=True)


register()

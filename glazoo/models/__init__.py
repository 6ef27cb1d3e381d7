"""Models for transformers' Auto classes: importing this package registers the language model of
any specs, `GlazooForCausalLM`, and every converted architecture.

import glazoo.models
model = AutoModelForCausalLM.from_pretrained("converted-folder")
"""

from __future__ import annotations

from typing import Any

from glazoo.errors import extra

with extra("models"):
    from glazoo.models import metaplastic
    from glazoo.models.causal_lm import GlazooConfig, GlazooForCausalLM, GlazooModel
    from glazoo.models.metaplastic import register
    from glazoo.models.sharding import fully_shard

__all__ = ["GlazooConfig", "GlazooForCausalLM", "GlazooModel", "fully_shard", "register"]

register()


def __getattr__(name: str) -> Any:
    # Classes are made on first use: a family's modeling code is not imported before somebody needs
    # it.
    return getattr(metaplastic, name)

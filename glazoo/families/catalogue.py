"""What cannot be found by looking at a family's models: data, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from glazoo.families.base import Quirks
from glazoo.families.lightning import LightningMixer, exact_decays

__all__ = ["NOT_CONVERTIBLE", "OVERRIDES", "QUIRKS"]

OVERRIDES: Mapping[str, type[Any]] = MappingProxyType({"MiniMaxLightningAttention": LightningMixer})
"""Forms of mixers that compute their recurrence inline and call no known function, by class name:
with a forward pass of ours, and the name of the spec that it follows."""

_CLAMP = (
    "the source limits the step size when it reads a prompt and not when it decodes a single token"
)

_APART = """
mamba2 falcon_h1 qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text olmo_hybrid
kimi_linear bailing_hybrid lara_mini"""

QUIRKS: Mapping[str, Quirks] = MappingProxyType(
    {
        **dict.fromkeys(_APART.split(), Quirks(apart=True)),
        "bamba": Quirks(apart=True, positions=True),
        "zamba2": Quirks(apart=True, defects={"decoded": _CLAMP}),
        "nemotron_h": Quirks(apart=True, defects={"decoded": _CLAMP}),
        "minimax": Quirks(
            apart=True,
            positions=True,
            defects={
                "continued": "the source reads its position from the first layer, which is wrong "
                "for several tokens at once if that layer is linear",
                "beams": "the source's cache does not reorder the state of its linear layers",
            },
            exact=exact_decays,
        ),
    }
)
"""Known defects and needs of families, by `model_type`."""

_MAMBA1 = (
    "its layers are Mamba-1, whose decay differs for every pair of channel and state; no spec "
    "describes that"
)
_CONVOLUTIONS = "its linear layers are short convolutions, which have no recurrent state"
_NO_STATE = "it has no linear attention; its indexer selects tokens for softmax attention"

NOT_CONVERTIBLE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), _MAMBA1),
        **dict.fromkeys(
            ("lfm2", "lfm2_moe", "lfm3", "inkling_mm_model", "inkling2", "inkling2_loop", "zaya"),
            _CONVOLUTIONS,
        ),
        **dict.fromkeys(("minimax_m2", "minimax_m3_vl", "deepseek_v32"), _NO_STATE),
        "xlstm": "its read-out is divided by a stabilised normaliser already, and its states are "
        "stored rescaled",
        "rwkv": "its state is one number per channel, a numerator over a denominator already",
        "recurrent_gemma": "its recurrent unit has no keys, and importance counts keys",
        "nemotron_h_omni": "only its text model nemotron_h is supported, not the multimodal one",
        "nemo_speechlm": "only its text model nemotron_h is supported, not the multimodal one",
        "glm5_next_text": "transformers has no causal language model of this text part alone; "
        "convert the glm5_next checkpoint",
    }
)
"""Families that look convertible and are not, with the reason."""

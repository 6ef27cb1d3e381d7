"""The smallest real model of every supported family, and of every variation that changes its
mixers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version

from glazoo.converters import ConversionError
from glazoo.families import find_family

VOCABULARY = 61
LINEAR, FULL = "linear_attention", "full_attention"

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {
    **_ATTENTION,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_DELTA = {
    **_ATTENTION,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "layer_types": [LINEAR, FULL, LINEAR],
    "num_hidden_layers": 3,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_LATENT = {
    **_ATTENTION,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "layer_types": [LINEAR, FULL, LINEAR],
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_expert_group": 1,
    "topk_group": 1,
}
_QWEN4 = {
    **_DELTA,
    **_EXPERTS,
    "hc_count": 2,
    "hc_lowrank": 8,
    "layer_types": [LINEAR, "indexed_attention", LINEAR],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}

ALL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "mamba2",
        {
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 2,
            "num_hidden_layers": 2,
            "expand": 2,
            "chunk_size": 16,
        },
    ),
    "bamba": ("bamba", {**_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MAMBA,
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, FULL, LINEAR],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {
            **_MAMBA,
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_MAMBA,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "mamba_rms_norm": True,
            "ssm_multipliers": [0.5, 1.5, 0.75, 1.25, 2.0],
            "ssm_in_multiplier": 1.5,
            "ssm_out_multiplier": 0.7,
        },
    ),
    "falcon_h1-no-norm": (
        "falcon_h1",
        {
            **_MAMBA,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "mamba_rms_norm": False,
            "ssm_multipliers": [0.5, 1.5, 0.75, 1.25, 2.0],
            "mamba_proj_bias": True,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_ATTENTION,
            "num_key_value_heads": 4,
            "num_hidden_layers": 5,
            "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid", LINEAR],
            "hybrid_layer_ids": [1, 3],
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "chunk_size": 16,
            "adapter_rank": 4,
            "time_step_min": 0.02,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **_ATTENTION,
            "head_dim": 8,
            "layers_block_type": [LINEAR, "moe", FULL, LINEAR, "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "time_step_min": 0.02,
        },
    ),
    "minimax": (
        "minimax",
        {
            **_ATTENTION,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "layer_types": [FULL, LINEAR, LINEAR],
            "block_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "minimax-linear-first": (
        "minimax",
        {
            **_ATTENTION,
            "head_dim": 8,
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "block_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": ("qwen3_next", {**_DELTA, **_EXPERTS}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_DELTA, **_EXPERTS}),
    "qwen4_exp_text": ("qwen4_exp_text", _QWEN4),
    "olmo_hybrid": (
        "olmo_hybrid",
        {**{k: v for k, v in _DELTA.items() if k != "head_dim"}, "linear_num_key_heads": 4},
    ),
    "kimi_linear": ("kimi_linear", _LATENT),
    "bailing_hybrid": ("bailing_hybrid", _LATENT),
    "glm5_next": (
        "glm5_next",
        {
            **_LATENT,
            "qk_rope_head_dim": 0,
            "q_lora_rank": 16,
            "layer_types": [LINEAR, "indexed_attention", LINEAR],
            "indexer_types": ["full"] * 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 64,
            "index_kpool": 4,
            "hc_mult": 2,
            "vision_config": _VISION,
        },
    ),
    "glazoo": (
        "glazoo",
        {
            "pattern": ["gla", "attention"],
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "num_heads": 4,
            "num_key_heads": 2,
            "head_k_dim": 8,
            "head_v_dim": 8,
            "num_attention_heads": 2,
        },
    ),
    "glazoo-delta": (
        "glazoo",
        {
            "pattern": "kda",
            "num_hidden_layers": 2,
            "intermediate_size": 0,
            "num_heads": 2,
            "head_k_dim": 8,
            "head_v_dim": 16,
        },
    ),
    "lara_mini": (
        "lara_mini",
        {
            **_DELTA,
            **_EXPERTS,
            "layer_types": [LINEAR, "sliding_attention", LINEAR],
            "sliding_window": 64,
        },
    ),
    "qwen3_5": ("qwen3_5", {**_DELTA, "vision_config": _VISION}),
    "qwen3_5_moe": ("qwen3_5_moe", {**_DELTA, **_EXPERTS, "vision_config": _VISION}),
    "qwen4_exp": ("qwen4_exp", {**_QWEN4, "vision_config": _VISION}),
}
"""Name of a tiny model: its family and the values of its configuration."""


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    family, values = ALL[name]
    described = find_family(family)
    values = {**_COMMON, **values, **changes}
    if "vision_config" not in values:
        return described.source_config()(**values)
    others = {"vision_config": values.pop("vision_config")}
    return described.source_config()(text_config=values, **others)


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model whose every tensor differs from its default start."""
    torch.manual_seed(seed)
    family = find_family(TINY[name][0])
    model = family.source_model(family.architectures[0])(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 1 and "visual" not in key:
                p.add_(0.3 * torch.randn_like(p))
            elif p.dim() > 1 and "conv1d" not in key:
                p.mul_(2.0 if p.std() > 0.1 else 6.0)
    return model


# The source's own decoding of a batch gives every token twice, before this version.
_BROKEN = {"falcon_h1": "5.23"}


def _is_there(name: str) -> bool:
    """Whether the installed transformers has the family, with these kinds of layers, and runs
    it."""
    if Version(transformers.__version__) < Version(_BROKEN.get(name, "0")):
        return False
    try:
        tiny_config(name)
    except (ConversionError, ValueError, StrictDataclassError):
        return False
    return True


TINY: Mapping[str, tuple[str, dict[str, Any]]] = {k: v for k, v in ALL.items() if _is_there(k)}
"""The tiny models that the installed transformers can build."""

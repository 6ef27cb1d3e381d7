"""The supported families: data, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from glazoo.converters.families.base import Block, Family
from glazoo.converters.families.delta import (
    CHANNEL_DELTA,
    FULL_GATE_CHANNEL_DELTA,
    FUSED_DELTA,
    JOINT_DELTA,
    SPLIT_DELTA,
)
from glazoo.converters.families.lightning import LIGHTNING
from glazoo.converters.families.own import OWN
from glazoo.converters.families.ssd import SCALED_SSD, SSD

__all__ = ["FAMILIES", "NOT_CONVERTIBLE"]

_MODELS = "transformers.models"
_LAYERS = r"(?P<prefix>model\.layers\.(?P<layer>\d+)"
# Text models of multimodal checkpoints may keep the name that they have inside.
_TEXT_LAYERS = r"(?P<prefix>model\.(?:language_model\.)?layers\.(?P<layer>\d+)"
_MULTIMODAL = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
_CLAMP = (
    "the source limits the step size when it reads a prompt and not when it decodes a single token"
)


def _ssd(
    model_type: str,
    name: str,
    *,
    mixer: str,
    mixer_keys: str,
    sizes: Mapping[str, str],
    flags: Mapping[str, str | bool],
    block: Block = SSD,
    **more: Any,
) -> Family:
    return Family(
        model_type=model_type,
        architectures=(f"{name}ForCausalLM",),
        spec="mamba2",
        block=block,
        configuration=f"{_MODELS}.{model_type}.configuration_{model_type}:{name}Config",
        modeling=f"{_MODELS}.{model_type}.modeling_{model_type}",
        mixer=mixer,
        mixer_keys=mixer_keys,
        sizes={"D": "hidden_size", **sizes},
        flags={"norm": True, **flags},
        **more,
    )


_MAMBA_SIZES = {
    "H": "mamba_n_heads",
    "V": "mamba_d_head",
    "K": "mamba_d_state",
    "G": "mamba_n_groups",
    "W": "mamba_d_conv",
}
_MAMBA_FLAGS = {
    "input_bias": "mamba_proj_bias",
    "output_bias": "mamba_proj_bias",
    "convolution_bias": "mamba_conv_bias",
}

MAMBA2 = _ssd(
    "mamba2",
    "Mamba2",
    mixer="Mamba2Mixer",
    mixer_keys=r"(?P<prefix>backbone\.layers\.(?P<layer>\d+)\.mixer)\.",
    sizes={"H": "num_heads", "V": "head_dim", "K": "state_size", "G": "n_groups"}
    | {"W": "conv_kernel"},
    flags={
        "input_bias": "use_bias",
        "output_bias": "use_bias",
        "convolution_bias": "use_conv_bias",
    },
    cache="cache_params",
)
BAMBA = _ssd(
    "bamba",
    "Bamba",
    mixer="BambaMixer",
    mixer_keys=rf"{_LAYERS}\.mamba)\.",
    sizes=_MAMBA_SIZES,
    flags=_MAMBA_FLAGS,
    positions=True,
)
GRANITE = _ssd(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    mixer="GraniteMoeHybridMambaLayer",
    mixer_keys=rf"{_LAYERS}\.mamba)\.",
    sizes=_MAMBA_SIZES,
    flags=_MAMBA_FLAGS,
)
FALCON_H1 = _ssd(
    "falcon_h1",
    "FalconH1",
    mixer="FalconH1Mixer",
    mixer_keys=rf"{_LAYERS}\.mamba)\.",
    sizes=_MAMBA_SIZES,
    flags={**_MAMBA_FLAGS, "output_bias": "projectors_bias", "norm": "mamba_rms_norm"},
    block=SCALED_SSD,
)
ZAMBA2 = _ssd(
    "zamba2",
    "Zamba2",
    mixer="Zamba2MambaMixer",
    mixer_keys=rf"{_LAYERS}\.(?:mamba_decoder\.)?mamba)\.",
    sizes={
        **_MAMBA_SIZES,
        "H": "n_mamba_heads",
        "V": "mamba_headdim",
        "G": "mamba_ngroups",
    },
    flags={
        "input_bias": "add_bias_linear",
        "output_bias": "add_bias_linear",
        "convolution_bias": True,
    },
    defects={"decoded": _CLAMP},
)
NEMOTRON_H = _ssd(
    "nemotron_h",
    "NemotronH",
    mixer="NemotronHMamba2Mixer",
    mixer_keys=r"(?P<prefix>(?:backbone|model)\.layers\.(?P<layer>\d+)\.mixer)\.",
    sizes={
        "H": "mamba_num_heads",
        "V": "mamba_head_dim",
        "K": "ssm_state_size",
        "G": "n_groups",
        "W": "conv_kernel",
    },
    flags={
        "input_bias": "use_bias",
        "output_bias": "use_bias",
        "convolution_bias": "use_conv_bias",
    },
    defects={"decoded": _CLAMP},
)


def _delta(
    package: str,
    name: str,
    *,
    block: Block,
    model_type: str | None = None,
    config: str | None = None,
    prefix: str = "",
    **more: Any,
) -> Family:
    return Family(
        model_type=model_type or package,
        architectures=(f"{name}ForCausalLM",),
        spec="gated_deltanet",
        block=block,
        configuration=f"{_MODELS}.{package}.configuration_{package}:{config or name}Config",
        modeling=f"{_MODELS}.{package}.modeling_{package}",
        mixer=f"{name}{prefix}GatedDeltaNet",
        mixer_keys=rf"{_TEXT_LAYERS}\.linear_attn)\.",
        sizes={
            "D": "hidden_size",
            "H": "linear_num_value_heads",
            "G": "linear_num_key_heads",
            "K": "linear_key_head_dim",
            "V": "linear_value_head_dim",
            "W": "linear_conv_kernel_dim",
        },
        **more,
    )


def _multimodal(text: Family, model_type: str, config: str) -> Family:
    """Gives the multimodal family around a text family."""
    package = text.modeling.rpartition(".")[0]
    return Family(
        model_type=model_type,
        architectures=tuple(
            a.replace("ForCausalLM", "ForConditionalGeneration") for a in text.architectures
        ),
        spec=text.spec,
        block=text.block,
        configuration=f"{package}.configuration_{model_type}:{config}",
        modeling=text.modeling,
        mixer=text.mixer,
        mixer_keys=text.mixer_keys,
        sizes=text.sizes,
        flags=text.flags,
        text="text_config",
        auto_classes=_MULTIMODAL,
    )


QWEN3_NEXT = _delta("qwen3_next", "Qwen3Next", block=FUSED_DELTA)
QWEN3_5_TEXT = _delta(
    "qwen3_5", "Qwen3_5", block=SPLIT_DELTA, model_type="qwen3_5_text", config="Qwen3_5Text"
)
QWEN3_5_MOE_TEXT = _delta(
    "qwen3_5_moe",
    "Qwen3_5Moe",
    block=SPLIT_DELTA,
    model_type="qwen3_5_moe_text",
    config="Qwen3_5MoeText",
)
QWEN4_EXP_TEXT = _delta(
    "qwen4_exp",
    "Qwen4Exp",
    block=SPLIT_DELTA,
    model_type="qwen4_exp_text",
    config="Qwen4ExpText",
    prefix="Text",
)
OLMO_HYBRID = _delta(
    "olmo_hybrid", "OlmoHybrid", block=JOINT_DELTA, write_above_one="linear_allow_neg_eigval"
)


def _channel(
    model_type: str, architecture: str, config: str, *, block: Block = CHANNEL_DELTA, **more: Any
) -> Family:
    return Family(
        model_type=model_type,
        architectures=(architecture,),
        spec="kda",
        block=block,
        configuration=f"{_MODELS}.{model_type}.configuration_{model_type}:{config}",
        modeling=f"{_MODELS}.{model_type}.modeling_{model_type}",
        sizes={
            "D": "hidden_size",
            "H": "linear_num_heads",
            "G": "linear_num_heads",
            "K": "linear_head_dim",
            "V": "linear_head_dim",
            "W": "linear_conv_kernel_dim",
        },
        **more,
    )


KIMI_LINEAR = _channel(
    "kimi_linear",
    "KimiLinearForCausalLM",
    "KimiLinearConfig",
    mixer="KimiLinearDeltaAttention",
    mixer_keys=rf"{_LAYERS}\.self_attn)\.",
    flags={"broadcast_decay_rate": True, "flat_decay_rate": False},
)
BAILING_HYBRID = _channel(
    "bailing_hybrid",
    "BailingHybridForCausalLM",
    "BailingHybridConfig",
    block=FULL_GATE_CHANNEL_DELTA,
    mixer="BailingHybridDeltaAttention",
    mixer_keys=rf"{_LAYERS}\.attention)\.",
)
GLM5_NEXT = _channel(
    "glm5_next",
    "Glm5NextForConditionalGeneration",
    "Glm5NextConfig",
    mixer="Glm5NextTextLinearAttention",
    mixer_keys=rf"{_TEXT_LAYERS}\.self_attn)\.",
    flags={"broadcast_decay_rate": False, "flat_decay_rate": True},
    text="text_config",
    auto_classes=_MULTIMODAL,
)


def _head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


MINIMAX = Family(
    model_type="minimax",
    architectures=("MiniMaxForCausalLM",),
    spec="lightning",
    block=LIGHTNING,
    configuration=f"{_MODELS}.minimax.configuration_minimax:MiniMaxConfig",
    modeling=f"{_MODELS}.minimax.modeling_minimax",
    mixer="MiniMaxLightningAttention",
    mixer_keys=rf"{_LAYERS}\.self_attn)\.",
    sizes={
        "D": "hidden_size",
        "H": "num_attention_heads",
        "K": _head_size,
        "V": _head_size,
        "S": "block_size",
    },
    positions=True,
    defects={
        "continued": "the source reads its position from the first layer, which is wrong for "
        "several tokens at once if that layer is linear",
        "beams": "the source's cache does not reorder the state of its linear layers",
    },
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        f.model_type: f
        for f in (
            MAMBA2,
            BAMBA,
            GRANITE,
            FALCON_H1,
            ZAMBA2,
            NEMOTRON_H,
            MINIMAX,
            QWEN3_NEXT,
            QWEN3_5_TEXT,
            _multimodal(QWEN3_5_TEXT, "qwen3_5", "Qwen3_5Config"),
            QWEN3_5_MOE_TEXT,
            _multimodal(QWEN3_5_MOE_TEXT, "qwen3_5_moe", "Qwen3_5MoeConfig"),
            QWEN4_EXP_TEXT,
            _multimodal(QWEN4_EXP_TEXT, "qwen4_exp", "Qwen4ExpConfig"),
            OLMO_HYBRID,
            KIMI_LINEAR,
            BAILING_HYBRID,
            GLM5_NEXT,
            OWN,
        )
    }
)
"""Every supported family by its `model_type`."""

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
            ("lfm2", "lfm2_moe", "lfm3", "inkling_mm_model", "inkling2", "zaya"), _CONVOLUTIONS
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

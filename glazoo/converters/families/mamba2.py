"""Mamba2."""

from __future__ import annotations

from glazoo.converters.families.base import Family
from glazoo.converters.families.ssd import SSD

__all__ = ["MAMBA2"]

MAMBA2 = Family(
    model_type="mamba2",
    architectures=("Mamba2ForCausalLM",),
    spec="mamba2",
    block=SSD,
    configuration="transformers.models.mamba2.configuration_mamba2:Mamba2Config",
    modeling="transformers.models.mamba2.modeling_mamba2",
    mixer="Mamba2Mixer",
    mixer_keys=r"(?P<prefix>backbone\.layers\.(?P<layer>\d+)\.mixer)\.",
    sizes={
        "D": "hidden_size",
        "H": "num_heads",
        "P": "head_dim",
        "N": "state_size",
        "G": "n_groups",
        "K": "conv_kernel",
    },
    flags={"projection_bias": "use_bias", "convolution_bias": "use_conv_bias"},
)

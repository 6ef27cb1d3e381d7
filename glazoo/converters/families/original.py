"""Importing checkpoints in the layout of the original state-spaces/mamba code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glazoo.converters.checkpoint import CONFIG, SINGLE, _read_json, inspect_checkpoint
from glazoo.converters.errors import ConversionError
from glazoo.converters.files import Staging, one_line

__all__ = ["import_original", "is_original"]

PICKLE = "pytorch_model.bin"
_WEIGHTS = (PICKLE, SINGLE)
_KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "README.md",
    "LICENSE",
)
"""Further files that are taken over."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Says whether a config.json is of the original code: it names a state space layer and no
    model_type."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def _translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the arguments of transformers' configuration.

    Raises:
        ConversionError: the model has something that transformers' Mamba2 has not.
    """
    cell = raw.get("ssm_cfg") or {}
    kind = cell.get("layer", "Mamba1")
    if kind != "Mamba2":
        raise ConversionError(f"ssm_cfg.layer is {kind!r}; supported is 'Mamba2'")
    width, expand = int(raw["d_model"]), int(cell.get("expand", 2))
    inner, head = expand * width, int(cell.get("headdim", 64))
    for name, found, accepted in (
        ("attn_layer_idx", raw.get("attn_layer_idx") or [], []),
        ("d_intermediate", raw.get("d_intermediate", 0), 0),
        ("rms_norm", raw.get("rms_norm", True), True),
        ("ssm_cfg.d_ssm", cell.get("d_ssm") or inner, inner),
        ("ssm_cfg.D_has_hdim", cell.get("D_has_hdim", False), False),
        ("ssm_cfg.rmsnorm", cell.get("rmsnorm", True), True),
        ("ssm_cfg.norm_before_gate", cell.get("norm_before_gate", False), False),
    ):
        if found != accepted:
            raise ConversionError(
                f"{name} is {found!r}: transformers' Mamba2 has only {accepted!r}"
            )
    if inner % head:
        raise ConversionError(f"ssm_cfg.headdim: {inner} channels are no multiple of {head}")
    multiple = int(raw.get("pad_vocab_size_multiple", 8))
    vocabulary = -(-int(raw["vocab_size"]) // multiple) * multiple
    limit = cell.get("dt_limit") or (0.0, float("inf"))
    return {
        "hidden_size": width,
        "expand": expand,
        "num_heads": inner // head,
        "head_dim": head,
        "state_size": int(cell.get("d_state", 128)),
        "n_groups": int(cell.get("ngroups", 1)),
        "conv_kernel": int(cell.get("d_conv", 4)),
        "chunk_size": int(cell.get("chunk_size", 256)),
        "use_bias": bool(cell.get("bias", False)),
        "use_conv_bias": bool(cell.get("conv_bias", True)),
        "time_step_limit": tuple(float(x) for x in limit),
        "num_hidden_layers": int(raw["n_layer"]),
        "vocab_size": vocabulary,
        "layer_norm_epsilon": float(raw.get("norm_epsilon", 1e-5)),
        "residual_in_fp32": bool(raw.get("residual_in_fp32", True)),
        "tie_word_embeddings": bool(raw.get("tie_embeddings", True)),
        "architectures": ["Mamba2ForCausalLM"],
    }


def _renamed(state: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConversionError(f"{key} holds {type(value).__name__}, expected a tensor")
        out["backbone.embeddings.weight" if key == "backbone.embedding.weight" else key] = value
    head, table = out.get("lm_head.weight"), out.get("backbone.embeddings.weight")
    if tied and head is not None:
        if table is None or not torch.equal(head, table):
            raise ConversionError(
                "tie_embeddings is set, but lm_head.weight and backbone.embedding.weight differ"
            )
        del out["lm_head.weight"]
    elif head is not None and table is not None and head.data_ptr() == table.data_ptr():
        # Shared in the file, and two tensors from now on.
        out["lm_head.weight"] = head.clone()
    return out


def import_original(src: str | Path, dst: str | Path, *, force: bool = False) -> None:
    """Writes a checkpoint of the original state-spaces/mamba code as a transformers folder.

    Tensors keep their values and dtype; one is renamed, and the configuration is translated.
    `convert_checkpoint` takes the result.

    Args:
        src: a folder with the original config.json, and pytorch_model.bin or model.safetensors.
        dst: the folder to make. It appears complete or not at all.
        force: replace a model's folder that is already at `dst`.

    Raises:
        ConversionError: it is no Mamba2 checkpoint of that code, has parts that transformers'
            Mamba2 lacks, or its tensors do not fit its configuration.
    """
    import transformers
    from safetensors.torch import load_file, save_file

    source, destination = Path(src), Path(os.path.abspath(dst))
    if not source.is_dir():
        raise ConversionError(f"{source}: there is no such folder")
    raw = _read_json(source / CONFIG, CONFIG)
    if not is_original(raw):
        raise ConversionError(
            f"{source / CONFIG} is not of the original code: it needs d_model and n_layer, and no "
            "model_type"
        )
    try:
        config = transformers.Mamba2Config(**_translated(raw))
    except (KeyError, TypeError) as e:
        raise ConversionError(f"config.json is damaged: {e}") from e
    weights = next((source / name for name in _WEIGHTS if (source / name).is_file()), None)
    if weights is None:
        raise ConversionError(f"{source} has neither {' nor '.join(_WEIGHTS)}")
    try:
        if weights.name == PICKLE:
            # Tensors only: a pickle may run code otherwise. Mapped: memory does not hold a copy.
            state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        else:
            state = load_file(weights)
    except Exception as e:
        raise ConversionError(f"cannot read {weights.name}: {' '.join(str(e).split())}") from e
    if not isinstance(state, dict):
        raise ConversionError(f"{weights.name} holds {type(state).__name__}, expected tensors")
    tensors = _renamed(state, tied=config.tie_word_embeddings)
    try:
        with Staging(destination, force=force, total=1, progress=None) as stage:
            save_file(
                {key: t.contiguous() for key, t in tensors.items()},
                stage.folder / SINGLE,
                metadata={"format": "pt"},
            )
            stage.write(CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
            for name in _KEPT:
                if (source / name).is_file():
                    stage.take(source / name, name, link=False)
            # Complete and of the right shapes, as a conversion will demand.
            inspect_checkpoint(stage.folder)
    except OSError as e:
        raise ConversionError(f"cannot write {destination}: {one_line(e)}") from e

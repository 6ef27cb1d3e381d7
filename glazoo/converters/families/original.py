"""Importing checkpoints in the layouts of other packages: the original state-spaces/mamba code and
flash-linear-attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glazoo.converters.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    _dump,
    _read_json,
    _read_shards,
    inspect_checkpoint,
)
from glazoo.converters.errors import ConversionError
from glazoo.converters.families.fla import read_fla
from glazoo.converters.families.layouts import FLA, STATE_SPACES, layout_of
from glazoo.converters.files import Staging, one_line

__all__ = ["import_original"]

PICKLE = "pytorch_model.bin"
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


def _read_state_spaces(
    raw: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor], str]:
    """Gives transformers' configuration and tensors, and the name of the table of embeddings."""
    import transformers

    table = "backbone.embeddings.weight"
    tensors = {table if key == "backbone.embedding.weight" else key: x for key, x in state.items()}
    return transformers.Mamba2Config(**_translated(raw)), tensors, table


_READERS: Mapping[
    str,
    Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Any, dict[str, Tensor], str]],
] = {STATE_SPACES: _read_state_spaces, FLA: read_fla}


def _settle_head(tensors: dict[str, Tensor], table: str, *, tied: bool) -> None:
    """Leaves out a head that is the table of embeddings.

    Raises:
        ConversionError: they should be one and differ.
    """
    head, embeddings = tensors.get("lm_head.weight"), tensors.get(table)
    if tied and head is not None:
        if embeddings is None or not torch.equal(head, embeddings):
            raise ConversionError(
                "the configuration ties the embeddings, but lm_head.weight and the table of "
                "embeddings differ"
            )
        del tensors["lm_head.weight"]


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives contiguous tensors, of which none shares its memory with another: tensors that a pickle
    shares are two from now on."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        out[key] = value.clone() if shared else value.contiguous()
    return out


def _load(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a folder."""
    from safetensors.torch import load_file

    if not any((folder / name).is_file() for name in (PICKLE, SINGLE, INDEX)):
        raise ConversionError(f"{folder} has neither {PICKLE} nor {SINGLE} nor {INDEX}")
    state: Any = {}
    name = PICKLE
    try:
        if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
            for shard in _read_shards(folder)[1]:
                name = shard.path.name
                state |= load_file(shard.path)
        else:
            # Tensors only: a pickle may run code otherwise. Mapped: memory does not hold a copy.
            state = torch.load(folder / PICKLE, map_location="cpu", weights_only=True, mmap=True)
    except ConversionError:
        raise
    except Exception as e:
        raise ConversionError(f"cannot read {name}: {' '.join(str(e).split())}") from e
    if not isinstance(state, dict):
        raise ConversionError(f"{name} holds {type(state).__name__}, expected tensors")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConversionError(f"{key} holds {type(value).__name__}, expected a tensor")
    return state


def import_original(src: str | Path, dst: str | Path, *, force: bool = False) -> None:
    """Writes a checkpoint of another package as a folder that `from_pretrained` loads.

    Mamba2 checkpoints of the original state-spaces/mamba code become transformers' Mamba2.
    Checkpoints of flash-linear-attention (mamba2, gla, retnet, linear_attn, hgrn2, delta_net,
    gated_deltanet, kda) become a `glazoo.models.GlazooForCausalLM`. The result computes the same
    function. Tensors keep their values and dtype; they are renamed and cut, and the configuration
    is translated. `convert_checkpoint` takes the result.

    Args:
        src: a folder with the package's config.json, and pytorch_model.bin, model.safetensors or
            shards with an index.
        dst: the folder to make. It appears complete or not at all.
        force: replace a model's folder that is already at `dst`.

    Raises:
        ConversionError: it is of neither package, has parts that the new model lacks, or its
            tensors do not fit its configuration.
    """
    from safetensors.torch import save_file

    source, destination = Path(src), Path(os.path.abspath(dst))
    if not source.is_dir():
        raise ConversionError(f"{source}: there is no such folder")
    raw = _read_json(source / CONFIG, CONFIG)
    layout = layout_of(raw)
    if layout is None:
        raise ConversionError(
            f"{source / CONFIG} is not of {STATE_SPACES}, which has d_model and n_layer and no "
            f"model_type, and not of {FLA}"
        )
    if "quantization_config" in raw:
        raise ConversionError(f"{source} is quantised; import the unquantised checkpoint")
    state = _load(source)
    try:
        config, tensors, table = _READERS[layout](raw, state)
    except ConversionError:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise ConversionError(f"config.json is damaged: {' '.join(str(e).split())}") from e
    _settle_head(tensors, table, tied=config.tie_word_embeddings)
    try:
        with Staging(destination, force=force, total=1, progress=None) as stage:
            save_file(
                _apart(tensors),
                stage.folder / SINGLE,
                metadata={"format": "pt"},
            )
            stage.write(CONFIG, _dump(config.to_dict()))
            for name in _KEPT:
                if (source / name).is_file():
                    stage.take(source / name, name, link=False)
            # Complete and of the right shapes, as a conversion will demand.
            inspect_checkpoint(stage.folder)
    except OSError as e:
        raise ConversionError(f"cannot write {destination}: {one_line(e)}") from e

"""Importing checkpoints in the layouts of other packages: the original state-spaces/mamba code,
flash-linear-attention and RWKV."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glazoo.converters.files import Staging
from glazoo.converters.folders import CONFIG, INDEX, SINGLE, dump_json, read_json, read_shards
from glazoo.converters.imports.layouts import (
    FLA,
    STATE_SPACES,
    layout_of,
    read_specs,
    read_state_spaces,
    rwkv_kind,
)
from glazoo.converters.imports.single import read_pickle, read_single
from glazoo.converters.source import check_model
from glazoo.errors import ConversionError, one_line
from glazoo.families import find_family

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
    """Return contiguous tensors, of which none shares its memory with another: tensors that a
    pickle shares are two from now on."""
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
    if not ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return read_pickle(folder / PICKLE)
    state: dict[str, Tensor] = {}
    name = SINGLE
    try:
        for shard in read_shards(folder)[1]:
            name = shard.path.name
            state |= load_file(shard.path)
    except ConversionError:
        raise
    except Exception as e:
        raise ConversionError(f"cannot read {name}: {' '.join(str(e).split())}") from e
    return state


def _translated(source: Path) -> tuple[Any, dict[str, Tensor], str]:
    """Return the configuration, the tensors and the name of the table of embeddings."""
    if source.is_file():
        form, state = read_single(source)
        try:
            kind, state = rwkv_kind(form, state)
            config, tensors, table = read_specs(kind, {}, state)
        except ConversionError as e:
            raise ConversionError(f"{source.name}: {e}") from e
        config.dtype = tensors[table].dtype
        return config, tensors, table
    if not source.is_dir():
        raise ConversionError(f"{source}: there is no such folder or file")
    raw = read_json(source / CONFIG, CONFIG)
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
        if layout == FLA:
            return read_specs(f"fla.{raw['model_type']}", raw, state)
        return read_state_spaces(raw, state)
    except ConversionError:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise ConversionError(f"config.json is damaged: {' '.join(str(e).split())}") from e


def import_original(
    src: str | Path, dst: str | Path, *, characters: str | None = None, force: bool = False
) -> None:
    """Writes a checkpoint of another package as a folder that `from_pretrained` loads.

    Mamba2 checkpoints of the original state-spaces/mamba code become transformers' Mamba2.
    Checkpoints of flash-linear-attention, of the families in `exchange/mixers.toml`, and files of
    RWKV-5.2, 6 and 7, become a `glazoo.models.GlazooForCausalLM`. The result computes the same
    function. Tensors keep their values and dtype; they are renamed and cut, and the configuration
    is translated. `convert_checkpoint` takes the result where its spec has a metaplastic form.

    Args:
        src: a folder with the package's config.json, and pytorch_model.bin, model.safetensors or
            shards with an index; or a file: a state dict of RWKV's training code (.pth), or one of
            rwkv.cpp (.bin), in float32, float16, Q5_1 or Q8_0, which becomes float32.
        dst: the folder to make. It appears complete or not at all.
        characters: what the tokens are, a character each, in the order of their ids, where `src`
            brings no tokenizer; a model of 256 tokens reads bytes without it.
        force: replace a model's folder that is already at `dst`.

    Raises:
        ConversionError: it is of neither package, has parts that the new model lacks, or its
            tensors do not fit its configuration.
    """
    from safetensors.torch import save_file

    source, destination = Path(src), Path(os.path.abspath(dst))
    config, tensors, table = _translated(source)
    symbols = _symbols(source, characters, config.vocab_size)
    _settle_head(tensors, table, tied=config.tie_word_embeddings)
    # Complete and of the right shapes, whether or not it can be converted.
    family = find_family(config.model_type)
    model = family.build(config.architectures[0], config)
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    check_model(family, model, (), shapes, set())
    try:
        with Staging(destination, force=force, total=1, progress=None) as stage:
            save_file(
                _apart(tensors),
                stage.folder / SINGLE,
                metadata={"format": "pt"},
            )
            stage.write(CONFIG, dump_json(config.to_dict()))
            if symbols is not None:
                symbols.save_pretrained(stage.folder)
            for name in () if source.is_file() else _KEPT:
                if (source / name).is_file():
                    stage.take(source / name, name, link=False)
    except OSError as e:
        raise ConversionError(f"cannot write {destination}: {one_line(e)}") from e


def _symbols(source: Path, characters: str | None, vocabulary: int) -> Any | None:
    """Return the tokenizer of a model whose tokens are bytes or characters."""
    if characters is None and (source.is_dir() or vocabulary != 256):
        return None
    from glazoo.training import symbol_tokenizer

    if characters is not None:
        if source.is_dir() and (source / "tokenizer_config.json").is_file():
            raise ConversionError(f"characters: {source} brings a tokenizer of its own")
        if len(set(characters)) != len(characters) or len(characters) > vocabulary:
            raise ConversionError(
                f"characters: got {len(characters)} characters, of which {len(set(characters))} "
                f"differ; accepted are up to {vocabulary} different ones, as many as tokens"
            )
    return symbol_tokenizer(characters)

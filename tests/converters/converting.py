"""Small real Mamba2 models, prompts and folders: what the tests of the converters share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

VOCABULARY = 61


def make_config(**changes: Any) -> Mamba2Config:
    """Two layers; the chunk is short, so that prompts span several and end inside one."""
    values: dict[str, Any] = {
        "hidden_size": 32,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "expand": 2,
        "chunk_size": 16,
    }
    return Mamba2Config(**{**values, **changes})


def make_model(seed: int = 0, **changes: Any) -> Mamba2ForCausalLM:
    """A random model whose every tensor differs from its default start."""
    torch.manual_seed(seed)
    model = Mamba2ForCausalLM(make_config(**changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif "conv1d" not in name:
                p.mul_(2.0)
    return model


def prompts(batch: int = 3, tokens: int = 37, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and a mask with padding of different length on the left; one row has
    none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 5 * row] = 0
    return ids, mask


def open_gates(model: torch.nn.Module, kappa: float = 0.5) -> None:
    """Moves every gate tensor away from its start, as training does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".metaplastic." not in name:
                continue
            noise = torch.rand(p.shape, generator=generator).to(p) - 0.5
            if name.endswith("axes"):
                continue  # orthogonal, and `turn` moves them
            if name.endswith("b_scale"):
                p.copy_(kappa * (1 + noise))
            else:
                p.add_(noise)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Changes top-level keys of a JSON file; None removes a key."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def cache_of(out: Any) -> dict[str, Any]:
    """The cache of a model's output, under the name that this version of the model has for it."""
    names = ("cache", "past_key_values", "cache_params")
    return next({name: out[name]} for name in names if out.get(name) is not None)


def layers_of(out: Any) -> Any:
    """The layers of the cache of a model's output."""
    (cache,) = cache_of(out).values()
    return cache.layers

"""What plain trainers pull towards zero: matrices, and nothing whose zero means something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from converters.tiny import tiny_model
from torch import nn
from transformers import Mamba2ForCausalLM, Trainer, TrainingArguments

import glazoo
from glazoo import metaplasticize
from glazoo.models import GlazooConfig, GlazooForCausalLM
from glazoo.models.decay import no_weight_decay


def decayed(model: nn.Module, folder: Path) -> set[str]:
    """Names of the parameters on which the optimiser of a plain trainer decays."""
    arguments = TrainingArguments(
        output_dir=str(folder), weight_decay=0.1, use_cpu=True, report_to="none"
    )
    optimizer: Any = Trainer(model=model, args=arguments).create_optimizer()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(learned)
    held = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


def own(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("name", ["mamba2", "kimi_linear", "qwen3_next", "glazoo"])
def test_gates_priors_and_decay_rates_of_converted_models(name: str, tmp_path: Path) -> None:
    source = tiny_model(name)
    before = decayed(source, tmp_path)
    layers = {n.rpartition(".metaplastic.")[0] for n in gates(metaplasticize(source))}
    after = decayed(source, tmp_path)
    assert layers
    assert not {n for n in after if ".metaplastic." in n}
    assert not {n for n in after if own(n) == "A_log"}
    # Nothing else changes.
    assert before - after == {n for n in before if own(n) == "A_log"}
    assert after <= before
    if name != "glazoo":
        assert {own(n) for n in before - after} == {"A_log"}


def gates(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters() if ".metaplastic." in n}


@pytest.mark.parametrize("name", glazoo.names())
def test_only_matrices_and_convolutions_of_own_models_decay(name: str, tmp_path: Path) -> None:
    heads = 1 if glazoo.load(name).layer.heads.sharing == "one" else 2
    model = GlazooForCausalLM(
        GlazooConfig(
            pattern=[name, "attention"],
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=heads,
            head_k_dim=8,
            head_v_dim=8,
            num_attention_heads=2,
        )
    )
    expected = {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d)
        or type(module).__name__ == "Convolution"
        for key, _ in module.named_parameters(recurse=False)
        if key == "weight"
    }
    assert decayed(model, tmp_path) == expected


def test_other_models_decay_as_they_did(tmp_path: Path) -> None:
    source = tiny_model("mamba2")
    assert type(source) is Mamba2ForCausalLM
    assert not [*no_weight_decay(source)]
    # transformers' own rule: A_log and D are neither called a bias nor a norm.
    assert {own(n) for n in decayed(source, tmp_path)} >= {"A_log", "D"}

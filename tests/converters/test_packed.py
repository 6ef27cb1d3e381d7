"""Packed sequences in converted models: every document is computed as if it stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from converters.converting import cache_of, open_gates
from converters.tiny import TINY, VOCABULARY, tiny_config, tiny_model
from torch import Tensor

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo import metaplasticize
from glazoo.converters.float64 import clean_float64_model
from glazoo.families import find_family
from glazoo.families.packing import find_packed

# The shortest document is shorter than any convolution's reach, and one has a single token.
LENGTHS = (5, 1, 2, 9, 4)
WRAPPED = {"qwen3_5", "qwen3_5_moe", "qwen4_exp"}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in WRAPPED else ())
    for name in sorted(TINY)
    if not find_family(TINY[name][0]).native
]


def converted(name: str, **options: Any) -> Any:
    """A model that computes in float64 throughout, with open gates."""
    weights = tiny_model(name).state_dict()
    model = clean_float64_model(TINY[name][0])(tiny_config(name)).double()
    model.load_state_dict(weights)
    # Fused products of experts know no float64.
    model.set_experts_implementation("eager")
    found: Any = metaplasticize(model, **options)
    open_gates(found)
    return found.double().eval()


def row(seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Documents end to end in one row, and what says where they are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=generator)
    lengths = torch.tensor(LENGTHS)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)[None]
    return ids, {
        "cu_seq_lens_q": bounds.int(),
        "position_ids": positions,
        "seq_idx": documents.int(),
    }


def alone(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())


def tolerance(x: Tensor) -> float:
    return 4096 * torch.finfo(x.dtype).eps * max(1.0, float(x.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_documents_do_not_mix(name: str) -> None:
    model = converted(name)
    ids, bounds = row()
    expected = alone(model, ids)
    # Mixed, they would be far from that.
    assert distance(model(ids).logits, expected) > 1e-3
    for key, value in bounds.items():
        assert distance(model(ids, **{key: value}).logits, expected) <= tolerance(expected), key
    together = model(ids, **bounds, attention_mask=torch.ones_like(ids))
    assert distance(together.logits, expected) <= tolerance(expected)
    # Two rows, with documents of their own each.
    others, _ = row(1)
    ids = torch.cat([ids, others])
    positions = bounds["position_ids"].expand(2, -1)
    expected = torch.cat([expected, alone(model, others)])
    found = model(ids, position_ids=positions).logits
    assert distance(found, expected) <= tolerance(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    # What checkpointing computes again is what was computed without it.
    "checkpointing",
    [pytest.param(False, marks=pytest.mark.slow), True],
)
def test_gradients_are_those_of_separate_documents(name: str, checkpointing: bool) -> None:
    model = converted(name)
    ids, bounds = row()
    weight = torch.randn(
        1, ids.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(1)
    ).double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            (logits * weight).sum(), list(parameters.values()), allow_unused=True
        )
        return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}

    expected = gradients(alone(model, ids))
    if checkpointing:
        enable = "activation_checkpointing_enable"
        if not hasattr(model, enable):
            enable = "gradient_checkpointing_enable"
        getattr(model, enable)({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    found = gradients(model(ids, position_ids=bounds["position_ids"]).logits)
    assert found.keys() == expected.keys()
    assert any(".metaplastic." in n for n in found)
    for key, grad in found.items():
        assert distance(grad, expected[key]) <= tolerance(expected[key]), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "kimi_linear"])
def test_the_model_below_the_head_keeps_documents_apart(name: str) -> None:
    """Trainers call it to compute the loss by themselves."""
    model: Any = converted(name).base_model
    ids, bounds = row()
    expected = torch.cat([model(part).last_hidden_state for part in ids.split(LENGTHS, 1)], 1)
    for key, value in bounds.items():
        found = model(ids, **{key: value}).last_hidden_state
        assert distance(found, expected) <= tolerance(expected), key
    with pytest.raises(ValueError, match="let documents begin at different tokens"):
        model(ids, position_ids=bounds["position_ids"], cu_seq_lens_q=torch.tensor([0, 4, 21]))
    # Nothing of a refused or finished call is left behind.
    whole = model(ids).last_hidden_state
    assert distance(whole, expected) > 1e-3
    assert distance(model(ids, **bounds).last_hidden_state, expected) <= tolerance(expected)
    # Where nobody has tried the layers between the mixers, only whole models take rows apart.
    next(m for m in model.modules() if hasattr(m, "metaplastic_apart")).metaplastic_apart = False
    with pytest.raises(ValueError, match="mixes packed sequences: call the whole model"):
        model(ids, **bounds)


def test_packed_documents_continue_no_cache() -> None:
    model = metaplasticize(tiny_model("mamba2"))
    ids, bounds = row()
    out: Any = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="packed sequences cannot continue a cache"):
        model(ids, **cache_of(out), **bounds)


def test_where_documents_begin() -> None:
    found = find_packed(2, 4, position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]))
    assert found is not None
    assert found.starts.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    assert found.cu_seqlens.tolist() == [0, 2, 4, 7, 8]
    assert found.documents.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert found.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    # An empty document has no tokens.
    assert find_packed(1, 3, cu_seqlens=torch.tensor([0, 0, 3])) is None
    # One document, wherever it begins: a continuation.
    assert find_packed(1, 3, position_ids=torch.tensor([[7, 8, 9]])) is None
    assert find_packed(1, 0, seq_idx=torch.zeros(1, 0)) is None
    # Positions of padding on the left say nothing.
    positions, mask = torch.tensor([[1, 1, 0, 1]]), torch.tensor([[0, 0, 1, 1]])
    assert find_packed(1, 4, position_ids=positions, attention_mask=mask) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2])}, r"got \[0, 2\], expected 0, .* and 4 last"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"got \[0, 3, 2, 4\]"),
        ({"cu_seqlens": torch.tensor([1, 4])}, r"got \[1, 4\]"),
        ({"seq_idx": torch.zeros(1, 3)}, r"seq_idx: got shape \[1, 3\], expected \[1, 4\]"),
        (
            {
                "cu_seqlens": torch.tensor([0, 1, 4]),
                "position_ids": torch.tensor([[0, 1, 0, 1]]),
            },
            "let documents begin at different tokens",
        ),
        (
            {
                "position_ids": torch.tensor([[0, 0, 1, 0]]),
                "attention_mask": torch.tensor([[0, 1, 1, 1]]),
            },
            "the batch has padding .* and several documents in a row",
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_packed(1, 4, **options)

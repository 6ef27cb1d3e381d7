"""Models that train and decode through the kernels do what they do on the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses
from layer_cases import HIDDEN, VOCABULARY
from layer_cases import tokens as ids
from torch import Tensor

import glazoo
from glazoo import kernels
from glazoo.models.causal_lm import GlazooConfig, GlazooForCausalLM

STEPS, TOKENS = 4, 21
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(glazoo.load("palimpsa"), {"synapse"}, id="palimpsa"),
    pytest.param(
        glazoo.metaplasticize(glazoo.load("gated_deltanet"), gate="head"),
        {"importance", "delta"},
        id="metaplastic-gated-deltanet",
    ),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the core operations that ran, in order."""
    calls: list[str] = []

    def spy(name: str, function: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return called

    for name in ("linear", "delta", "importance", "synapse", "posterior_step"):
        monkeypatch.setattr(kernels, name, spy(name, getattr(kernels, name)))
    return calls


def model(spec: glazoo.Spec, impl: str, dtype: torch.dtype) -> GlazooForCausalLM:
    """A model of two layers whose importance gates are open, the same numbers in every dtype."""
    torch.manual_seed(0)
    config = GlazooConfig(
        pattern=spec,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        intermediate_size=0,
        num_heads=2,
        head_k_dim=4,
        head_v_dim=6,
        impl=impl,
    )
    made = GlazooForCausalLM(config)
    for name, x in made.named_parameters():
        if "importance" in name and name.endswith("scale"):
            torch.nn.init.constant_(x, 0.5)
        if "importance" in name and ".up" in name:
            torch.nn.init.normal_(x)
    return made.to(DEVICE, dtype)


def train(spec: glazoo.Spec, impl: str, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of a few steps on one batch from the given parameters, and what they became."""
    made = model(spec, impl, parameters[0].dtype)
    with torch.no_grad():
        for x, start in zip(made.parameters(), parameters, strict=True):
            x.copy_(start)
    # Its update is continuous in the gradient: a sign, or a quotient by the gradient's size, would
    # make a whole step of the rounding of a gradient that is zero.
    optimizer = torch.optim.SGD(made.parameters(), lr=0.3, momentum=0.9)
    batch = ids(1, TOKENS).to(DEVICE)
    losses = []
    for _ in range(STEPS):
        loss = made(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    final = torch.cat([x.detach().cpu().flatten() for x in made.parameters()])
    return torch.stack(losses), final


@pytest.mark.parametrize(
    ("spec", "operations"),
    [CASES[0], pytest.param(*CASES[1].values, id=CASES[1].id, marks=pytest.mark.slow)],
)
def test_training_follows_the_reference(spec, operations, launched) -> None:
    start = [x.detach() for x in model(spec, "reference", torch.float64).parameters()]
    truth = train(spec, "reference", start)
    # A budget from runs of the reference in float32 whose parameters differ by one rounding.
    seen = witnesses(lambda *xs: train(spec, "reference", list(xs)), start)
    assert truth[0][-1] < 0.98 * truth[0][0], "nothing was learned"
    for impl in ("triton", "chunked"):
        found = train(spec, impl, [x.float() for x in start])
        assert set(launched) == operations, "other operations than those of the spec ran"
        for i, name in enumerate(("losses", "parameters")):
            witness = [run[i] for run in seen]
            assert_within_budget(found[i], truth[i], witness=witness, name=f"{impl}: {name}")


@pytest.mark.parametrize(("spec", "operations"), CASES)
def test_decoding_follows_the_reference(spec, operations, launched) -> None:
    batch = ids(1, 8).to(DEVICE)
    start = [x.detach() for x in model(spec, "reference", torch.float64).parameters()]

    def whole(*parameters: Tensor) -> list[Tensor]:
        made = model(spec, "reference", parameters[0].dtype).eval()
        with torch.no_grad():
            for x, y in zip(made.parameters(), parameters, strict=True):
                x.copy_(y)
            return [made(batch).logits.cpu()]

    [truth], seen = whole(*start), witnesses(whole, start)
    made = model(spec, "triton", torch.float32).eval()
    with torch.no_grad():
        piece = made(batch[:, :5], use_cache=True)
        logits = [piece.logits]
        launched.clear()
        for t in range(5, 8):
            piece = made(batch[:, t : t + 1], past_key_values=piece.past_key_values, use_cache=True)
            logits.append(piece.logits)
    # Three tokens of two layers: where importance is one vector over keys, one launch each.
    in_one_piece = operations != {"synapse"}
    assert launched == ["posterior_step" if in_one_piece else "synapse"] * 6
    found = torch.cat(logits, 1).cpu()
    assert_within_budget(found, truth, witness=[run[0] for run in seen], name="logits")

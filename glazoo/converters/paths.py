"""What a model gives on each of its paths: a prompt at once, padded, from a cache, generated."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.families import CACHES, Family

__all__ = ["Outputs", "evaluating", "prompts", "run_paths", "source_noise"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """One model's logits and tokens on the same prompts."""

    prompt: Tensor
    padded: Tensor
    decoded: Tensor
    continued: Tensor
    greedy: Tensor
    beams: Tensor


def prompts(config: Any, batch: int, tokens: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random token ids [batch, tokens + steps] and a mask [batch, tokens] with padding of
    uneven length on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(config.vocab_size), (batch, tokens + steps), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        mask[row, : (row * tokens) // (batch + 1)] = 0
    # The longest prompt comes last, so that the first row of a batch of one is padded too.
    return ids, mask.flip(0) if batch > 1 else mask.index_fill(1, torch.arange(tokens // 3), 0)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation inside a `with` block."""
    before = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        yield
    finally:
        for m, training in zip(models, before, strict=True):
            m.train(training)


class _Caller:
    """Calls a model with a cache, under the name that it has for it."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model: Callable[..., Any] = model
        self.positions = family.quirks.positions
        taken = inspect.signature(inspect.unwrap(type(model).forward)).parameters
        self.cache = next((name for name in CACHES if name in taken), CACHES[0])

    def __call__(self, ids: Tensor, cache: Any = None, start: int = 0) -> tuple[Tensor, Any]:
        """Return the logits of tokens that follow `start` cached ones, and the cache."""
        arguments: dict[str, Any] = {"use_cache": True}
        if cache is not None:
            arguments[self.cache] = cache
            if self.positions:
                positions = torch.arange(start, start + ids.shape[1], device=ids.device)
                arguments["position_ids"] = positions.expand(ids.shape[0], -1)
        out = self.model(ids, **arguments)
        # The installed transformers may call it otherwise than the model does.
        return out.logits, next(out[name] for name in CACHES if name in out)


def _decode(call: _Caller, ids: Tensor, tokens: int) -> Tensor:
    """Return the logits of the last token of a prompt and of those decoded one at a time after
    it."""
    logits, cache = call(ids[:, :tokens])
    decoded = [logits[:, -1:]]
    for t in range(tokens, ids.shape[1]):
        logits, cache = call(ids[:, t : t + 1], cache, t)
        decoded.append(logits)
    return torch.cat(decoded, 1)


@contextlib.contextmanager
def _equal_paths(model: nn.Module, family: Family) -> Iterator[None]:
    """Holds off what a source does in some of its own paths only."""
    kept = []
    for mixer in family.mixers(model).values():
        for name, value in {
            k: v for c in family.calls(mixer) for k, v in c.unequal.items()
        }.items():
            if hasattr(mixer, name):
                kept.append((mixer, name, getattr(mixer, name)))
                setattr(mixer, name, value)
    try:
        yield
    finally:
        for mixer, name, value in kept:
            setattr(mixer, name, value)


@torch.no_grad()
def source_noise(model: nn.Module, family: Family, ids: Tensor, tokens: int) -> float:
    """Measures what rounding does to these weights: the source's own paths over the same
    positions, which differ by rounding only."""
    ids = ids.to(next(model.parameters()).device)
    with _equal_paths(model, family):
        call = _Caller(model, family)
        decoded = _decode(call, ids, tokens)
        full: Tensor = call.model(ids).logits
        # Prompts of one token more or less fill other blocks of the scan.
        shorter: Tensor = call.model(ids[:, :tokens]).logits
    return max(
        float((full[:, tokens - 1 :] - decoded).abs().max()),
        float((full[:, :tokens] - shorter).abs().max()),
    )


@torch.no_grad()
def run_paths(model: nn.Module, family: Family, ids: Tensor, mask: Tensor, steps: int) -> Outputs:
    """Return what a model gives for prompts, on each of its paths.

    Args:
        model: the model.
        family: its family.
        ids: [batch, tokens + steps] token ids, the prompts first.
        mask: [batch, tokens], 0 for padding.
        steps: tokens to generate after padded prompts.
    """
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    tokens = mask.shape[1]
    call = _Caller(model, family)
    prompt = ids[:, :tokens]
    # A cache that is continued by several tokens at once takes another path than prompt and
    # decoding.
    half = max(1, tokens // 2)
    continued, _ = call(ids[:, half:], call(ids[:, :half])[1], half)

    generate = {
        "max_new_tokens": steps,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    greedy = model.generate(prompt, attention_mask=mask, **generate)  # type: ignore[operator]
    beams = model.generate(prompt, attention_mask=mask, num_beams=2, **generate)  # type: ignore[operator]
    keep = mask.bool()
    return Outputs(
        prompt=call.model(ids).logits,
        padded=call.model(prompt, attention_mask=mask).logits[keep],
        decoded=_decode(call, ids, tokens),
        continued=continued,
        greedy=greedy[:, tokens:],
        beams=beams[:, tokens:],
    )

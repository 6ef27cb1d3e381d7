"""Comparing a converted model with its source."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.converters.casting import is_cast_of
from glazoo.converters.float64 import clean_float64_model, convert_like, recompute
from glazoo.converters.folders import (
    CONFIG,
    INDEX,
    KEPT,
    MANIFEST,
    dump_json,
    read_json,
    read_shards,
)
from glazoo.converters.loading import load_metaplastic, load_model, quiet, read_pair
from glazoo.converters.paths import Outputs, evaluating, prompts, run_paths, source_noise
from glazoo.converters.report import Check, VerifyReport
from glazoo.converters.tokenizers import TEXTS, difference, source_tokenizer
from glazoo.errors import ConversionError
from glazoo.families import Family, find_family
from glazoo.families.settings import Settings
from glazoo.layers import gates
from glazoo.models.conversion import set_impl, source_limit

__all__ = ["verify_checkpoint", "verify_models"]


_MARGIN = 8.0
"""Budget over noise. Both models round on their own and the noise is a single sample of it; a wrong
formula is off by thousands."""


def _compare(
    source: Outputs,
    converted: Outputs,
    *,
    noise: float,
    defects: Mapping[str, str],
    dtype: torch.dtype,
) -> list[Check]:
    checks = []
    details = {
        "prompt": "all logits of the prompts at once",
        "padded": "prompts of different lengths, padded on the left",
        "decoded": "prompt into a cache, then one token at a time",
        "continued": "half into a cache, then the other half at once",
    }
    for name, detail in details.items():
        detail += _defect(defects, name)
        a, b = getattr(source, name), getattr(converted, name)
        largest = float(a.abs().max())
        rounding = torch.finfo(dtype).eps * largest
        budget = _MARGIN * max(noise, rounding)
        difference = float((a - b).abs().max())
        # Written so that a NaN fails.
        passed = difference <= budget
        checks.append(Check(name, passed, difference, budget, noise, largest, detail))
    for name, detail in (("greedy", "greedy tokens"), ("beams", "beam search with 2 beams")):
        a, b = getattr(source, name), getattr(converted, name)
        same = a.shape == b.shape and bool((a == b).all())
        detail = f"{detail}, {a.shape[0]} x {a.shape[1]} from padded prompts"
        detail += _defect(defects, name)
        checks.append(Check(name, same, None, None, None, None, detail))
    return checks


def _defect(defects: Mapping[str, str], name: str) -> str:
    return f"; both share a defect: {defects[name]}" if name in defects else ""


def verify_models(
    source: nn.Module,
    converted: nn.Module,
    *,
    batch: int = 3,
    tokens: int = 37,
    new_tokens: int = 12,
    seed: int = 0,
) -> VerifyReport:
    """Compares a live converted model with its live source.

    Logits of random prompts at once, padded on the left, decoded from a cache token by token and
    continued in one piece; greedy and beam-searched tokens. Both must agree at kappa = 0 and prior
    1, to which the converted model's gates are set meanwhile; how far the stored gates move the
    logits is measured besides.

    Args:
        source: the model before conversion.
        converted: the model after it.
        batch: prompts.
        tokens: length of the prompts.
        new_tokens: tokens decoded after them.
        seed: seed of the prompts.

    Returns:
        The comparison.

    Raises:
        ConversionError: `converted` has no importance gates, or a number is too small.
    """
    for name, value, least in (
        ("batch", batch, 1),
        ("tokens", tokens, 2),
        ("new_tokens", new_tokens, 1),
    ):
        if value < least:
            raise ConversionError(f"{name}: got {value}, expected at least {least}")
    if any(gate.added for _, gate in gates(source)):
        raise ConversionError("source: this model is converted itself")
    if not getattr(source, "can_generate", bool)():
        raise ConversionError(
            f"{type(source).__name__} generates no text, and verification compares logits and "
            "generated tokens: convert and verify the model with its language head"
        )
    begun = time.monotonic()
    low, high, at_source = _gate_range(converted)
    config: Any = source.config
    family = find_family(getattr(config, "model_type", None))
    ids, mask = prompts(family.text_config(config), batch, tokens, new_tokens, seed)
    dtype = next(source.parameters()).dtype
    with quiet(), evaluating(source, converted):
        try:
            noise = source_noise(source, family, ids, tokens)
            expected = run_paths(source, family, ids, mask, new_tokens)
        except Exception as e:
            reason = " ".join(str(e).split())
            raise ConversionError(
                f"the source {type(source).__name__} does not run with the installed transformers, "
                f"so that there is nothing to compare with: {reason}"
            ) from e
        with source_limit(converted):
            got = run_paths(converted, family, ids, mask, new_tokens)
        shift = None
        if not at_source:
            with torch.no_grad():
                moved = converted(ids.to(next(converted.parameters()).device)).logits
            shift = float((moved - expected.prompt).abs().max())
    # The language model head gives float32 logits whatever came before.
    precision = (
        torch.float32 if dtype == torch.float64 and expected.prompt.dtype != dtype else dtype
    )
    return VerifyReport(
        source=str(getattr(source, "name_or_path", "")) or type(source).__name__,
        destination=str(getattr(converted, "name_or_path", "")) or type(converted).__name__,
        plasticity=(low, high),
        at_source=at_source,
        checks=tuple(
            _compare(expected, got, noise=noise, defects=family.quirks.defects, dtype=precision)
        ),
        shift=shift,
        batch=batch,
        tokens=tokens,
        new_tokens=new_tokens,
        seed=seed,
        seconds=time.monotonic() - begun,
    )


def _gate_range(model: nn.Module) -> tuple[float, float, bool]:
    scales, at_source = [], True
    for gate in (gate for _, gate in gates(model) if gate.added):
        assert gate.b_scale is not None
        assert gate.ip_log is not None
        kappa = gate.b_scale.detach().clamp(min=0)
        scales += [float(kappa.min()), float(kappa.max())]
        at_source = at_source and not bool(kappa.any()) and not bool(gate.ip_log.detach().any())
    if not scales:
        raise ConversionError("converted: this model has no importance gates")
    return min(scales), max(scales), at_source


def verify_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    batch: int = 3,
    tokens: int = 37,
    new_tokens: int = 12,
    seed: int = 0,
    float64: bool = False,
    impl: str = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Loads a source folder and its converted form in float32 and compares them, as `verify_models`
    does.

    If the conversion cast the weights, every tensor is compared with the source's after the same
    cast, bit for bit, and both models are compared with those weights.

    Args:
        src: the source folder.
        dst: the converted folder.
        batch: prompts.
        tokens: length of the prompts.
        new_tokens: tokens decoded after them.
        seed: seed of the prompts.
        float64: compare in float64 too. The source's code casts to float32 inside; it is run from a
            copy whose casts go to float64.
        impl: engine of the converted model's scans.
        device: where both models run.
        progress: called with one line before each stage.

    Returns:
        The comparison.

    Raises:
        ConversionError: a folder cannot be loaded, or `dst` was made from another kind of source.
    """
    begun = time.monotonic()
    say = progress if progress is not None else (lambda _line: None)
    source, destination = Path(src), Path(dst)
    family, architecture, settings = read_pair(source, destination)
    dtype = _cast_dtype(destination)
    checks = _check_ids(source, destination, family)
    # What is to be equal is the source with the weights that the conversion wrote.
    with tempfile.TemporaryDirectory() as scratch:
        weights, shift = source, None
        if dtype is not None:
            say(f"comparing the weights with the source's, cast to {dtype}")
            checks += (_check_cast(source, destination, dtype),)
            weights = Path(scratch)
            _cast_source(source, destination, weights)
        report = _verify(
            source,
            destination,
            weights,
            family,
            architecture,
            settings,
            batch=batch,
            tokens=tokens,
            new_tokens=new_tokens,
            seed=seed,
            float64=float64,
            impl=impl,
            device=device,
            say=say,
        )
        if dtype is not None:
            say("measuring what the cast alone does")
            shift = _distance(
                family.source_model(architecture),
                source,
                weights,
                family,
                batch=batch,
                tokens=tokens,
                seed=seed,
                device=device,
            )
    return replace(
        report,
        checks=(*checks, *report.checks),
        dtype=dtype,
        cast_shift=shift,
        seconds=time.monotonic() - begun,
    )


def _check_ids(source: Path, destination: Path, family: Family) -> tuple[Check, ...]:
    """Compares the token ids of sample texts, if the source has a tokenizer that loads here."""
    try:
        own = source_tokenizer(source)
    except ConversionError:
        # The conversion has said so.
        return ()
    if own is None:
        return ()
    found = difference(own, destination, family.converted_model_type)
    detail = found or f"token ids of {len(TEXTS)} sample texts, with glazoo and without it"
    return (Check("tokens", found is None, None, None, None, None, detail),)


def _cast_dtype(folder: Path) -> str | None:
    """Return the dtype that a conversion cast the source's weights to, None if it did not."""

    if not (folder / MANIFEST).is_file():
        return None
    found = read_json(folder / MANIFEST, MANIFEST).get("dtype")
    return found if isinstance(found, str) else None


def _check_cast(source: Path, destination: Path, dtype: str) -> Check:
    strange, rounded = is_cast_of(read_shards(source)[1], read_shards(destination)[1], dtype)
    detail = f"the source's tensors, {rounded} of them cast to {dtype}, bit for bit"
    if strange is not None:
        detail += f"; {strange} is not"
    return Check("cast", strange is None, None, None, None, None, detail)


def _cast_source(source: Path, converted: Path, scratch: Path) -> None:
    """Makes a folder that holds the source with the weights that a conversion cast: links, and its
    own configuration and index."""

    own = {key for shard in read_shards(source)[1] for key in shard.tensors}
    _, shards = read_shards(converted)
    weight_map: dict[str, str] = {}
    for shard in shards:
        keys = [key for key in shard.tensors if key in own]
        if keys:
            (scratch / shard.path.name).symlink_to(shard.path.resolve())
            weight_map |= dict.fromkeys(keys, shard.path.name)
    config = read_json(converted / KEPT / CONFIG, CONFIG)
    (scratch / CONFIG).write_bytes(dump_json(config))
    (scratch / INDEX).write_bytes(dump_json({"metadata": {}, "weight_map": weight_map}))


@torch.no_grad()
def _distance(
    cls: type[Any],
    one: Path,
    other: Path,
    family: Family,
    *,
    batch: int,
    tokens: int,
    seed: int,
    device: str | torch.device,
) -> float:
    """Return the largest difference of two folders' logits, loaded one after the other."""
    found: list[Tensor] = []
    for folder in (one, other):
        model: Any = load_model(cls, folder, torch.float32).to(device).eval()
        ids, _ = prompts(family.text_config(model.config), batch, tokens, 0, seed)
        with quiet():
            found.append(model(ids.to(device)).logits)
    return float((found[0] - found[1]).abs().max())


def _verify(
    source: Path,
    destination: Path,
    weights: Path,
    family: Family,
    architecture: str,
    settings: Settings | None,
    *,
    batch: int,
    tokens: int,
    new_tokens: int,
    seed: int,
    float64: bool,
    impl: str,
    device: str | torch.device,
    say: Callable[[str], None],
) -> VerifyReport:
    """Compares the source, with the weights of a folder, and the converted model."""
    say("loading both models in float32")
    old = load_model(family.source_model(architecture), weights, torch.float32)
    new = load_metaplastic(family, architecture, destination, torch.float32)
    set_impl(new, impl)
    old.to(device)
    new.to(device)
    say("comparing in float32")
    report = verify_models(old, new, batch=batch, tokens=tokens, new_tokens=new_tokens, seed=seed)
    checks = report.checks
    if float64:
        del old, new
        gc.collect()
        say("comparing in float64")
        clean = clean_float64_model(family, architecture)
        old = load_model(clean, weights, torch.float64).to(device)
        twin = load_model(clean, weights, torch.float64)
        for model in (old, twin):
            recompute(model, family)
        wide = load_metaplastic(family, architecture, destination, torch.float64)
        convert_like(twin, wide, family, settings)
        set_impl(twin, impl).to(device)
        exact = verify_models(
            old, twin, batch=batch, tokens=tokens, new_tokens=new_tokens, seed=seed
        )
        checks += tuple(replace(c, name=f"{c.name} (float64)") for c in exact.checks)
    return replace(
        report,
        source=str(source),
        destination=str(destination),
        checks=checks,
    )

"""Measuring a converted model against its source."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import inspect
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.converters.folders import (
    CONFIG,
    INDEX,
    KEPT,
    MANIFEST,
    dump_json,
    read_json,
    read_shards,
)
from glazoo.converters.report import Check, VerifyReport
from glazoo.converters.tokenizers import TEXTS, difference, source_tokenizer
from glazoo.errors import ConversionError
from glazoo.families import CACHES, Family, find_family
from glazoo.families.settings import Settings
from glazoo.layers import gates, layers_of
from glazoo.layers.conversion import update_configurations
from glazoo.models.conversion import set_impl, source_limit

__all__ = ["clean_float64_model", "verify_checkpoint", "verify_models"]

_MARGIN = 8.0
"""Budget over noise. Both models round on their own and the noise is a single sample of it; a wrong
formula is off by thousands."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One model's logits and tokens on the same prompts."""

    prompt: Tensor
    padded: Tensor
    decoded: Tensor
    continued: Tensor
    greedy: Tensor
    beams: Tensor


def _prompts(config: Any, batch: int, tokens: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
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
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
def _noise(model: nn.Module, family: Family, ids: Tensor, tokens: int) -> float:
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
def _run(model: nn.Module, family: Family, ids: Tensor, mask: Tensor, steps: int) -> _Run:
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
    return _Run(
        prompt=call.model(ids).logits,
        padded=call.model(prompt, attention_mask=mask).logits[keep],
        decoded=_decode(call, ids, tokens),
        continued=continued,
        greedy=greedy[:, tokens:],
        beams=beams[:, tokens:],
    )


def _compare(
    source: _Run,
    converted: _Run,
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


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    before = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        yield
    finally:
        for m, training in zip(models, before, strict=True):
            m.train(training)


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
    ids, mask = _prompts(family.text_config(config), batch, tokens, new_tokens, seed)
    dtype = next(source.parameters()).dtype
    with _quiet(), _evaluating(source, converted):
        try:
            noise = _noise(source, family, ids, tokens)
            expected = _run(source, family, ids, mask, new_tokens)
        except Exception as e:
            reason = " ".join(str(e).split())
            raise ConversionError(
                f"the source {type(source).__name__} does not run with the installed transformers, "
                f"so that there is nothing to compare with: {reason}"
            ) from e
        with source_limit(converted):
            got = _run(converted, family, ids, mask, new_tokens)
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
    family, architecture, settings = _pair(source, destination)
    dtype = _cast_dtype(destination)
    ids = _check_ids(source, destination, family)
    if dtype is None:
        report = _verify(
            source,
            destination,
            source,
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
            begun=begun,
        )
        return replace(report, checks=(*ids, *report.checks))
    say(f"comparing the weights with the source's, cast to {dtype}")
    rounded = _check_cast(source, destination, dtype)
    # What is to be equal is the source with these weights.
    with tempfile.TemporaryDirectory() as scratch:
        _cast_source(source, destination, Path(scratch))
        report = _verify(
            source,
            destination,
            Path(scratch),
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
            begun=begun,
        )
        say("measuring what the cast alone does")
        shift = _distance(
            family.source_model(architecture),
            source,
            Path(scratch),
            family,
            batch=batch,
            tokens=tokens,
            seed=seed,
            device=device,
        )
    return replace(
        report,
        checks=(*ids, rounded, *report.checks),
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
    from glazoo.converters.casting import is_cast_of

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
        model: Any = _load(cls, folder, torch.float32).to(device).eval()
        ids, _ = _prompts(family.text_config(model.config), batch, tokens, 0, seed)
        with _quiet():
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
    begun: float,
) -> VerifyReport:
    """Compares the source, with the weights of a folder, and the converted model."""
    say("loading both models in float32")
    old = _load(family.source_model(architecture), weights, torch.float32)
    new = _load_converted(family, architecture, destination, torch.float32)
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
        old = _load(clean, weights, torch.float64).to(device)
        twin = _load(clean, weights, torch.float64)
        for model in (old, twin):
            _exact(model, family)
        wide = _load_converted(family, architecture, destination, torch.float64)
        _convert_like(twin, wide, family, settings)
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
        seconds=time.monotonic() - begun,
    )


def _pair(source: Path, destination: Path) -> tuple[Family, str, Settings | None]:
    """Reads both configurations; gives the family, the source's class and the conversion's
    settings, which models that are metaplastic by their specs do not need."""

    for folder in (source, destination):
        if not folder.is_dir():
            raise ConversionError(f"{folder}: there is no such folder")
    raw = read_json(source / CONFIG, CONFIG)
    family = find_family(raw.get("model_type"))
    converted = read_json(destination / CONFIG, CONFIG)
    if family.native and "metaplastic" not in converted:
        made_from, settings = converted.get("model_type"), None
    else:
        settings = Settings.from_block(converted.get("metaplastic"))
        made_from = settings.base_model_type
    if made_from != family.model_type:
        raise ConversionError(
            f"{destination} was made from a {made_from!r} model, {source} is {family.model_type!r}"
        )
    named = raw.get("architectures") if settings is None else settings.base_architectures
    return family, (named or family.architectures)[0], settings


def _load(cls: type[Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                # Fused products of experts know no float64, and round on their own.
                experts_implementation="eager",
            )
            # What a quantised checkpoint is unpacked to may have a dtype of its own.
            if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
                model.to(dtype)
    except ConversionError:
        raise
    except Exception as e:
        # Loaders raise whatever their libraries do: the caller gets one line, the traceback has the
        # rest.
        raise ConversionError(f"cannot load {folder}: {' '.join(str(e).split())}") from e
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(f"{folder} lacks the tensor {missing[0]}")
    loaded: nn.Module = model
    return loaded


def _load_converted(
    family: Family, architecture: str, folder: Path, dtype: torch.dtype
) -> nn.Module:
    from glazoo.models.metaplastic import model_class

    return _load(model_class(family.source_model(architecture), family), folder, dtype)


def _exact(model: nn.Module, family: Family) -> None:
    """Recomputes the fixed numbers of a source model's mixers."""
    if family.quirks.exact is not None:
        for mixer in family.mixers(model).values():
            family.quirks.exact(mixer)


def _convert_like(
    model: nn.Module, like: nn.Module, family: Family, settings: Settings | None
) -> None:
    """Converts a source model and gives it the gates of another converted one."""
    from glazoo.models.metaplastic import convert_in_place

    if family.native:
        for layer, theirs in zip(layers_of(model).values(), layers_of(like).values(), strict=True):
            if layer.spec != theirs.spec:
                layer.metaplasticize_(theirs.spec)
        update_configurations(model)
    else:
        assert settings is not None
        convert_in_place(model, family, settings)
    here = dict(gates(model))
    for name, gate in gates(like):
        here[name].load_state_dict(gate.state_dict())


_CLEAN = "_float64"


def _own_model(module: ModuleType, config: Any) -> Any:
    """Builds a configuration's model from the classes of a module."""
    from transformers import PreTrainedModel

    for cls in vars(module).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, PreTrainedModel)
            and cls.__module__ == module.__name__
            and cls.__name__.endswith("Model")
            and not cls.__name__.endswith("PreTrainedModel")
            and cls.config_class is type(config)
        ):
            return cls._from_config(config)
    raise ConversionError(f"{module.__name__} has no model for {type(config).__name__}")


def _clean_module(family: Family) -> ModuleType:
    """Return a copy of a family's modeling code that computes in float64 where the original casts
    to float32."""
    name = family.modeling + _CLEAN
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(family.modeling)
    if spec is None or spec.origin is None:
        raise ConversionError(f"the source code of {family.modeling} is not installed")
    text = Path(spec.origin).read_text("utf-8")
    for old, new in (
        (".float()", ".double()"),
        ("torch.float32", "torch.float64"),
        ("=torch.float,", "=torch.float64,"),
        ("=torch.float)", "=torch.float64)"),
        # By configuration, transformers would give the original's inner models.
        (" AutoModel.from_config(", " _own_model("),
    ):
        text = text.replace(old, new)
    module = ModuleType(name)
    vars(module)["_own_model"] = functools.partial(_own_model, module)
    module.__package__ = family.modeling.rpartition(".")[0]
    module.__file__ = spec.origin
    # Decorators look their module up by name.
    sys.modules[name] = module
    try:
        exec(compile(text, spec.origin, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def clean_float64_model(family: Family | str, architecture: str | None = None) -> type[Any]:
    """Return a copy of a source model's class whose casts to float32 go to float64 instead.

    Cast to float64, the original rounds to float32 in several places: two float64 runs then agree
    to float32 only.

    Args:
        family: a family, or its `model_type`.
        architecture: the model class; default the family's first.

    Returns:
        The class; load or build it with `dtype=torch.float64`.
    """
    if isinstance(family, str):
        family = find_family(family)
    found: type[Any] = getattr(_clean_module(family), architecture or family.architectures[0])
    return found

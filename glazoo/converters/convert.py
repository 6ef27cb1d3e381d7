"""Converting checkpoint folders, shard by shard."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from glazoo.converters.calibration import Axes
from glazoo.converters.calibration import calibrate as calibrate_model
from glazoo.converters.casting import Dtype, plan_cast
from glazoo.converters.files import Progress, Staging, leftover_warnings
from glazoo.converters.folders import (
    check_apart,
)
from glazoo.converters.loading import load_to_observe
from glazoo.converters.rehearsal import rehearse
from glazoo.converters.report import AddedTensor, ConversionReport, FileRecord
from glazoo.converters.source import Checkpoint, inspect_checkpoint
from glazoo.converters.tensors import NewTensor
from glazoo.converters.texts import read_tokens
from glazoo.converters.tokenizers import settled
from glazoo.converters.writing import plan_files, write_files
from glazoo.errors import ConversionError, one_line
from glazoo.families.settings import Settings
from glazoo.layers.conversion import metaplastic_layers
from glazoo.program import lower
from glazoo.spec import COUNTERPARTS, Counterpart
from glazoo.versions import installed, untested

__all__ = ["convert_checkpoint"]

CALIBRATION_TOKENS = 65_536
"""Tokens of the texts that give axes of importance."""


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    plasticity: float = 0.0,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    dtype: Dtype | None = None,
    link: bool = True,
    remote_code: bool = True,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    calibrate: Sequence[str | Path] = (),
    tokenizer: str | None = None,
    **form: Unpack[Counterpart],
) -> ConversionReport:
    """Converts a checkpoint folder into its metaplastic counterpart.

        b_t = kappa r_t 2 sigmoid(b_up b_down h_t) ;
        kappa = `plasticity`, b_up = 0, I_p = 1 at the start

    with r_t the write gate or, for the exact gain, the precision whose rate it is.

    `AutoModelForCausalLM.from_pretrained(dst)` loads the result after `import glazoo.models`;
    without glazoo, transformers refuses its model_type. No tensor of the source is rewritten unless
    `dtype` asks for it, and memory does not grow with the model.

    Args:
        src: the source folder; it is not changed.
        dst: the folder to make. It appears complete or not at all.
        plasticity: kappa, from 0, which computes what the source computes, to 1; sources that
            subtract no prediction accept more.
        rank: rank of the importance gate's projection; default a sixteenth of the hidden size, at
            most 128.
        layers: indices of the layers to convert; default all that can be.
        seed: seed of the gate's inner projection.
        dtype: write the source's weights in this dtype: "float32", "bfloat16" or "float16". The
            added tensors are float32 always, and what the family or the checkpoint keeps in float32
            on purpose stays. A narrower dtype cannot be undone: `revert_checkpoint` then gives the
            weights back as they were cast. Default: they stay as they are.
        link: hard-link the source's weights where the file system allows it. A link shares its
            content with the source: a program that rewrites one file in place changes both. False
            copies.
        remote_code: write a small module too, so that loaders with `trust_remote_code` need no
            `import glazoo.models`; glazoo must be installed all the same. Without it, programs that
            load models by themselves cannot load this one.
        dry_run: check and report only; reads config.json, the index and headers.
        force: replace a model's folder that is already at `dst`.
        progress: called as `progress(file, done_bytes, total_bytes)`.
        calibrate: texts that the source reads once, in memory, and whose keys then give the axes of
            importance, with `basis="rotated"`: UTF-8 files, or one folder with a data set. Without,
            the axes start as the keys' own. At most 65,536 tokens are read.
        tokenizer: for these texts, a folder with a tokenizer, or "bytes". Default: the source's.
        form: which metaplastic form: `gate`, `gain`, `precision`, `basis` and `forgetting` of
            `glazoo.metaplasticize`.

    Returns:
        What was done.

    Raises:
        ConversionError: one line with the reason; nothing is left behind.

    Reference: arXiv:2602.09075, MetaMamba2.
    """
    begun = time.monotonic()
    source, destination = Path(src), Path(os.path.abspath(dst))
    if calibrate and form.setdefault("basis", "rotated") != "rotated":
        raise ConversionError("calibrate: gives the axes of basis = 'rotated', and of no other")
    checkpoint = inspect_checkpoint(source)
    family, config, found = checkpoint.family, checkpoint.config, checkpoint.found
    settings = family.settings(
        config,
        checkpoint.architecture,
        found,
        plasticity=plasticity,
        rank=rank,
        layers=layers,
        seed=seed,
        **form,
    )
    check_apart(source, destination)
    for layer in settings.layers:
        if layer in checkpoint.quantised:
            raise ConversionError(checkpoint.quantised[layer])
    rehearse(family.build(checkpoint.architecture, config), family, settings, found)
    cast = None
    if dtype is not None:
        if checkpoint.raw_config.get("quantization_config") is not None:
            raise ConversionError(
                f"dtype: {source} is quantised, and its scales belong to its weights: leave the "
                "dtype as it is"
            )
        cast = plan_cast(dtype, checkpoint.shards, family, checkpoint.architecture, config)
    texts = () if dry_run else calibrate
    axes, turned = _calibrated(checkpoint, settings, texts, tokenizer or str(source), progress)
    new, added = _added(checkpoint, settings, axes)
    own_tokenizer, more = settled(source, family.model_type, family.converted_model_type)
    newer = untested(installed(("torch", "transformers")))
    warnings = [*checkpoint.warnings, *more, *newer.values()]
    try:
        Staging.check(destination, force=force)
        files = plan_files(checkpoint, cast, retokenized=own_tokenizer is not None, link=link)
        records = tuple(FileRecord(f.name, f.stored, f.bytes, None, "planned") for f in files)
        if not dry_run:
            records = write_files(
                checkpoint,
                settings,
                files,
                new,
                destination,
                cast=cast,
                tokenizer=own_tokenizer,
                remote_code=remote_code,
                force=force,
                progress=progress,
            )
        warnings += leftover_warnings(destination)
    except OSError as e:
        raise ConversionError(f"cannot convert {source}: {one_line(e)}") from e
    shards = checkpoint.shards
    before, after = _state_bytes(checkpoint, settings)
    return ConversionReport(
        source=str(source),
        destination=str(dst),
        dry_run=dry_run,
        family=family.model_type,
        architecture=family.converted_architecture(checkpoint.architecture),
        spec=settings.metaplastic_spec(family.source_spec(config, found)).name,
        **{name: getattr(settings, name) for name in COUNTERPARTS},
        rank=settings.rank,
        plasticity=settings.plasticity,
        seed=settings.seed,
        layers=settings.layers,
        mixers=tuple(found[layer] for layer in settings.layers),
        skipped_layers=_skipped_layers(checkpoint, settings),
        base_parameters=sum(math.prod(t.shape) for s in shards for t in s.tensors.values()),
        added_parameters=sum(math.prod(t.shape) for t in new),
        base_bytes=sum(
            t.nbytes for s in shards for t in (cast.tensors(s) if cast else s.tensors).values()
        ),
        added_bytes=sum(t.nbytes for t in new),
        state_bytes_source=before,
        state_bytes_converted=after,
        added=added,
        files=records,
        skipped_files=checkpoint.skipped,
        warnings=tuple(warnings),
        seconds=time.monotonic() - begun,
        dtype=dtype if cast is not None and any(map(cast.changes, shards)) else None,
        kept_wide=() if cast is None else cast.kept,
        axes=turned,
        largest_change=None if cast is None or dry_run else cast.largest,
    )


def _calibrated(
    checkpoint: Checkpoint,
    settings: Settings,
    texts: Sequence[str | Path],
    tokenizer: str,
    progress: Progress | None,
) -> tuple[dict[int, Tensor], tuple[Axes, ...]]:
    """Return the axes of importance that texts give, by layer, and what they do."""
    if not texts:
        return {}, ()
    ids = read_tokens(
        texts,
        tokenizer,
        vocabulary=int(checkpoint.config.get_text_config().vocab_size),
        limit=CALIBRATION_TOKENS,
    )
    model = load_to_observe(checkpoint, settings)
    turned = calibrate_model(model, torch.from_numpy(ids.astype("int64")), progress)
    axes = {gate.layer: gate.axes for _, gate, _ in metaplastic_layers(model)}
    return {layer: x.detach().clone() for layer, x in axes.items() if x is not None}, turned


def _added(
    checkpoint: Checkpoint, settings: Settings, axes: Mapping[int, Tensor]
) -> tuple[list[NewTensor], tuple[AddedTensor, ...]]:
    starts = {
        "b_down": f"uniform, seed {settings.seed}",
        "b_up": "zero",
        "b_scale": f"{settings.plasticity:g}",
        "ip_log": "zero (prior 1)",
        "axes": "identity",
        "turn": "zero",
    }
    new: list[NewTensor] = []
    reported: list[AddedTensor] = []
    source = checkpoint.family.source_spec(checkpoint.config, checkpoint.found)
    spec = settings.metaplastic_spec(source)
    for layer in settings.layers:
        # Without data: every tensor is made when it is written.
        with torch.device("meta"):
            gate = checkpoint.found[layer].gate(
                spec, plasticity=settings.plasticity, seed=settings.seed
            )
        for name, p in gate.named_parameters():
            key, shape = f"{checkpoint.prefixes[layer]}.metaplastic.{name}", tuple(p.shape)
            start = functools.partial(gate.start, name)
            known = name == "axes" and layer in axes
            if known:
                start = functools.partial(axes.__getitem__, layer)
            new.append(NewTensor(key, shape, start))
            what = "from the texts" if known else starts[name]
            reported.append(AddedTensor(key, shape, "float32", what))
    return new, tuple(reported)


def _skipped_layers(checkpoint: Checkpoint, settings: Settings) -> dict[int, str]:
    kinds = checkpoint.family.layer_kinds(checkpoint.config)
    return {
        i: "not asked for" if i in checkpoint.prefixes else f"{kind}: no convertible mixer"
        for i, kind in enumerate(kinds)
        if i not in settings.layers
    }


def _state_bytes(checkpoint: Checkpoint, settings: Settings) -> tuple[int, int]:
    """Counts the recurrent state of one sequence, in float32, of the source and of the converted
    model."""
    spec = checkpoint.family.source_spec(checkpoint.config, checkpoint.found)
    programs = lower(spec), lower(settings.metaplastic_spec(spec))
    before = after = 0
    for layer, mixer in checkpoint.found.items():
        plain, converted = (
            4 * mixer.heads * program.state_floats(mixer.key, mixer.value) for program in programs
        )
        before += plain
        after += converted if layer in settings.layers else plain
    return before, after

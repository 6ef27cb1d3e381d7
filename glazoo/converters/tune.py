"""Fine-tuning metaplastic checkpoints on text files and data sets."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from glazoo.converters.examine import _vocabulary, gate_summaries
from glazoo.converters.files import Staging, leftover_warnings
from glazoo.converters.folders import CONFIG, INDEX, OWN, other_files, read_shards
from glazoo.converters.loading import load_converted
from glazoo.converters.recipes import Recipe
from glazoo.converters.report import TuneReport
from glazoo.converters.tensors import NewTensor, write_shard
from glazoo.converters.texts import read_splits
from glazoo.errors import ConversionError, extra, one_line
from glazoo.layers import gates
from glazoo.strictjson import dumps, loads

if TYPE_CHECKING:
    from glazoo.training import Blocks

__all__ = ["save_gates", "tune_checkpoint"]


def save_gates(
    folder: str | Path, dst: str | Path, model: nn.Module, *, force: bool = False
) -> None:
    """Writes a converted folder anew with other values of its gates.

    Every file but the shard of the gates is a hard link to `folder`'s, or a copy where links are
    refused; `glazoo convert --revert` gives the source back as it does from `folder`.

    Args:
        folder: a folder that `convert_checkpoint` wrote.
        dst: the folder to make. It appears complete or not at all.
        model: the model with the values.
        force: replace a model's folder that is already at `dst`.

    Raises:
        ConversionError: `folder` keeps its gates together with other tensors, or lacks some.
    """
    source, destination = Path(folder), Path(os.path.abspath(dst))
    here = {gate.layer: gate for _, gate in gates(model)}
    _, shards = read_shards(source)
    values: dict[str, list[NewTensor]] = {}
    for shard in shards:
        for key in shard.tensors:
            mixer, added, name = key.partition(".metaplastic.")
            if not added:
                continue
            layer = re.findall(r"(?:^|\.)(\d+)\.", f"{mixer}.")[0]
            value = here[int(layer)].get_parameter(name).detach().float().cpu().contiguous()
            new = NewTensor(key, tuple(value.shape), lambda value=value: value)  # type: ignore[misc]
            values.setdefault(shard.path.name, []).append(new)
        if shard.path.name in values and len(values[shard.path.name]) != len(shard.tensors):
            raise ConversionError(f"{shard.path.name} holds other tensors beside gates")
    names = [s.path.name for s in shards]
    others, _ = other_files(source, set(names))
    rest = [p.as_posix() for p in others if p.parts[0] != "checkpoints"]
    try:
        with Staging(destination, force=force, total=1, progress=None) as stage:
            for name in names:
                if name in values:
                    stage.write(name, lambda f, name=name: write_shard(f, values[name]))  # type: ignore[misc]
                else:
                    stage.take(source / name, name, link=True)
            for name in rest:
                stage.take(source / name, name, link=False)
    except OSError as e:
        raise ConversionError(f"cannot write {destination}: {one_line(e)}") from e


def _gates_apart(folder: Path) -> bool:
    """Return whether a folder keeps its gates in files of their own, as conversions write them."""
    _, shards = read_shards(folder)
    kinds = [{".metaplastic." in key for key in shard.tensors} for shard in shards]
    return {True} in kinds and {True, False} not in kinds


def _save_all(source: Path, dst: Path, model: Any, *, force: bool) -> None:
    """Writes a whole model, with the source's further files."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    destination = Path(os.path.abspath(dst))
    _, shards = read_shards(source)
    taken = {CONFIG, INDEX, *(s.path.name for s in shards)}
    others, _ = other_files(source, taken)
    with Staging(destination, force=force, total=1, progress=None) as stage:
        model.save_pretrained(stage.folder)
        made = {p.name for p in stage.folder.iterdir()}
        for other in others:
            # Bytes of the source are no longer in the weights: there is nothing to revert to. And
            # checkpoints of the run that made the source are not this one's.
            gone = other.parts[0] == OWN or other.parts[0].startswith(f"{PREFIX_CHECKPOINT_DIR}-")
            if not gone and other.as_posix() not in made:
                stage.take(source / other, other.as_posix(), link=False)


def _examples(
    texts: Sequence[str | Path],
    tokenizer: str,
    *,
    needed: int,
    length: int,
    validation: float,
    **options: Any,
) -> tuple[Blocks, Blocks]:
    """Return the examples for training and for evaluation, which are apart."""
    from glazoo.training import Blocks

    # The end of the text is kept for evaluation: so much more is to be read.
    most = math.ceil(needed / (1 - validation)) + 1
    share = max(1, round(most * validation))
    ids, other = read_splits(
        texts, tokenizer, limit=most * length, validation_limit=share * length, **options
    )
    count = len(ids) // length
    if other is not None:
        held = min(len(other) // length, max(1, round(count * validation)))
        if count < 1 or held < 1:
            raise ConversionError(
                f"texts: {len(ids)} tokens for training and {len(other)} for evaluation; both need "
                f"at least {length}, the length of an example"
            )
        return Blocks(ids, length, 0, count), Blocks(other, length, 0, held)
    held = max(1, round(count * validation))
    if count - held < 1:
        raise ConversionError(
            f"texts: {len(ids)} tokens make {count} examples of length {length}; training and "
            "evaluation need one each"
        )
    return Blocks(ids, length, 0, count - held), Blocks(ids, length, count - held, count)


def _fingerprint(*examples: Blocks) -> str:
    """Return what tells the tokens of some examples from those of others."""
    digest = hashlib.sha256()
    for part in examples:
        for block in range(part.start, part.end):
            tokens = part.tokens[block * part.length : (block + 1) * part.length]
            digest.update(np.ascontiguousarray(tokens, dtype=np.int64).data)
    return digest.hexdigest()[:16]


_SETTINGS = "settings.json"
"""Beside the checkpoints of a run, what it was asked for."""


def _check_resumed(work: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that the checkpoints were made with."""
    file = work / _SETTINGS
    if not file.exists():
        return  # checkpoints of before it was written
    before = loads(file.read_text("utf-8"))
    changed = [
        "other texts" if n == "texts" else f"{n} was {before[n]}, is {x}"
        for n, x in settings.items()
        if before.get(n, x) != x
    ]
    if changed:
        raise ConversionError(
            f"{work} has checkpoints of other settings ({', '.join(changed)}): resume with those, "
            "or remove the folder"
        )


def tune_checkpoint(
    folder: str | Path,
    dst: str | Path,
    texts: Sequence[str | Path],
    *,
    recipe: str = "gates",
    everything: bool = False,
    steps: int | None = None,
    batch: int = 8,
    length: int = 512,
    learning_rate: float | None = None,
    plasticity_rate: float | None = None,
    validation: float = 0.05,
    column: str = "text",
    split: str | None = None,
    validation_split: str | None = None,
    tokenizer: str | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    cpu: bool = False,
    force: bool = False,
    quiet: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> TuneReport:
    """Trains the importance gates of a metaplastic model's folder, or all of it, on texts.

    Args:
        folder: a converted folder, or one of a model that is metaplastic by its specs, as `glazoo
            train` writes; it is not changed.
        dst: the folder to make. It appears complete or not at all; checkpoints of the training are
            in `dst` + ".checkpoints" meanwhile.
        texts: UTF-8 text files, or one folder with a Hugging Face data set: written by
            `save_to_disk`, or one of parquet, JSON, CSV or text files. Of a data set no more rows
            are read than the steps need.
        recipe: named settings, one of `RECIPES`, which those that are given replace: "gates", or
            "whole", which trains everything and takes the peak learning rate of the source's own
            training.
        everything: train every parameter whatever the recipe.
        steps: optimiser steps.
        batch: examples per step and device.
        length: tokens per example.
        learning_rate: of AdamW, at its peak; default 1e-2 for gates, and 1e-5 for everything with
            the recipe "gates".
        plasticity_rate: share of it that the plasticity gets; 0 leaves it as it is.
        validation: share of the examples, at the end of the text, that is kept for evaluation; of
            a split for evaluation, at most this share of what is trained on is used.
        column: the data set's column with the text.
        split: the data set's split for training; default `train`, or the only one.
        validation_split: the data set's split for evaluation; default `validation` if there,
            otherwise the end of the text.
        tokenizer: a folder with a tokenizer, or "bytes"; default the model's own.
        checkpoint_every: steps between checkpoints; 0 for none.
        resume: continue from the last checkpoint.
        seed: seed of the order of the examples.
        dtype: dtype of the weights that are not trained, "float32" or "bfloat16".
        cpu: stay on the CPU.
        force: replace a model's folder that is already at `dst`.
        quiet: show no progress.
        progress: called as `progress(losses, step, steps)`, in place of the trainer's own bars.

    Returns:
        What was done.

    Raises:
        ConversionError: one line with the reason.
        ImportError: accelerate is not installed.
    """
    with extra("train"):
        import accelerate  # noqa: F401 - transformers asks for it, of a Trainer
        from transformers import PrinterCallback, TrainingArguments, set_seed
        from transformers.trainer_utils import get_last_checkpoint

    from glazoo.models.rates import RateTrainer, check_rate
    from glazoo.training import freeze_all_but_importance, report_steps

    begun, chosen = time.monotonic(), Recipe.named(recipe)
    steps = chosen.steps if steps is None else steps
    plasticity_rate = chosen.plasticity_rate if plasticity_rate is None else plasticity_rate
    if learning_rate is None:
        learning_rate = 1e-5 if everything and not chosen.everything else chosen.learning_rate
    if learning_rate is None:
        raise ConversionError(
            f"learning_rate: the recipe {recipe!r} trains at the peak rate of the source's own "
            "training, which its folder does not say: give it (--lr)"
        )
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConversionError(
            f"learning_rate: got {learning_rate}, accepted are finite numbers above 0"
        )
    everything |= chosen.everything
    source, destination = Path(folder), Path(os.path.abspath(dst))
    for name, value, least in (
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("length", length, 2),
        ("checkpoint_every", checkpoint_every, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ConversionError(f"{name}: got {value}, expected at least {least}")
    if seed >= 2**32:
        raise ConversionError(f"seed: got {seed}, accepted are numbers below 2^32")
    if not 0.0 < validation < 1.0:
        raise ConversionError(f"validation: got {validation}, accepted are numbers in (0, 1)")
    try:
        check_rate(plasticity_rate)
    except ValueError as e:
        raise ConversionError(str(e)) from e
    if dtype not in ("float32", "bfloat16") or (everything and dtype != "float32"):
        raise ConversionError(
            f"dtype: got {dtype!r}, accepted are 'float32' and, for gates, 'bfloat16'"
        )
    if source.resolve() == destination.resolve():
        raise ConversionError(f"{dst} is the source itself")
    Staging.check(destination, force=force)
    work = destination.with_name(destination.name + ".checkpoints")
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    if resume and last is None:
        raise ConversionError(f"{work} has no checkpoint to resume from")
    if not resume and last is not None:
        raise ConversionError(f"{work} has checkpoints: --resume continues, or remove the folder")
    settings: dict[str, Any] = {
        "recipe": recipe,
        "everything": everything,
        "learning_rate": learning_rate,
        "plasticity_rate": plasticity_rate,
        "steps": steps,
        "batch": batch,
        "length": length,
        "seed": seed,
        "dtype": dtype,
        "validation": validation,
    }
    if resume:
        _check_resumed(work, settings)
    model = load_converted(source, dtype=getattr(torch, dtype))
    apart = _gates_apart(source)
    if getattr(model, "_hf_peft_config_loaded", False) and (everything or not apart):
        raise ConversionError(
            f"{source} holds an adapter beside its weights, which alone would be saved: merge it "
            "into them first, or move adapter_config.json and its weights away"
        )
    train, evaluation = _examples(
        texts,
        tokenizer or str(source),
        vocabulary=_vocabulary(model),
        column=column,
        split=split,
        validation_split=validation_split,
        needed=steps * batch,
        length=length,
        validation=validation,
    )
    if resume or checkpoint_every:
        settings["texts"] = _fingerprint(train, evaluation)
    if resume:
        _check_resumed(work, settings)
    if everything:
        model.requires_grad_(True)
    else:
        freeze_all_but_importance(model)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    set_seed(seed)
    try:
        trainer = RateTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(work),
                max_steps=steps,
                per_device_train_batch_size=batch,
                per_device_eval_batch_size=batch,
                learning_rate=learning_rate,
                lr_scheduler_type=chosen.schedule,
                warmup_steps=round(chosen.warmup * steps),
                weight_decay=0.0,
                seed=seed,
                use_cpu=cpu,
                save_strategy="steps" if checkpoint_every else "no",
                save_steps=checkpoint_every or steps,
                save_total_limit=1,
                logging_steps=max(1, steps // 20),
                report_to="none",
                disable_tqdm=quiet,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=train,
            eval_dataset=evaluation,
        )
        trainer.plasticity_rate = plasticity_rate
        if progress is not None:
            report_steps(trainer, progress)
        # It prints to standard output, which belongs to the report.
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        if checkpoint_every:
            work.mkdir(exist_ok=True)
            (work / _SETTINGS).write_text(dumps(settings) + "\n", "utf-8")
        trainer.train(resume_from_checkpoint=last)
        after = trainer.evaluate()["eval_loss"]
    finally:
        if work.is_dir() and get_last_checkpoint(str(work)) is None:
            (work / _SETTINGS).unlink(missing_ok=True)
            if not any(work.iterdir()):
                work.rmdir()
    if not math.isfinite(after):
        if last is None:
            # What it would be resumed from ends here again.
            shutil.rmtree(work, ignore_errors=True)
        raise ConversionError(
            f"the loss on held-out text went from {before:.4f} to {after}: nothing is written; a "
            f"lower learning rate than {learning_rate:g} may help"
        )
    model.eval()
    if everything or not apart:
        _save_all(source, destination, model, force=force)
    else:
        save_gates(source, destination, model, force=force)
    shutil.rmtree(work, ignore_errors=True)
    return TuneReport(
        source=str(source),
        destination=str(dst),
        recipe=recipe,
        learning_rate=learning_rate,
        plasticity_rate=plasticity_rate,
        trained="all" if everything else "gates",
        trained_parameters=learned,
        parameters=sum(p.numel() for p in model.parameters()),
        training_tokens=steps * batch * length,
        evaluation_tokens=len(evaluation) * length,
        steps=steps,
        loss_before=float(before),
        loss_after=float(after),
        gates=gate_summaries(model),
        seconds=time.monotonic() - begun,
        warnings=tuple(leftover_warnings(destination)),
    )

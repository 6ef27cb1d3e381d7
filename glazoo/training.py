"""Training of language models from a configuration file, on transformers' Trainer."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import pydoc_data.topics
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from glazoo.errors import extra
from glazoo.layers import gates
from glazoo.metaplastic import metaplasticize

with extra("train"):
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    from glazoo.models.causal_lm import GlazooConfig, GlazooForCausalLM
    from glazoo.models.rates import RateTrainer

__all__ = [
    "Blocks",
    "Prepared",
    "TrainConfig",
    "byte_tokenizer",
    "prepare",
    "read_config",
    "report_steps",
    "run",
    "symbol_tokenizer",
    "tokens_of",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(_Section):
    """What is learned from."""

    corpus: Literal["pydoc"] | None = None
    """A built-in text: `pydoc`, the language reference that comes with Python (about 0.7 MB)."""
    files: tuple[Path, ...] = ()
    """UTF-8 text files; relative paths start at the configuration file's folder."""
    tokens: tuple[Path, ...] = ()
    """Arrays of token ids (.npy, one axis, integers), mapped into memory rather than read."""
    tokenizer: str = "bytes"
    """`bytes`, or a folder with a tokenizer."""
    length: int = Field(default=512, ge=2)
    """Tokens per example."""
    validation: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the examples, at the end of the text, that is kept for evaluation."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [bool(self.corpus), bool(self.files), bool(self.tokens)]
        if sum(given) != 1:
            raise ValueError("give one of corpus, files and tokens")
        return self


class Metaplastic(_Section):
    """Conversion of the model before it is trained."""

    plasticity: float = Field(default=0.0, ge=0.0)
    """kappa at the start."""
    gate: Literal["head", "value"] | None = None
    """Shape of the importance gate."""
    gain: Literal["first_order", "exact"] | None = None
    """Learning rate of a delta rule."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the importance gate's projection."""
    seed: int = 0
    """Seed of the importance gate's inner projection."""


class TrainConfig(_Section):
    """What `glazoo train` reads: four tables of a TOML file.

    model: arguments of `GlazooConfig`, or `path`, a checkpoint folder to start from;
    training: arguments of transformers' `TrainingArguments`.
    """

    model: dict[str, Any]
    """The model."""
    data: Data
    """The text."""
    training: dict[str, Any]
    """The optimisation; `output_dir` is needed."""
    metaplastic: Metaplastic | None = None
    """Turns the model into its metaplastic form first."""
    trainable: Literal["all", "importance"] = "all"
    """Which parameters learn: all, or those of the importance gates and priors only."""
    plasticity_rate: float = Field(default=1.0, ge=0.0, le=1000.0)
    """Share of the learning rate that the plasticity of importance gates gets; 0 leaves it as it
    is."""


def read_config(path: str | Path) -> TrainConfig:
    """Reads a training configuration.

    Args:
        path: a TOML file.

    Returns:
        The validated configuration, with absolute paths.

    Raises:
        ValueError: it cannot be read, is no TOML file, or has unknown, missing or contradicting
            keys.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text("utf-8"))
        config = TrainConfig.model_validate(data)
    except OSError as e:
        raise ValueError(
            f"cannot read the configuration {path}: {e.strerror}; it is a TOML file with the "
            "tables [model], [data] and [training]"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not a TOML file: {e}") from e
    except ValidationError as e:
        lines = [f"{'.'.join(str(p) for p in x['loc'])}: {x['msg']}" for x in e.errors()]
        raise ValueError(f"{path}: {'; '.join(lines)}") from e
    _known(config.training, TrainingArguments, f"{path}: training")
    if "path" in config.model:
        if len(config.model) > 1:
            raise ValueError(f"{path}: model.path stands alone: a checkpoint has its sizes")
    else:
        _known(config.model, GlazooConfig, f"{path}: model")
    if "output_dir" not in config.training:
        raise ValueError(f"{path}: training.output_dir is missing")
    at = path.parent
    sources = {
        "files": tuple(at / p for p in config.data.files),
        "tokens": tuple(at / p for p in config.data.tokens),
    }
    return config.model_copy(update={"data": config.data.model_copy(update=sources)})


def _known(given: dict[str, Any], cls: type[Any], where: str) -> None:
    known = list(inspect.signature(cls).parameters)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: {cls.__name__} has no {key!r}{hint}")


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of the 256 bytes, an end of text (256) and a padding token (257)."""
    return symbol_tokenizer(eos_token="<|endoftext|>", pad_token="<|pad|>")


def symbol_tokenizer(characters: str | None = None, **special: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of single symbols, whose ids count from 0.

    Args:
        characters: the symbols, in the order of their ids; a text's other characters are left out.
            Default: the 256 bytes.
        special: special tokens, by their names in transformers, with the ids that follow.
    """
    # The byte-level alphabet: printable bytes stand for themselves, the others, in order, are
    # written as the symbols from 256 on.
    hidden = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    symbols = [chr(256 + hidden.index(i) if i in hidden else i) for i in range(256)]
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    level["trim_offsets"] = True
    split, join = (level, level) if characters is None else (None, {"type": "Fuse"})
    vocabulary = {c: i for i, c in enumerate(symbols if characters is None else characters)}
    data: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": split,
        "decoder": join,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(data), "utf-8")
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)


_MARGIN = 64
"""Tokens that a text is read beyond a limit: a word that is cut in two is other tokens."""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None) -> list[int]:
    """Return the token ids of a text, or at least `limit` of them, without making all of them."""
    characters = len(text) if limit is None else 8 * (limit + _MARGIN)
    while True:
        part = text[:characters]
        if characters < len(text) and (words := part.rpartition(" ")[0]):
            part = words
        found = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if characters >= len(text) or (limit is not None and len(found) >= limit + _MARGIN):
            return list(found)
        characters *= 4


def tokens_of(
    data: Data, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> NDArray[Any]:
    """Return all token ids of the data, one axis; texts are separated by the end of text.

    Args:
        data: texts, or arrays of token ids.
        tokenizer: of texts.
        limit: how many token ids of texts are enough; there may be more.

    Raises:
        ValueError: a token file is none, or has the wrong shape or dtype; a text is not UTF-8.
        OSError: a file cannot be read.
    """
    if data.tokens:
        arrays = []
        for path in data.tokens:
            try:
                array = np.load(path, mmap_mode="r")
            except (ValueError, EOFError) as e:
                raise ValueError(f"{path}: not an array that numpy.save wrote: {e}") from e
            arrays.append(array)
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"{path}: got {array.dtype} {list(array.shape)}, accepted are integers [N]"
                )
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    parts: list[int] = []
    for text in _texts(data):
        if limit is not None and len(parts) >= limit:
            break
        parts += _ids(tokenizer, text, None if limit is None else limit - len(parts))
        if tokenizer.eos_token_id is not None:
            parts.append(tokenizer.eos_token_id)
    return np.asarray(parts, dtype=np.int32)


def _texts(data: Data) -> Iterator[str]:
    if data.corpus == "pydoc":
        topics = pydoc_data.topics.topics
        yield from (topics[name] for name in sorted(topics))
    for path in data.files:
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is no UTF-8 text: {e}") from e


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive blocks of a text as examples of causal language modelling.

    Args:
        tokens: token ids, one axis.
        length: tokens per block; what is left at the end is not used.
        start: first block.
        end: block after the last.
    """

    def __init__(self, tokens: NDArray[Any], length: int, start: int, end: int) -> None:
        self.tokens, self.length, self.start, self.end = tokens, length, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        at = (self.start + index) * self.length
        ids = torch.from_numpy(np.asarray(self.tokens[at : at + self.length], dtype=np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def _split(tokens: NDArray[Any], data: Data) -> tuple[Blocks, Blocks | None]:
    count = len(tokens) // data.length
    held = round(count * data.validation)
    if count - held < 1:
        raise ValueError(
            f"data: {len(tokens)} tokens make {count} examples of length {data.length}, "
            f"{held} of them for evaluation; at least one must be left for training"
        )
    train = Blocks(tokens, data.length, 0, count - held)
    return train, Blocks(tokens, data.length, count - held, count) if held else None


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Builds or loads the model, in metaplastic form if asked for."""
    if "path" in config.model:
        model: Any = AutoModelForCausalLM.from_pretrained(config.model["path"])
    else:
        ids = {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        given = ids | config.model
        _check_vocabulary(given["vocab_size"], tokenizer)
        model = GlazooForCausalLM(GlazooConfig(**given))
    _check_vocabulary(model.config.vocab_size, tokenizer)
    if config.metaplastic is not None:
        metaplasticize(model, **config.metaplastic.model_dump())
    if config.trainable == "importance":
        freeze_all_but_importance(model)
    return model


def _check_vocabulary(size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > size:
        raise ValueError(
            f"model.vocab_size: got {size}, but the tokenizer has {len(tokenizer)} tokens"
        )


def freeze_all_but_importance(model: nn.Module) -> None:
    """Leaves only importance gates, their scale and the prior trainable.

    Raises:
        ValueError: no layer has any.
    """
    found = [gate for _, gate in gates(model)]
    if not found:
        raise ValueError("trainable: the model has no importance gates; add a [metaplastic] table")
    learned = [p for gate in found for p in gate.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)


class _Steps(TrainerCallback):
    """Reports steps, and the losses that were logged last."""

    def __init__(self, report: Callable[[str, int, int], None]) -> None:
        self.report, self.losses = report, {"loss": math.nan, "eval_loss": math.nan}

    def _show(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            known = {n.replace("eval_", "held-out "): x for n, x in self.losses.items() if x == x}
            what = ", ".join(f"{n} {x:.4g}" for n, x in known.items())
            self.report(what, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        found = {n: x for n, x in kwargs["logs"].items() if n in self.losses}
        self.losses |= found
        if found:
            self._show(state)


def report_steps(trainer: Trainer, report: Callable[[str, int, int], None]) -> None:
    """Makes a trainer report `(losses, step, steps)`, and show and print nothing itself."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Steps(report))


class Prepared(NamedTuple):
    """What a training run starts from."""

    args: TrainingArguments
    checkpoint: str | None
    """To resume from."""
    tokenizer: PreTrainedTokenizerBase
    examples: Blocks
    held: Blocks | None
    """Examples for evaluation."""
    model: Any

    def to_json(self) -> dict[str, Any]:
        """Return what there is to train and on what, as plain data."""
        args, parameters = self.args, list(self.model.parameters())
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        steps = args.max_steps
        if steps <= 0:
            steps = math.ceil(args.num_train_epochs * -(-len(self.examples) // batch))
        return {
            "output_dir": args.output_dir,
            "resume_from": self.checkpoint,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "examples": len(self.examples),
            "evaluation_examples": 0 if self.held is None else len(self.held),
            "steps": steps,
            "tokens_per_step": batch * self.examples.length,
        }


def prepare(config: TrainConfig, *, resume: bool = False) -> Prepared:
    """Reads the data and makes the model of a training run; writes nothing.

    Args:
        config: what to train, on what, and how.
        resume: continue from the last checkpoint in the output folder.

    Returns:
        What the run starts from.

    Raises:
        ValueError: the output folder has checkpoints and `resume` is off, or has none and it is on;
            the configuration does not fit the data.
        ImportError: accelerate is not installed.
    """
    with extra("train"):
        import accelerate  # noqa: F401 - transformers asks for it, of a Trainer
    defaults: dict[str, Any] = {
        "report_to": "none",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "eval_strategy": "no" if config.data.validation == 0 else "epoch",
    }
    args = TrainingArguments(**(defaults | config.training))
    assert args.output_dir is not None
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if last is not None and not resume:
        raise ValueError(
            f"training.output_dir: {args.output_dir} has checkpoints; continue with --resume, or "
            "choose another folder"
        )
    if last is None and resume:
        raise ValueError(f"training.output_dir: {args.output_dir} has no checkpoint to resume")
    set_seed(args.seed)
    bytes_ = config.data.tokenizer == "bytes"
    tokenizer = byte_tokenizer() if bytes_ else AutoTokenizer.from_pretrained(config.data.tokenizer)
    train, held = _split(tokens_of(config.data, tokenizer), config.data)
    return Prepared(args, last, tokenizer, train, held, build_model(config, tokenizer))


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """Trains a model and saves it with its tokenizer.

    Under `torchrun` or `accelerate launch` the processes share every batch; `training.fsdp` and
    `training.fsdp_config`, or accelerate's own configuration, shard the model. The first process
    of all writes the folder, which the others must see to resume.

    Args:
        config: what to train, on what, and how.
        resume: continue from the last checkpoint in the output folder.
        callbacks: further callbacks of the trainer.
        progress: called as `progress(losses, step, steps)`, in place of the trainer's own bars.

    Returns:
        The last values of the logged metrics, such as `train_loss` and `eval_loss`.

    Raises:
        ValueError: the output folder has checkpoints and `resume` is off, or has none and it is on;
            the configuration does not fit the data.
        ImportError: accelerate is not installed.
    """
    args, last, tokenizer, examples, held, model = prepare(config, resume=resume)
    trainer = RateTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=held,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if progress is not None:
        report_steps(trainer, progress)
    trainer.plasticity_rate = config.plasticity_rate
    # What `accelerate launch` says to its processes.
    sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and not trainer.is_fsdp_enabled:
        raise ValueError(
            "training.fsdp, or accelerate's configuration: FSDP shards on accelerators only; leave "
            "it out, and CPUs share the batch"
        )
    result = trainer.train(resume_from_checkpoint=last)
    metrics = dict(result.metrics)
    if held is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return {name: float(x) for name, x in metrics.items()}

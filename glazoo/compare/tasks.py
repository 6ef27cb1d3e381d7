"""Training tasks: synthetic sequences with known answers, and bytes of text.

Every draw comes from one explicit generator: the same seed gives the same data on every machine,
whatever else draws random numbers.

Tasks in which what the facts of a context have in common changes from context to context come with
a control, in which it never changes, so that training can learn it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from glazoo.compare.errors import CompareError

__all__ = ["TASKS", "Batch", "Task", "TaskName", "Vectors", "data_hash", "draw", "generator"]

TaskName = Literal[
    "mqar",
    "noisy_recall",
    "fuzzy_recall",
    "selective_copy",
    "memorisation",
    "compression",
    "overwriting",
    "records",
    "static",
    "entities",
    "static_entities",
    "regression",
    "static_regression",
    "text",
]

TASKS: tuple[TaskName, ...] = get_args(TaskName)

IGNORED = -100
"""Label of tokens that are not scored."""


class Vectors(NamedTuple):
    """Channels of a task whose tokens are vectors."""

    inputs: int
    """The last one is 1 for every token."""
    outputs: int


class Task(BaseModel):
    """One task and its sizes; together with a seed it determines every example."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: TaskName
    """Which task."""
    vocab: int = Field(default=128, ge=16)
    """Tokens: an eighth are filler, the rest half keys and half values. For records one is filler,
    and every field has half as many of the rest as there are values. Text has 256."""
    length: int = Field(default=128, ge=4)
    """Tokens of an example."""
    load: int = Field(default=16, ge=1)
    """What must be held at once: pairs, records, facts, examples, tokens to copy or to compress.
    Unused by text."""
    filler_tokens: int | None = Field(default=None, ge=1)
    """Filler tokens, instead of these."""
    gap_power: float = Field(default=0.1, gt=0)
    """mqar: the chance of a gap of n slots before a query is proportional to n^(gap_power - 1)."""
    width: int = Field(default=2, ge=2, le=4)
    """fuzzy_recall: tokens of a key and of a value."""
    overwrites: int = Field(default=2, ge=1)
    """overwriting: how often every changing key gets a new value; half of the keys change."""
    fields: int = Field(default=3, ge=2, le=8)
    """records: tokens that describe a record; one of them, other ones in other contexts, tells the
    records of a context apart."""
    shared: float = Field(default=1.0, ge=0, le=1)
    """records: chance that a field which does not tell records apart has the context's value,
    rather than any."""
    channels: int = Field(default=8, ge=2)
    """regression: channels of an input and of an output."""
    anisotropy: float = Field(default=1.0, ge=1)
    """regression: ratio of the largest standard deviation of the inputs, over directions that are
    drawn per context, to the smallest."""
    noise: float = Field(default=0.0, ge=0)
    """regression: standard deviation of the noise on outputs that are shown; their own is 1."""
    text: Path | None = None
    """text: a file to read as bytes; unset for the language reference that ships with Python."""

    @property
    def interface(self) -> int | Vectors:
        """Number of different tokens, or the channels of tokens that are vectors."""
        kind = _KINDS[self.name]
        if kind.vectors:
            return Vectors(2 * self.channels + 1, self.channels)
        return 256 if kind.bytes else self.vocab

    @property
    def measure(self) -> str:
        """What an accuracy of this task is."""
        return "variance explained" if _KINDS[self.name].vectors else "accuracy"

    @property
    def resizable(self) -> bool:
        """Whether examples of other loads and lengths are the same task."""
        return _KINDS[self.name].resizable

    @property
    def control(self) -> Task | None:
        """The same task but for what it is about, which training can learn there."""
        name = _KINDS[self.name].control
        return None if name is None else self.model_copy(update={"name": name})

    @property
    def filler(self) -> tuple[int, int]:
        """First filler token and the one after the last."""
        if self.filler_tokens is not None:
            return 0, self.filler_tokens
        return 0, 1 if _KINDS[self.name].fields else max(2, self.vocab // 8)

    @property
    def keys(self) -> tuple[int, int]:
        """First key and the one after the last."""
        start = self.filler[1]
        if _KINDS[self.name].fields:
            return start, start + self.fields * ((self.vocab - start) // (self.fields + 2))
        return start, start + (self.vocab - start) // 2

    @property
    def values(self) -> tuple[int, int]:
        """First value and the one after the last."""
        return self.keys[1], self.vocab

    def smallest_length(self, load: int) -> int:
        """Return the shortest example that has room for a load."""
        return _KINDS[self.name].room(self, load)

    def largest_load(self) -> int:
        """Return the load that the vocabulary has enough keys for."""
        return _KINDS[self.name].most(self)

    def check(self) -> None:
        """Checks that the sizes fit together.

        Raises:
            CompareError: the load does not fit into the length or the vocabulary.
        """
        if self.length < self.smallest_length(self.load):
            raise CompareError(
                f"{self.name}: a load of {self.load} needs a length of at least "
                f"{self.smallest_length(self.load)}, got {self.length}"
            )
        if self.load > (most := self.largest_load()):
            names = _KINDS[self.name].bytes
            source = "there are names" if names else f"a vocabulary of {self.vocab} has keys"
            raise CompareError(
                f"{self.name}: {source} for a load of at most {most}, got {self.load}"
            )


class Batch(NamedTuple):
    """Examples of a task."""

    inputs: Int[Tensor, "B T"] | Float[Tensor, "B T D"]
    labels: Int[Tensor, "B T"] | Float[Tensor, "B T E"]
    """The right answer at tokens that ask for one; elsewhere `IGNORED`, for vectors NaN."""
    group: Int[Tensor, "B T"] | None = None
    """overwriting: 1 where the key was overwritten, 0 where it was not."""

    @property
    def asked(self) -> Bool[Tensor, "B T"]:
        """Tokens that ask for an answer."""
        if self.labels.is_floating_point():
            return ~self.labels[..., 0].isnan()
        return self.labels != IGNORED


def generator(*parts: int | str) -> Generator:
    """Return the random generator of a purpose, named by numbers and words."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(
    task: Task,
    count: int,
    rng: Generator,
    *,
    load: int | None = None,
    length: int | None = None,
    held_out: bool = False,
) -> Batch:
    """Draws examples.

    Args:
        task: what to draw.
        count: number of examples.
        rng: the only source of randomness.
        load: instead of the task's own.
        length: instead of the task's own.
        held_out: text: draw from the last tenth, which training never sees.

    Returns:
        The examples.

    Raises:
        CompareError: the load does not fit.
    """
    changed = {"load": load or task.load, "length": length or task.length}
    task = task.model_copy(update=changed)
    task.check()
    return _KINDS[task.name].draw(task, count, rng, held_out)


def data_hash(*batches: Batch) -> str:
    """Return the SHA-256 of examples, for reports: equal data has equal hashes."""
    digest = hashlib.sha256()
    for batch in batches:
        for x in (batch.inputs, batch.labels):
            x = x if x.is_floating_point() else x.to(torch.int64)
            digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _choose(span: tuple[int, int], count: int, size: int, rng: Generator) -> Tensor:
    """Draws `size` different tokens of a span per example."""
    return torch.rand(count, span[1] - span[0], generator=rng).argsort(1)[:, :size] + span[0]


def _any(span: tuple[int, int], shape: tuple[int, ...], rng: Generator) -> Tensor:
    return torch.randint(span[0], span[1], shape, generator=rng)


def _blank(task: Task, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Return filler everywhere, and labels that ask for nothing."""
    inputs = _any(task.filler, (count, task.length), rng)
    return inputs, torch.full_like(inputs, IGNORED)


def _slots(count: int, slots: int, size: int, rng: Generator) -> Tensor:
    """Chooses `size` different slots per example, in random order."""
    return torch.rand(count, slots, generator=rng).argsort(1)[:, :size]


def _mqar(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Multi-query associative recall: pairs first, then each key once among filler.

        k1 v1 k2 v2 f f k2 f k1 f
        .  .  .  .  . . v2 . v1 .

    Slots of two tokens follow the pairs; small gaps are likelier, by a power law.
    """
    n = task.load
    inputs, labels = _blank(task, count, rng)
    keys = _choose(task.keys, count, n, rng)
    values = _any(task.values, (count, n), rng)
    inputs[:, 0 : 2 * n : 2], inputs[:, 1 : 2 * n : 2] = keys, values
    slots = (task.length - 2 * n) // 2
    chance = torch.arange(1, slots + 1, dtype=torch.float64) ** (task.gap_power - 1)
    at = 2 * n + 2 * torch.multinomial(chance.expand(count, -1), n, generator=rng)
    return Batch(inputs.scatter(1, at, keys), labels.scatter(1, at, values))


def _noisy_recall(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Recall with noise: pairs at random places of the first half, queries of the second."""
    n, half = task.load, task.length // 2
    inputs, labels = _blank(task, count, rng)
    keys = _choose(task.keys, count, n, rng)
    values = _any(task.values, (count, n), rng)
    at = 2 * _slots(count, half // 2, n, rng)
    inputs = inputs.scatter(1, at, keys).scatter(1, at + 1, values)
    at = half + 2 * _slots(count, (task.length - half) // 2, n, rng)
    return Batch(inputs.scatter(1, at, keys), labels.scatter(1, at, values))


def _fuzzy_recall(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Recall of several tokens by several tokens: keys share tokens, so that none alone tells.

    k1 k1' v1 v1' ... f f k1 k1' v1 f
                          .  v1  v1' .
    """
    n, w = task.load, task.width
    inputs, labels = _blank(task, count, rng)
    span = task.keys[1] - task.keys[0]
    # Different keys, by their number in base `span`.
    codes = torch.stack([torch.randperm(span**w, generator=rng)[:n] for _ in range(count)])
    keys = torch.stack([codes // span**i % span for i in range(w)], -1) + task.keys[0]
    values = _any(task.values, (count, n, w), rng)
    pairs = torch.cat([keys, values], -1)
    inputs[:, : 2 * w * n] = pairs.flatten(1)
    slots = task.length // (2 * w) - n
    start = 2 * w * (n + _slots(count, slots, n, rng))
    at = start[..., None] + torch.arange(2 * w - 1)
    inputs = inputs.scatter(1, at.flatten(1), pairs[..., :-1].flatten(1))
    ask = start[..., None] + torch.arange(w - 1, 2 * w - 1)
    return Batch(inputs, labels.scatter(1, ask.flatten(1), values.flatten(1)))


def _selective_copy(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Copying in order: some tokens among filler, then as many prompts."""
    n = task.load
    inputs, labels = _blank(task, count, rng)
    # One key token serves as the prompt.
    at = _slots(count, task.length - n, n, rng).sort(1).values
    content = _any(task.values, (count, n), rng)
    inputs = inputs.scatter(1, at, content)
    inputs[:, -n:] = task.keys[0]
    labels[:, -n:] = content
    return Batch(inputs, labels)


def _memorisation(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Facts that are the same in all examples: the value follows the key, but is never shown."""
    n = task.load
    facts = _any(task.values, (n,), generator("facts", task.vocab, n))
    which = _any((0, n), (count, task.length // 2), rng)
    inputs, labels = _blank(task, count, rng)
    ends = 2 * which.shape[1]
    inputs[:, 0:ends:2] = which + task.keys[0]
    labels[:, 1:ends:2] = facts[which]
    return Batch(inputs, labels)


def _compression(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Random access to a sequence: its tokens, then the numbers of places in random order."""
    n = task.load
    inputs, labels = _blank(task, count, rng)
    content = _any(task.values, (count, n), rng)
    order = _slots(count, n, n, rng)
    inputs[:, :n], inputs[:, n : 2 * n] = content, order + task.keys[0]
    labels[:, n : 2 * n] = content.gather(1, order)
    return Batch(inputs, labels)


def _overwriting(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Facts of which half change: the last value counts, and what did not change must stay."""
    n, again = task.load, task.overwrites
    changing = n // 2
    inputs, labels = _blank(task, count, rng)
    keys = _choose(task.keys, count, n, rng)
    which = torch.arange(n).expand(count, -1)
    rounds = [which]
    for _ in range(again):
        rounds.append(_slots(count, changing, changing, rng))
    which = torch.cat(rounds, 1)
    values = _any(task.values, which.shape, rng)
    writes = which.shape[1]
    inputs[:, 0 : 2 * writes : 2] = keys.gather(1, which)
    inputs[:, 1 : 2 * writes : 2] = values
    latest = values[:, :n].clone()
    for i in range(1, again + 1):
        part = slice(n + (i - 1) * changing, n + i * changing)
        latest = latest.scatter(1, which[:, part], values[:, part])
    slots = (task.length - 2 * writes) // 2
    at = 2 * writes + 2 * _slots(count, slots, n, rng)
    group = (torch.arange(n) < changing).long().expand(count, -1)
    return Batch(
        inputs.scatter(1, at, keys),
        labels.scatter(1, at, latest),
        torch.zeros_like(inputs).scatter(1, at, group),
    )


def _records(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Recall by several fields, of which one tells the records of a context apart.

        f1 f2 f3 v   f1 f2 f3' v' ...   f1 f2 f3' 0   f1 f2 f3 0 ...
        .  .  .  .   .  .  .   .        .  .  .   v'  .  .  .  v

    It has different values in all records of the context; the others have one value each, so that
    what keys have in common is what this context does not need.
    """
    return _described(task, count, rng, torch.randint(0, task.fields, (count, 1), generator=rng))


def _static(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Records that the first field tells apart in all contexts: what keys have in common never
    changes."""
    return _described(task, count, rng, torch.zeros(count, 1, dtype=torch.long))


def _described(task: Task, count: int, rng: Generator, telling: Tensor) -> Batch:
    """Draws records and queries, given the field that tells apart, [count, 1]."""
    n, fields = task.load, torch.arange(task.fields)
    size = (task.keys[1] - task.keys[0]) // task.fields
    inputs, labels = _blank(task, count, rng)
    chosen = _any((0, size), (count, 1, task.fields), rng).expand(-1, n, -1)
    if task.shared < 1:
        other = _any((0, size), (count, n, task.fields), rng)
        chosen = chosen.where(torch.rand(chosen.shape, generator=rng) < task.shared, other)
    different = _choose((0, size), count, n, rng)
    chosen = torch.where((fields == telling)[:, None], different[..., None], chosen)
    keys = chosen + size * fields + task.keys[0]
    values = _any(task.values, (count, n), rng)
    step = task.fields + 1
    inputs[:, : step * n] = torch.cat([keys, values[..., None]], -1).flatten(1)
    start = step * (n + _slots(count, task.length // step - n, n, rng))
    at = (start[..., None] + fields).flatten(1)
    return Batch(
        inputs.scatter(1, at, keys.flatten(1)),
        labels.scatter(1, start + task.fields, values),
    )


_FIRST_NAMES, _LAST_NAMES = (
    names.split()
    for names in (
        "ada ben cyn dov eva fay gus hal ida jon kim lou mia ned ola pia",
        "abt bow cox day eck fox gow hix ivy jay kay lux moe nye orr poe",
    )
)


def _entities(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Lines of text that say a fact about a person, then lines that ask: their answer belongs where
    the value stood.

        ada fox K | ada poe C | ada bow X | ...  ada poe   | ada fox   | ...
        .................................................C...........K

    In some documents all share the first name and in the others the last one, which then says
    nothing about whom a fact is about.
    """
    return _document(task, count, rng, torch.randint(0, 2, (count,), generator=rng))


def _static_entities(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Facts about people who share the last name in all documents: which word tells them apart
    never changes."""
    return _document(task, count, rng, torch.zeros(count, dtype=torch.long))


def _document(task: Task, count: int, rng: Generator, telling: Tensor) -> Batch:
    """Draws facts and questions, given the word that tells apart: the first, 0, or the last, 1."""
    n = task.load
    words = torch.tensor([[[*f"{w} ".encode()] for w in ws] for ws in (_FIRST_NAMES, _LAST_NAMES)])
    different = _choose((0, words.shape[1]), count, n, rng)
    common = _any((0, words.shape[1]), (count, 1), rng)
    names = torch.cat(
        [words[i][torch.where(telling[:, None] == i, different, common)] for i in (0, 1)], -1
    )
    size = names.shape[-1]
    values = _any((ord("A"), ord("Z") + 1), (count, n), rng)
    step = size + 2
    inputs = torch.full((count, task.length), ord(" "))
    inputs[:, step - 1 :: step] = ord("\n")
    facts = inputs[:, : step * n].view(count, n, step)
    facts[..., :size], facts[..., size] = names, values
    start = step * (n + _slots(count, task.length // step - n, n, rng))
    at = (start[..., None] + torch.arange(size)).flatten(1)
    labels = torch.full_like(inputs, IGNORED)
    return Batch(inputs.scatter(1, at, names.flatten(1)), labels.scatter(1, start + size, values))


def _regression(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Linear regression in context: inputs and noisy outputs in turns, then inputs alone.

        y = W x + noise;   x ~ N(0, A S^2 A^T);   tokens (x, 0, 1), (0, y, 1)

    W, its entries of variance 1/d, and the orthogonal axes A are drawn per context; the standard
    deviations S fall geometrically, by `anisotropy` in all, and their squares have the mean one.
    Answers are without noise.
    """
    drawn = torch.randn(count, task.channels, task.channels, generator=rng)
    return _examples(task, count, rng, torch.linalg.qr(drawn).Q)


def _static_regression(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    """Regression with the same axes in all contexts: what inputs have in common never changes."""
    return _examples(task, count, rng, torch.eye(task.channels).expand(count, -1, -1))


def _examples(task: Task, count: int, rng: Generator, axes: Tensor) -> Batch:
    n, d = task.load, task.channels
    spread = torch.logspace(0, -1, d, base=task.anisotropy)
    spread = spread / spread.square().mean().sqrt()
    x = (torch.randn(count, 2 * n, d, generator=rng) * spread) @ axes.mT
    y = x @ torch.randn(count, d, d, generator=rng) / d**0.5
    inputs = torch.zeros(count, task.length, 2 * d + 1)
    inputs[..., -1] = 1.0
    inputs[:, 0 : 2 * n : 2, :d] = x[:, :n]
    inputs[:, 1 : 2 * n : 2, d:-1] = y[:, :n]
    inputs[:, 1 : 2 * n : 2, d:-1] += task.noise * torch.randn(count, n, d, generator=rng)
    at = (2 * n + _slots(count, task.length - 2 * n, n, rng))[..., None].expand(-1, -1, d)
    inputs[..., :d].scatter_(1, at, x[:, n:])
    labels = torch.full((count, task.length, d), torch.nan)
    return Batch(inputs, labels.scatter(1, at, y[:, n:]))


@functools.lru_cache(maxsize=2)
def _corpus(path: Path | None) -> Tensor:
    if path is None:
        from pydoc_data.topics import topics

        data = "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
    else:
        try:
            data = path.read_bytes()
        except OSError as e:
            raise CompareError(f"cannot read the text {path}: {e.strerror or e}") from e
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _text(task: Task, count: int, rng: Generator, held_out: bool) -> Batch:
    corpus = _corpus(task.text)
    border = len(corpus) * 9 // 10
    part = corpus[border:] if held_out else corpus[:border]
    if len(part) <= task.length:
        raise CompareError(
            f"text: a length of {task.length} needs more than the {len(corpus):,} bytes that the "
            "text has"
        )
    start = torch.randint(0, len(part) - task.length, (count, 1), generator=rng)
    window = part[start + torch.arange(task.length + 1)].long()
    return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())


@dataclass(frozen=True)
class _Kind:
    """What is particular to a task."""

    draw: Callable[[Task, int, Generator, bool], Batch]
    room: Callable[[Task, int], int]
    """Tokens that a load needs."""
    most: Callable[[Task], int] = lambda _: 10**9
    """Largest load."""
    control: TaskName | None = None
    resizable: bool = True
    bytes: bool = False
    fields: bool = False
    vectors: bool = False


def _all_keys(task: Task) -> int:
    return task.keys[1] - task.keys[0]


def _one_field(task: Task) -> int:
    return _all_keys(task) // task.fields


def _room_of_records(task: Task, load: int) -> int:
    return 2 * (task.fields + 1) * load


def _room_of_entities(task: Task, load: int) -> int:
    return 2 * load * (len(_FIRST_NAMES[0]) + len(_LAST_NAMES[0]) + 4)


_NAMES = min(len(_FIRST_NAMES), len(_LAST_NAMES))

_KINDS: dict[TaskName, _Kind] = {
    "mqar": _Kind(_mqar, lambda _, n: 4 * n, _all_keys),
    "noisy_recall": _Kind(_noisy_recall, lambda _, n: 8 * n, _all_keys),
    "fuzzy_recall": _Kind(
        _fuzzy_recall, lambda t, n: 4 * t.width * n, lambda t: int(_all_keys(t) ** t.width)
    ),
    "selective_copy": _Kind(_selective_copy, lambda _, n: 4 * n),
    "memorisation": _Kind(_memorisation, lambda *_: 4, _all_keys, resizable=False),
    "compression": _Kind(_compression, lambda _, n: 2 * n, _all_keys),
    "overwriting": _Kind(_overwriting, lambda t, n: 4 * n + 2 * t.overwrites * (n // 2), _all_keys),
    "records": _Kind(_records, _room_of_records, _one_field, "static", fields=True),
    "static": _Kind(_static, _room_of_records, _one_field, fields=True),
    "entities": _Kind(
        _entities, _room_of_entities, lambda _: _NAMES, "static_entities", bytes=True
    ),
    "static_entities": _Kind(_static_entities, _room_of_entities, lambda _: _NAMES, bytes=True),
    "regression": _Kind(_regression, lambda _, n: 3 * n, control="static_regression", vectors=True),
    "static_regression": _Kind(_static_regression, lambda _, n: 3 * n, vectors=True),
    "text": _Kind(_text, lambda *_: 4, resizable=False, bytes=True),
}

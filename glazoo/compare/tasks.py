"""Training tasks: synthetic sequences with known answers, and bytes of text.

Every draw comes from one explicit generator: the same seed gives the same data on every machine,
whatever else draws random numbers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from glazoo.compare.errors import CompareError

__all__ = ["TASKS", "Batch", "Task", "TaskName", "data_hash", "draw", "generator"]

TaskName = Literal[
    "mqar",
    "noisy_recall",
    "fuzzy_recall",
    "selective_copy",
    "memorisation",
    "compression",
    "overwriting",
    "text",
]

TASKS: tuple[TaskName, ...] = get_args(TaskName)

IGNORED = -100
"""Label of tokens that are not scored."""


class Task(BaseModel):
    """One task and its sizes; together with a seed it determines every example."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: TaskName
    """Which task."""
    vocab: int = Field(default=128, ge=16)
    """Tokens: an eighth are filler, the rest half keys and half values. Text has 256."""
    length: int = Field(default=128, ge=4)
    """Tokens of an example."""
    load: int = Field(default=16, ge=1)
    """What must be held at once: pairs, tokens to copy or to compress, facts. Unused by text."""
    gap_power: float = Field(default=0.1, gt=0)
    """mqar: the chance of a gap of n slots before a query is proportional to n^(gap_power - 1)."""
    width: int = Field(default=2, ge=2, le=4)
    """fuzzy_recall: tokens of a key and of a value."""
    overwrites: int = Field(default=2, ge=1)
    """overwriting: how often every changing key gets a new value; half of the keys change."""
    text: Path | None = None
    """text: a file to read as bytes; unset for the language reference that ships with Python."""

    @property
    def tokens(self) -> int:
        """Number of different tokens."""
        return 256 if self.name == "text" else self.vocab

    @property
    def filler(self) -> tuple[int, int]:
        """First filler token and the one after the last."""
        return 0, max(2, self.vocab // 8)

    @property
    def keys(self) -> tuple[int, int]:
        """First key and the one after the last."""
        start = self.filler[1]
        return start, start + (self.vocab - start) // 2

    @property
    def values(self) -> tuple[int, int]:
        """First value and the one after the last."""
        return self.keys[1], self.vocab

    def smallest_length(self, load: int) -> int:
        """Gives the shortest example that has room for a load."""
        return {
            "mqar": 4 * load,
            "noisy_recall": 8 * load,
            "fuzzy_recall": 4 * self.width * load,
            "selective_copy": 4 * load,
            "memorisation": 4,
            "compression": 2 * load,
            "overwriting": 4 * load + 2 * self.overwrites * (load // 2),
            "text": 4,
        }[self.name]

    def largest_load(self) -> int:
        """Gives the load that the vocabulary has enough keys for."""
        keys = self.keys[1] - self.keys[0]
        if self.name == "fuzzy_recall":
            return int(keys**self.width)
        return (
            keys
            if self.name in ("mqar", "noisy_recall", "overwriting", "memorisation", "compression")
            else 10**9
        )

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
        if self.load > self.largest_load():
            raise CompareError(
                f"{self.name}: a vocabulary of {self.vocab} has keys for a load of at most "
                f"{self.largest_load()}, got {self.load}"
            )


class Batch(NamedTuple):
    """Examples of a task."""

    inputs: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    """The right answer at tokens that ask for one, `IGNORED` elsewhere."""
    group: Int[Tensor, "B T"] | None = None
    """overwriting: 1 where the key was overwritten, 0 where it was not."""


def generator(*parts: int | str) -> Generator:
    """Gives the random generator of a purpose, named by numbers and words."""
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
    if task.name == "text":
        return _text(task, count, rng, held_out)
    return _DRAW[task.name](task, count, rng)


def data_hash(*batches: Batch) -> str:
    """Gives the SHA-256 of examples, for reports: equal data has equal hashes."""
    digest = hashlib.sha256()
    for batch in batches:
        for x in (batch.inputs, batch.labels):
            digest.update(x.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _choose(span: tuple[int, int], count: int, size: int, rng: Generator) -> Tensor:
    """Draws `size` different tokens of a span per example."""
    return torch.rand(count, span[1] - span[0], generator=rng).argsort(1)[:, :size] + span[0]


def _any(span: tuple[int, int], shape: tuple[int, ...], rng: Generator) -> Tensor:
    return torch.randint(span[0], span[1], shape, generator=rng)


def _blank(task: Task, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Gives filler everywhere, and labels that ask for nothing."""
    inputs = _any(task.filler, (count, task.length), rng)
    return inputs, torch.full_like(inputs, IGNORED)


def _slots(count: int, slots: int, size: int, rng: Generator) -> Tensor:
    """Chooses `size` different slots per example, in random order."""
    return torch.rand(count, slots, generator=rng).argsort(1)[:, :size]


def _mqar(task: Task, count: int, rng: Generator) -> Batch:
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


def _noisy_recall(task: Task, count: int, rng: Generator) -> Batch:
    """Recall with noise: pairs at random places of the first half, queries of the second."""
    n, half = task.load, task.length // 2
    inputs, labels = _blank(task, count, rng)
    keys = _choose(task.keys, count, n, rng)
    values = _any(task.values, (count, n), rng)
    at = 2 * _slots(count, half // 2, n, rng)
    inputs = inputs.scatter(1, at, keys).scatter(1, at + 1, values)
    at = half + 2 * _slots(count, (task.length - half) // 2, n, rng)
    return Batch(inputs.scatter(1, at, keys), labels.scatter(1, at, values))


def _fuzzy_recall(task: Task, count: int, rng: Generator) -> Batch:
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


def _selective_copy(task: Task, count: int, rng: Generator) -> Batch:
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


def _memorisation(task: Task, count: int, rng: Generator) -> Batch:
    """Facts that are the same in all examples: the value follows the key, but is never shown."""
    n = task.load
    facts = _any(task.values, (n,), generator("facts", task.vocab, n))
    which = _any((0, n), (count, task.length // 2), rng)
    inputs, labels = _blank(task, count, rng)
    ends = 2 * which.shape[1]
    inputs[:, 0:ends:2] = which + task.keys[0]
    labels[:, 1:ends:2] = facts[which]
    return Batch(inputs, labels)


def _compression(task: Task, count: int, rng: Generator) -> Batch:
    """Random access to a sequence: its tokens, then the numbers of places in random order."""
    n = task.load
    inputs, labels = _blank(task, count, rng)
    content = _any(task.values, (count, n), rng)
    order = _slots(count, n, n, rng)
    inputs[:, :n], inputs[:, n : 2 * n] = content, order + task.keys[0]
    labels[:, n : 2 * n] = content.gather(1, order)
    return Batch(inputs, labels)


def _overwriting(task: Task, count: int, rng: Generator) -> Batch:
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


_DRAW: dict[str, Callable[[Task, int, Generator], Batch]] = {
    "mqar": _mqar,
    "noisy_recall": _noisy_recall,
    "fuzzy_recall": _fuzzy_recall,
    "selective_copy": _selective_copy,
    "memorisation": _memorisation,
    "compression": _compression,
    "overwriting": _overwriting,
}

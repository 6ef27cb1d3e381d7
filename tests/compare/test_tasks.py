import hashlib
from pathlib import Path

import pytest
import torch

from glazoo.compare.errors import CompareError
from glazoo.compare.tasks import IGNORED, TASKS, Batch, Task, data_hash, draw, generator

SYNTHETIC = [t for t in TASKS if t != "text"]


def task(name: str, **changes: object) -> Task:
    return Task(name=name, **({"vocab": 64, "length": 96, "load": 6} | changes))


def answer(t: Task, inputs: list[int], at: int) -> int | None:
    """Solves an example the slow way: reads what came before and looks for the question."""
    before = inputs[:at]
    if t.name in ("mqar", "noisy_recall", "overwriting"):
        asked = [i for i, x in enumerate(before) if x == inputs[at]]
        told = [before[i + 1] for i in asked if i + 1 < at and before[i + 1] >= t.values[0]]
        return told[-1] if told else None
    if t.name == "fuzzy_recall":
        # The answer is what followed the last time that the same tokens came in a row: as many as
        # a key has, at its end, or also the values already given.
        for size in range(2 * t.width - 1, t.width - 1, -1):
            tail = inputs[at + 1 - size : at + 1]
            for i in range(0, 2 * t.width * t.load, 2 * t.width):
                if inputs[i : i + size] == tail:
                    return inputs[i + size]
        return None
    if t.name == "selective_copy":
        content = [x for x in inputs[: t.length - t.load] if x >= t.values[0]]
        return content[at - (t.length - t.load)]
    if t.name == "compression":
        return inputs[inputs[at] - t.keys[0]]
    raise AssertionError(t.name)


@pytest.mark.parametrize("name", [t for t in SYNTHETIC if t != "memorisation"])
def test_every_question_has_the_answer_that_the_example_gives(name: str) -> None:
    t = task(name)
    batch = draw(t, 20, generator("answers", name))
    asked = 0
    for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        for at, label in enumerate(labels):
            if label != IGNORED:
                assert answer(t, inputs, at) == label
                asked += 1
    per_example = t.load * (t.width if name == "fuzzy_recall" else 1)
    assert asked == 20 * per_example


def test_memorised_facts_are_the_same_in_all_data_and_never_shown() -> None:
    t = task("memorisation", load=12)
    facts: dict[int, int] = {}
    for seed in range(4):
        batch = draw(t, 8, generator("facts of", seed))
        assert int(batch.inputs.max()) < t.values[0]
        for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
            for at, label in enumerate(labels):
                if label != IGNORED:
                    assert facts.setdefault(inputs[at - 1], label) == label
    assert len(facts) == 12


@pytest.mark.parametrize("name", TASKS)
def test_data_depends_on_its_generator_alone(name: str) -> None:
    torch.manual_seed(1)
    one = draw(task(name), 4, generator("same", 5))
    torch.manual_seed(2)
    two = draw(task(name), 4, generator("same", 5))
    other = draw(task(name), 4, generator("same", 6))
    assert data_hash(one) == data_hash(two)
    assert data_hash(one) != data_hash(other)
    before = torch.get_rng_state()
    draw(task(name), 4, generator("same", 5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SYNTHETIC)
def test_filler_keys_and_values_share_no_token(name: str) -> None:
    t = task(name)
    assert t.filler[1] == t.keys[0]
    assert t.keys[1] == t.values[0]
    batch = draw(t, 16, generator("disjoint", name))
    assert int(batch.inputs.min()) >= 0
    assert int(batch.inputs.max()) < t.vocab
    labels = batch.labels[batch.labels != IGNORED]
    assert int(labels.min()) >= t.values[0]


def test_filler_is_disjoint_even_in_the_smallest_vocabulary() -> None:
    t = task("mqar", vocab=16, load=4)
    batch = draw(t, 200, generator("small"))
    after = batch.inputs[:, 2 * t.load :]
    asked = batch.labels[:, 2 * t.load :] != IGNORED
    assert int(after[~asked].max()) < t.keys[0]
    assert int(after[asked].min()) >= t.keys[0]


def test_small_gaps_are_likelier_by_the_power_that_is_asked_for() -> None:
    def first_share(power: float) -> float:
        t = task("mqar", load=1, length=66, gap_power=power)
        labels = draw(t, 20_000, generator("gaps")).labels
        return float((labels[:, 2] != IGNORED).double().mean())

    slots = torch.arange(1, 33, dtype=torch.float64)
    for power in (0.1, 1.0):
        weight = slots ** (power - 1)
        p = float(weight[0] / weight.sum())
        assert abs(first_share(power) - p) < 5 * (p * (1 - p) / 20_000) ** 0.5


def test_overwritten_keys_are_marked_and_half_of_all() -> None:
    t = task("overwriting", overwrites=3)
    batch = draw(t, 8, generator("marks"))
    assert batch.group is not None
    writes = t.load + 3 * (t.load // 2)
    for inputs, labels, group in zip(
        batch.inputs.tolist(), batch.labels.tolist(), batch.group.tolist(), strict=True
    ):
        told = inputs[0 : 2 * writes : 2]
        for at, label in enumerate(labels):
            if label != IGNORED:
                assert told.count(inputs[at]) == (1 + 3 * group[at])
    chosen = batch.labels != IGNORED
    assert int(batch.group[chosen].sum()) * 2 == int(chosen.sum())


def test_text_holds_out_a_tenth_and_labels_are_the_next_bytes(tmp_path: Path) -> None:
    data = bytes(range(250)) * 8
    path = tmp_path / "text.bin"
    path.write_bytes(data)
    t = Task(name="text", length=32, text=path)
    train = draw(t, 64, generator("text"))
    assert torch.equal(train.inputs[:, 1:], train.labels[:, :-1])
    marked = data[:1800] + bytes([255]) * 200
    path2 = tmp_path / "marked.bin"
    path2.write_bytes(marked)
    t2 = t.model_copy(update={"text": path2})
    assert int(draw(t2, 200, generator("text")).inputs.max()) < 255
    assert int(draw(t2, 20, generator("text"), held_out=True).inputs.min()) == 255


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"load of 40 needs a length of at least 160, got 96"):
        draw(task("mqar", load=40), 1, generator(0))
    with pytest.raises(CompareError, match=r"keys for a load of at most 28, got 29"):
        draw(task("mqar", load=29, length=400), 1, generator(0))
    with pytest.raises(CompareError, match="No such file"):
        draw(Task(name="text", text=tmp_path / "none"), 1, generator(0))
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(CompareError, match="3 bytes"):
        draw(Task(name="text", text=tmp_path / "short"), 1, generator(0))


def test_the_hash_is_of_the_numbers() -> None:
    x = torch.tensor([[1, 2]])
    digest = hashlib.sha256(x.numpy().tobytes() * 2).hexdigest()
    assert data_hash(Batch(x, x)) == digest

import hashlib
from pathlib import Path

import pytest
import torch

from glazoo.compare.errors import CompareError
from glazoo.compare.tasks import (
    IGNORED,
    TASKS,
    Batch,
    Task,
    TaskName,
    Vectors,
    data_hash,
    draw,
    generator,
)

TOKENS = [t for t in TASKS if isinstance(Task(name=t, vocab=64).interface, int)]
WORDS = [t for t in TOKENS if Task(name=t, vocab=64).interface == 64]
CONTROLLED = [t for t in TASKS if Task(name=t).control is not None]


def task(name: TaskName, **changes: object) -> Task:
    smallest = Task(name=name).smallest_length(6)
    sizes = {"vocab": 64, "length": max(96, smallest + 24), "load": 6}
    return Task.model_validate({"name": name} | sizes | changes)


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
    if t.name in ("records", "static"):
        told = records(t, inputs)
        return told[tuple(inputs[at - 3 : at])]
    if t.name in ("entities", "static_entities"):
        # A question is what a fact says before its value.
        text = bytes(inputs).decode()
        return ord(text[text.index(text[at - 8 : at]) + 8])
    raise AssertionError(t.name)


def records(t: Task, inputs: list[int]) -> dict[tuple[int, ...], int]:
    """Reads the records of an example: their fields and their values."""
    told = [inputs[4 * i : 4 * i + 4] for i in range(t.load)]
    return {(a, b, c): v for a, b, c, v in told}


@pytest.mark.parametrize("name", [t for t in TOKENS if t not in ("memorisation", "text")])
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


@pytest.mark.parametrize("name", ["records", "static"])
def test_one_field_tells_the_records_of_a_context_apart(name: TaskName) -> None:
    t = Task(name=name, vocab=81, length=96, load=12)
    assert (t.filler, t.keys, t.values) == ((0, 1), (1, 49), (49, 81))
    telling = set()
    for inputs in draw(t, 40, generator("fields", name)).inputs.tolist():
        told = records(t, inputs)
        kinds = [{key[i] for key in told} for i in range(3)]
        # Every field has sixteen tokens of its own.
        assert all(1 + 16 * i <= min(k) and max(k) < 17 + 16 * i for i, k in enumerate(kinds))
        assert sorted(map(len, kinds)) == [1, 1, 12]
        telling.add(next(i for i, k in enumerate(kinds) if len(k) == 12))
        asked = [tuple(inputs[i : i + 3]) for i in range(48, 96, 4)]
        assert set(asked) == set(told)
        assert len(asked) == len(told) == 12
        assert all(inputs[i + 3] == 0 for i in range(48, 96, 4))
    assert telling == ({0} if name == "static" else {0, 1, 2})


def test_fields_are_shared_as_often_as_asked() -> None:
    t = Task(name="static", vocab=81, length=96, load=12, shared=0.8)
    second = draw(t, 2000, generator("shared")).inputs[:, 1:48:4]
    agree = float((second[:, None] == second[..., None]).double().mean())
    # One record with itself, or two that both have the context's value or meet by chance.
    p = 1 / 12 + 11 / 12 * (0.8**2 + (1 - 0.8**2) / 16)
    assert abs(agree - p) < 0.01


@pytest.mark.parametrize("name", ["entities", "static_entities"])
def test_people_share_one_name_in_a_document(name: TaskName) -> None:
    t = Task(name=name, length=160, load=8)
    telling = set()
    for inputs in draw(t, 40, generator("names", name)).inputs.tolist():
        text = bytes(inputs).decode("ascii")
        facts = [line.split() for line in text[:80].splitlines()]
        questions = [line.split() for line in text[80:].splitlines()]
        kinds = [len({f[i] for f in facts}) for i in (0, 1)]
        assert sorted(kinds) == [1, 8]
        telling.add(kinds.index(8))
        assert sorted(questions) == sorted(f[:2] for f in facts)
        assert all(len(f[2]) == 1 and f[2].isupper() for f in facts)
    assert telling == ({0} if name == "static_entities" else {0, 1})


@pytest.mark.parametrize("name", ["regression", "static_regression"])
def test_outputs_are_one_linear_function_of_the_inputs_of_a_context(name: TaskName) -> None:
    t = Task(name=name, length=60, load=20, channels=4, anisotropy=5.0)
    assert t.interface == Vectors(9, 4)
    batch = draw(t, 8, generator("linear", name))
    for inputs, labels, asked in zip(batch.inputs, batch.labels, batch.asked, strict=True):
        tokens = inputs.double()
        x, y = tokens[0:40:2, :4], tokens[1:40:2, 4:8]
        assert bool((tokens[:, 8] == 1).all())
        assert not tokens[1:40:2, :4].any()
        assert not tokens[40:, 4:8].any()
        function = torch.linalg.lstsq(x, y).solution
        assert asked.tolist() == [False] * 40 + [True] * 20
        # What float32 keeps of the examples, times how much solving for the function amplifies it.
        allowed = 20 * 2.0**-24 * float(torch.linalg.cond(x)) * float(y.abs().max())
        assert float((tokens[40:, :4] @ function - labels[40:]).abs().max()) < allowed


def test_regression_has_the_noise_and_the_axes_that_are_asked_for() -> None:
    sizes = {"length": 3000, "load": 1000, "channels": 4}
    quiet, noisy, static = (
        draw(Task(name=n, **sizes, anisotropy=8.0, noise=e), 6, generator("moments"))  # type: ignore[arg-type]
        for n, e in (("regression", 0.0), ("regression", 0.5), ("static_regression", 0.0))
    )
    assert torch.equal(quiet.inputs[:, 0:2000:2], noisy.inputs[:, 0:2000:2])
    assert torch.equal(quiet.labels[quiet.asked], noisy.labels[noisy.asked])
    shown = (noisy.inputs - quiet.inputs)[:, 1:2000:2, 4:8]
    assert float(shown.std()) == pytest.approx(0.5, rel=0.03)

    def covariance(batch: Batch, i: int) -> torch.Tensor:
        return batch.inputs[i, 0:2000:2, :4].T.cov()

    wanted = 8.0 ** (-2 * torch.arange(4) / 3)
    wanted = wanted / wanted.mean()
    for i in range(6):
        found = torch.linalg.eigvalsh(covariance(quiet, i)).flip(0)
        assert torch.allclose(found, wanted, rtol=0.2)
        assert torch.allclose(covariance(static, i).diag(), wanted, rtol=0.2)
    axes = [torch.linalg.eigh(covariance(quiet, i)).eigenvectors[:, -1] for i in range(6)]
    assert max(abs(float(a @ b)) for a in axes for b in axes if a is not b) < 0.999
    off = covariance(static, 0) - covariance(static, 0).diag().diag()
    assert float(off.abs().max()) < 0.2


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_control_is_the_same_task_but_for_what_training_can_learn(name: TaskName) -> None:
    t = task(name)
    control = t.control
    assert control is not None
    assert control.control is None
    assert control.model_dump(exclude={"name"}) == t.model_dump(exclude={"name"})
    assert control.interface == t.interface
    assert control.measure == t.measure
    assert control.smallest_length(5) == t.smallest_length(5)
    assert control.largest_load() == t.largest_load()
    one, two = (draw(x, 4, generator("control")) for x in (t, control))
    assert one.inputs.shape == two.inputs.shape
    assert int(one.asked.sum()) == int(two.asked.sum())


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


@pytest.mark.parametrize("name", WORDS)
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
    with pytest.raises(CompareError, match=r"vocabulary of 64 has keys for a load of at most 12"):
        draw(task("records", load=13, length=200), 1, generator(0))
    with pytest.raises(CompareError, match=r"there are names for a load of at most 16, got 17"):
        draw(task("entities", load=17, length=400), 1, generator(0))
    with pytest.raises(CompareError, match="No such file"):
        draw(Task(name="text", text=tmp_path / "none"), 1, generator(0))
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(CompareError, match="3 bytes"):
        draw(Task(name="text", text=tmp_path / "short"), 1, generator(0))


def test_the_hash_is_of_the_numbers() -> None:
    x = torch.tensor([[1, 2]])
    digest = hashlib.sha256(x.numpy().tobytes() * 2).hexdigest()
    assert data_hash(Batch(x, x)) == digest

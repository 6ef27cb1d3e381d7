"""One training run: everything that it needs is in its description, and its result is plain
data."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glazoo.compare.files import make_folder, write_bytes
from glazoo.compare.model import Model, ModelConfig, count_parameters, shape_for
from glazoo.compare.tasks import Batch, Task, data_hash, draw, generator
from glazoo.compare.timing import in_turns, seconds_of
from glazoo.layers.plasticity import PLASTICITY
from glazoo.spec import Spec

__all__ = [
    "Fitted",
    "Progress",
    "Run",
    "Training",
    "evaluate",
    "evaluate_batch",
    "evaluation_data",
    "evaluation_points",
    "fit",
    "step_seconds",
    "train",
]

Progress = Callable[[float, float], None]
"""Takes the share that is done and the current loss."""


class Training(BaseModel):
    """How every run trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: int = Field(default=600, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=32, ge=1)
    """Examples per step."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    curriculum: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps in which the load rises to the task's own; examples are shorter then."""
    start: float = Field(default=0.25, gt=0, le=1)
    """Share of the load at the beginning of the curriculum."""
    decay: float = Field(default=0.0, ge=0)
    """Weight decay."""
    momentum: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the gradient's mean and of its square's."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    examples: int = Field(default=0, ge=0)
    """Size of the training set; 0 draws fresh examples at every step."""
    eval_examples: int = Field(default=256, ge=1)
    """Examples per evaluation point."""
    data_seed: int = 0
    """Together with the run's seed it determines the training data."""


class Run(BaseModel):
    """One training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    label: str
    """Name in tables."""
    spec: Spec
    """The variant."""
    task: Task
    """What is learned."""
    model: ModelConfig
    """What all variants share."""
    training: Training
    """How all variants train."""
    mlp: int
    """Inner channels of the position-wise part, which make the parameters equal."""
    rate: float
    """Learning rate."""
    plasticity_rate: float = Field(default=1.0, ge=0)
    """Share of it that the plasticity, the factor of an importance gate, gets; 0 leaves it where it
    starts."""
    seed: int
    """Seed of parameters, and with the data seed of the training data."""
    selection: bool = False
    """Whether the run only serves to choose rates."""
    before: Run | None = None
    """The run whose weights this one goes on from, converted if its variant is another one."""
    kept: bool = False
    """Whether others go on from this run's weights."""
    impl: str = "auto"
    """Engine."""
    device: str = "cpu"
    """Device."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a changed copy, which has a key of its own."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("key", None)
        return copy

    @functools.cached_property
    def key(self) -> str:
        """Identifies the run by everything that determines its result."""
        described = self.model_dump(mode="json", exclude={"label", "before"})
        del described["model"]["name"]
        described["before"] = None if self.before is None else self.before.key
        text = json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def evaluation_points(task: Task) -> list[tuple[int, int]]:
    """Lists the loads and lengths at which a task is evaluated: its own load and fractions of it at
    its own length, and its own load at the shortest and at double the length."""
    if not task.resizable:
        return [(task.load, task.length)]
    loads = sorted({max(1, round(task.load * share)) for share in (0.25, 0.5, 0.75, 1.0)})
    points = [(load, task.length) for load in loads]
    points += [(task.load, n) for n in (task.smallest_length(task.load), 2 * task.length)]
    return sorted(set(points))


@functools.lru_cache(maxsize=16)
def evaluation_data(task: Task, examples: int) -> dict[tuple[int, int], Batch]:
    """Draws the examples of every evaluation point; they are the same for all runs."""
    return {
        (load, length): draw(
            task,
            examples,
            generator("evaluation", load, length),
            load=load,
            length=length,
            held_out=True,
        )
        for load, length in evaluation_points(task)
    }


def _step_batch(run: Run, step: int) -> Batch:
    """Draws the examples of one step: every variant of a seed sees the same."""
    task, t = run.task, run.training
    rising = t.curriculum * t.steps
    share = 1.0 if step >= rising else t.start * (1 / t.start) ** (step / rising)
    fixed = t.examples > 0
    index = step % max(1, t.examples // t.batch) if fixed else step
    purpose = "training" if run.before is None else "further training"
    rng = generator(purpose, t.data_seed, run.seed, index)
    if not task.resizable or share == 1.0 or fixed:
        return draw(task, t.batch, rng)
    # One or two pairs teach a place in the sequence rather than recall.
    load = min(task.load, max(4, round(task.load * share)))
    length = max(task.smallest_length(load), round(task.length * load / task.load))
    return draw(task, t.batch, rng, load=load, length=length)


def _losses(given: Tensor, wanted: Tensor) -> Tensor:
    """Return the loss of every answer: nats, or for vectors half the mean squared error."""
    if wanted.is_floating_point():
        return (given - wanted).square().mean(-1) / 2
    return F.cross_entropy(given, wanted, reduction="none")


def _loss(model: nn.Module, batch: Batch, device: str) -> Tensor:
    given = model(batch.inputs.to(device))[batch.asked.to(device)].float()
    return _losses(given, batch.labels[batch.asked].to(device)).mean()


@torch.no_grad()
def evaluate_batch(model: nn.Module, batch: Batch, device: str, size: int = 64) -> dict[str, Any]:
    """Return loss, accuracy and, where the task has groups, the accuracy of each. The accuracy of
    vectors is the share of their variance that is explained."""
    model.eval()
    asked, wanted = batch.asked, batch.labels[batch.asked]
    given = torch.cat(
        [
            model(inputs.to(device))[chosen.to(device)].float().cpu()
            for inputs, chosen in zip(batch.inputs.split(size), asked.split(size), strict=True)
        ]
    )
    model.train()
    losses = _losses(given, wanted)
    if wanted.is_floating_point():
        right = 1 - 2 * losses / wanted.square().mean()
    else:
        right = (given.argmax(-1) == wanted).float()
    out: dict[str, Any] = {"loss": float(losses.mean()), "accuracy": float(right.mean())}
    if batch.group is not None:
        group = batch.group[asked]
        out["groups"] = {str(g): float(right[group == g].mean()) for g in (0, 1)}
    return out


class Fitted(NamedTuple):
    """What training a model gave besides the model."""

    curve: list[dict[str, float]]
    """Loss and accuracy on held-out examples, by step."""
    tokens: int
    seconds: float
    """Of the steps alone."""
    diverged: bool


def fit(
    model: nn.Module, run: Run, progress: Progress | None = None, *, partial: Path | None = None
) -> Fitted:
    """Trains a model in place, on the run's task, data, learning rates and schedule.

    Args:
        model: a `Model`, new or trained before.
        run: how to train it.
        progress: called now and then.
        partial: a file that keeps where the training is, once a minute. What is there is gone on
            from, with the result that there would be without the interruption; at the end it is
            deleted.

    Returns:
        The learning curve and the cost.
    """
    t = run.training
    scales = [p for n, p in model.named_parameters() if n.endswith(PLASTICITY)]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1 and all(p is not s for s in scales)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": t.decay},
        {"params": others, "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "lr": run.rate * run.plasticity_rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=run.rate, betas=t.momentum)
    warm = max(1, round(t.warmup * t.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(
            (i + 1) / warm,
            0.5 * (1 + math.cos(math.pi * max(0, i - warm) / max(1, t.steps - warm))),
        ),
    )
    main = evaluation_data(run.task, t.eval_examples)[run.task.load, run.task.length]
    peek = Batch(*(None if x is None else x[:64] for x in main))  # type: ignore[arg-type]
    curve: list[dict[str, float]] = []
    every = max(1, t.steps // 12)
    first, tokens, computing, diverged = 0, 0, 0.0, False
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if partial is not None and partial.exists():
        at = torch.load(partial, map_location=run.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(at[name])  # type: ignore[attr-defined]
        first, tokens, computing, curve = at["step"], at["tokens"], at["seconds"], at["curve"]
    saved = time.monotonic()
    batches = _batches(run, first)
    for step in range(first, t.steps):
        batch = next(batches)
        before = time.perf_counter()
        loss = _loss(model, batch, run.device)
        if not torch.isfinite(loss):
            diverged = True
            break
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        if torch.isfinite(norm):
            optimizer.step()
        schedule.step()
        tokens += batch.asked.numel()
        computing += time.perf_counter() - before
        if (step + 1) % every == 0 or step + 1 == t.steps:
            point = evaluate_batch(model, peek, run.device)
            curve.append({"step": step + 1, "loss": point["loss"], "accuracy": point["accuracy"]})
        if progress is not None and step % 10 == 9:
            progress((step + 1) / t.steps, float(loss.detach()))
        if partial is not None and time.monotonic() - saved > _SAVE_EVERY:
            states = {n: x.state_dict() for n, x in parts.items()}  # type: ignore[attr-defined]
            counts = {"step": step + 1, "tokens": tokens, "seconds": computing, "curve": curve}
            _save(partial, states | counts)
            saved = time.monotonic()
    batches.close()
    if partial is not None:
        partial.unlink(missing_ok=True)
    return Fitted(curve, tokens, computing, diverged)


_SAVE_EVERY = 60.0
"""Seconds of training between two savings of where it is."""


def _batches(run: Run, first: int) -> Generator[Batch, None, None]:
    """Draws the examples of every step; for other devices one step ahead, while they compute."""
    steps = range(first, run.training.steps)
    if run.device == "cpu":
        yield from (_step_batch(run, step) for step in steps)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for step in steps:
            drawn = ahead or pool.submit(_step_batch, run, step)
            ahead = pool.submit(_step_batch, run, step + 1) if step + 1 in steps else None
            yield drawn.result()


def _save(path: Path, data: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    make_folder(path.parent)
    write_bytes(path, buffer.getvalue())


def step_seconds(run: Run) -> float:
    """Measures the seconds of one step of a run, its share of the evaluation included."""
    t = run.training
    # A processor's time is about proportional to the examples; a GPU's is not.
    batch = min(t.batch, 32) if run.device == "cpu" else t.batch
    small = run.model_copy(update={"training": t.model_copy(update={"batch": batch})})
    model = Model(run.spec, run.model, run.task.interface, mlp=run.mlp, impl=run.impl)
    model.to(run.device)

    def step() -> None:
        _loss(model, _step_batch(small, t.steps - 1), run.device).backward()

    once = functools.partial(seconds_of, step, run.device)
    (times,) = in_turns([once], seconds=0, least=2, most=2)
    asked = t.eval_examples * sum(length for _, length in evaluation_points(run.task))
    # A pass forwards takes about a third of a step.
    return min(times) * (t.batch / batch + asked / 3 / t.steps / run.task.length / batch)


def evaluate(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """Return load, length, loss and accuracy of a model at every evaluation point of the run's
    task, its own first."""
    held_out = evaluation_data(run.task, run.training.eval_examples)
    points = [
        {"load": load, "length": length} | evaluate_batch(model, batch, run.device)
        for (load, length), batch in held_out.items()
    ]
    own = (run.task.load, run.task.length)
    return sorted(points, key=lambda p: (p["load"], p["length"]) != own)


def train(
    run: Run, progress: Progress | None = None, *, folder: Path | None = None
) -> dict[str, Any]:
    """Trains one model and evaluates it.

    Args:
        run: what to train.
        progress: called now and then.
        folder: where weights that others go on from are kept, and where the training is; unset to
            keep nothing.

    Returns:
        The result as plain data: accuracy and loss at every evaluation point, the learning curve,
        sizes, time, and the hash of the evaluation data.

    Raises:
        CompareError: the task or the state budget does not fit, or a file cannot be written.
    """
    run.task.check()
    started, cpu = time.perf_counter(), time.process_time()
    model = _start(run, folder)
    if run.device != "cpu":
        torch.cuda.reset_peak_memory_stats(run.device)
    at_first = None if run.before is None else evaluate(model, run)[0]["accuracy"]
    partial = None if folder is None else folder / "partial" / f"{run.key}.pt"
    fitted = fit(model, run, progress, partial=partial)
    points = evaluate(model, run)
    if run.kept and folder is not None:
        _save(_weights(run, folder), model.state_dict())
    own = points[0]
    return {
        "key": run.key,
        "label": run.label,
        "task": run.task.name,
        "state_budget": run.model.state_bytes,
        "rate": run.rate,
        "plasticity_rate": run.plasticity_rate,
        "seed": run.seed,
        "selection": run.selection,
        "before": None if run.before is None else run.before.key,
        "accuracy_at_first": at_first,
        "accuracy": own["accuracy"],
        "loss": own["loss"],
        "plasticity": [
            round(float(x), 6)
            for name, p in model.named_parameters()
            if name.endswith(PLASTICITY)
            for x in p.detach()
        ],
        "diverged": fitted.diverged,
        "points": points,
        "curve": fitted.curve,
        "shape": shape_for(run.spec, run.model).model_dump(),
        "parameters": count_parameters(run.spec, run.model, run.task.interface, run.mlp),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": fitted.tokens,
        "tokens_per_second": fitted.tokens / fitted.seconds if fitted.seconds else 0.0,
        "peak_memory": _peak_memory(run.device),
        "data_hash": data_hash(*evaluation_data(run.task, run.training.eval_examples).values()),
        "first_batch_hash": data_hash(_step_batch(run, 0)),
    }


def _weights(run: Run, folder: Path) -> Path:
    return folder / "weights" / f"{run.key}.pt"


def _start(run: Run, folder: Path | None) -> Model:
    """Makes a run's model: new, or with the weights that it goes on from, and then what conversion
    adds is as it starts."""
    torch.manual_seed(run.seed)
    model = Model(run.spec, run.model, run.task.interface, mlp=run.mlp, impl=run.impl)
    if run.before is not None:
        weights = None if folder is None else _weights(run.before, folder)
        if weights is None or not weights.exists():
            source = _start(run.before, folder)
            fit(source, run.before)
            state = source.state_dict()
            if weights is not None:
                _save(weights, state)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        added, foreign = model.load_state_dict(state, strict=False)
        converted = run.spec != run.before.spec
        assert not foreign
        assert all(converted and ".metaplastic." in name for name in added)
    return model.to(run.device)


def _peak_memory(device: str) -> int:
    """Return the device's peak in bytes, on a CPU that of the whole process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        # Not on Windows.
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""One training run: everything that it needs is in its description, and its result is plain
data."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glazoo.compare.model import Model, ModelConfig, count_parameters, shape_for
from glazoo.compare.tasks import Batch, Task, data_hash, draw, generator
from glazoo.spec import Spec

__all__ = [
    "Fitted",
    "Progress",
    "Run",
    "Training",
    "evaluate",
    "evaluation_points",
    "fit",
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
    plasticity_rate: float = Field(default=1.0, ge=0)
    """Share of the learning rate that the plasticity, the factor of an importance gate, gets; 0
    leaves it where it starts."""
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
    seed: int
    """Seed of parameters, and with the data seed of the training data."""
    sweep: bool = False
    """Whether the run only serves to choose the learning rate."""
    impl: str = "auto"
    """Engine."""
    device: str = "cpu"
    """Device."""

    @property
    def key(self) -> str:
        """Identifies the run by everything that determines its result."""
        text = json.dumps(self.model_dump(mode="json", exclude={"label"}), sort_keys=True)
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


@functools.lru_cache(maxsize=2)
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
    rng = generator("training", t.data_seed, run.seed, index)
    if not task.resizable or share == 1.0 or fixed:
        return draw(task, t.batch, rng)
    # One or two pairs teach a place in the sequence rather than recall.
    load = min(task.load, max(4, round(task.load * share)))
    length = max(task.smallest_length(load), round(task.length * load / task.load))
    return draw(task, t.batch, rng, load=load, length=length)


def _losses(given: Tensor, wanted: Tensor) -> Tensor:
    """Gives the loss of every answer: nats, or for vectors half the mean squared error."""
    if wanted.is_floating_point():
        return (given - wanted).square().mean(-1) / 2
    return F.cross_entropy(given, wanted, reduction="none")


def _loss(model: nn.Module, batch: Batch, device: str) -> Tensor:
    given = model(batch.inputs.to(device))[batch.asked.to(device)].float()
    return _losses(given, batch.labels[batch.asked].to(device)).mean()


@torch.no_grad()
def _evaluate(model: nn.Module, batch: Batch, device: str, size: int = 64) -> dict[str, Any]:
    """Gives loss, accuracy and, where the task has groups, the accuracy of each. The accuracy of
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


def fit(model: nn.Module, run: Run, progress: Progress | None = None) -> Fitted:
    """Trains a model in place, on the run's task, data, learning rate and schedule.

    Args:
        model: a `Model`, new or trained before.
        run: how to train it.
        progress: called now and then.

    Returns:
        The learning curve and the cost.
    """
    t = run.training
    scales = [p for n, p in model.named_parameters() if n.endswith("importance.scale")]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1 and all(p is not s for s in scales)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": t.decay},
        {"params": others, "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "lr": run.rate * t.plasticity_rate},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=run.rate, betas=(0.9, 0.98)
    )
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
    tokens, computing, diverged = 0, 0.0, False
    for step in range(t.steps):
        batch = _step_batch(run, step)
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
        tokens += batch.inputs.numel()
        computing += time.perf_counter() - before
        if (step + 1) % every == 0 or step + 1 == t.steps:
            at = _evaluate(model, peek, run.device)
            curve.append({"step": step + 1, "loss": at["loss"], "accuracy": at["accuracy"]})
        if progress is not None and step % 10 == 9:
            progress((step + 1) / t.steps, float(loss.detach()))
    return Fitted(curve, tokens, computing, diverged)


def evaluate(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """Gives load, length, loss and accuracy of a model at every evaluation point of the run's task,
    its own first."""
    held_out = evaluation_data(run.task, run.training.eval_examples)
    points = [
        {"load": load, "length": length} | _evaluate(model, batch, run.device)
        for (load, length), batch in held_out.items()
    ]
    own = (run.task.load, run.task.length)
    return sorted(points, key=lambda p: (p["load"], p["length"]) != own)


def train(run: Run, progress: Progress | None = None) -> dict[str, Any]:
    """Trains one model and evaluates it.

    Args:
        run: what to train.
        progress: called now and then.

    Returns:
        The result as plain data: accuracy and loss at every evaluation point, the learning curve,
        sizes, time, and the hash of the evaluation data.

    Raises:
        CompareError: the task or the state budget does not fit.
    """
    run.task.check()
    shape = shape_for(run.spec, run.model)
    torch.manual_seed(run.seed)
    model = Model(run.spec, run.model, run.task.interface, mlp=run.mlp, impl=run.impl)
    model.to(run.device)
    if run.device != "cpu":
        torch.cuda.reset_peak_memory_stats(run.device)
    started, cpu = time.perf_counter(), time.process_time()
    fitted = fit(model, run, progress)
    points = evaluate(model, run)
    own = points[0]
    return {
        "key": run.key,
        "label": run.label,
        "task": run.task.name,
        "state_budget": run.model.state_bytes,
        "rate": run.rate,
        "seed": run.seed,
        "sweep": run.sweep,
        "accuracy": own["accuracy"],
        "loss": own["loss"],
        "diverged": fitted.diverged,
        "points": points,
        "curve": fitted.curve,
        "shape": shape.model_dump(),
        "parameters": count_parameters(run.spec, run.model, run.task.interface, run.mlp),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": fitted.tokens,
        "tokens_per_second": fitted.tokens / fitted.seconds if fitted.seconds else 0.0,
        "peak_memory": _peak_memory(run.device),
        "data_hash": data_hash(*evaluation_data(run.task, run.training.eval_examples).values()),
        "first_batch_hash": data_hash(_step_batch(run, 0)),
    }


def _peak_memory(device: str) -> int:
    """Gives the device's peak in bytes, on a CPU that of the whole process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        # Not on Windows.
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

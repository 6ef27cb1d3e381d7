"""The main job from end to end on this machine: train, convert, verify, fine-tune, compare."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from glazoo.strictjson import dumps, loads
from glazoo.terminal import console

__all__ = ["demo"]

_TOKENS, _BATCH, _EVAL_BATCHES = 128, 8, 16


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table."""

    model: str
    parameters: int
    trained: int
    state_bytes: int
    max_logit_change: float | None
    loss: float
    seconds: float


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for models, reports and results.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the source.")] = 1000,
    tune_steps: Annotated[int, typer.Option(min=1, help="Fine-tuning steps of every model.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train a small Mamba2 on real text, convert it, verify equality, fine-tune, and compare.

    The text ships with Python (the reference of the language, read as bytes). The source is
    transformers' own Mamba2; conversion runs the command `glazoo convert --verify`.
    """
    import transformers

    import glazoo.models  # noqa: F401  (registers the converted model's classes)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    text = _text()
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()
    _say(f"text: {len(text):,} bytes of Python's language reference (sha256 {digest[:12]})")

    torch.manual_seed(seed)
    config = transformers.Mamba2Config(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        state_size=16,
        num_heads=4,
        head_dim=64,
        n_groups=1,
        expand=2,
        chunk_size=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    source: nn.Module = transformers.Mamba2ForCausalLM(config)
    seconds = _train(source, source.parameters(), train, steps, 2e-3, seed, "training the source")
    source_dir, converted_dir = out / "source", out / "converted"
    source.save_pretrained(source_dir)  # type: ignore[operator]
    source_loss = _loss(source, held_out)

    _say(f"glazoo convert {source_dir} {converted_dir} --verify")
    report = _convert(source_dir, converted_dir)
    change = max(c["max_difference"] or 0.0 for c in report["verify"]["checks"])
    passed = report["verify"]["passed"]
    before, after = report["state_bytes_source"], report["state_bytes_converted"]
    parameters = sum(p.numel() for p in source.parameters())

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(converted_dir)

    converted = load()
    total = sum(p.numel() for p in converted.parameters())
    rows = [
        Row("source", parameters, parameters, before, None, source_loss, seconds),
        Row("converted", total, 0, after, change, _loss(converted, held_out), report["seconds"]),
    ]
    gates = [p for name, p in converted.named_parameters() if ".metaplastic." in name]
    label = f"tuning {sum(p.numel() for p in gates):,} gate parameters"
    seconds = _train(converted, gates, train, tune_steps, 1e-2, seed + 1, label)
    rows.append(_tuned("converted, gates tuned", converted, gates, after, held_out, seconds))
    kappas = torch.cat(
        [p.detach() for n, p in converted.named_parameters() if n.endswith("b_scale")]
    )

    everything = load()
    seconds = _train(
        everything, everything.parameters(), train, tune_steps, 1e-3, seed + 1, "tuning converted"
    )
    rows.append(
        _tuned(
            "converted, all tuned", everything, everything.parameters(), after, held_out, seconds
        )
    )
    seconds = _train(
        source, source.parameters(), train, tune_steps, 1e-3, seed + 1, "tuning the source"
    )
    rows.append(_tuned("source, all tuned", source, source.parameters(), before, held_out, seconds))

    total_seconds = time.perf_counter() - started
    _show(rows, tune_steps, passed)
    opened = int((kappas > 0).sum())
    _say(
        f"{opened} of {kappas.numel()} heads opened their importance gate while the gates were "
        f"tuned (plasticity up to {float(kappas.max()):.3f})"
    )
    results = {
        "rows": [asdict(r) for r in rows],
        "steps": steps,
        "tune_steps": tune_steps,
        "seed": seed,
        "text_sha256": digest,
        "verified": passed,
        "plasticity": kappas.tolist(),
        "seconds": total_seconds,
        "conversion": report,
    }
    (out / "demo.json").write_text(dumps(results, indent=2) + "\n")
    _say(f"{total_seconds:.0f} s in all; models, reports and demo.json are in {out}")
    if not passed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    console().print(line, highlight=False, soft_wrap=True)


def _text() -> Tensor:
    """Gives the text of Python's own language reference as bytes."""
    from pydoc_data import topics

    joined = "\n\n".join(topics.topics[k] for k in sorted(topics.topics))
    return torch.tensor(list(joined.encode()), dtype=torch.uint8)


def _batch(text: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - _TOKENS, (_BATCH,), generator=generator)
    return torch.stack([text[s : s + _TOKENS] for s in starts.tolist()]).long()


def _train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    text: Tensor,
    steps: int,
    rate: float,
    seed: int,
    label: str,
) -> float:
    """Trains the given parameters with AdamW and a cosine schedule; gives the seconds it took."""
    chosen = list(parameters)
    kept = {id(p) for p in chosen}
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / 10, 0.5 * (1 + math.cos(math.pi * i / steps))),
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    started = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=steps)
        for _ in range(steps):
            tokens = _batch(text, generator)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bars.update(task, advance=1, description=f"{label}, loss {loss.item():.3f}")
    return time.perf_counter() - started


@torch.no_grad()
def _loss(model: nn.Module, text: Tensor) -> float:
    """Gives the mean loss per byte, in nats, over fixed windows of the held-out text."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(_EVAL_BATCHES):
        tokens = _batch(text, generator)
        losses.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss.item())
    return float(sum(losses) / len(losses))


def _tuned(
    name: str,
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    state_bytes: int,
    held_out: Tensor,
    seconds: float,
) -> Row:
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained)
    return Row(name, total, count, state_bytes, None, _loss(model, held_out), seconds)


def _convert(source: Path, converted: Path) -> Any:
    """Runs the command line, as a user would."""
    command = [sys.executable, "-P", "-m", "glazoo.cli", "convert", str(source), str(converted)]
    done = subprocess.run(
        [*command, "--verify", "--force", "--json"], capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise ValueError(f"the conversion failed: {done.stderr.strip()}")
    return loads(done.stdout)


def _show(rows: list[Row], tune_steps: int, passed: bool) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        title=f"Mamba2, its metaplastic form, and both after {tune_steps} more steps",
    )
    table.add_column("model")
    for column in (
        "parameters",
        "trained",
        "state of a sequence\n(bytes)",
        "max logit change\nat conversion",
        "held-out loss\n(nats per byte)",
        "seconds",
    ):
        table.add_column(column, justify="right")
    for r in rows:
        change = "" if r.max_logit_change is None else f"{r.max_logit_change:.1e}"
        table.add_row(
            r.model,
            f"{r.parameters:,}",
            f"{r.trained:,}",
            f"{r.state_bytes:,}",
            change,
            f"{r.loss:.4f}",
            f"{r.seconds:.1f}",
        )
    console().print(table)
    verdict = "agree" if passed else "DIFFER"
    _say(
        f"verified: source and converted model {verdict} within float32 rounding (prefill, left "
        "padding, cached decoding, continuation, greedy and beam search)"
    )


if __name__ == "__main__":
    typer.run(demo)

r"""A small language model of every variant asked for, to convert, calibrate and measure on.

    python benchmarks/language_model.py mamba2 gated_deltanet --text TEXT --out build/language_model

The texts are UTF-8 files or folders of them, gzip or not, joined in the order of their names. The
committed curves come from the Markdown files of the Debian package `anarchism` (11.7 MB of prose):

    apt-get download anarchism && dpkg -x anarchism_*.deb corpus
    python benchmarks/language_model.py mamba2 gated_deltanet \
        --text corpus/usr/share/doc/anarchism/markdown

`--jobs` and `--cluster` train several at once. A repeat goes on where the last one stopped. Weights
stay in `--out`; the recipe and the loss curve go to `benchmarks/results/language_model/`.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from glazoo.compare.commands.options import ClusterOptions, OnCluster
from glazoo.compare.workers import Failed, Finished, pool_for, run_all
from glazoo.training import Data, TrainConfig, run
from glazoo.versions import stated

RESULTS = Path(__file__).parent / "results" / "language_model"

MODEL = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "head_k_dim": 32,
    "head_v_dim": 48,
    "tie_word_embeddings": True,
}
LENGTH, BATCH = 256, 16


def texts(paths: Iterable[Path]) -> Iterator[str]:
    """Return the texts of files and folders, in the order of their names."""
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inside:
            data = file.read_bytes()
            yield (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")


@dataclass(frozen=True)
class Model:
    """One language model to train."""

    key: str
    """Its variant."""
    out: Path
    """Folder of the models and of their text."""
    steps: int
    rate: float

    @property
    def folder(self) -> Path:
        """Where it is saved."""
        return self.out / self.key


def train(model: Model, report: Callable[[float, float], None]) -> dict[str, Any]:
    """Train a model, and return its recipe and loss curve."""
    folder, corpus = model.folder, model.out / "corpus.txt"
    training: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": model.steps,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": model.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(100, model.steps // 10),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 50,
        "eval_strategy": "no",
        "save_steps": 250,
        "save_total_limit": 1,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }
    config = TrainConfig(
        model={"pattern": model.key, **MODEL},
        data=Data(files=(corpus,), length=LENGTH, validation=0.02),
        training=training,
    )
    began = time.time()
    resume = any(folder.glob("checkpoint-*"))
    found = run(
        config, resume=resume, progress=lambda _, step, steps: report(step / steps, math.nan)
    )
    curve = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "variant": model.key,
        "model": MODEL,
        "data": {"bytes": corpus.stat().st_size, "length": LENGTH, "validation": 0.02},
        "training": {k: v for k, v in training.items() if k != "output_dir"},
        "versions": stated("torch", "transformers"),
        "eval_loss": found["eval_loss"],
        "seconds": round(time.time() - began),
        "resumed": resume,
        "loss": [[row["step"], row["loss"]] for row in curve if "loss" in row],
    }


def main(
    variants: Annotated[list[str], typer.Argument(help="Specs of the models.")],
    text: Annotated[list[Path], typer.Option(help="A text, or a folder of texts; again for more.")],
    out: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("build/language_model"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 800,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    jobs: Annotated[int, typer.Option(min=1, help="Models at once.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one process.")] = 1,
    cluster: OnCluster = None,
    cluster_option: ClusterOptions = None,
    results: Annotated[Path, typer.Option(help="Folder of the loss curves.")] = RESULTS,
) -> None:
    """Train one small language model on bytes per variant."""
    out = out.absolute()
    for folder in (out, results):
        folder.mkdir(parents=True, exist_ok=True)
    corpus = out / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("\n".join(texts(text)), "utf-8")
    models = []
    for model in (Model(name, out, steps, rate) for name in variants):
        if (model.folder / "model.safetensors").exists():
            print(f"{model.key}: {model.folder} is trained already")
        else:
            models.append(model)
    options = cluster_option or ()
    pool = pool_for(cluster, out, jobs=jobs, threads=threads, options=options)
    with closing(run_all(models, pool=pool, threads=threads, work=train)) as events:
        for event in events:
            name = event.run.key
            if isinstance(event, Finished):
                record = event.result
                (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
                print(f"{name}: {record['eval_loss']:.3f} nats a byte on the held-out text")
            elif isinstance(event, Failed):
                print(f"{name}: {event.reason}" + ("; it starts again" if event.again else ""))
            else:
                print(f"{name}: {100 * event.share:.0f} %", flush=True)


if __name__ == "__main__":
    typer.run(main)

r"""A small language model of every variant asked for, to convert, calibrate and measure on.

    python benchmarks/language_model.py mamba2 gated_deltanet --text TEXT --out build/language_model

The texts are UTF-8 files or folders of them, gzip or not, joined in the order of their names. The
committed curves come from the Markdown files of the Debian package `anarchism` (11.7 MB of prose):

    apt-get download anarchism && dpkg -x anarchism_*.deb corpus
    python benchmarks/language_model.py mamba2 gated_deltanet \
        --text corpus/usr/share/doc/anarchism/markdown

A repeat goes on where the last one stopped. Weights stay in `--out`; the recipe and the loss curve
go to `benchmarks/results/language_model/`.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

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


def main(
    variants: Annotated[list[str], typer.Argument(help="Specs of the models.")],
    text: Annotated[list[Path], typer.Option(help="A text, or a folder of texts; again for more.")],
    out: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("build/language_model"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 800,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one process.")] = 1,
) -> None:
    """Train one small language model on bytes per variant."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    corpus = out / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("\n".join(texts(text)), "utf-8")
    for name in variants:
        folder = out / name
        training: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(100, steps // 10),
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
            model={"pattern": name, **MODEL},
            data=Data(files=(corpus.absolute(),), length=LENGTH, validation=0.02),
            training=training,
        )
        began = time.time()
        resume = any(folder.glob("checkpoint-*"))
        if (folder / "model.safetensors").exists():
            print(f"{name}: {folder} is trained already")
            continue
        found = run(config, resume=resume)
        curve = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        record = {
            "variant": name,
            "model": MODEL,
            "data": {"bytes": corpus.stat().st_size, "length": LENGTH, "validation": 0.02},
            "training": {k: v for k, v in training.items() if k != "output_dir"},
            "versions": stated("torch", "transformers"),
            "eval_loss": found["eval_loss"],
            "seconds": round(time.time() - began),
            "resumed": resume,
            "loss": [[row["step"], row["loss"]] for row in curve if "loss" in row],
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {found['eval_loss']:.3f} nats a byte on the held-out text")


if __name__ == "__main__":
    typer.run(main)

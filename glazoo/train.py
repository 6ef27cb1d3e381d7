"""`glazoo train`: a language model of any specs, on one device or many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from glazoo.errors import extra

with extra("cli"):
    import typer

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file: [model], [data], [training].")],
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
) -> None:
    """Train a language model; run it under torchrun or accelerate launch for several devices."""
    from glazoo.training import read_config, run

    metrics = run(read_config(config), resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return
    for name in sorted(metrics):
        typer.echo(f"{name} = {metrics[name]:.6g}")


if __name__ == "__main__":
    # What torchrun starts: torchrun --nproc-per-node 8 -m glazoo.train CONFIG
    typer.run(train)

"""`glazoo train`: a language model of any specs, on one device or many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from glazoo.errors import extra
from glazoo.terminal import AsJson, print_json, refusals, step_progress

with extra("cli"):
    import typer

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file: [model], [data], [training].")],
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Read the data, make the model, say what would be trained; no more."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a language model of any specs.

    Run it under torchrun or accelerate launch for several devices.
    """
    from glazoo.training import prepare, read_config, run

    first = os.environ.get("RANK", "0") == "0"
    settings = read_config(config)
    with step_progress(quiet=as_json or not first) as report:
        if dry_run:
            found = prepare(settings, resume=resume).to_json()
        else:
            metrics = run(settings, resume=resume, progress=report)
            found = {"output_dir": settings.training["output_dir"], "metrics": metrics}
    if not first:
        return
    if as_json:
        print_json(found)
        return
    shown = found if dry_run else found["metrics"]
    for name in sorted(shown):
        value = shown[name]
        typer.echo(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")


if __name__ == "__main__":
    # What torchrun starts: torchrun --nproc-per-node 8 -m glazoo.train CONFIG
    with refusals():
        typer.run(train)

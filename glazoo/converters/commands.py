"""`glazoo convert`, `glazoo tune` and `glazoo inspect`: checkpoint folders into metaplastic form
and back, their training, and where they stand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from glazoo.converters.report import Report
from glazoo.errors import ConversionError
from glazoo.terminal import AsJson, console, heat_map, print_json, progress, step_progress

__all__ = ["convert", "inspect", "tune"]

Column = Annotated[str, typer.Option(help="The data set's column with the text.")]
Split = Annotated[
    str | None, typer.Option(help="The data set's split. Default: train, or the only one.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder with a tokenizer, or bytes. Default: the model's.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace a model's folder that is already at DST.")
]
ReportFile = Annotated[
    Path | None,
    typer.Option(help="Write the report to this file: JSON, or Markdown if it ends in .md."),
]


def convert(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder of the model to convert; with --import also a file."
        ),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    *,
    plasticity: Annotated[
        float,
        typer.Option(
            metavar="KAPPA",
            help="Where on the continuum to start: 0 is the source, 1 the full metaplastic form. "
            "Sources that subtract no prediction accept more.",
        ),
    ] = 0.0,
    gate: Annotated[
        Literal["value", "head"] | None,
        typer.Option(
            help="One importance vector over keys per head, or one importance per synapse (the "
            "published form, twice the state). Default: head."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the importance gate. Default: width / 16, max 128.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to convert, for example 0,2-5. Default: all that can be.")
    ] = "all",
    gain: Annotated[
        Literal["first_order", "exact"] | None,
        typer.Option(
            help="Learning rate of a delta rule; both start at the source. Default: exact, the "
            "posterior's, where the family has it."
        ),
    ] = None,
    precision: Annotated[
        Literal["diagonal", "isotropic", "full"] | None,
        typer.Option(
            help="What importance is: a vector over keys, one number per head, or a matrix over "
            "keys (the strongest form; K more channels of state). Default: diagonal."
        ),
    ] = None,
    basis: Annotated[
        Literal["own", "rotated"] | None,
        typer.Option(
            help="Axes of a vector of importances: the keys' own, or orthogonal ones that train. "
            "Default: own."
        ),
    ] = None,
    forgetting: Annotated[
        Literal["temper", "diffuse"] | None,
        typer.Option(
            help="How a decay acts on importance: old evidence fades, or the variance grows as in "
            "a Kalman filter. Default: temper where it is sound."
        ),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --basis rotated: a text, or a folder with a data set, whose keys give the "
            "axes; again for more texts. The model then has to fit into memory."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="For --calibrate: a folder with a tokenizer, or bytes. Default: SRC's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the importance gate's projection.")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Write the source's weights in this dtype. Default: as they are."),
    ] = None,
    link: Annotated[
        bool,
        typer.Option("--link/--copy", help="Hard-link the source's weights if possible, or copy."),
    ] = True,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code/--no-remote-code",
            help="Write a module for loaders with trust_remote_code, which then need no import.",
        ),
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare source and converted model; needs both in memory."),
    ] = False,
    float64: Annotated[
        bool, typer.Option("--float64", help="With --verify: compare in float64 too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and report only; read headers, write nothing.")
    ] = False,
    revert: Annotated[
        bool, typer.Option("--revert", help="SRC is a converted folder: give its source back.")
    ] = False,
    import_: Annotated[
        bool,
        typer.Option(
            "--import",
            help="SRC is a checkpoint of the original state-spaces/mamba code or of "
            "flash-linear-attention, or a file of RWKV-5.2, 6 or 7 (.pth, or rwkv.cpp's .bin): "
            "write it as a folder that loads here, not converted yet.",
        ),
    ] = False,
    characters: Annotated[
        str | None,
        typer.Option(
            help="With --import, where SRC brings no tokenizer: the model's tokens, a character "
            "each, in the order of their ids. A model of 256 tokens reads bytes without it."
        ),
    ] = None,
    force: Force = False,
    clean: Annotated[
        bool,
        typer.Option("--remove-leftovers", help="Remove what killed runs have left beside DST."),
    ] = False,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model's folder into its metaplastic form, or back.

    What it computes does not change until its gates are trained, or --plasticity opens them.

    With --verify, the reports verify.json and verify.md are written into DST/glazoo, and the exit
    code is 1 if source and converted model differ by more than rounding.
    """
    from glazoo.converters.convert import convert_checkpoint
    from glazoo.converters.files import leftover_warnings, remove_leftovers
    from glazoo.converters.revert import revert_checkpoint

    destination = Path(os.path.abspath(dst))
    if clean and not dry_run and destination.parent.is_dir():
        # Before anything is written: they may hold the room that it needs.
        for gone in remove_leftovers(destination.parent, destination.name):
            Console(stderr=True, quiet=as_json).print(Text(f"removed {gone}"), soft_wrap=True)
    if import_:
        from glazoo.converters.imports.folder import import_original

        if dry_run or verify or revert or report is not None or dtype is not None:
            raise ConversionError("--import goes with --characters and --force only")
        import_original(src, dst, characters=characters, force=force)
        if as_json:
            print_json({"source": str(src), "destination": str(dst)})
        else:
            console().print(Text(f"{src} imported into {dst}: convert that folder now"))
        for warning in leftover_warnings(destination):
            Console(stderr=True).print(Text(warning), soft_wrap=True)
        return
    if characters is not None:
        raise ConversionError("--characters goes with --import")
    results: list[Report] = []
    passed = True
    with progress(quiet=as_json, of_bytes=True) as shown:
        if revert:
            if dry_run or verify or dtype is not None:
                raise ConversionError("--revert goes with none of --dry-run, --verify and --dtype")
            results.append(revert_checkpoint(src, dst, link=link, force=force, progress=shown))
        else:
            results.append(
                convert_checkpoint(
                    src,
                    dst,
                    plasticity=plasticity,
                    gate=gate,
                    rank=rank,
                    layers=_layers(layers),
                    seed=seed,
                    gain=gain,
                    precision=precision,
                    basis=basis,
                    forgetting=forgetting,
                    calibrate=calibrate or (),
                    tokenizer=tokenizer,
                    dtype=dtype,
                    link=link,
                    remote_code=remote_code,
                    dry_run=dry_run,
                    force=force,
                    progress=shown,
                )
            )
    if verify and not dry_run:
        from glazoo.converters.verify import verify_checkpoint

        status = Console(stderr=True, quiet=as_json)
        with status.status("loading both models") as line:
            verified = verify_checkpoint(
                src, dst, float64=float64, progress=lambda stage: line.update(stage)
            )
        for name in ("verify.json", "verify.md"):
            verified.write(dst / "glazoo" / name)
        results.append(verified)
        passed = verified.passed
    if report is not None:
        results[-1 if verify else 0].write(report)
    if as_json:
        merged = results[0].to_json()
        if len(results) > 1:
            merged["verify"] = results[1].to_json()
        print_json(merged)
    else:
        for result in results:
            console().print(Markdown(result.to_markdown()))
    if not passed:
        raise typer.Exit(1)


def _layers(text: str) -> list[int] | None:
    """Reads a list like 0,2-5."""
    if text == "all":
        return None
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConversionError(f"layers: got {text!r}, accepted are 'all' or numbers like 0,2-5")
        out += range(int(first), int(last or first) + 1)
    return out


def tune(
    src: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a metaplastic model.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    texts: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT...",
            help="UTF-8 text files, or one folder with a Hugging Face data set (save_to_disk, or "
            "parquet, JSON, CSV or text files).",
        ),
    ],
    *,
    recipe: Annotated[
        Literal["gates", "whole"],
        typer.Option(
            help="Named settings, which the options below replace: gates and priors alone; or the "
            "whole model at the --lr of the source's own training, its plasticity at ten times "
            "that."
        ),
    ] = "gates",
    everything: Annotated[
        bool, typer.Option("--all", help="Train every parameter, not only gates and priors.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: 200.")] = None,
    batch: Annotated[int, typer.Option(help="Examples per step and device.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per example.")] = 512,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Default: 1e-2, or 1e-5 with --all.")
    ] = None,
    plasticity_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the learning rate that the plasticity gets. Default: 1, or 10 of a "
            "whole."
        ),
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the examples that is kept for evaluation.")
    ] = 0.05,
    column: Column = "text",
    split: Split = None,
    validation_split: Annotated[
        str | None,
        typer.Option(
            help="The data set's split for evaluation. Default: validation, or the end of the text."
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints, for --resume; 0 for none.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the examples.")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Dtype of weights that stay.")
    ] = "float32",
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
    force: Force = False,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Train the importance gates of a metaplastic model on texts.

    It writes a new folder. The model is one that `glazoo convert` wrote, or `glazoo train` from
    metaplastic specs.
    """
    from glazoo.converters.tune import tune_checkpoint

    with step_progress(quiet=as_json) as shown:
        result = tune_checkpoint(
            src,
            dst,
            texts,
            recipe=recipe,
            everything=everything,
            steps=steps,
            batch=batch,
            length=length,
            learning_rate=learning_rate,
            plasticity_rate=plasticity_rate,
            validation=validation,
            column=column,
            split=split,
            validation_split=validation_split,
            tokenizer=tokenizer,
            checkpoint_every=checkpoint_every,
            resume=resume,
            seed=seed,
            dtype=dtype,
            cpu=cpu,
            force=force,
            progress=shown,
        )
    if report is not None:
        result.write(report)
    if as_json:
        print_json(result.to_json())
    else:
        console().print(Markdown(result.to_markdown()))


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a metaplastic model.")],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="UTF-8 text files, or one folder with a data set, to measure on.",
        ),
    ] = None,
    *,
    tokenizer: Tokenizer = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the texts that are read at most.")] = 2048,
    column: Column = "text",
    split: Split = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw heat maps, layers by heads, into this file; their numbers go into a CSV "
            "beside it.",
        ),
    ] = None,
    save_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Write every layer's keys over the texts, for glazoo capacity --keys FILE.npz.",
        ),
    ] = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Show where each head stands between source and metaplastic.

    The model is one that `glazoo convert` wrote, or `glazoo train` from metaplastic specs.
    With texts: effective window, importance gate and the share of synapses whose importance exceeds
    the prior.
    """
    from glazoo.converters.examine import inspect_model
    from glazoo.converters.picture import check_plot, write_plot

    if plot is not None:
        check_plot(plot)
    result = inspect_model(
        folder,
        texts or (),
        tokenizer=tokenizer,
        tokens=tokens,
        column=column,
        split=split,
        keys=save_keys,
    )
    if report is not None:
        result.write(report)
    table = None if plot is None else write_plot(result, plot)
    if as_json:
        print_json(result.to_json())
        return
    out = console()
    out.print(Markdown(result.to_markdown()))
    maps = [("plasticity kappa", {g.layer: g.kappa for g in result.gates}, 1.0)]
    if result.use:
        shares = {u.layer: u.consolidated for u in result.use}
        maps.append(("share of synapses above the prior", shares, 1.0))
    for title, rows, top in maps:
        out.print(heat_map(title, rows, top))
    if plot is not None:
        out.print(Text(f"heat maps: {plot}, their numbers: {table}"))

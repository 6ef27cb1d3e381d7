"""`glazoo bench`: speed and memory of variants on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich import box
from rich.table import Table

from glazoo.compare.bench import MODES, BenchPlan, Measurement, measure
from glazoo.compare.commands.options import (
    Gain,
    GateShape,
    Metaplastic,
    Names,
    check_device,
    command_line,
    known,
    load_specs,
)
from glazoo.compare.files import make_folder, write_csv, write_json
from glazoo.compare.machine import machine, versions
from glazoo.engines import NAMES, available
from glazoo.terminal import AsJson, console, print_json, progress

__all__ = ["bench"]


def bench(
    names: Names,
    *,
    metaplastic: Metaplastic = False,
    gate: GateShape = "spec",
    gain: Gain = "spec",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(NAMES)}; again for more. Default: those that compute on a CPU here, "
            "but for the reference.",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="train, prefill or decode; give it again for more. Default: all."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 4,
    key_size: Annotated[int, typer.Option(min=1, help="Key channels per head.")] = 64,
    value_size: Annotated[int, typer.Option(min=1, help="Value channels per head.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"],
        typer.Option(help="Of queries, keys and values; gates are float32."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time to spend on each measurement.")
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench.json and bench.csv. Default: none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the recurrence of each variant on this machine.

    Training, prefill and decoding. Each engine is first compared with the reference. Memory is what
    autograd keeps for the backward pass and, on a GPU, the peak.
    """
    engines = engine or [e for e in available() if e != "reference"]
    for e in engines:
        known("engine", e, NAMES)
    for m in mode or ():
        known("mode", m, MODES)
    modes = [m for m in MODES if not mode or m in mode]
    check_device(device)
    specs = load_specs(names, metaplastic, gate, gain)
    if out is not None:
        make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    plans = [
        BenchPlan(
            spec,
            name,
            e,
            m,
            batch,
            tokens,
            heads,
            key_size,
            value_size,
            getattr(torch, dtype),
            device,
            seconds,
        )
        for name, spec in specs.items()
        for e in engines
        for m in modes
    ]
    results: list[Measurement] = []
    with progress(quiet=as_json) as report:
        for plan in plans:
            what = f"timing {plan.label}, {plan.engine}, {plan.mode}"
            report(what, len(results), len(plans))
            results.append(measure(plan))
    data = {
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "heads": heads,
        "key_size": key_size,
        "value_size": value_size,
        "dtype": dtype,
        "device": device,
        "measurements": [r.to_json() for r in results],
    }
    if out is not None:
        write_json(out / "bench.json", data)
        write_csv(out / "bench.csv", [r.to_json() for r in results])
    if as_json:
        print_json(data)
        return
    view = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in ("variant", "engine", "mode"):
        view.add_column(column, no_wrap=True)
    for column in (
        "tokens\nper call",
        "ms per call\n(p20 / p50 / p80)",
        "tokens/s",
        "state\n(KiB)",
        "kept for backward\n(MiB)",
        "GPU peak\n(MiB)",
        "error against\nthe reference",
    ):
        view.add_column(column, justify="right", no_wrap=True)
    for r in results:
        if r.failure:
            continue
        view.add_row(
            r.label,
            r.engine,
            r.mode,
            f"{batch} x {r.tokens}",
            " / ".join(f"{x:.3g}" for x in r.milliseconds),
            f"{r.tokens_per_second:,.0f}",
            f"{r.state_bytes / 1024:,.0f}",
            f"{r.saved_bytes / 2**20:,.1f}" if r.saved_bytes else "",
            "" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:,.1f}",
            "" if r.error is None else f"{r.error:.1e}",
        )
    if not all(r.failure for r in results):
        console().print(view)
    failures = dict.fromkeys(f"{r.label}, {r.engine}: {r.failure}" for r in results if r.failure)
    for failure in failures:
        console().print(f"no measurement of {failure}", style="yellow")
    console().print(
        f"{machine()}; {torch.get_num_threads()} threads; {heads} heads, K = {key_size}, "
        f"V = {value_size}, {dtype} on {device}"
    )

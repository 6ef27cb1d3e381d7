"""What these commands share: options, and what is read from them."""

from __future__ import annotations

import difflib
import shlex
import sys
from typing import Annotated, Any, Literal

import torch
import typer

from glazoo.compare.errors import CompareError
from glazoo.engines import NAMES
from glazoo.spec import Spec, metaplasticize
from glazoo.zoo import completions, load

__all__ = [
    "ClusterOptions",
    "Gain",
    "GateShape",
    "Impl",
    "Jobs",
    "Metaplastic",
    "Names",
    "OnCluster",
    "Plots",
    "Seed",
    "check_device",
    "command_line",
    "integers",
    "known",
    "load_specs",
    "numbers",
]

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...",
        help="Variants, metaplastic_NAME, or paths to .toml files.",
        autocompletion=completions,
    ),
]
Metaplastic = Annotated[
    bool, typer.Option("--metaplastic", help="Also measure every variant's metaplastic form.")
]
GateShape = Annotated[
    Literal["spec", "head", "value"],
    typer.Option(
        "--gate",
        help="With --metaplastic: importance per head's keys, per synapse, or what the variant's "
        "own counterpart has.",
    ),
]
Gain = Annotated[
    Literal["spec", "first_order", "exact"],
    typer.Option(
        "--gain",
        help="With --metaplastic: learning rate of the forms that subtract their prediction, or "
        "what the variant's own counterpart has.",
    ),
]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures (matplotlib).")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random draws.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per CPU core.")]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Run as jobs of a cluster, by submitit: slurm, or local to try it here. --jobs are "
        "then those that run or wait at once, 32 by default.",
    ),
]
ClusterOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--cluster-option",
        metavar="NAME=VALUE",
        help="Of these jobs, like slurm_partition=gpu, timeout_min=600, mem_gb=8; again for more.",
    ),
]
Impl = Annotated[str, typer.Option(help=f"Engine: auto, {', '.join(NAMES)}.")]


def load_specs(names: list[str], metaplastic: bool, gate: str, gain: str) -> dict[str, Spec]:
    """Return specs by label; with `metaplastic`, each is followed by its counterpart.

    Raises:
        CompareError: two different specs have one name.
        SpecError: a spec cannot be loaded.
    """
    out: dict[str, Spec] = {}
    for name in names:
        spec = load(name)
        if out.setdefault(spec.name, spec) != spec:
            raise CompareError(f"two different specs are named {spec.name!r}: give one a new name")
        if metaplastic and not spec.metaplastic:
            options: dict[str, Any] = {"gate": gate}
            if spec.posterior.correction == "full":
                options["gain"] = gain
            chosen = {name: x for name, x in options.items() if x != "spec"}
            made = metaplasticize(spec, **chosen)
            label = ", ".join(x.replace("_", " ") for x in chosen.values())
            out.setdefault(f"{made.name} ({label})" if label else made.name, made)
    return out


def integers(name: str, text: str) -> tuple[int, ...]:
    """Return the positive integers of an option's comma-separated text, sorted.

    Raises:
        CompareError: something else is in it.
    """
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) > 0 for p in parts):
        raise CompareError(f"{name}: got {text!r}, accepted are positive integers like 8,16,32")
    return tuple(sorted({int(p) for p in parts}))


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Return the numbers of an option's comma-separated text, sorted.

    Raises:
        CompareError: something else is in it.
    """
    try:
        return tuple(sorted({float(p) for p in text.split(",")}))
    except ValueError as e:
        raise CompareError(f"{name}: got {text!r}, accepted are numbers like 0.003,0.01") from e


def known(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """Return an option's value, one of those accepted.

    Raises:
        CompareError: it is another one; the message names the closest.
    """
    if value in accepted:
        return value
    near = difflib.get_close_matches(value, accepted, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(accepted)}"
    raise CompareError(f"{name}: got {value!r}; {hint}")


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        CompareError: with the reason.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise CompareError(f"device: got {device!r}, accepted are cpu and cuda") from e
    if kind == "cuda" and not torch.cuda.is_available():
        raise CompareError(
            f"device: got {device!r}, but this machine has no GPU that torch can use"
        )


def command_line() -> str:
    """Return the command that makes these results again."""
    return shlex.join(["glazoo", *sys.argv[1:]])

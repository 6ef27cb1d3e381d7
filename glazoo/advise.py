"""`glazoo advise`: which conversion of a model pays, from the keys and the loss that it has on a
text."""

from __future__ import annotations

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from rich.markdown import Markdown
from torch import Tensor, nn

from glazoo import stats
from glazoo.compare.capacity import CapacityPlan, capacity
from glazoo.compare.keys import recorded
from glazoo.converters.calibration import LENGTH, directions, neglected, observed, turn
from glazoo.converters.commands import Column, ReportFile, Split, Tokenizer
from glazoo.converters.loading import load_to_observe
from glazoo.converters.report import Report
from glazoo.converters.source import Checkpoint, inspect_checkpoint
from glazoo.converters.texts import read_tokens
from glazoo.errors import ConversionError
from glazoo.layers import gates, set_plasticity
from glazoo.layers.conversion import metaplastic_layers
from glazoo.layers.plasticity import Observation
from glazoo.program import lower
from glazoo.spec import Spec
from glazoo.stats import Interval, interval
from glazoo.terminal import AsJson, console, heat_map, markdown_table, print_json, progress
from glazoo.versions import stated

__all__ = [
    "FORMS",
    "PLASTICITIES",
    "AdviceReport",
    "KeyUse",
    "Opening",
    "Prediction",
    "advise",
    "advise_checkpoint",
    "best_opening",
    "key_use",
    "opened",
    "predict",
]

FORMS: Mapping[str, dict[str, Any]] = {
    "isotropic": {"precision": "isotropic"},
    "per key": {},
    "diffuse": {"forgetting": "diffuse"},
    "rotated": {"basis": "rotated"},
    "full": {"precision": "full"},
    "per synapse": {"gate": "value"},
}
"""Conversions by name, as options of `glazoo.metaplasticize`."""

LEAST = 0.05
"""Share of values that a form must find more than its source, to be advised."""

NEARLY = 0.8
"""Share of the best form's gain that makes a form with less state as good as that one."""

LEAST_FALL = 0.001
"""Nats a token that the loss must fall by when gates open, for a form to be advised."""

PLASTICITIES = (0.001, 0.01, 0.1, 1.0)
"""Plasticities kappa at which gates are opened."""

_CONTEXTS = 4
"""Contexts at least: axes come from a half of them and are measured on the other, and intervals
need two."""

_VALUES = 64
"""Value channels of the measurement at most: what is found hardly depends on more."""

Told = Callable[[str, int, int], object]


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What the keys of one layer are like, head by head."""

    layer: int
    directions: tuple[float, ...]
    """Participation ratio (tr M)^2 / |M|^2 of M = E[k k^T]: how many of the K directions they
    live on."""
    changing: tuple[float, ...]
    """Share of the dominant directions of a context, as many as `directions`, that are not those of
    all contexts."""
    neglected: tuple[float, ...]
    """Share of |M|^2 off the diagonal, which an importance per key neglects."""
    neglected_rotated: tuple[float, ...]
    """The same along the eigenvectors of other contexts."""
    window: tuple[float, ...]
    """Tokens that the memory keeps: 1 / (1 - a) of the mean decay a, at most a context."""

    @property
    def writes(self) -> tuple[float, ...]:
        """Writes within the window per direction."""
        pairs = zip(self.window, self.directions, strict=True)
        # Of a head whose keys are all zero, the directions are none.
        return tuple(w / max(1.0, d) for w, d in pairs)


@dataclass(frozen=True, slots=True)
class Opening:
    """What opening the gates of a form does to a loss, untrained."""

    plasticity: float
    """The kappa that was best on every second context."""
    change: Interval
    """Of the loss on the other contexts, in nats a token; above zero the loss rises. Infinite where
    no plasticity leaves it finite."""
    tried: dict[float, float]
    """The change at each kappa, mean over all contexts."""

    @property
    def falls(self) -> bool:
        """Whether the loss falls by enough, and with certainty."""
        return self.change.seeds > 1 and self.change.high < 0 and self.change.mean <= -LEAST_FALL


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a memory would hold of a model's keys, untrained."""

    form: str
    """`source`, or one of `FORMS`."""
    found: Interval
    """Share of values that are found again among all stored, at each memory's best constant gates,
    mean over numbers of pairs."""
    gain: Interval
    """The same less the source's, draw by draw."""
    state_bytes: int
    """Of a sequence and all layers, float32."""
    operations: float
    """Times those of the source's recurrence, token by token."""
    added_parameters: int
    opening: Opening | None = None
    """Of forms that would find enough more to be advised."""


@dataclass(frozen=True, slots=True)
class AdviceReport(Report):
    """What to convert a model to."""

    folder: str
    family: str
    spec: str
    keys: int
    values: int
    tokens: int
    pairs: tuple[int, ...]
    """Numbers of pairs in a memory that predictions are means over."""
    use: tuple[KeyUse, ...]
    predictions: tuple[Prediction, ...]
    impossible: dict[str, str]
    """Forms that the source does not have, with the reason."""
    advice: str | None
    """The form to convert to; None where no form is expected to help."""
    seconds: float
    versions: dict[str, str] = field(default_factory=lambda: stated("torch", "transformers"))

    @property
    def command(self) -> str | None:
        """The command that follows the advice."""
        if self.advice is None:
            return None
        options = "".join(f" --{n} {x}" for n, x in FORMS[self.advice].items())
        more = " --calibrate TEXT" if self.advice == "rotated" else ""
        return f"glazoo convert {shlex.quote(self.folder)} DST{options}{more}"

    def to_markdown(self) -> str:
        source = self.predictions[0]
        rows = [
            (
                p.form,
                p.found.times(100).text(1),
                "" if p is source else p.gain.times(100).signed(),
                f"{p.state_bytes:,} ({p.state_bytes / source.state_bytes:.2f})",
                f"{p.operations:.2f}",
                "" if p is source else f"{p.added_parameters:,}",
                _opening_text(p.opening),
            )
            for p in self.predictions
        ]
        keys = [
            (
                f"{u.layer}",
                *(
                    f"{min(x):.2f} / {sum(x) / len(x):.2f} / {max(x):.2f}"
                    for x in (u.directions, u.changing, u.neglected, u.neglected_rotated)
                ),
                " / ".join(f"{f(u.writes):.3g}" for f in (min, _mean, max)),
            )
            for u in self.use
        ]
        head = ("layer", "directions", "changing", "off the diagonal", "rotated", "writes")
        lines = [
            f"# {self.folder}",
            "",
            f"{self.family}, {self.spec}, {self.keys} keys and {self.values} values a head; "
            f"{self.tokens:,} tokens.",
            "",
            self._verdict(),
            "",
            "## What each memory would find of this model's keys, untrained",
            "",
            *markdown_table(
                (
                    "memory",
                    "found (%)",
                    "to the source",
                    "state (bytes, times)",
                    "operations (times)",
                    "new parameters",
                    "loss, opened (nats)",
                ),
                rows,
                right=True,
            ),
            "",
            f"Random values under this model's keys in the order of the text, "
            f"{', '.join(map(str, self.pairs))} pairs in a memory, at the best constant gates of "
            "each; 95 % intervals over draws. Loss, opened: what opening all gates does to the "
            "loss on the text, untrained, at the kappa that is best on other contexts; of the "
            "forms that would find enough more.",
            "",
            *(f"- {form}: {reason}" for form, reason in self.impossible.items()),
            "",
            "## Keys (least / mean / most over heads)",
            "",
            *markdown_table(head, keys, right=True),
            "",
            f"Directions: how many of {self.keys} the keys live on. Changing: share of a context's "
            "dominant directions that other contexts do not share. Off the diagonal: what an "
            "importance per key neglects, along the keys' own axes and rotated ones. Writes: in "
            "the memory's window, per direction.",
        ]
        return "\n".join(lines) + "\n"

    def _verdict(self) -> str:
        opened = [p for p in self.predictions if p.opening is not None]
        if self.advice is None and opened:
            return (
                f"**None is expected to help**: the memories of {_listed(p.form for p in opened)} "
                "would find more, but this model does not ask for it. With their gates open, "
                f"untrained, its loss on this text does not fall by {LEAST_FALL} nats a token."
            )
        if self.advice is None:
            return (
                "**None is expected to help**: no form is expected to find "
                f"{100 * LEAST:.0f} points more than the source, with certainty."
            )
        found = {p.form: p for p in self.predictions}[self.advice]
        assert found.opening is not None
        cost = found.state_bytes / self.predictions[0].state_bytes
        return (
            f"**Try {self.advice}**: {found.gain.times(100).signed()} points more found, "
            f"for {cost:.2f} times the state, and a loss that changes by "
            f"{_opening_text(found.opening)} nats a token as soon as its gates open: "
            f"`{self.command}`. Tune it (`glazoo tune --all`) beside the source, for as long, "
            "before you keep it."
        )


def _mean(xs: Sequence[float]) -> float:
    return sum(xs) / len(xs)


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _opening_text(opening: Opening | None) -> str:
    if opening is None:
        return ""
    return f"{opening.change.signed(4)} at {opening.plasticity:g}"


@torch.no_grad()
def key_use(
    layer: int, keys: Float[Tensor, "C T H K"], g: Float[Tensor, "C T HV *K"] | None = None
) -> KeyUse:
    """Measure what the keys of a layer are like.

    Args:
        layer: its index.
        keys: as the recurrence takes them, of at least two contexts.
        g: log decays of the same tokens; unset for a memory that forgets nothing.

    Returns:
        The measurements; along rotated axes, which come from the first half of the contexts, on the
        second half.
    """
    k = keys.double()
    moments = torch.einsum("cthi,cthj->chij", k, k) / k.shape[1]
    half = len(k) // 2
    whole, first, second = moments.mean(0), moments[:half].mean(0), moments[half:].mean(0)
    ratio = directions(whole)
    heads = k.shape[2]
    axes = torch.linalg.eigh(first).eigenvectors
    changing = []
    for h in range(heads):
        rank = max(1, min(k.shape[3], round(float(ratio[h]))))
        shared = torch.linalg.eigh(whole[h]).eigenvectors[:, -rank:]
        own = torch.linalg.eigh(moments[:, h]).eigenvectors[..., -rank:]
        changing.append(float(1 - (shared.mT @ own).square().sum((-2, -1)).mean() / rank))
    window = torch.full((heads,), float(k.shape[1]), dtype=torch.float64)
    if g is not None:
        g = g.double().mean((0, 1))
        g = (g.mean(-1) if g.dim() == 2 else g).view(heads, -1).mean(-1)
        window = window.minimum(1 / -torch.expm1(g.clamp(max=-1e-12)))
    return KeyUse(
        layer,
        tuple(ratio.tolist()),
        tuple(changing),
        tuple(neglected(whole).tolist()),
        tuple(neglected(axes.mT @ second @ axes).tolist()),
        tuple(window.tolist()),
    )


def predict(
    keys: str,
    specs: Mapping[str, Spec],
    *,
    values: int = _VALUES,
    pairs: Sequence[int] | None = None,
    seeds: int = 12,
    jobs: int = 1,
    told: Told | None = None,
) -> tuple[tuple[int, ...], dict[str, list[float]]]:
    """Measure what each memory would find of recorded keys.

    Args:
        keys: what `glazoo.compare.keys.recorded` takes.
        specs: memories by label.
        values: value channels.
        pairs: numbers of pairs. Default: half as many as key channels, as many, and twice as many,
            of those that a context has.
        seeds: independent draws.
        jobs: processes.
        told: called as `told(label, done, total)`.

    Returns:
        The numbers of pairs; and by label and draw the share of values found, mean over these.
        Draws of one number are the same for all memories.
    """
    found = recorded(keys)
    size = found.size
    chosen = tuple(pairs or (n for n in (size // 2, size, 2 * size) if 2 <= n <= found.longest))
    chosen = chosen or (found.longest,)
    common = (0, values, chosen, seeds, 0, 0.25, "auto", "once", "values")
    plans = [CapacityPlan(s, n, keys, *common) for n, s in specs.items()]  # type: ignore[arg-type]
    shares: dict[str, list[float]] = {}
    for curve in capacity(plans, jobs=jobs):
        errors = torch.tensor(curve.errors)
        shares[curve.label] = (1 - errors.mean(0)).tolist()
        if told is not None:
            told(f"memories: {curve.label}", len(shares), len(plans))
    return chosen, {n: shares[n] for n in specs}


@torch.no_grad()
def opened(
    model: nn.Module,
    losses: Callable[[], Float[Tensor, "C"]],
    layers: Collection[int] | None = None,
) -> dict[float, list[float]]:
    """Measure what opening the gates of a form does to a loss, untrained.

        L_c(kappa) - L_c(0) ,   the same kappa for all heads

    A form at kappa = 0 computes what its source does. If knowing what was learned well served what
    the model does with its memories, its loss would fall before anything is trained.

    Args:
        model: a model that `glazoo.metaplasticize` made; at kappa = 0 afterwards.
        losses: the loss of every context.
        layers: indices of those that it made so; what was metaplastic before stays as it is.
            Default: all.

    Returns:
        The change of every context, by kappa; infinite where an opened gate leaves no finite loss.

    Raises:
        ConversionError: the loss at kappa = 0 is not finite.
    """
    chosen = [
        m for m, gate, _ in metaplastic_layers(model) if layers is None or gate.layer in layers
    ]
    form = nn.ModuleList(chosen)
    set_plasticity(form, 0.0)
    closed = losses()
    if not bool(closed.isfinite().all()):
        raise ConversionError("the model's loss on this text is not finite: there is none to lower")
    changes = {}
    for plasticity in PLASTICITIES:
        set_plasticity(form, plasticity)
        changes[plasticity] = (losses() - closed).nan_to_num(math.inf, math.inf).tolist()
    set_plasticity(form, 0.0)
    return changes


def best_opening(changes: Mapping[float, Sequence[float]]) -> Opening:
    """Choose the plasticity on every second context, and measure it on the others.

    Args:
        changes: what `opened` returns, of at least two contexts.
    """
    best = min(changes, key=lambda kappa: sum(changes[kappa][::2]))
    tried = {kappa: _mean(x) for kappa, x in changes.items()}
    held_out = changes[best][1::2]
    finite = all(map(math.isfinite, held_out))
    return Opening(best, interval(held_out if finite else [math.inf]), tried)


def advise_checkpoint(
    folder: str | Path,
    texts: Sequence[str | Path],
    *,
    tokenizer: str | None = None,
    tokens: int = 4096,
    column: str = "text",
    split: str | None = None,
    seeds: int = 12,
    jobs: int = 1,
    device: str | torch.device = "cpu",
    told: Told | None = None,
) -> AdviceReport:
    """Say which conversion of a model is expected to pay, from its keys and its loss on a text.

        gain(form) = share of values that a memory of that form finds again under the model's own
                     keys, less the share that the source's finds
        change(form) = L(kappa) - L(0), the loss on the text with gates opened, less that of the
                       source

    Without training. Of the first, values are random and gates constant, each memory's best: what
    keys of a context share, a vector or matrix of importances tells from what tells them apart;
    where keys are unlike each other, nothing is gained. The second says whether the model uses its
    memories so that this serves it.

    Args:
        folder: a folder that `convert_checkpoint` takes.
        texts: UTF-8 text files, or one folder with a Hugging Face data set.
        tokenizer: a folder with a tokenizer, or "bytes"; default the model's own.
        tokens: how many tokens of the texts are read at most, 512 at a time, each piece a context.
        column: the data set's column with the text.
        split: the data set's split; default `train`, or the only one.
        seeds: draws of the measurement.
        jobs: processes of the measurement.
        device: where the model runs.
        told: called as `told(what, done, total)`.

    Returns:
        What the keys are like, what every form would hold, and the advice: of the forms with a gain
        of at least five points whose interval excludes zero, and with a loss that falls by 0.001
        nats when their gates open, the one with the least state whose gain is at least four fifths
        of the best.

    Raises:
        ConversionError: the folder cannot be converted or holds no language model, the text has
            fewer than four contexts, or the model's keys or its loss on it are not finite.
    """
    begun = time.monotonic()
    stats.require()
    told = told or (lambda *_: None)
    checkpoint = inspect_checkpoint(folder)
    found = checkpoint.found
    if checkpoint.quantised:
        raise ConversionError(next(iter(checkpoint.quantised.values())))
    if not checkpoint.family.source_model(checkpoint.architecture).can_generate():
        raise ConversionError(
            f"{folder} holds a {checkpoint.architecture}, which predicts no next token: there is "
            "no loss to measure"
        )
    if tokens < _CONTEXTS * LENGTH:
        raise ConversionError(
            f"tokens: got {tokens}, accepted is at least four contexts of {LENGTH}"
        )
    specs, impossible = _forms(checkpoint)
    ids = read_tokens(
        texts,
        tokenizer or str(folder),
        vocabulary=int(checkpoint.config.get_text_config().vocab_size),
        column=column,
        split=split,
        limit=tokens,
    )[:tokens]
    contexts = len(ids) // LENGTH
    if contexts < _CONTEXTS:
        raise ConversionError(
            f"texts: got {len(ids)} tokens, expected at least four contexts of {LENGTH}"
        )
    ids = ids[: contexts * LENGTH].astype("int64")
    model = load_to_observe(checkpoint, _settings(checkpoint)).to(device)
    told("keys of the text", 0, contexts)
    seen: dict[int, list[Observation]] = {}
    for observation in observed(model, torch.from_numpy(ids)):
        # Layers that are metaplastic already stay as they are.
        if observation.layer not in found:
            continue
        of = seen.setdefault(observation.layer, [])
        of.append(observation._replace(keys=observation.keys.float().cpu(), g=observation.g.cpu()))
        told("keys of the text", len(of), contexts)
    del model
    keys = {layer: torch.cat([x.keys for x in of]) for layer, of in sorted(seen.items())}
    for layer, k in keys.items():
        if not bool(k.isfinite().all()):
            raise ConversionError(f"layer {layer}: its keys on this text are not finite")
    use = tuple(key_use(n, k, _decays(seen[n], len(k))) for n, k in keys.items())
    sizes = {n: (found[n].key, found[n].value) for n in keys}
    # Layers of another size, which no family has so far, are described and not measured.
    size = sizes[next(iter(sizes))]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "keys.npz"
        arrays: Any = {f"layer_{n}": k.numpy() for n, k in keys.items() if sizes[n] == size}
        np.savez(file, **arrays)
        values = min(_VALUES, size[1])
        memories = {n: _mapped_already(spec) for n, spec in specs.items()}
        pairs, shares = predict(
            str(file), memories, values=values, seeds=seeds, jobs=jobs, told=told
        )
    predictions = list(_predictions(checkpoint, specs, shares))
    candidates = _candidates(predictions)
    for n, p in enumerate(candidates):
        told(f"gates opened: {p.form}", n, len(candidates))
        form = load_to_observe(checkpoint, _settings(checkpoint, **FORMS[p.form])).to(device)
        _turn(form, keys)
        losses = partial(_losses, form, torch.from_numpy(ids).view(contexts, LENGTH))
        opening = best_opening(opened(form, losses, found))
        predictions[predictions.index(p)] = replace(p, opening=opening)
        del form
    return AdviceReport(
        folder=str(folder),
        family=checkpoint.config.model_type,
        spec=specs["source"].name,
        keys=size[0],
        values=size[1],
        tokens=len(ids),
        pairs=pairs,
        use=use,
        predictions=tuple(predictions),
        impossible=impossible,
        advice=_advice(predictions),
        seconds=time.monotonic() - begun,
    )


def _settings(checkpoint: Checkpoint, **form: Any) -> Any:
    return checkpoint.family.settings(
        checkpoint.config,
        checkpoint.architecture,
        checkpoint.found,
        plasticity=0.0,
        rank=None,
        layers=None,
        seed=0,
        **form,
    )


def _forms(checkpoint: Checkpoint) -> tuple[dict[str, Spec], dict[str, str]]:
    """Return the specs of the source and of its forms, and why it has not the others."""
    source = checkpoint.family.source_spec(checkpoint.config, checkpoint.found)
    specs, impossible = {"source": source}, {}
    for name, form in FORMS.items():
        try:
            spec = _settings(checkpoint, **form).metaplastic_spec(source)
        except ValueError as e:
            impossible[name] = str(e)
            continue
        if spec in specs.values():
            impossible[name] = "the same as another form here"
        else:
            specs[name] = spec
    return specs, impossible


def _mapped_already(spec: Spec) -> Spec:
    """Return the spec of the same memory for keys that its feature map has made already."""
    data = spec.model_dump()
    for path in ("q", "k"):
        data["layer"][path]["feature_map"] = "none"
    return Spec.model_validate(data)


def _decays(seen: Sequence[Observation], contexts: int) -> Tensor:
    """Return log decays by context and token; of static ones the same for all."""
    parts = [x.g if x.g.dim() > 2 else x.g.view(1, 1, -1) for x in seen]
    g = torch.cat(parts)
    return g if len(g) == contexts else g.expand(contexts, *g.shape[1:])


def _predictions(
    checkpoint: Checkpoint, specs: Mapping[str, Spec], shares: Mapping[str, Sequence[float]]
) -> tuple[Prediction, ...]:
    mixers = checkpoint.found.values()
    one = next(iter(mixers))
    plain = lower(specs["source"])
    out = []
    for form, spec in specs.items():
        program = lower(spec)
        added = 0
        if form != "source":
            with torch.device("meta"):
                gates = [m.gate(spec, plasticity=0.0, seed=0) for m in mixers]
            added = sum(p.numel() for gate in gates for p in gate.parameters())
        pairs = zip(shares[form], shares["source"], strict=True)
        out.append(
            Prediction(
                form,
                interval(shares[form]),
                interval([a - b for a, b in pairs]),
                sum(4 * m.heads * program.state_floats(m.key, m.value) for m in mixers),
                program.flops_per_token(one.key, one.value)
                / plain.flops_per_token(one.key, one.value),
                added,
            )
        )
    return tuple(out)


def _turn(model: nn.Module, keys: Mapping[int, Tensor]) -> None:
    """Turns the axes of rotated importances to the eigenvectors of the keys' moments."""
    for _, gate in gates(model):
        if gate.axes is not None and gate.layer in keys:
            k = keys[gate.layer].double().flatten(0, 1)
            turn(gate, torch.einsum("thi,thj->hij", k, k) / len(k))


def _losses(model: nn.Module, contexts: Int[Tensor, "C T"]) -> Float[Tensor, "C"]:
    model.eval()
    device = next(model.parameters()).device
    found = []
    for tokens in contexts.to(device):
        logits = model(tokens[None], use_cache=False).logits[0, :-1].float()
        found.append(F.cross_entropy(logits, tokens[1:]).cpu())
    return torch.stack(found).double()


def _candidates(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return the forms whose memory would find enough more than the source's, with certainty."""
    return [p for p in predictions[1:] if p.gain.low > 0 and p.gain.mean >= LEAST]


def _advice(predictions: Sequence[Prediction]) -> str | None:
    forms = [p for p in _candidates(predictions) if p.opening is not None and p.opening.falls]
    if not forms:
        return None
    best = max(p.gain.mean for p in forms)
    return min(
        (p for p in forms if p.gain.mean >= NEARLY * best),
        key=lambda p: (p.state_bytes, -p.gain.mean),
    ).form


def advise(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a model to convert.")],
    texts: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT...",
            help="UTF-8 text files, or one folder with a data set, to measure on.",
        ),
    ],
    *,
    tokenizer: Tokenizer = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the texts that are read at most.")
    ] = 4096,
    column: Column = "text",
    split: Split = None,
    seeds: Annotated[int, typer.Option(min=2, help="Independent draws.")] = 12,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Say which conversion of a model pays, or that none would.

    Keys of the model on a text, what untrained memories of every form hold of them, and what
    opening their gates does to its loss.
    """
    with progress(quiet=as_json) as told:
        result = advise_checkpoint(
            folder,
            texts,
            tokenizer=tokenizer,
            tokens=tokens,
            column=column,
            split=split,
            seeds=seeds,
            jobs=jobs,
            told=told,
        )
    if as_json:
        print_json(result.to_json())
    else:
        out = console()
        out.print(Markdown(result.to_markdown()))
        keys = result.keys
        out.print(heat_map("directions of keys", {u.layer: u.directions for u in result.use}, keys))
        shares = {u.layer: u.changing for u in result.use}
        out.print(heat_map("share that changes from context to context", shares, 1.0))
    # Last: a file that cannot be written takes nothing of what was measured.
    if report is not None:
        result.write(report)

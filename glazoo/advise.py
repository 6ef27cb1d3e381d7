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
from typing import Annotated, Any, NamedTuple

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
    "Written",
    "advise",
    "advise_checkpoint",
    "best_opening",
    "key_use",
    "memory_load",
    "opened",
    "predict",
    "recommended",
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

LEAST = 0.02
"""Share of values that a form must find more than its source, to be advised. It and LEAST_FALL are
round numbers near those that are right of most runs of benchmarks/conversion.py."""

NEARLY = 0.8
"""Share of the best form's gain that makes a form with less state as good as that one."""

LEAST_FALL = 0.0003
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
    load: tuple[float, ...]
    """How many writes the memory holds at once: (sum w)^2 / sum w^2 of the sizes w that all writes
    so far have left, mean over tokens."""


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
    mean over heads."""
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
    """How many pairs are stored in a memory, for each of at most three groups of heads, from the
    least to the most loaded."""
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
                    " / ".join(f"{f(x):.{digits}f}" for f in (min, _mean, max))
                    for x, digits in (
                        (u.directions, 1),
                        (u.changing, 2),
                        (u.neglected, 2),
                        (u.neglected_rotated, 2),
                        (u.load, 1),
                    )
                ),
            )
            for u in self.use
        ]
        head = ("layer", "directions", "changing", "off the diagonal", "rotated", "load")
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
            "Random values under the keys that this model writes, in the order of the text, as "
            "many pairs in a memory as the model's own hold at once "
            f"({', '.join(map(str, self.pairs))}: heads from the least to the most loaded), at "
            "the best constant gates of each; 95 % intervals over draws. Loss, opened: what "
            "opening all gates does to the loss on the text, untrained, at the kappa that is best "
            "on other contexts; of the forms that would find enough more.",
            "",
            *(f"- {form}: {reason}" for form, reason in self.impossible.items()),
            "",
            "## Keys (least / mean / most over heads)",
            "",
            *markdown_table(head, keys, right=True),
            "",
            f"Directions: how many of {self.keys} the keys live on. Changing: share of a context's "
            "dominant directions that other contexts do not share. Off the diagonal: what an "
            "importance per key neglects, along the keys' own axes and rotated ones. Load: how "
            "many writes a memory holds at once.",
        ]
        return "\n".join(lines) + "\n"

    def _verdict(self) -> str:
        opened = [p for p in self.predictions if p.opening is not None]
        if self.advice is None and opened:
            return (
                f"**None is expected to help**: the memories of {_listed(p.form for p in opened)} "
                "would find more, but this model does not ask for it. With their gates open, "
                f"untrained, its loss on this text does not fall by {LEAST_FALL} nats a token with "
                "certainty."
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


class Written(NamedTuple):
    """What the memories of one layer are given."""

    layer: int
    g: Float[Tensor, "C T HV *K"]
    """Log decays, their last axis K or 1."""
    keys: Float[Tensor, "C T H K"]
    writes: Float[Tensor, "C T HV"]
    """Sizes of what is written."""

    @classmethod
    def of(cls, seen: Observation) -> Written:
        """Take what an observation says of it, on the CPU in float32."""
        keys, writes, g = (x.float().cpu() for x in (seen.keys, seen.writes, seen.g))
        if g.dim() < 3:
            # Static decays are the same of all contexts and tokens.
            g = g.view(1, 1, len(g), -1).expand(*writes.shape, -1)
        g = g if g.dim() > 3 else g[..., None]
        if (steps := writes.shape[1] // g.shape[1]) > 1:
            # Of the writes of one token, the first alone decays.
            g = torch.stack([g, *[torch.zeros_like(g)] * (steps - 1)], 2).flatten(1, 2)
        return cls(seen.layer, g, keys, writes)

    @classmethod
    def joined(cls, parts: Sequence[Written]) -> Written:
        """Join several contexts of as many tokens."""
        return cls(parts[0].layer, *(torch.cat(x) for x in list(zip(*parts, strict=True))[1:]))


@torch.no_grad()
def memory_load(seen: Written) -> Float[Tensor, "C T HV"]:
    """Measure how many writes the memories of a layer hold at every token.

        n_t = (sum_s w_s)^2 / sum_s w_s^2 ,   w_s = |k_s| |beta_s v_s| exp(sum_{s < r <= t} g_r)

    Where all writes are of one size it is their number if nothing decays, and at most
    (1 + a) / (1 - a) under a decay a.

    Returns:
        n in float64, mean over the key channels of a decay per key; zero as long as nothing was
        written, and after a decay of zero.
    """
    total = torch.zeros_like(seen.g[:, 0], dtype=torch.float64)
    # 1 / n, which no common factor of all writes changes: sums of squares would leave the floats.
    spread = torch.full_like(total, math.inf)
    found = []
    for a, w in zip(seen.g.double().exp().unbind(1), seen.writes.double().unbind(1), strict=True):
        left, w = a * total, w[..., None]
        total = left + w
        new = torch.where(total > 0, w / total, 0.0)
        kept = (1 - new) * (1 - new) * spread
        spread = torch.where(new < 1, kept, 0.0) + new * new
        spread = torch.where((total > 0) | (a > 0), spread, math.inf)
        found.append((1 / spread).mean(-1))
    return torch.stack(found, 1)


@torch.no_grad()
def key_use(seen: Written) -> KeyUse:
    """Measure what the keys of a layer are like.

    Args:
        seen: what its memories are given, of at least two contexts.

    Returns:
        The measurements; along rotated axes, which come from the first half of the contexts, on the
        second half.
    """
    k = seen.keys.double()
    moments = torch.einsum("cthi,cthj->chij", k, k) / k.shape[1]
    half = len(k) // 2
    whole, first, second = moments.mean(0), moments[:half].mean(0), moments[half:].mean(0)
    ratio = directions(whole)
    axes = torch.linalg.eigh(first).eigenvectors
    changing = []
    for h in range(k.shape[2]):
        rank = max(1, min(k.shape[3], round(float(ratio[h]))))
        shared = torch.linalg.eigh(whole[h]).eigenvectors[:, -rank:]
        own = torch.linalg.eigh(moments[:, h]).eigenvectors[..., -rank:]
        same = float((shared.mT @ own).square().sum((-2, -1)).mean()) / rank
        changing.append(max(0.0, 1 - same))
    return KeyUse(
        seen.layer,
        tuple(ratio.tolist()),
        tuple(changing),
        tuple(neglected(whole).tolist()),
        tuple(neglected(axes.mT @ second @ axes).tolist()),
        tuple(memory_load(seen).mean((0, 1)).tolist()),
    )


_HEADS = 32
"""Heads of a group whose keys are measured on, at most."""


class _Heads(NamedTuple):
    """Heads whose memories are as loaded as each other's."""

    share: float
    """Of all heads."""
    pairs: int
    """What their memories hold at once."""
    keys: list[Float[Tensor, "C N 1 K"]]
    """The keys that each writes most, in the order of the text."""


def _by_load(seen: Iterable[Written]) -> list[_Heads]:
    """Sort the heads of some layers into at most three groups by the load of their memories."""
    found = []
    for x in seen:
        loads = memory_load(x).mean((0, 1))
        # As many writes as a context has. A few may be much larger than all others, such as those
        # of a first token: they count like the others.
        w = x.writes.double()
        w = torch.minimum(w, w.quantile(0.95, 1, keepdim=True))
        counts = (w.sum(1).square() / w.square().sum(1)).nan_to_num(w.shape[1])
        group = x.writes.shape[2] // x.keys.shape[2]
        for h, load in enumerate(loads.tolist()):
            found.append((load, counts[:, h], x.keys[:, :, h // group], x.writes[:, :, h]))
    if len({k.shape for _, _, k, _ in found}) != 1 or len(found[0][2]) < 2:
        shapes = ", ".join(sorted({str(list(k.shape)) for _, _, k, _ in found})) or "nothing"
        raise ValueError(f"seen: got keys {shapes}, accepted is one shape [C, T, K] with C >= 2")
    found.sort(key=lambda head: head[0])
    groups = []
    for part in np.array_split(np.arange(len(found)), min(3, len(found))):
        some = part[np.linspace(0, len(part) - 1, min(_HEADS, len(part))).round().astype(int)]
        heads = [found[i] for i in some]
        longest = heads[0][2].shape[1]
        pairs = min(longest, max(2, round(_mean([found[i][0] for i in part]))))
        usual = float(torch.cat([counts for _, counts, _, _ in heads]).median())
        count = min(longest, max(pairs, round(usual)))
        keys = []
        for _, _, k, w in heads:
            most = w.topk(count, dim=1).indices.sort(1).values
            keys.append(k.gather(1, most[..., None].expand(-1, -1, k.shape[-1]))[:, :, None])
        groups.append(_Heads(len(part) / len(found), pairs, keys))
    return groups


def predict(
    seen: Iterable[Written],
    specs: Mapping[str, Spec],
    *,
    values: int = _VALUES,
    seeds: int = 12,
    jobs: int = 1,
    told: Told | None = None,
) -> tuple[tuple[int, ...], dict[str, list[float]]]:
    """Measure what each memory would find of what a model writes.

    Args:
        seen: what the memories of every layer are given; at least one layer, of one key size, and
            two contexts.
        specs: memories by label.
        values: value channels.
        seeds: independent draws.
        jobs: processes.
        told: called as `told(label, done, total)`.

    Returns:
        The numbers of pairs, one for each of at most three groups of heads: as many as their
        memories hold at once; and by label and draw the share of values found, mean over heads.
        Draws are the same for all memories.

    Raises:
        ValueError: there is no layer, one context, or keys of several sizes.
    """
    groups = _by_load(seen)
    shares: dict[str, Tensor] = {n: torch.zeros(seeds, dtype=torch.float64) for n in specs}
    with tempfile.TemporaryDirectory() as folder:
        plans, of = [], {}
        for i, group in enumerate(groups):
            file = str(Path(folder) / f"{i}.npz")
            arrays: Any = {f"layer_{n}": k.numpy() for n, k in enumerate(group.keys)}
            np.savez(file, **arrays)
            of[file] = group
            common = (0, values, (group.pairs,), seeds, 0, 0.25, "auto", "once", "values")
            plans += [CapacityPlan(s, n, file, *common) for n, s in specs.items()]  # type: ignore[arg-type]
        for done, curve in enumerate(capacity(plans, jobs=jobs), 1):
            found = 1 - torch.tensor(curve.errors[0], dtype=torch.float64)
            shares[curve.label] += of[curve.keys].share * found
            if told is not None:
                told(f"memories: {curve.label}", done, len(plans))
    # It would keep what was in files that are gone.
    recorded.cache_clear()
    return tuple(g.pairs for g in groups), {n: x.tolist() for n, x in shares.items()}


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
        of at least two points whose interval excludes zero, and with a loss that falls by 0.0003
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
    )
    contexts = len(ids) // LENGTH
    if contexts < _CONTEXTS:
        raise ConversionError(
            f"texts: got {len(ids)} tokens, expected at least four contexts of {LENGTH}"
        )
    ids = ids[: contexts * LENGTH].astype("int64")
    model = load_to_observe(checkpoint, _settings(checkpoint)).to(device)
    told("keys of the text", 0, contexts)
    parts: dict[int, list[Written]] = {}
    for observation in observed(model, torch.from_numpy(ids)):
        # Layers that are metaplastic already stay as they are.
        if observation.layer not in found:
            continue
        of = parts.setdefault(observation.layer, [])
        of.append(Written.of(observation))
        told("keys of the text", len(of), contexts)
    del model
    seen = {layer: Written.joined(parts.pop(layer)) for layer in sorted(parts)}
    for layer, x in seen.items():
        for name, values in (("keys", x.keys), ("writes", x.writes), ("decays", x.g.exp())):
            if not bool(values.isfinite().all()):
                raise ConversionError(f"layer {layer}: its {name} on this text are not finite")
    use = tuple(map(key_use, seen.values()))
    sizes = {n: (found[n].key, found[n].value) for n in seen}
    # Layers of another size, which no family has so far, are described and not measured.
    size = sizes[next(iter(sizes))]
    pairs, shares = predict(
        [x for n, x in seen.items() if sizes[n] == size],
        {n: _mapped_already(spec) for n, spec in specs.items()},
        values=min(_VALUES, size[1]),
        seeds=seeds,
        jobs=jobs,
        told=told,
    )
    predictions = list(_predictions(checkpoint, specs, shares))
    candidates = _candidates(predictions)
    for n, p in enumerate(candidates):
        told(f"gates opened: {p.form}", n, len(candidates))
        form = load_to_observe(checkpoint, _settings(checkpoint, **FORMS[p.form])).to(device)
        _turn(form, {n: x.keys for n, x in seen.items()})
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
        advice=recommended(predictions),
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


def recommended(predictions: Sequence[Prediction]) -> str | None:
    """Return the form to convert to, or None: the first prediction is the source's."""
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

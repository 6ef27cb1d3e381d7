"""What conversions, reversions and verifications report: dataclasses that give JSON data and
readable text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glazoo.converters.calibration import Axes
from glazoo.converters.files import size_text
from glazoo.errors import ConversionError
from glazoo.families import Found
from glazoo.strictjson import dumps, plain
from glazoo.terminal import markdown_table
from glazoo.versions import stated

__all__ = [
    "AddedTensor",
    "Check",
    "ConversionReport",
    "FileRecord",
    "GateSummary",
    "InspectReport",
    "LayerUse",
    "Report",
    "RevertReport",
    "TuneReport",
    "VerifyReport",
]


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a conversion depends on."""
    return stated("torch", "transformers", "safetensors")


def _warned(warnings: Sequence[str]) -> list[str]:
    return ["", "## Warnings", "", *(f"- {w}" for w in warnings)] if warnings else []


@dataclass(frozen=True, slots=True)
class Report:
    """Common to all reports."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        return data

    def to_markdown(self) -> str:
        """Return the report as readable text."""
        raise NotImplementedError

    def write(self, path: Path | str) -> None:
        """Writes the report to a file: readable text if its name ends in .md, JSON otherwise.

        Raises:
            ConversionError: the file cannot be written.
        """
        path = Path(path)
        data = dumps(self.to_json(), indent=2) + "\n"
        try:
            path.write_text(self.to_markdown() if path.suffix == ".md" else data, "utf-8")
        except OSError as e:
            raise ConversionError(f"cannot write the report {path}: {e.strerror}") from e


@dataclass(frozen=True, slots=True)
class AddedTensor:
    """A tensor that conversion adds."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: str
    """How it starts, in words."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the source and where it is in the converted folder."""

    path: str
    stored: str
    bytes: int
    sha256: str | None
    """None in a dry run, which reads no data."""
    how: Literal["linked", "copied", "cast", "planned"]
    """`cast` files were written anew, with another dtype; `bytes` and `sha256` are the new ones."""


@dataclass(frozen=True, slots=True)
class ConversionReport(Report):
    """What a conversion did, or in a dry run would do."""

    source: str
    destination: str
    dry_run: bool
    family: str
    architecture: str
    spec: str
    gate: str
    gain: str
    precision: str
    basis: str
    forgetting: str
    rank: int
    plasticity: float
    seed: int
    layers: tuple[int, ...]
    mixers: tuple[Found, ...]
    """What was found in each of the layers."""
    skipped_layers: dict[int, str]
    """Layers that stay as they are, with the reason."""
    base_parameters: int
    added_parameters: int
    base_bytes: int
    added_bytes: int
    state_bytes_source: int
    """Recurrent state of one sequence, all layers together."""
    state_bytes_converted: int
    added: tuple[AddedTensor, ...]
    files: tuple[FileRecord, ...]
    skipped_files: tuple[str, ...]
    """Entries of the source that are not carried over: hidden folders."""
    warnings: tuple[str, ...]
    seconds: float
    dtype: str | None = None
    """dtype that the source's weights were cast to; None where they stay as they are."""
    kept_wide: tuple[str, ...] = ()
    """Tensors that stay wider than that dtype."""
    largest_change: float | None = None
    """Largest difference of a weight from the source's; None in a dry run."""
    axes: tuple[Axes, ...] = ()
    """What axes that come from texts do to the keys."""
    versions: dict[str, str] = field(default_factory=_versions)

    def to_markdown(self) -> str:
        percent = 100 * self.added_parameters / max(1, self.base_parameters)
        states = (self.state_bytes_source, self.state_bytes_converted)
        per_layer = len(self.added) // max(1, len(self.layers))
        lines = [
            f"# Conversion of {self.source}"
            + (" (dry run: nothing written)" if self.dry_run else ""),
            "",
            *markdown_table(
                ("what", "value"),
                [
                    ("destination", self.destination),
                    ("family, spec", f"{self.family}, {self.spec}"),
                    ("architecture", self.architecture),
                    ("importance gate", f"{self.gate}-shaped, rank {self.rank}, seed {self.seed}"),
                    ("gain", self.gain.replace("_", " ")),
                    ("precision", f"{self.precision}, {self.basis} basis, {self.forgetting}"),
                    ("plasticity kappa", f"{self.plasticity:g}"),
                    ("layers converted", f"{len(self.layers)} ({_ranges(self.layers)})"),
                    (
                        "parameters",
                        f"{self.base_parameters:,} + {self.added_parameters:,} ({percent:.2f} %)",
                    ),
                    ("weights", f"{size_text(self.base_bytes)} + {size_text(self.added_bytes)}"),
                    *self._cast_rows(),
                    ("state of one sequence", " -> ".join(map(size_text, states))),
                    ("seconds", f"{self.seconds:.1f}"),
                    ("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())),
                ],
            ),
        ]
        if self.dtype is not None:
            what = (
                "rounds where it has to"
                if self.largest_change is None
                else "changes no number"
                if self.largest_change == 0
                else "rounds: a weight differs from the source's by up to "
                f"{self.largest_change:.3g}"
            )
            lines += [
                "",
                f"Casting to {self.dtype} {what}. The source's own files are not in the converted "
                "folder: `glazoo convert --revert` gives them back with the weights in "
                f"{self.dtype}.",
            ]
        lines += ["", "## Mixers that were found", ""]
        kinds: dict[Found, list[int]] = {}
        for mixer in self.mixers:
            kinds.setdefault(replace(mixer, path="", layer=0), []).append(mixer.layer)
        lines += markdown_table(
            ("layers", "mixer", "calls", "spec", "heads", "key heads", "key", "value"),
            [
                (
                    ", ".join(map(str, layers)),
                    kind.mixer,
                    ", ".join(kind.calls) or "none",
                    kind.spec,
                    *map(str, (kind.heads, kind.key_heads, kind.key, kind.value)),
                )
                for kind, layers in kinds.items()
            ],
        )
        if self.skipped_layers:
            lines += ["", "## Layers left as they are", ""]
            lines += [f"- {i}: {reason}" for i, reason in self.skipped_layers.items()]
        if self.axes:
            lines += ["", "## Axes of importance, from the texts", ""]
            lines += markdown_table(
                ("layer", "off the diagonal before", "after", "directions of", "keys"),
                [
                    (
                        str(x.layer),
                        f"{x.before:.3f}",
                        f"{x.after:.3f}",
                        f"{x.directions:.1f}",
                        str(x.keys),
                    )
                    for x in self.axes
                ],
            )
        lines += [
            "",
            f"## Added tensors (those of layer {self.layers[0]}; every converted layer has the "
            "same)",
            "",
        ]
        lines += markdown_table(
            ("name", "shape", "dtype", "start"),
            [
                (t.name, " x ".join(map(str, t.shape)), t.dtype, t.start)
                for t in self.added[:per_layer]
            ],
        )
        lines += ["", "## Files", ""]
        lines += markdown_table(
            ("source", "converted", "size", "how", "SHA-256"),
            [(f.path, f.stored, size_text(f.bytes), f.how, f.sha256 or "") for f in self.files],
        )
        if self.skipped_files:
            lines += ["", "Not carried over: " + ", ".join(self.skipped_files) + "."]
        lines += _warned(self.warnings)
        return "\n".join(lines) + "\n"

    def _cast_rows(self) -> list[tuple[str, str]]:
        if self.dtype is None:
            return []
        kept = f"; {len(self.kept_wide)} tensors stay wider" if self.kept_wide else ""
        return [("cast to", f"{self.dtype}{kept}")]


@dataclass(frozen=True, slots=True)
class RevertReport(Report):
    """What a reversion gave back."""

    source: str
    destination: str
    files: tuple[FileRecord, ...]
    seconds: float
    dtype: str | None = None
    """dtype that the conversion cast the weights to: they come back in it. None where every file is
    byte for byte the source's."""
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=_versions)

    def to_markdown(self) -> str:
        lines = [
            f"# The source of {self.source}, in {self.destination}",
            "",
            f"{len(self.files)} files, {self._likeness()} ({self.seconds:.1f} s).",
            "",
            *markdown_table(
                ("file", "size", "how", "SHA-256"),
                [(f.path, size_text(f.bytes), f.how, f.sha256 or "") for f in self.files],
            ),
            *_warned(self.warnings),
        ]
        return "\n".join(lines) + "\n"

    def _likeness(self) -> str:
        if self.dtype is None:
            return "byte for byte those that were converted"
        return (
            f"not byte for byte those that were converted: the conversion cast the weights to "
            f"{self.dtype}, and they come back in it"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of the source with the converted model."""

    name: str
    passed: bool
    max_difference: float | None
    """Largest absolute difference of a logit; None where tokens are compared."""
    budget: float | None
    """What rounding may explain."""
    noise: float | None
    """How far two paths of the source itself differ in the same precision."""
    max_logit: float | None
    detail: str
    """What was run."""


@dataclass(frozen=True, slots=True)
class VerifyReport(Report):
    """How a converted model compares with its source."""

    source: str
    destination: str
    plasticity: tuple[float, float]
    """Smallest and largest kappa over layers and heads as stored."""
    at_source: bool
    """Whether the stored gates are at the source: kappa = 0 and prior 1."""
    checks: tuple[Check, ...]
    """At kappa = 0 and prior 1, where both models must agree."""
    shift: float | None
    """Largest absolute difference of a logit with the gates as stored; None when they are at the
    source."""
    batch: int
    tokens: int
    new_tokens: int
    seed: int
    seconds: float
    dtype: str | None = None
    """dtype that the conversion cast the weights to; the source is compared after the same cast."""
    cast_shift: float | None = None
    """Largest absolute difference of a logit that this cast alone makes in the source."""
    versions: dict[str, str] = field(default_factory=_versions)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(c.passed for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {"passed": self.passed, **Report.to_json(self)}

    def to_markdown(self) -> str:
        def number(x: float | None) -> str:
            return "" if x is None else f"{x:.2e}"

        verdict = "agrees with" if self.passed else "DIFFERS FROM"
        lines = [
            f"# {self.destination} {verdict} its source {self.source}",
            "",
            f"{self.batch} random prompts of {self.tokens} tokens, {self.new_tokens} generated "
            "tokens, "
            f"seed {self.seed}, {self.seconds:.1f} s. All at kappa = 0 and prior 1. The noise is "
            "the distance between two "
            "paths of the source itself (a prompt at once, token by token from a cache, and cut "
            "short); "
            "the budget is eight "
            "times the larger of that noise and one rounding of the largest logit.",
            "",
            *markdown_table(
                (
                    "check",
                    "result",
                    "largest difference",
                    "budget",
                    "noise",
                    "largest logit",
                    "what",
                ),
                [
                    (
                        c.name,
                        "ok" if c.passed else "FAILED",
                        number(c.max_difference),
                        number(c.budget),
                        number(c.noise),
                        number(c.max_logit),
                        c.detail,
                    )
                    for c in self.checks
                ],
            ),
            "",
        ]
        low, high = self.plasticity
        if self.at_source:
            lines.append("The stored gates are at the source: kappa = 0 and prior 1 in every head.")
        else:
            lines.append(
                f"The stored gates are not at the source: kappa from {low:g} to {high:g}; "
                f"as stored, logits differ by up to {number(self.shift)}, as they should."
            )
        if self.dtype is not None:
            lines += [
                "",
                f"The conversion cast the weights to {self.dtype}: both models were compared with "
                f"the weights after it. The cast alone moves the source's logits by up to "
                f"{number(self.cast_shift)}.",
            ]
        lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()) + "."]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class GateSummary:
    """Where one layer stands, head by head."""

    layer: int
    kappa: tuple[float, ...]
    """Plasticity: 0 is the source, 1 the full metaplastic form."""
    prior: tuple[float, ...]
    """Prior importance I_p."""
    opening: float
    """Norm of the gate's learned projection; 0 means that b = kappa beta for every token."""


@dataclass(frozen=True, slots=True)
class TuneReport(Report):
    """What fine-tuning did."""

    source: str
    destination: str
    recipe: str
    learning_rate: float
    """At its peak."""
    plasticity_rate: float
    """Share of it that the plasticity got."""
    trained: str
    """`gates` or `all`."""
    trained_parameters: int
    parameters: int
    training_tokens: int
    evaluation_tokens: int
    steps: int
    loss_before: float
    """Evaluation loss, nats per token."""
    loss_after: float
    gates: tuple[GateSummary, ...]
    """After tuning."""
    seconds: float
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=_versions)

    def to_markdown(self) -> str:
        percent = 100 * self.trained_parameters / max(1, self.parameters)
        rows = [
            ("destination", self.destination),
            ("trained", f"{self.trained}: {self.trained_parameters:,} ({percent:.2f} %)"),
            ("recipe", self.recipe),
            ("steps", f"{self.steps}"),
            (
                "learning rate",
                f"{self.learning_rate:g}, of the plasticity {self.plasticity_rate:g} times that",
            ),
            ("tokens", f"{self.training_tokens:,} trained, {self.evaluation_tokens:,} held out"),
            (
                "evaluation loss",
                f"{self.loss_before:.4f} -> {self.loss_after:.4f} "
                f"({self.loss_after - self.loss_before:+.4f})",
            ),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        lines = [f"# {self.source} tuned", "", *markdown_table(("what", "value"), rows), ""]
        lines += ["## Importance gates", "", *_gate_table(self.gates), *_warned(self.warnings)]
        lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()) + "."]
        return "\n".join(lines) + "\n"


def _gate_table(gates: tuple[GateSummary, ...]) -> list[str]:
    def spread(xs: tuple[float, ...]) -> str:
        return f"{min(xs):.3g} / {sum(xs) / len(xs):.3g} / {max(xs):.3g}"

    head = ("layer", "kappa (least / mean / most)", "prior (least / mean / most)", "opening")
    return markdown_table(
        head,
        [(f"{g.layer}", spread(g.kappa), spread(g.prior), f"{g.opening:.3g}") for g in gates],
    )


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What the importance of one layer did on a text, head by head."""

    layer: int
    window: tuple[float, ...]
    """Effective window in tokens: 1 / (1 - a) of the geometric mean decay a."""
    strength: tuple[float, ...]
    """Mean importance gate b."""
    consolidated: tuple[float, ...]
    """Share of synapses whose importance J, above the prior, exceeds the prior at the end."""
    importance: tuple[float, ...]
    """Mean total importance over the prior at the end; 1 is the source."""


@dataclass(frozen=True, slots=True)
class InspectReport(Report):
    """Where a metaplastic model sits between its source and the full metaplastic form."""

    folder: str
    family: str
    spec: str
    gate: str
    form: str
    gates: tuple[GateSummary, ...]
    tokens: int
    """Tokens of the text; 0 if none was given."""
    use: tuple[LayerUse, ...]
    seconds: float
    versions: dict[str, str] = field(default_factory=_versions)

    def to_markdown(self) -> str:
        lines = [
            f"# {self.folder}",
            "",
            f"{self.family}, {self.spec}, {self.gate}-shaped importance gate; {self.form}.",
            "",
            *_gate_table(self.gates),
        ]
        if self.use:
            head = ("layer", "head", "kappa", "prior", "window", "gate b", "importance / prior")
            known = {g.layer: g for g in self.gates}
            rows = [
                (
                    f"{u.layer}",
                    f"{h}",
                    f"{known[u.layer].kappa[h]:.3g}",
                    f"{known[u.layer].prior[h]:.3g}",
                    f"{u.window[h]:.3g}",
                    f"{u.strength[h]:.3g}",
                    f"{u.importance[h]:.3g}",
                    f"{100 * u.consolidated[h]:.1f} %",
                )
                for u in self.use
                for h in range(len(u.window))
            ]
            lines += ["", f"## On {self.tokens:,} tokens", ""]
            lines += markdown_table((*head, "synapses above the prior"), rows)
        return "\n".join(lines) + "\n"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Writes sorted numbers as ranges."""
    parts: list[str] = []
    start = previous = None
    for n in (*numbers, None):
        if previous is not None and n == previous + 1:
            previous = n
            continue
        if previous is not None:
            parts.append(f"{start}-{previous}" if start != previous else f"{start}")
        start = previous = n
    return ", ".join(parts)

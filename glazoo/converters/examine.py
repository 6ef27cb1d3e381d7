"""Measuring where a metaplastic model sits between its source and the full metaplastic form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.converters.calibration import save_keys
from glazoo.converters.loading import load_converted
from glazoo.converters.report import GateSummary, InspectReport, LayerUse
from glazoo.converters.texts import read_tokens
from glazoo.errors import ConversionError
from glazoo.layers import ImportanceGate
from glazoo.layers.conversion import metaplastic_layers
from glazoo.layers.plasticity import Observation
from glazoo.spec import Spec

__all__ = ["gate_summaries", "inspect_model", "measure_use"]


def _measured(model: nn.Module) -> Iterator[tuple[nn.Module, ImportanceGate, Spec]]:
    """Return the layers whose importance is what gates add to a prior, each with its gate and its
    metaplastic spec."""
    for layer, gate, spec in metaplastic_layers(model):
        if "none" not in (gate.spec.gate.shape, gate.spec.prior.shape):
            yield layer, gate, spec


@torch.no_grad()
def gate_summaries(model: nn.Module) -> tuple[GateSummary, ...]:
    """Return plasticity and prior of every layer and head."""
    found: dict[int, GateSummary] = {}
    for _, gate, _ in _measured(model):
        kappa, prior = gate.kappa(), gate.prior(torch.float64)
        assert prior is not None
        kappa = torch.ones(gate.heads) if kappa is None else kappa
        down, up = gate.b_down, gate.b_up
        product = up if up is None or down is None else up @ down
        found[gate.layer] = GateSummary(
            layer=gate.layer,
            kappa=tuple(kappa.double().tolist()),
            prior=tuple((prior if prior.dim() == 1 else prior.mean(-1)).tolist()),
            opening=0.0 if product is None else float(product.norm()),
        )
    return tuple(found[layer] for layer in sorted(found))


@contextmanager
def _observed(model: nn.Module, record: Any) -> Iterator[None]:
    mixers: list[Any] = [m for m, _, _ in _measured(model)]
    for m in mixers:
        m.observer = record
    try:
        yield
    finally:
        for m in mixers:
            m.observer = None


@torch.no_grad()
def measure_use(model: nn.Module, ids: Tensor) -> tuple[LayerUse, ...]:
    """Measures what importance does on a text.

    Args:
        model: a metaplastic model.
        ids: token ids, [B, T].

    Returns:
        One entry for each layer whose importance is what a gate adds to a prior.
    """
    found: dict[int, LayerUse] = {}
    specs = {gate.layer: spec for _, gate, spec in _measured(model)}

    def heads(x: Tensor) -> tuple[float, ...]:
        # The head axis is last by now.
        return tuple(x.double().flatten(0, -2).mean(0).tolist())

    def record(seen: Observation) -> None:
        g, b, prior, state = seen.g, seen.b, seen.prior, seen.state
        assert state.importance is not None
        # Decays of every token or of none: [.., HV]; per key channel they are averaged.
        g = g.mean(-1) if g.dim() == 4 else g
        g = g.reshape(-1, prior.shape[0])
        b = b.mean(-1) if b.dim() == 4 else b
        prior = prior if prior.dim() == 1 else prior.mean(-1)
        above = _above(specs[seen.layer], state.importance, prior).flatten(2).transpose(1, 2)
        window = 1 / -torch.expm1(g.double().clamp(min=-60).mean(0))
        found[seen.layer] = LayerUse(
            layer=seen.layer,
            window=tuple(window.tolist()),
            strength=heads(b),
            consolidated=heads((above > 1).double()),
            importance=heads(1 + above),
        )

    training = model.training
    model.eval()
    try:
        with _observed(model, record):
            model(ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(training)
    return tuple(found[layer] for layer in sorted(found))


def _above(spec: Spec, importance: Tensor, prior: Tensor) -> Tensor:
    """Return importance above the prior, in units of it, [N, HV, ...]: of a matrix over keys its
    diagonal, of a covariance the reciprocal of its diagonal."""
    if spec.posterior.precision != "full":
        return importance / prior.view(-1, *[1] * (importance.dim() - 2))
    importance = importance.diagonal(dim1=-2, dim2=-1)
    if spec.forgetting == "diffuse":
        # What is kept is the variance less that of the prior, 1 / I_p.
        return 1 / (1 + importance * prior[:, None]) - 1
    return importance / prior[:, None]


def inspect_model(
    folder: str | Path,
    texts: Sequence[str | Path] = (),
    *,
    tokenizer: str | None = None,
    tokens: int = 2048,
    column: str = "text",
    split: str | None = None,
    device: str | torch.device = "cpu",
    keys: str | Path | None = None,
) -> InspectReport:
    """Says, for every layer and head of a metaplastic model's folder, where it sits between its
    source and the full metaplastic form.

    Args:
        folder: a converted folder, or one of a model that is metaplastic by its specs, as `glazoo
            train` writes.
        texts: UTF-8 text files, or one folder with a Hugging Face data set, on which effective
            window, importance gate and the share of consolidated synapses are measured; none leaves
            that out.
        tokenizer: a folder with a tokenizer, or "bytes"; default the model's own.
        tokens: how many tokens of the texts are read at most.
        column: the data set's column with the text.
        split: the data set's split; default `train`, or the only one.
        device: where the model runs.
        keys: an .npz file to make, of the keys of every layer over the texts.

    Returns:
        The measurements.

    Raises:
        ConversionError: the folder is of no such model or does not load, a text cannot be read, or
            keys are asked for without texts or at a place that is none.
    """
    begun = time.monotonic()
    if tokens < 1:
        raise ConversionError(f"tokens: got {tokens}, expected at least 1")
    if keys is not None:
        _check_keys(Path(keys), bool(texts))
    model = load_converted(folder)
    measured = list(_measured(model))
    if not measured:
        raise ConversionError(
            f"{folder} has no layer whose importance is what a gate adds to a prior: there is "
            "nothing to inspect"
        )
    config: Any = model.config
    use: tuple[LayerUse, ...] = ()
    count = 0
    if texts:
        ids = read_tokens(
            texts,
            tokenizer or str(folder),
            vocabulary=_vocabulary(model),
            column=column,
            split=split,
            limit=tokens,
        )
        count = len(ids)
        model.to(device)
        read = torch.from_numpy(ids.astype("int64"))
        use = measure_use(model, read[None])
        if keys is not None:
            save_keys(model, read, Path(keys))
    return InspectReport(
        folder=str(folder),
        family=config.model_type,
        spec=", ".join(dict.fromkeys(s.counterpart or s.name for _, _, s in measured)),
        gate=", ".join(dict.fromkeys(g.spec.gate.shape for _, g, _ in measured)),
        form=", ".join(dict.fromkeys(_form(spec) for _, _, spec in measured)),
        gates=gate_summaries(model),
        tokens=count,
        use=use,
        seconds=time.monotonic() - begun,
    )


def _check_keys(file: Path, texts: bool) -> None:
    if not texts:
        raise ConversionError("keys: they are those of a text; give one")
    if file.suffix != ".npz":
        raise ConversionError(f"keys: got {file}, accepted is a file that ends in .npz")
    if not file.parent.is_dir() or file.is_dir():
        raise ConversionError(f"keys: {file} cannot be written: {file.parent} is no folder")


def _form(spec: Spec) -> str:
    imp = spec.importance
    assert imp is not None
    return f"{spec.posterior.precision} precision, {imp.basis} basis, {imp.forgetting}"


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)

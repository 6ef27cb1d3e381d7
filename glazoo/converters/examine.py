"""Measuring where a converted model sits between its source and the full metaplastic form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.converters.errors import ConversionError
from glazoo.converters.families.mixer import MetaplasticMixer, Observation
from glazoo.converters.module import gates
from glazoo.converters.report import GateSummary, InspectReport, LayerUse
from glazoo.converters.settings import Settings

__all__ = ["gate_summaries", "inspect_model", "load_converted", "measure_use"]


def load_converted(folder: str | Path, **options: Any) -> tuple[nn.Module, Settings]:
    """Loads a converted folder and the settings of its conversion.

    Raises:
        ConversionError: it is not a converted folder, or does not load.
    """
    import transformers

    import glazoo.models  # noqa: F401 - registers the architectures
    from glazoo.converters.checkpoint import CONFIG, _read_json
    from glazoo.converters.families import find_family

    folder = Path(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: there is no such folder")
    settings = Settings.from_block(_read_json(folder / CONFIG, CONFIG).get("metaplastic"))
    family = find_family(settings.base_model_type)
    auto = getattr(transformers, family.loaders(settings.base_architectures[0])[0])
    try:
        model: nn.Module = auto.from_pretrained(folder, local_files_only=True, **options)
    except ConversionError:
        raise
    except Exception as e:
        raise ConversionError(f"cannot load {folder}: {' '.join(str(e).split())}") from e
    return model, settings


@torch.no_grad()
def gate_summaries(model: nn.Module) -> tuple[GateSummary, ...]:
    """Gives plasticity and prior of every layer and head."""

    def numbers(x: Tensor) -> tuple[float, ...]:
        return tuple(x.double().tolist())

    return tuple(
        GateSummary(
            layer=gate.layer,
            kappa=numbers(gate.b_scale.clamp(min=0)),
            prior=numbers(gate.ip_log.exp()),
            opening=float((gate.b_up @ gate.b_down).norm()),
        )
        for _, gate in sorted(gates(model), key=lambda item: item[1].layer)
    )


@contextmanager
def _observed(model: nn.Module, record: Any) -> Iterator[None]:
    mixers = [m for m in model.modules() if isinstance(m, MetaplasticMixer)]
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
        model: a converted model.
        ids: token ids, [B, T].

    Returns:
        One entry for each converted layer.
    """
    found: dict[int, LayerUse] = {}

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
        above = state.importance.flatten(2).transpose(1, 2) / prior
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


def inspect_model(
    folder: str | Path,
    texts: Sequence[str | Path] = (),
    *,
    tokenizer: str | None = None,
    tokens: int = 2048,
    column: str = "text",
    split: str | None = None,
    device: str | torch.device = "cpu",
) -> InspectReport:
    """Says, for every layer and head of a converted folder, where it sits between its source and
    the full metaplastic form.

    Args:
        folder: a converted folder.
        texts: UTF-8 text files, or one folder with a Hugging Face data set, on which effective
            window, importance gate and the share of consolidated synapses are measured; none leaves
            that out.
        tokenizer: a folder with a tokenizer, or "bytes"; default the model's own.
        tokens: how many tokens of the texts are read at most.
        column: the data set's column with the text.
        split: the data set's split; default `train`, or the only one.
        device: where the model runs.

    Returns:
        The measurements.

    Raises:
        ConversionError: the folder is not a converted one or does not load, or a text cannot be
            read.
    """
    from glazoo.converters.texts import read_tokens

    begun = time.monotonic()
    if tokens < 1:
        raise ConversionError(f"tokens: got {tokens}, expected at least 1")
    model, settings = load_converted(folder)
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
        )[:tokens]
        count = len(ids)
        model.to(device)
        use = measure_use(model, torch.from_numpy(ids.astype("int64"))[None])
    return InspectReport(
        folder=str(folder),
        family=settings.base_model_type,
        spec=settings.spec,
        gate=settings.gate,
        gates=gate_summaries(model),
        tokens=count,
        use=use,
        seconds=time.monotonic() - begun,
    )


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)

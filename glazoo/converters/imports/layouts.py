"""Telling checkpoints of other packages apart by their configuration, and reading them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glazoo.converters.exchange.maps import (
    KINDS,
    MODELS,
    REFUSED,
    SILENT,
    SPELLINGS,
    Config,
    KeyMap,
    Options,
    Table,
    entries,
    read,
)
from glazoo.converters.exchange.transfer import apart, joined, spec_of, split, translated
from glazoo.errors import ConversionError
from glazoo.layers import GatedLinearAttention

__all__ = ["FLA", "STATE_SPACES", "layout_of", "read_specs", "read_state_spaces", "rwkv_kind"]

STATE_SPACES = "the original state-spaces/mamba code"
FLA = "flash-linear-attention"

_MARKS = ("norm_eps", "fuse_norm", "fuse_cross_entropy")
_EMBEDDINGS = "model.embed_tokens.weight"
_GATE, _UP = (f"model.layers.N.mlp.{name}_proj.weight" for name in ("gate", "up"))
_KEPT = ("pad_token_id", "bos_token_id", "eos_token_id", "dtype")


def layout_of(config: Mapping[str, Any]) -> str | None:
    """Names the package that a config.json is of, if it has to be imported; None for all others.

    The original code has no model_type. A model_type that transformers may have too is
    flash-linear-attention's if the configuration has fields with that package's names.

    Raises:
        ConversionError: it is of a model of flash-linear-attention that cannot be imported.
    """
    if "model_type" not in config and "d_model" in config and "n_layer" in config:
        return STATE_SPACES
    kind, marked = str(config.get("model_type")), any(name in config for name in _MARKS)
    if marked and kind in REFUSED:
        raise ConversionError(f"model_type {kind!r} of {FLA} cannot be imported: {REFUSED[kind]}")
    m = KINDS.get(f"fla.{kind}")
    return FLA if m is not None and (marked or not m.table.get("shared", False)) else None


def read_state_spaces(
    raw: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor], str]:
    """Return transformers' configuration and tensors, and the name of the table of embeddings.

    Raises:
        ConversionError: the model has something that transformers' Mamba2 has not.
    """
    import transformers

    cell = {f"ssm_cfg.{name}": x for name, x in (raw.get("ssm_cfg") or {}).items()}
    found = read(MODELS["state_spaces"], Config({**raw, **cell}))
    multiple = int(found.values["pad_vocab_size_multiple"])
    given = found.changes | found.sizes
    del given["inner"]
    config = transformers.Mamba2Config(
        **given,
        vocab_size=-(-int(found.values["vocab_size"]) // multiple) * multiple,
        architectures=["Mamba2ForCausalLM"],
    )
    table = "backbone.embeddings.weight"
    tensors = {table if key == "backbone.embedding.weight" else key: x for key, x in state.items()}
    return config, tensors, table


def _attention_layers(given: Any) -> tuple[frozenset[int], dict[str, Any]]:
    """Reads which layers are softmax attention; gives them and our fields for them."""
    layers: set[int] = set()
    kinds: list[dict[str, Any]] = []
    for i, entry in enumerate([given] if isinstance(given, dict) else given or []):
        if not isinstance(entry, dict):
            raise ConversionError(f"config.json: attn is {given!r}, accepted are objects")
        source = Config(entry, "attn." if isinstance(given, dict) else f"attn[{i}].")
        found = read(MODELS["attention"], source)
        source.check_all_read()
        layers |= {int(layer) for layer in found.values["layers"]}
        kinds.append(found.sizes | found.changes)
    if any(kind != kinds[0] for kind in kinds):
        raise ConversionError(f"config.json: attn is {given!r}, accepted is one kind of attention")
    return frozenset(layers), kinds[0] if layers else {}


def _configuration(
    raw: Mapping[str, Any], m: KeyMap, model: Table, state: Mapping[str, Tensor]
) -> tuple[Any, Options]:
    """Return our configuration, and the options of the mixers."""
    from glazoo.models import GlazooConfig
    from glazoo.models.configuration import ATTENTION

    accepted = [m.table.get("model")]
    if (names := raw.get("architectures") or accepted) != accepted:
        raise ConversionError(
            f"config.json: architectures is {names!r}, accepted for model_type "
            f"{raw['model_type']!r} is {accepted!r}"
        )
    source = Config(raw, defaults=m.table.get("defaults"), tensors=state)
    found, around = read(m.table, source), read(model, source)
    source.check_all_read(model["ignored"])
    spec, values = spec_of(m, found), around.values | found.values
    softmax, own = frozenset[int](), dict[str, Any]()
    if values.get("attn") is not None:
        softmax, own = _attention_layers(values["attn"])
    if softmax and own["rope_theta"] != 10000.0 and spec.layer.q.rotation == "static":
        raise ConversionError(
            f"config.json: attn.rope_theta is {own['rope_theta']!r}, accepted is 10000.0, that of "
            "the other layers"
        )
    if softmax and spec.decay.parameterization == "lower_bounded_sigmoid":
        raise ConversionError(
            f"config.json: attn is {raw['attn']!r}, accepted with use_lower_bound is None"
        )
    layers = around.sizes["num_hidden_layers"]
    if strangers := sorted(softmax - set(range(layers))):
        raise ConversionError(f"config.json: attn.layers has {strangers}, the model has {layers}")
    given = {"dtype": raw.get("torch_dtype"), **raw}
    own |= {name: given[name] for name in _KEPT if given.get(name) is not None}
    config = GlazooConfig(
        pattern=[ATTENTION if i in softmax else spec for i in range(layers)],
        intermediate_size=values.get("intermediate_size") or 0,
        norm_eps=float(values["norm_eps"]),
        initializer_range=float(values["initializer_range"]),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        architectures=["GlazooForCausalLM"],
        **(own | around.sizes | around.changes | found.sizes),
    )
    return config, found


def _renamed(
    state: Mapping[str, Tensor], m: KeyMap, model: Table, ours: Any, *, tied: bool
) -> Iterator[tuple[str, str, Tensor]]:
    """Return every tensor of the files with its name there and ours, as `apart` has it."""
    rows, prefix = {e.theirs: e for e in entries(model)}, model["mixer"]
    known, layers = apart(ours), ours.config.num_hidden_layers
    mixers: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    for key, value in state.items():
        row, index = _row(key, layers)
        if row.startswith(prefix):
            mixers[index][row.removeprefix(prefix)] = value
            continue
        parts = {row: value}
        if row == _GATE and value.shape[0] == 2 * ours.config.intermediate_size:
            # Older files hold both factors in one.
            parts = dict(zip((_GATE, _UP), value.chunk(2), strict=True))
        for name, part in parts.items():
            if name not in rows:
                described = " that config.json describes" if "model" in m.table else ""
                raise ConversionError(f"{key} has no place in the model{described}")
            entry = rows[name]
            place = tuple(x.replace(".N.", f".{index}.") for x in entry.ours)
            if entry.flat:
                entry = replace(entry, theirs=key, ours=place)
                for mine, x in split(entry, part, known, "").items():
                    yield key, mine, x
            else:
                yield key, place[0], part
    for index, found in enumerate(mixers):
        where, mixer = prefix.replace("N.", f"{index}."), ours.model.layers[index].mixer
        if tied:
            # Shared tensors may be stored once.
            copies = {
                k.replace("map_q", "map_k"): x.clone() for k, x in found.items() if "map_q" in k
            }
            found = copies | found
        if isinstance(mixer, GatedLinearAttention):
            found = translated(mixer, found, m.kind, where=where)
        for name, value in found.items():
            yield f"{where}{name}", f"model.layers.{index}.mixer.{name}", value


def _row(key: str, layers: int) -> tuple[str, int]:
    """Return a name with N for its layer, and the layer; names of no layer of the model stay."""
    match = re.fullmatch(r"([a-z_.]*)(\d+)(\..+)", key)
    index = int(match[2]) if match else 0
    return (f"{match[1]}N{match[3]}", index) if match and index < layers else (key, 0)


def read_specs(
    kind: str, raw: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor], str]:
    """Translates a checkpoint whose mixers have a map.

    Args:
        kind: the map: `fla.` and a model_type, or what `rwkv_kind` gives.
        raw: its config.json; empty where there is none.
        state: its tensors, of any dtype.

    Returns:
        A `GlazooConfig`, the tensors of a `GlazooForCausalLM` in the dtypes that they came in, and
        the name of the table of embeddings.

    Raises:
        ConversionError: the configuration asks for what no model here has, or a tensor of either
            side has no place on the other or a wrong shape.
    """
    from glazoo.models import GlazooForCausalLM

    m = KINDS[kind]
    model = MODELS[m.table.get("around", "blocks")]
    config, options = _configuration(raw, m, model, state)
    tied = bool(options.values.get("tie_feature_map_qk"))
    with torch.device("meta"):
        ours = GlazooForCausalLM(config)
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, name, value in _renamed(state, m, model, ours, tied=tied):
        if name in found:
            raise ConversionError(f"{key} and {origin[name]} are one tensor in two versions")
        found[name], origin[name] = value, key
    return config, joined(ours, found), _EMBEDDINGS


def rwkv_kind(layout: str, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the map of a file of RWKV, and its tensors under their usual names.

    Args:
        layout: "pth" or "bin".
        state: the file's tensors.

    Raises:
        ConversionError: it is of no version that there is a map for.
    """
    state = _spelled(state)
    mixer = MODELS["rwkv"]["mixer"].replace("N", "0")
    names = {key.removeprefix(mixer) for key in state if key.startswith(mixer)}
    maps = {k: m.table["has"].split() for k, m in KINDS.items() if k.startswith(f"{layout}.")}
    fitting = [kind for kind, marks in maps.items() if names.issuperset(marks)]
    if not fitting or "emb.weight" not in state:
        known = ", ".join(
            f"{kind.partition('.')[2]} ({' and '.join(marks)})" for kind, marks in maps.items()
        )
        seen = ", ".join([*state][:3]) or "nothing"
        raise ConversionError(
            f"it holds {seen} ..., which is no RWKV that can be imported. Accepted are state dicts "
            f"with emb.weight and, in {mixer}*, the tensors of {known}; earlier versions have no "
            "matrix state or one decay per head. A checkpoint with a config.json is imported by "
            "its folder"
        )
    # More marks are more particular.
    return max(fitting, key=lambda kind: len(maps[kind])), state


def _spelled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under their usual names, of a file that has shorter ones, and without what
    has no effect."""
    rows = {key: re.sub(r"\d+", "N", key, count=1) for key in state}
    silent = [key for key, row in rows.items() if row == SILENT["zero"]]
    without = tuple(SILENT["prefixes"].split()) if silent else ()
    if used := next((key for key in silent if state[key].any()), None):
        raise ConversionError(
            f"{used} is not zero: that layer computes something that no spec describes"
        )
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        start = next((s for s in SPELLINGS if rows[key].startswith(s)), None)
        if start is not None:
            digits = re.search(r"\d+", key)
            layer = str(int(digits[0]) - 1) if digits and "N" in start else ""
            key = SPELLINGS[start].replace("N", layer) + rows[key].removeprefix(start)
        elif rows[key].startswith(without):
            continue
        out[key] = value
    return out

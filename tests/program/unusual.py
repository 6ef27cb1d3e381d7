"""Specs that no file ships: combinations of axes that lowering must get right all the same."""

from typing import Any, Literal

from glazoo.spec import Gate, Read, Spec, Steps, metaplasticize
from glazoo.theory.catalogue.axes import changed
from glazoo.zoo import load


def _rated(source: str, gate: Literal["head", "value"], **update: Any) -> Spec:
    return metaplasticize(changed(load(source), **update), gate=gate, gain="exact")


_SIGMOID = Gate(shape="value", parameterization="sigmoid")

UNUSUAL = {
    "rate per value, importance per key": _rated("kda", "head", write=_SIGMOID),
    "rate per value, importance per synapse": _rated("kda", "value", write=_SIGMOID),
    "rate of two steps": _rated("gated_deltanet", "head", steps=Steps(count=2)),
    "rate, key tied to the decay": _rated("kda", "head", key="one_minus_decay"),
    "normalised, removal": changed(load("rwkv7"), read=Read(normalizer="max_abs_one")),
    "normalised, delta rule": changed(load("gated_deltanet"), read=Read(normalizer="max_abs_one")),
    "tied key, three steps": changed(load("hgrn2"), steps=Steps(count=3)),
    "full, no write gate": changed(load("mesanet"), write=Gate()),
    "full, two steps": changed(load("mesanet"), steps=Steps(count=2)),
    "free erase key, write gate per value": changed(load("comba"), write=Gate(shape="value")),
}

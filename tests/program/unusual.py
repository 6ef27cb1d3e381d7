"""Specs that no file ships: combinations of axes that lowering must get right all the same."""

from glazoo.spec import Gate, Read, Steps
from glazoo.theory.catalogue.axes import changed
from glazoo.zoo import load

UNUSUAL = {
    "normalised, removal": changed(load("rwkv7"), read=Read(normalizer="max_abs_one")),
    "normalised, delta rule": changed(load("gated_deltanet"), read=Read(normalizer="max_abs_one")),
    "tied key, three steps": changed(load("hgrn2"), steps=Steps(count=3)),
    "full, no write gate": changed(load("mesanet"), write=Gate()),
    "full, two steps": changed(load("mesanet"), steps=Steps(count=2)),
    "free erase key, write gate per value": changed(load("comba"), write=Gate(shape="value")),
}

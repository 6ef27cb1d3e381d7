"""What a model family declares so that it can be converted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from glazoo.converters.errors import ConversionError
from glazoo.spec import Spec, no_exact_gain
from glazoo.zoo import load

__all__ = ["Block", "Family", "Sizes", "TensorRule"]

Sizes = Mapping[str, int]
"""Values of the symbols in which a block states shapes: D hidden, H value heads, G key heads, K key
size, V value size, W taps of the convolution, and what a block derives from them."""

_LINEAR_LAYERS = ("linear_attention", "hybrid")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor of a mixer, as checkpoints hold it."""

    name: str
    """Name inside the mixer."""
    shape: tuple[str, ...]
    """Shape in the block's symbols; digits stand for themselves."""
    when: str | None = None
    """Flag of the family under which the tensor exists; unset for always."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A kind of mixer that several families share: its tensors and how it computes them with an
    importance state."""

    name: str
    tensors: tuple[TensorRule, ...]
    derived: Mapping[str, tuple[tuple[str, ...], ...]]
    """Symbols that follow from others: a sum of products."""
    mixin: type[nn.Module]
    """Gives the mixer's `forward`."""
    hooked: tuple[str, ...]
    """Submodules whose weights `forward` uses without calling them."""
    joined: tuple[str, ...] = ()
    """Tensors that loaders lay end to end: only their lengths together count, as some savers cut
    what they loaded into equal parts."""
    exact: Callable[[Any], None] | None = None
    """Recomputes, in the dtype that a mixer has now, fixed numbers that its files hold rounded."""
    unequal: Mapping[str, object] = field(default_factory=dict)
    """Attributes of the source's mixer that act in some of its own paths only (a limit in prefill
    but not in decoding), each with the value at which they do nothing. Paths of the source can be
    compared with each other only there."""


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """One family of checkpoints: where its mixers are and how their tensors map onto a spec's
    operands."""

    model_type: str
    """`model_type` in config.json."""
    architectures: tuple[str, ...]
    """Causal language models of the family."""
    spec: str
    """Name of the spec that the mixers follow."""
    block: Block
    """The kind of mixer."""
    configuration: str
    """`module:class` of the configuration."""
    modeling: str
    """Module of the models and mixers."""
    mixer: str
    """Class name of the mixer."""
    mixer_keys: str
    """Regular expression of the mixers' tensor names in files, with groups `prefix` and `layer`.
    Other modules may have names of the same form, in layers of another kind."""
    sizes: Mapping[str, str | Callable[[Any], int]]
    """Symbols of the block, as names of configuration fields or functions of the configuration."""
    flags: Mapping[str, str | bool] = field(default_factory=dict)
    """Flags of the block's tensors, as names of boolean configuration fields or as constants."""
    text: str | None = None
    """Configuration field that holds the language model's configuration, where there are others
    beside it."""
    write_above_one: str | None = None
    """Configuration field that lets the write gate of a delta rule exceed 1."""
    cache: str = "past_key_values"
    """Name of the cache in the models' arguments and outputs."""
    positions: bool = False
    """Whether a continued cache needs explicit `position_ids`."""
    auto_classes: tuple[str, ...] = ("AutoModelForCausalLM",)
    """Auto classes that load the family."""
    defects: Mapping[str, str] = field(default_factory=dict)
    """Known defects of the source's own code, by the check of a comparison whose numbers they are
    in. The converted model shares them."""

    @property
    def converted_model_type(self) -> str:
        """`model_type` of a converted checkpoint."""
        return f"metaplastic_{self.model_type}"

    def converted_architecture(self, architecture: str) -> str:
        """Gives the class name of the converted form of one of the family's models."""
        return f"Metaplastic{architecture}"

    def source_config(self) -> type[Any]:
        """Imports the configuration class."""
        module, _, name = self.configuration.partition(":")
        return self._from(module, name)

    def source_model(self, architecture: str) -> type[Any]:
        """Imports one of the family's model classes, by its own module and never through an Auto
        class.

        Auto classes are open to re-registration: other packages put classes of their own behind the
        same `model_type`.
        """
        return self._from(self.modeling, architecture)

    def _from(self, module: str, name: str) -> type[Any]:
        try:
            found: type[Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as e:
            raise ConversionError(
                f"the installed transformers has no {name}: the family {self.model_type!r} needs "
                "another version"
            ) from e
        return found

    def text_config(self, config: Any) -> Any:
        """Gives the language model's part of a configuration object."""
        return config if self.text is None else getattr(config, self.text)

    def symbols(self, config: Any) -> Sizes:
        """Gives the values of the block's symbols for a configuration object."""
        text = self.text_config(config)
        values = {
            symbol: int(source(text) if callable(source) else getattr(text, source))
            for symbol, source in self.sizes.items()
        }
        for symbol, products in self.block.derived.items():
            total = 0
            for product in products:
                n = 1
                for factor in product:
                    n *= int(factor) if factor.isdigit() else values[factor]
                total += n
            values[symbol] = total
        return values

    def source_spec(self, config: Any) -> Spec:
        """Gives the spec that the mixers follow."""
        return load(self.spec)

    def mixer_shapes(self, config: Any, layer: int | None = None) -> dict[str, tuple[int, ...]]:
        """Gives the tensors that the mixer of a layer, default any, must have, with their
        shapes."""
        values = self.symbols(config)
        return {
            rule.name: tuple(int(d) if d.isdigit() else values[d] for d in rule.shape)
            for rule in self.block.tensors
            if rule.when is None or self._flag(config, rule.when)
        }

    def _flag(self, config: Any, name: str) -> bool:
        value = self.flags[name]
        return value if isinstance(value, bool) else bool(getattr(self.text_config(config), value))

    def layers(self, config: Any) -> tuple[int, ...]:
        """Gives the indices of the layers with a mixer."""
        kinds = enumerate(self.layer_kinds(config))
        return tuple(i for i, kind in kinds if kind in _LINEAR_LAYERS)

    def layer_kinds(self, config: Any) -> tuple[str, ...]:
        """Gives the kind of every layer."""
        return tuple(self.text_config(config).layer_types)

    def no_exact_gain(self, config: Any) -> str | None:
        """Says why the mixers cannot have the exact gain, or gives None if they can."""
        field = self.write_above_one
        if field is not None and getattr(self.text_config(config), field):
            return f"{field} lets the write gate exceed 1, and a rate above 1 has no precision"
        return no_exact_gain(self.source_spec(config))

    def split_key(self, key: str) -> tuple[int, str, str] | None:
        """Splits a tensor name into layer, mixer prefix and name inside the mixer, if it belongs to
        a mixer."""
        match = re.match(self.mixer_keys, key)
        if match is None:
            return None
        prefix = match["prefix"]
        return int(match["layer"]), prefix, key[len(prefix) + 1 :]

"""Configuration of a causal language model of gated linear attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from transformers import PreTrainedConfig
from transformers.configuration_utils import strict  # type: ignore[attr-defined]

from glazoo.families.own import OWN
from glazoo.families.settings import Settings
from glazoo.layers import Sizes
from glazoo.models.remote import carry_code
from glazoo.spec import Spec, SpecError
from glazoo.zoo import load

__all__ = ["ATTENTION", "RECURRENT", "GlazooConfig"]

ATTENTION = "attention"
"""Entry of a layer pattern that stands for softmax attention."""

RECURRENT = "gated_linear_attention"
"""Type of a recurrent layer, as `config.layer_types` and caches name it."""

_CHOICES = {
    "norm": ("rms", "layer"),
    "feed_forward": ("swiglu", "channel_mix", "gated_channel_mix"),
}
_SIZES = ("num_heads", "num_key_heads", "head_k_dim", "head_v_dim")


@strict
class GlazooConfig(PreTrainedConfig):
    """Configuration of `GlazooModel` and `GlazooForCausalLM`.

    The specs of all layers are stored in full, so that a checkpoint does not depend on the specs
    that the installed package ships.

    Args:
        pattern: what the layers are, repeated to `num_hidden_layers`: one entry or a list of
            entries, each a variant's name, the path of a spec file, a spec as a dictionary, a
            `Spec`, or "attention" for softmax attention. It is resolved into `specs` and
            `layer_specs`, and not kept.
        specs: the specs in use, in full, by name.
        layer_specs: per layer the name of its spec, or "attention".
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        intermediate_size: width of the feed-forward part; 0 leaves it out. Default: 8/3 of
            the hidden size, rounded up to a multiple of 16.
        num_heads: heads of the recurrent layers; see `glazoo.layers.GatedLinearAttention` for this
            and the next three.
        num_key_heads: heads of the shared streams.
        head_k_dim: key channels per head.
        head_v_dim: value channels per head.
        spec_sizes: by spec name, values that replace the four above.
        num_attention_heads: heads of softmax attention. Default: hidden_size / 64, at least 1.
        num_key_value_heads: key and value heads of softmax attention. Default: as many as queries.
        rope_theta: base of rotary embeddings, in softmax attention and in specs that have them.
        norm: norms between the layers: "rms" or "layer", which has a bias.
        norm_eps: inside the norms between the layers.
        feed_forward: "swiglu"; or "channel_mix", RWKV's squared relu of tokens interpolated with
            the one before, or "gated_channel_mix", that times a sigmoid gate of such tokens.
        embedding_norm: whether a norm follows the embeddings.
        head_bias: whether the language head has a bias.
        initializer_range: standard deviation of matrices and embeddings that have no published
            start.
        use_cache: whether the model gives its state back by default.
        tie_word_embeddings: whether input and output embeddings are one.
        impl: engine of the recurrences, as in `glazoo.attention`.
        check_finite: whether a layer with a non-finite input or output raises.
    """

    model_type: ClassVar[str] = "glazoo"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    pattern: Any = None
    specs: dict[str, dict[str, Any]] | None = None
    layer_specs: list[str] | None = None
    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_key_heads: int | None = None
    head_k_dim: int | None = None
    head_v_dim: int | None = None
    spec_sizes: dict[str, dict[str, int]] | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    rope_theta: float = 10000.0
    norm: str = "rms"
    norm_eps: float = 1e-5
    feed_forward: str = "swiglu"
    embedding_norm: bool = False
    head_bias: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    impl: str = "auto"
    check_finite: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # What the file says; the class knows better.
        kwargs.pop("model_type", None)
        block = kwargs.pop("metaplastic", None)
        if self.pattern is not None or self.layer_specs is None:
            default = "gated_deltanet" if self.pattern is None else self.pattern
            self.set_pattern(default)
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 48) * 16
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 64)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if block is not None:
            # A conversion of 0.1 kept the specs of the source, and beside them what it did.
            settings = Settings.from_block(block)
            changed = ((i, self.spec(i)) for i in settings.layers)
            self.take_specs({i: settings.metaplastic_spec(s) for i, s in changed if s is not None})
        # Here rather than in validators, whose exceptions hide what was raised.
        self.check()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def set_pattern(self, pattern: Any) -> None:
        """Resolves a layer pattern into `specs` and `layer_specs`.

        Raises:
            ValueError: the pattern is empty or has an entry that is none of the accepted.
            SpecError: an entry names no spec, or two different specs have one name.
        """
        given = pattern if isinstance(pattern, Sequence) and not isinstance(pattern, str) else None
        entries = [pattern] if given is None else list(given)
        if not entries:
            raise ValueError("pattern: got an empty list, at least one entry is needed")
        specs: dict[str, dict[str, Any]] = {}
        names: list[str] = []
        for entry in entries:
            if entry == ATTENTION:
                names.append(ATTENTION)
                continue
            spec = _resolve(entry)
            if spec.name == ATTENTION:
                raise SpecError(f"pattern: {ATTENTION!r} stands for softmax attention, not a spec")
            data = spec.model_dump(mode="json")
            if specs.setdefault(spec.name, data) != data:
                raise SpecError(f"pattern: two different specs are named {spec.name!r}")
            names.append(spec.name)
        self.specs = specs
        self.layer_specs = [names[i % len(names)] for i in range(self.num_hidden_layers)]
        self.pattern = None

    def take_specs(self, changed: Mapping[int, Spec]) -> None:
        """Takes other specs of layers into `specs` and `layer_specs`; sizes stay as they are."""
        assert self.layer_specs is not None
        sizes = dict(self.spec_sizes or {})
        specs: dict[str, dict[str, Any]] = {}
        names: list[str] = []
        for i, old in enumerate(self.layer_specs):
            spec = changed.get(i) or self.spec(i)
            if spec is None:
                names.append(old)
                continue
            data = spec.model_dump(mode="json")
            # Layers may differ in the shape or rank of their gates under one spec name.
            key, n = spec.name, 2
            while specs.setdefault(key, data) != data:
                key, n = f"{spec.name}.{n}", n + 1
            names.append(key)
            if old in sizes:
                sizes[key] = sizes[old]
        self.specs, self.layer_specs = specs, names
        if sizes:
            self.spec_sizes = {name: x for name, x in sizes.items() if name in specs}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a configuration; conversions of 0.1 had a `model_type` of their own."""
        found, rest = super().get_config_dict(*args, **kwargs)
        if found.get("model_type") == f"metaplastic_{cls.model_type}":
            found["model_type"] = cls.model_type
        return found, rest

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: transformers would save this module's file with every model."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the configuration, and the module that its `auto_map` names."""
        carry_code(self, OWN, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def spec(self, layer: int) -> Spec | None:
        """Return the spec of a layer, or None for softmax attention."""
        assert self.layer_specs is not None
        name = self.layer_specs[layer]
        if name == ATTENTION:
            return None
        if not self.specs or name not in self.specs:
            raise SpecError(f"layer_specs: layer {layer} is {name!r}, which `specs` does not have")
        return _resolve(self.specs[name])

    def sizes(self, layer: int) -> dict[str, int | None]:
        """Return the head counts and channels asked for a recurrent layer."""
        assert self.layer_specs is not None
        own = (self.spec_sizes or {}).get(self.layer_specs[layer], {})
        if strangers := sorted(set(own) - set(_SIZES)):
            raise ValueError(
                f"spec_sizes: got {', '.join(strangers)}, accepted are {', '.join(_SIZES)}"
            )
        return {name: own.get(name, getattr(self, name)) for name in _SIZES}

    @property
    def layer_types(self) -> list[str]:
        """Type of every layer, as caches need it."""
        assert self.layer_specs is not None
        return ["full_attention" if s == ATTENTION else RECURRENT for s in self.layer_specs]

    def validate_layer_type(self) -> None:
        """Takes the place of the base class's check, which knows its own layer types only."""

    def check(self) -> None:
        """Checks the layers, and that head counts and widths divide.

        Raises:
            ValueError: they do not, or the number of layers is not that of `layer_specs`.
            SpecError: a layer's spec is missing or invalid.
        """
        if self.layer_specs is None or len(self.layer_specs) != self.num_hidden_layers:
            count = 0 if self.layer_specs is None else len(self.layer_specs)
            raise ValueError(
                f"layer_specs: got {count} layers, but num_hidden_layers is "
                f"{self.num_hidden_layers}; to change the layers, give a `pattern`"
            )

        assert self.num_attention_heads is not None
        assert self.num_key_value_heads is not None
        if ATTENTION in self.layer_specs:
            if self.hidden_size % (2 * self.num_attention_heads):
                raise ValueError(
                    f"hidden_size: got {self.hidden_size}, accepted are multiples of "
                    f"2 num_attention_heads = {2 * self.num_attention_heads}"
                )
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads: got {self.num_attention_heads}, accepted are multiples "
                    f"of num_key_value_heads = {self.num_key_value_heads}"
                )
        for option, accepted in _CHOICES.items():
            if (value := getattr(self, option)) not in accepted:
                raise ValueError(f"{option}: got {value!r}, accepted are {', '.join(accepted)}")
        if ATTENTION in self.layer_specs and self.feed_forward != "swiglu":
            raise ValueError(
                f"feed_forward: got {self.feed_forward!r}, accepted beside softmax attention is "
                "swiglu: its cache has no place for the last token"
            )
        seen: set[str] = set()
        for layer, name in enumerate(self.layer_specs):
            spec = None if name in seen else self.spec(layer)
            seen.add(name)
            if spec is not None:
                Sizes.of(spec, self.hidden_size, **self.sizes(layer))


def _resolve(entry: object) -> Spec:
    if isinstance(entry, dict):
        try:
            return Spec.model_validate(entry)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise SpecError(f"spec {entry.get('name')!r}: {where}: {first['msg']}") from e
    if isinstance(entry, str | Path | Spec):
        return load(entry)
    raise ValueError(
        f"pattern: got {type(entry).__name__}, accepted are a variant's name, a spec file's path, "
        f"a spec as a dictionary, a Spec, and {ATTENTION!r}"
    )

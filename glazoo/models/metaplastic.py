"""Configuration and model classes of converted checkpoints, one pair per supported family.

The classes are subclasses of the source family's own, made from its description:
`MetaplasticMamba2Config` and `MetaplasticMamba2ForCausalLM` for Mamba2. They are attributes of this
module, and of `glazoo.models`.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from glazoo.converters.errors import ConversionError
from glazoo.converters.families import FAMILIES, Block, Family
from glazoo.converters.families.mixer import MetaplasticMixer
from glazoo.converters.gate import ImportanceGate
from glazoo.converters.settings import Settings

__all__ = ["attach", "config_class", "convert_in_place", "find_mixers", "model_class", "register"]


@functools.cache
def config_class(family: Family) -> type[Any]:
    """Gives the configuration class of a family's converted checkpoints."""
    base = family.source_config()

    def __post_init__(self: Any, **kwargs: Any) -> None:
        # A configuration precedes every model: this is where the family's modeling code gets
        # imported.
        _register_models(family)
        super(cls, self).__post_init__(**kwargs)

    name = f"Metaplastic{base.__name__}"
    cls: type[Any] = type(
        name,
        (base,),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} of a model converted to metaplastic form.",
            "__post_init__": __post_init__,
            "model_type": family.converted_model_type,
            "metaplastic": None,
        },
    )
    return cls


class _ConvertedModel:
    """What a converted model adds to its source's class."""

    glazoo_family: ClassVar[Family]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        attach(self, self.glazoo_family, Settings.from_block(config.metaplastic))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Says that transformers may treat the class as one of its own.

        It is loaded as its source is: renamings included, and buffers that no file holds filled by
        the source's own initialisation, which classes of other packages are denied.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ImportanceGate):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the model, into the folder it was loaded from too."""
        # A conversion links shards to the source's files. Writing over one would change the source:
        # take the link away first. What replaces it is a file of its own.
        if Path(save_directory).is_dir():
            for path in Path(save_directory).glob("*.safetensors"):
                if path.stat().st_nlink > 1:
                    path.unlink()
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a converted checkpoint; absent or unknown metaplastic tensors are an error, not a
        log line."""
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        unknown = sorted(k for k in info["unexpected_keys"] if ".metaplastic." in k)
        mismatched = sorted(str(k) for k in info["mismatched_keys"])
        for kind, keys in (
            ("lacks", missing),
            ("has unknown", unknown),
            ("has misshapen", mismatched),
        ):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ConversionError(
                    f"{pretrained_model_name_or_path} {kind} tensors: {', '.join(keys[:3])}{more}; "
                    "it is not a complete converted checkpoint"
                )
        return (model, info) if output_loading_info else model


_CLASSES: dict[tuple[type[Any], Family | Block], type[Any]] = {}
"""Converted classes by source class: there must be one only, or pickles and `isinstance` go
wrong."""


def model_class(base: type[Any], family: Family) -> type[Any]:
    """Gives the converted form of one of a family's model classes."""
    if (base, family) not in _CLASSES:
        _CLASSES[base, family] = _make_model_class(base, family)
    return _CLASSES[base, family]


def _make_model_class(base: type[Any], family: Family) -> type[Any]:
    name = family.converted_architecture(base.__name__)
    wide = {*(base._keep_in_fp32_modules_strict or ()), "metaplastic"}
    return type(
        name,
        (_ConvertedModel, base),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} converted to metaplastic form.",
            "glazoo_family": family,
            "config_class": config_class(family),
            "_keep_in_fp32_modules_strict": sorted(wide),
            # Engines choose by shape and device in Python; nobody has traced that in one graph with
            # the cache.
            "_can_compile_fullgraph": False,
        },
    )


def _mixer_class(base: type[nn.Module], family: Family) -> type[nn.Module]:
    # By block: several families may share a mixer.
    if (base, family.block) not in _CLASSES:
        _CLASSES[base, family.block] = _make_mixer_class(base, family)
    return _CLASSES[base, family.block]


def _make_mixer_class(base: type[nn.Module], family: Family) -> type[nn.Module]:
    from transformers.integrations.accelerate import force_accelerate_hooks

    name = f"Metaplastic{base.__name__}"
    mixin = family.block.mixin
    return type(
        name,
        (mixin, base),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} converted to metaplastic form.",
            "source_module": base.__module__,
            # Weights used without calling their submodule would stay where an offloading hook left
            # them.
            "forward": force_accelerate_hooks(list(family.block.hooked))(mixin.forward),
        },
    )


def find_mixers(model: nn.Module, family: Family) -> dict[int, nn.Module]:
    """Gives a model's mixers by layer: by their class, since some families reuse the attribute for
    other modules."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if type(module).__name__ == family.mixer:
            index = module.layer_idx
            assert isinstance(index, int)
            found[index] = module
    return found


def attach(model: nn.Module, family: Family, settings: Settings) -> None:
    """Turns a source model's mixers into metaplastic ones: class swap, and one added submodule
    each.

    Raises:
        ConversionError: the model has no mixer in a layer that the settings name.
    """
    config: Any = model.config
    sizes = family.symbols(config)
    spec = settings.metaplastic_spec(family.source_spec(config))
    mixers = find_mixers(model, family)
    if absent := sorted(set(settings.layers) - set(mixers)):
        raise ConversionError(f"the model has no {family.mixer} in the layers {absent}")
    if any("forward" in vars(mixers[layer]) for layer in settings.layers):
        # A hook of that kind keeps the source's forward pass on the instance, over any class.
        raise ConversionError(
            "the model's mixers carry hooks that replace `forward` (it was loaded with a "
            "device_map "
            "that offloads): convert the checkpoint folder, or load the model without"
        )
    for layer in settings.layers:
        mixer = mixers[layer]
        weight = next(mixer.parameters())
        gate = ImportanceGate(
            hidden=sizes["D"],
            heads=sizes["H"],
            value=sizes["V"],
            rank=settings.rank,
            gate=settings.gate,
            plasticity=settings.plasticity,
            seed=settings.seed,
            layer=layer,
            device=weight.device,
        )
        gate.train(mixer.training)
        if weight.dtype.itemsize > 4:
            gate.to(weight.dtype)
        mixer.metaplastic = gate
        mixer.metaplastic_spec = spec  # type: ignore[assignment]
        mixer.metaplastic_impl = "auto"  # type: ignore[assignment]
        mixer.__class__ = _mixer_class(type(mixer), family)
        assert isinstance(mixer, MetaplasticMixer)
        mixer.attached()


def convert_in_place(model: nn.Module, family: Family, settings: Settings) -> None:
    """Turns a source model into the converted class: mixers, configuration and the model's own
    class."""
    old: Any = model.config
    new = copy.deepcopy(old)
    new.__class__ = config_class(family)
    new.metaplastic = settings.to_block()
    new.architectures = [family.converted_architecture(type(model).__name__)]
    attach(model, family, settings)
    # Other models may share the configuration object: give this one its own.
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    cls = model_class(type(model), family)
    model.__class__ = cls
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model._keep_in_fp32_modules_strict = strict | {"metaplastic"}  # type: ignore[assignment]
    _register_models(family)


@functools.cache
def _register_models(family: Family) -> None:
    import transformers
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    mapping = get_checkpoint_conversion_mapping(family.model_type)
    if mapping is not None:
        # A class of another package is excluded from its source's renamings unless they are
        # registered for it.
        register_checkpoint_conversion_mapping(family.converted_model_type, mapping, overwrite=True)
    for architecture in family.architectures:
        base = family.source_model(architecture)
        own = get_checkpoint_conversion_mapping(architecture)
        if own is not None:
            name = family.converted_architecture(architecture)
            register_checkpoint_conversion_mapping(name, own, overwrite=True)
        for auto in family.auto_classes:
            getattr(transformers, auto).register(
                config_class(family), model_class(base, family), exist_ok=True
            )


def register() -> None:
    """Makes transformers' Auto classes know every converted architecture; done on import of
    `glazoo.models`."""
    from transformers import AutoConfig

    for family in FAMILIES.values():
        try:
            cls = config_class(family)
        except ConversionError:
            # The installed transformers does not have the family; converting names it with the
            # reason.
            continue
        AutoConfig.register(family.converted_model_type, cls, exist_ok=True)


def __getattr__(name: str) -> Any:
    # Dunder names come here too, from the import machinery.
    families = FAMILIES.values() if name.startswith("Metaplastic") else ()
    for family in families:
        try:
            cls = config_class(family)
        except ConversionError:
            continue
        if name == cls.__name__:
            return cls
        if name == f"Metaplastic{family.mixer}":
            return _mixer_class(family.source_model(family.mixer), family)
        for architecture in family.architectures:
            if name == family.converted_architecture(architecture):
                return model_class(family.source_model(architecture), family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

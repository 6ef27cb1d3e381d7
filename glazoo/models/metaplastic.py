"""Configuration and model classes of converted checkpoints, one pair per supported family.

The classes are subclasses of the source family's own, made from its description:
`MetaplasticMamba2Config` and `MetaplasticMamba2ForCausalLM` for Mamba2. They are attributes of this
module, and of `glazoo.models`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from glazoo.errors import ConversionError
from glazoo.families import CACHES, Family, Found, families
from glazoo.families.interception import current_packing, once, packing
from glazoo.families.mixer import MetaplasticMixer
from glazoo.families.packing import Packed, find_packed
from glazoo.families.settings import Settings
from glazoo.layers import ImportanceGate
from glazoo.models.decay import teach_trainer
from glazoo.models.remote import carry_code, remote_map, without_model_code
from glazoo.models.saving import SavesWhole, refuse_incomplete_gates
from glazoo.models.sharding import teach_accelerate
from glazoo.spec import Spec
from glazoo.strictjson import dumps, loads

__all__ = [
    "attach",
    "config_class",
    "convert_in_place",
    "convert_mixer",
    "model_class",
    "register",
]


class _ConvertedConfig:
    """What a converted model's configuration adds to its source's class.

    In memory, `model_type` is the source's: transformers, peft and others look up by it how to
    tokenise, which modules to adapt, how tensors are renamed, and what is right for the source is
    right for the converted model. In files it is the family's own: a program without glazoo refuses
    it, where under the source's it would load the weights as the source's and drop the gates.
    """

    glazoo_family: ClassVar[Family]
    model_type: ClassVar[str]
    metaplastic: Any = None
    auto_map: Mapping[str, Any]

    def __post_init__(self, **kwargs: Any) -> None:
        # What the file says; the class knows better.
        kwargs.pop("model_type", None)
        # A configuration precedes every model: this is where the family's modeling code gets
        # imported.
        _register_models(self.glazoo_family)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: transformers would save this module's file with every model."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a configuration; `model_type` becomes the source's."""
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if found.get("model_type") == cls.glazoo_family.converted_model_type:
            found["model_type"] = cls.model_type
        return found, rest

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        """Return the content of config.json."""
        data = loads(super().to_json_string(*args, **kwargs))  # type: ignore[misc]
        data["model_type"] = self.glazoo_family.converted_model_type
        return dumps(data, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the configuration, and the module that its `auto_map` names."""
        carry_code(self, self.glazoo_family, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def config_class(family: Family) -> type[Any]:
    """Return the configuration class of a family's converted checkpoints."""
    base = family.source_config()
    if family.native:
        return base
    name = family.converted_architecture(base.__name__)
    return type(
        name,
        (_ConvertedConfig, base),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} of a model converted to metaplastic form.",
            "glazoo_family": family,
            "model_type": base.model_type,
            "metaplastic": None,
        },
    )


class _ConvertedModel(SavesWhole):
    """What a converted model adds to its source's class."""

    glazoo_family: ClassVar[Family]
    # Assisted generation takes tokens back, which caches of transformers' own do for convolutions
    # and keys only: with this, `generate` refuses it at once.
    _is_stateful = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        teach_trainer()
        teach_accelerate()
        assert isinstance(self, nn.Module)
        settings = Settings.from_block(config.metaplastic)
        # Some heads build the model below them through AutoModel, which gives the converted one.
        if not any(isinstance(module, ImportanceGate) for module in self.modules()):
            attach(self, self.glazoo_family, settings)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: transformers would save this module's file with every model."""

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
        # A head that the files were saved without starts anew, as it does on the source.
        whole = cls.__name__ in (model.config.architectures or ()) or model.base_model is model
        body = "" if whole else f"{model.base_model_prefix}."
        missing = (k for k in info["missing_keys"] if k.startswith(body))
        refuse_incomplete_gates(pretrained_model_name_or_path, info, missing)
        return (model, info) if output_loading_info else model


_PACKED = {"position_ids": "position_ids", "cu_seq_lens_q": "cu_seqlens", "seq_idx": "seq_idx"}


def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a forward pass takes. To look takes as long as a layer's token, and
    the compiler does not follow it: do it once, before there are tokens."""
    return tuple(inspect.signature(inspect.unwrap(forward)).parameters)[1:]


def _keeping_apart(source: Callable[..., Any], *, apart: bool) -> Callable[..., Any]:
    """Wrap a model's forward pass so that packed sequences stay apart.

    The source's models drop the bounds on their way to the mixers, or read them in some layers and
    not in others: they are read here, once, from whatever says them, and reach every mixer.
    """
    names = _arguments(source)

    @functools.wraps(source)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        packed = _find_packed(given)
        # Bounds under the scan functions' own name reach the mixers without our help.
        if packed is None or given.get("cu_seqlens") is not None:
            return source(self, *args, **kwargs)
        given = _without_cache(given)
        if not apart:
            return _in_rows(functools.partial(source, self), packed, given)
        given = _by_positions(given, packed, names)
        with packing(packed), _recomputing(self, packed):
            return source(self, **given)

    return forward


def _without_cache(given: dict[str, Any]) -> dict[str, Any]:
    if any(given.get(name) is not None for name in CACHES):
        raise ValueError("packed sequences cannot continue a cache: pass no cache")
    return {**given, "use_cache": False}


def _by_positions(given: dict[str, Any], packed: Packed, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments by which attention takes rows apart: positions, and no mask. The mask
    has no zeros."""
    positions, mask = given.get("position_ids"), {"attention_mask": None}
    if "position_ids" in names and positions is None:
        given = {**given, "position_ids": packed.positions}
    return given | (mask if "attention_mask" in names else {})


_entered: dict[int, contextlib.ExitStack] = {}


def _enter_packed(
    names: Sequence[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Keep packed sequences apart where trainers call the model below the head, which is the
    source's, to compute the loss by themselves."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    packed = None if current_packing() is not None else _find_packed(given)
    if packed is None or given.get("cu_seqlens") is not None:
        return None
    mixer = next(m for m in module.modules() if isinstance(m, MetaplasticMixer))
    if not mixer.metaplastic_apart:
        raise ValueError(
            f"{type(module).__name__} mixes packed sequences: call the whole model, which computes "
            "them in rows of their own, or pass no packed sequences"
        )
    given = _by_positions(_without_cache(given), packed, names)
    stack = _entered[id(module)] = contextlib.ExitStack()
    stack.enter_context(packing(packed))
    stack.enter_context(_recomputing(module, packed))
    return (), given


def _leave_packed(module: nn.Module, args: Any, output: Any) -> None:
    if stack := _entered.pop(id(module), None):
        stack.close()


def _in_rows(source: Callable[..., Any], packed: Packed, given: dict[str, Any]) -> Any:
    """Run a model on documents in rows of their own, and lay what it gives end to end again."""
    shape = packed.starts.shape
    fills = {"labels": -100}
    rows = {
        name: packed.apart(x, fills.get(name, 0))
        if isinstance(x, Tensor) and x.shape[:2] == shape
        else x
        for name, x in given.items()
        if name not in (*_PACKED, "logits_to_keep", "attention_mask", "return_dict")
    }
    mask = packed.apart(torch.ones_like(packed.starts))
    output = source(**rows, attention_mask=mask.long(), return_dict=True)

    def together(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(together(part) for part in x)
        return packed.together(x) if isinstance(x, Tensor) and x.shape[:2] == mask.shape else x

    for name, value in output.items():
        output[name] = together(value)
    if kept := given.get("logits_to_keep"):
        last = slice(-kept, None) if isinstance(kept, int) else kept
        output["logits"] = output["logits"][:, last]
    return output if given.get("return_dict") is not False else output.to_tuple()


def _find_packed(given: Mapping[str, Any]) -> Packed | None:
    bounds = {ours: given.get(theirs) for theirs, ours in _PACKED.items()}
    if all(x is None for x in bounds.values()):
        return None
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    # One token of every row has nothing to be kept apart from.
    if not isinstance(tokens, Tensor) or tokens.shape[1] == 1:
        return None
    mask = given.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) else None
    return find_packed(tokens.shape[0], tokens.shape[1], attention_mask=mask, **bounds)


@contextlib.contextmanager
def _recomputing(model: nn.Module, packed: Packed) -> Iterator[None]:
    """Return the bounds to the layers' second forward pass too, which gradient checkpointing runs
    after this one has ended."""

    def apart(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with packing(packed):
                return function(*args, **kwargs)

        return call

    kept = [
        (m, vars(m)["_gradient_checkpointing_func"])
        for m in model.modules()
        if "_gradient_checkpointing_func" in vars(m)
    ]
    for m, checkpoint in kept:
        m._gradient_checkpointing_func = lambda function, *args, _checkpoint=checkpoint, **kwargs: (  # type: ignore[assignment]
            _checkpoint(apart(function), *args, **kwargs)
        )
    try:
        yield
    finally:
        for m, checkpoint in kept:
            m._gradient_checkpointing_func = checkpoint


@once
def model_class(base: type[Any], family: Family) -> type[Any]:
    """Return the converted form of one of a family's model classes.

    There is one only of each: pickles and `isinstance` rely on it.
    """
    if family.native:
        return base
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
            "forward": _keeping_apart(base.forward, apart=family.quirks.apart),
            "_keep_in_fp32_modules_strict": sorted(wide),
            # Engines choose by shape and device in Python; nobody has traced that in one graph with
            # the cache.
            "_can_compile_fullgraph": False,
        },
    )


class _LiveModel:
    """What conversion adds to a model of a class that is not transformers' own."""

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuses: nothing could load what it would write.

        Raises:
            ConversionError: always.
        """
        raise ConversionError(
            f"{type(self).__name__} was converted in memory, and no folder can hold it: its source "
            "is not a class of transformers. Keep its state_dict(), to load it into a model that "
            "is converted again; or import the source's folder (glazoo convert --import) and "
            "convert what that writes"
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ImportanceGate):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


@once
def _live_class(base: type[Any]) -> type[Any]:
    name = f"Metaplastic{base.__name__}"
    return type(
        name,
        (_LiveModel, base),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} converted to metaplastic form.",
            "forward": _keeping_apart(base.forward, apart=False),
        },
    )


def attach(
    model: nn.Module, family: Family, settings: Settings, found: Mapping[int, Found] | None = None
) -> None:
    """Turn a source model's mixers into metaplastic ones: class swap, and one added submodule each.

    Args:
        model: the source model.
        family: its family.
        settings: what to do.
        found: its mixers, if they have been examined already.

    Raises:
        ConversionError: the model has no mixer in a layer that the settings name.
    """
    mixers = family.mixers(model)
    if absent := sorted(set(settings.layers) - set(mixers)):
        raise ConversionError(f"the model has no convertible mixer in the layers {absent}")
    found = family.examine(model) if found is None else found
    spec = settings.metaplastic_spec(family.source_spec(model.config, found))
    for layer in settings.layers:
        convert_mixer(mixers[layer], family, settings, spec, found[layer])
    for inner in model.modules():
        if inner is model or not hasattr(inner, "get_input_embeddings"):
            continue
        if any(isinstance(m, MetaplasticMixer) for m in inner.modules()):
            enter = functools.partial(_enter_packed, _arguments(type(inner).forward))
            inner.register_forward_pre_hook(enter, with_kwargs=True)
            inner.register_forward_hook(_leave_packed, always_call=True)


def convert_mixer(
    mixer: nn.Module, family: Family, settings: Settings, spec: Spec, sizes: Found
) -> None:
    """Turn one source mixer into its metaplastic form, with the spec that it gets."""
    weight = next(mixer.parameters())
    gate = sizes.gate(spec, plasticity=settings.plasticity, seed=settings.seed).to(weight.device)
    if weight.dtype.itemsize > 4:
        gate.to(weight.dtype)
    mixer.metaplastic = gate.train(mixer.training)
    mixer.metaplastic_spec = spec  # type: ignore[assignment]
    mixer.metaplastic_impl = "auto"  # type: ignore[assignment]
    mixer.metaplastic_apart = family.quirks.apart  # type: ignore[assignment]
    form = family.metaplastic_class(type(mixer))
    assert form is not None
    mixer.__class__ = form


def convert_in_place(
    model: nn.Module, family: Family, settings: Settings, found: Mapping[int, Found] | None = None
) -> None:
    """Turns a source model into the converted class: mixers, configuration and the model's own
    class."""
    old: Any = model.config
    new = copy.deepcopy(old)
    new.metaplastic = settings.to_block()
    if family.saves:
        new.__class__ = config_class(family)
        new.architectures = [family.converted_architecture(type(model).__name__)]
        others = without_model_code(getattr(old, "auto_map", None)) or {}
        new.auto_map = {**others, **remote_map(family)}
    attach(model, family, settings, found)
    # Other models may share the configuration object: give this one its own.
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    base = type(model)
    model.__class__ = model_class(base, family) if family.saves else _live_class(base)
    # transformers notes at construction, by the name of the class, what a model can record.
    records = getattr(model, "_can_record_outputs", None)
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), records)
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model._keep_in_fp32_modules_strict = strict | {"metaplastic"}  # type: ignore[assignment]
    teach_trainer()
    teach_accelerate()
    if family.saves:
        _register_models(family)


@functools.cache
def _register_models(family: Family) -> None:
    import transformers
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.models.auto import (
        feature_extraction_auto,
        image_processing_auto,
        processing_auto,
        tokenization_auto,
        video_processing_auto,
    )

    base, config = family.source_config(), config_class(family)
    models = family.auto_models()
    for source in set(models.values()):
        # Renamings of an architecture rather than of a model type.
        own = get_checkpoint_conversion_mapping(source.__name__)
        if own is not None:
            name = family.converted_architecture(source.__name__)
            register_checkpoint_conversion_mapping(name, own, overwrite=True)
    for auto, source in models.items():
        getattr(transformers, auto).register(config, model_class(source, family), exist_ok=True)
    # What these give for the source they give for the converted model.
    for mapping in (
        tokenization_auto.TOKENIZER_MAPPING,
        processing_auto.PROCESSOR_MAPPING,
        image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
        video_processing_auto.VIDEO_PROCESSOR_MAPPING,
    ):
        if base in mapping:
            mapping.register(config, mapping[base], exist_ok=True)


def register() -> None:
    """Makes transformers' Auto classes know every converted architecture; done on import of
    `glazoo.models`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for family in families().values():
        try:
            cls = config_class(family)
        except ConversionError:
            # The installed transformers does not have the family; converting names it with the
            # reason.
            continue
        # Not by AutoConfig.register, which demands that memory and files agree on the type.
        CONFIG_MAPPING.register(f"metaplastic_{family.model_type}", cls, exist_ok=True)


def __getattr__(name: str) -> Any:
    # Dunder names come here too, from the import machinery.
    known = families().values() if name.startswith("Metaplastic") else ()
    source = name.removeprefix("Metaplastic")
    for family in known:
        try:
            config = family.source_config()
        except ConversionError:
            continue
        if source == config.__name__:
            return config_class(family)
        base = family.own_model(source)
        if base is not None:
            return model_class(base, family)
        if (mixer := family.own_mixer(source)) is not None:
            return mixer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

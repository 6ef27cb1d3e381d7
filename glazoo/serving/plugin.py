"""The entry point that vLLM calls in every one of its processes."""

from __future__ import annotations

from glazoo.families import families

__all__ = ["register"]

_MODEL = "glazoo.serving.vllm:ServedModel"
"""By name: vLLM looks at a class in a process of its own, so that none holds a GPU before it
forks."""


def register() -> None:
    """Makes vLLM know `GlazooForCausalLM` and every converted architecture.

    It may be called any number of times, in any process. Importing `glazoo.models` is what lets
    transformers, and so vLLM, read the configurations.
    """
    from vllm import ModelRegistry

    import glazoo.models  # noqa: F401 - registers the configurations

    for family in families().values():
        for architecture in family.generative or family.architectures:
            ModelRegistry.register_model(family.converted_architecture(architecture), _MODEL)

"""What a converted folder says about itself: the model card."""

from __future__ import annotations

import re
from pathlib import Path

from glazoo.families import Family
from glazoo.families.settings import Settings

__all__ = ["CARD", "base_model", "model_card"]

CARD = "README.md"


def base_model(folder: Path) -> str:
    """Names the source: its hub name, if the folder is one of a download cache, or the folder's."""
    for part in reversed(folder.resolve().parts):
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{match[1]}/{match[2]}"
    return folder.resolve().name


def _front_matter(card: str) -> list[str]:
    """Return the metadata lines of a source's card, but for its own base model."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    kept: list[str] = []
    inside = False
    for line in match[1].splitlines() if match else []:
        if re.match(r"\S", line) and not line.startswith("- "):
            inside = re.match(r"base_model(_relation)?\s*:", line) is not None
        if not inside:
            kept.append(line)
    return kept


_REMOTE = (
    "With `trust_remote_code=True` the import is not needed, only glazoo installed; so the folder "
    "can be given to programs that load models by themselves:",
    "",
    "```console",
    "$ lm_eval --model hf --model_args pretrained=...,trust_remote_code=True --tasks piqa",
    "```",
    "",
)


def model_card(
    source: Path,
    settings: Settings,
    family: Family,
    card: str | None,
    *,
    remote_code: bool = False,
    dtype: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        source: the source folder.
        settings: what the conversion was asked for.
        family: the source's family.
        card: text of the source's own card, whose metadata (licence, languages, tags) are kept.
        remote_code: whether the folder has the module `REMOTE_CODE`.
        dtype: dtype that the conversion cast the weights to, if it did.
    """
    name = base_model(source)
    kept = _front_matter(card or "")
    if not any(line.startswith("library_name") for line in kept):
        kept.append("library_name: transformers")
    layers = f"{len(settings.layers)} layers"
    auto = family.loaders(settings.base_architectures[0])[0]
    shape = {
        "head": "one importance vector over keys per head",
        "value": "one importance per synapse",
    }[settings.gate]
    back = "byte for byte" if dtype is None else f"with the weights in {dtype}"
    lines = [
        "---",
        *kept,
        f"base_model: {name}",
        "---",
        "",
        f"# {name}, metaplastic",
        "",
        f"`{name}` converted with glazoo: the recurrence of {layers} (`{settings.spec}`) carries "
        f"an importance state, {shape}. Its gates start at a plasticity of "
        f"{settings.plasticity:g}"
        + (
            ", where the model computes what its source computes."
            if settings.plasticity == 0
            else "; at 0 it computes what its source computes."
        ),
        "",
        "```python",
        "import glazoo.models",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("...")',
        "```",
        "",
        *(_REMOTE if remote_code else ()),
        "`glazoo tune` trains the gates, `glazoo inspect` shows where they stand, and "
        f"`glazoo convert --revert` gives the source back {back}. Licence and terms are "
        "those of the source; its own card is `glazoo/source/README.md`, if it had one.",
        "",
        "The method: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based "
        "Models, arXiv:2602.09075.",
    ]
    return "\n".join(lines) + "\n"

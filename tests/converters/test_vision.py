"""Families with a vision part: it stays as it is, and images go through the converted model as
they go through the source."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import contents
from converters.tiny import TINY, VOCABULARY, tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo.converters import convert_checkpoint, revert_checkpoint, verify_checkpoint
from glazoo.families import find_family

NAMES = sorted(name for name, (_, values) in TINY.items() if "vision_config" in values)
VIDEO, START, END, IMAGE = VOCABULARY - 4, VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1


def make(name: str) -> Any:
    """A random model whose image tokens are in its vocabulary."""
    family = find_family(TINY[name][0])
    config = tiny_config(name)
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    for field, value in (
        ("vision_start_token_id", START),
        ("vision_end_token_id", END),
        ("image_start_token_id", START),
        ("image_end_token_id", END),
    ):
        if hasattr(config, field):
            setattr(config, field, value)
    torch.manual_seed(0)
    model = family.source_model(family.architectures[0])(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def picture(model: Any, seed: int = 0) -> dict[str, Any]:
    """An image of four by four patches, between words."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(int(grid.prod()), width, generator=generator)
    count = int(grid.prod()) // merge**2
    ids = torch.tensor([[3, 1, 4, START, *[IMAGE] * count, END, 1, 5, 9, 2, 6]])
    arguments = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        arguments["mm_token_type_ids"] = (ids == IMAGE).int()
    return arguments


def test_every_family_with_a_vision_part_is_here() -> None:
    known = {"qwen3_5", "qwen3_5_moe", "qwen4_exp", "glm5_next"} & {x for x, _ in TINY.values()}
    assert {TINY[n][0] for n in NAMES} == known >= {"qwen3_5", "qwen3_5_moe"}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_images_are_seen_as_by_the_source(name: str, tmp_path: Path) -> None:
    source = make(name)
    source.save_pretrained(tmp_path / "s", max_shard_size="50KB")
    before = contents(tmp_path / "s")
    convert_checkpoint(tmp_path / "s", tmp_path / "c")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    visual = {n: p for n, p in source.named_parameters() if ".visual." in n}
    assert len(visual) > 5
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[n], p) for n, p in visual.items())
    files: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "c").glob("*.safetensors"):
        files |= load_file(path)
    assert not any(".visual." in key and ".metaplastic." in key for key in files)

    # What rounding may explain: measured on the text alone.
    verified = verify_checkpoint(tmp_path / "s", tmp_path / "c", tokens=17, new_tokens=3)
    assert verified.passed
    budget = max(c.budget for c in verified.checks if c.budget is not None)
    logits = source(**picture(source)).logits
    assert float((model(**picture(model)).logits - logits).abs().max()) <= budget
    # And the image does matter, far more than that.
    other = source(**picture(source, seed=1)).logits
    assert float((other - logits).abs().max()) > 10 * budget

    revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert contents(tmp_path / "back") == before

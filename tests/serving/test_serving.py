"""Models behind vLLM's interfaces give the logits that transformers gives."""

from __future__ import annotations

import copy
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import SPREAD, unit
from layer_cases import model
from serving.stand_in import Registry, Server, configuration, installed
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import glazoo
from glazoo.families import families
from glazoo.models.causal_lm import GlazooForCausalLM

ROOT = Path(__file__).parents[2]
# Of our own models: softmax attention between, states of several sizes, tokens shifted in mixer and
# feed-forward, values of the first layer, a normaliser, a learned lower bound.
PATTERNS = (
    ["metaplastic_mamba2", "attention", "kdn"],
    ["rwkv7", "mlstm"],
    ["hgrn2", "metaplastic_comba"],
)
FAMILIES = (
    "mamba2",
    "qwen3_next",
    "falcon_h1",
    "bamba",
    "kimi_linear",
    "olmo_hybrid",
    "granitemoehybrid",
)


@pytest.fixture
def registry():
    with installed() as found:
        yield found


def served(registry: Registry, made: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Server]:
    """The model as transformers loads it, and a server of the class that the registry names."""
    from glazoo.serving.plugin import register

    made.save_pretrained(folder)
    register()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).config
    config = configuration(folder, again, dtype)
    (architecture,) = again.architectures
    with torch.no_grad():
        return plain, Server(registry.load(architecture)(vllm_config=config), config, slots=3)


@torch.no_grad()
def tolerance(plain: Any) -> float:
    """What another order of summation may change: the error of float32, in units of the dtype."""
    vocabulary = plain.config.get_text_config().vocab_size
    text = torch.arange(1, 20)[None] % vocabulary
    made = copy.deepcopy(plain)
    # The grouped kernels of experts take no float64.
    made.set_experts_implementation("eager")
    low, exact = (
        made.to(dtype)(input_ids=text).logits.double() for dtype in (torch.float32, torch.float64)
    )
    return SPREAD * float((low - exact).abs().max()) * unit(plain.dtype) / unit(torch.float32)


@torch.no_grad()
def check(plain: Any, server: Server) -> None:
    """Pieces of prompts and single tokens of several requests at once, and slots used again."""
    vocabulary, allowed = plain.config.get_text_config().vocab_size, tolerance(plain)
    generator = torch.Generator().manual_seed(0)
    lengths = {"a": 19, "b": 7, "c": 12, "d": 1, "e": 5}
    text = {
        name: torch.randint(1, vocabulary, (n,), generator=generator).tolist()
        for name, n in lengths.items()
    }
    steps: list[dict[str, int]] = [
        {"a": 4, "b": 3},
        {"b": 1, "a": 9, "c": 2},
        {"b": 1, "a": 1, "c": 5},
        {"b": 1, "a": 1, "c": 1},
        {"b": 1, "a": 1, "c": 1},
        # "d" is one token long and gets the slot of "b"; "e" that of "d".
        {"a": 1, "c": 1, "d": 1},
        {"a": 1, "c": 1, "e": 2},
        {"e": 1, "c": 1, "a": 1},
        {"e": 2},
    ]
    done = dict.fromkeys(text, 0)
    for step in steps:
        new = {}
        for name, count in step.items():
            new[name] = text[name][done[name] : done[name] + count]
        for name, logits in server.step(new).items():
            seen = done[name] + len(new[name])
            wanted = plain(input_ids=torch.tensor([text[name][:seen]])).logits[0, done[name] :]
            torch.testing.assert_close(logits, wanted, rtol=0, atol=allowed)
            done[name] = seen
            if seen == lengths[name]:
                server.finish(name)
    assert done == lengths


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (i > 0), id="-".join(x))
        for i, x in enumerate(PATTERNS)
    ],
)
def test_our_models_give_their_logits(
    pattern: list[str], registry: Registry, tmp_path: Path
) -> None:
    made = model(pattern).double()
    plain, server = served(registry, made, tmp_path, torch.float64)
    assert isinstance(plain, GlazooForCausalLM)
    check(plain, server)


@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=[pytest.mark.slow] * (i > 0)) for i, x in enumerate(FAMILIES)]
)
def test_converted_models_give_their_logits(
    family: str, registry: Registry, tmp_path: Path
) -> None:
    made = tiny_model(family)
    glazoo.metaplasticize(made, plasticity=0.5)
    plain, server = served(registry, made, tmp_path, torch.float32)
    check(plain, server)


def test_memory_is_measured_without_slots(registry: Registry, tmp_path: Path) -> None:
    """vLLM runs a model on made-up tokens before it has a cache."""
    made = model(["kdn", "attention"]).double()
    _, server = served(registry, made, tmp_path, torch.float64)
    with torch.no_grad():
        assert server.model(torch.zeros(5, dtype=torch.long), torch.arange(5)).shape[0] == 5


def test_every_architecture_is_registered(registry: Registry) -> None:
    from glazoo.serving.plugin import register

    for _ in range(2):
        register()
    names = set(registry.models)
    assert {"GlazooForCausalLM", "MetaplasticMamba2ForCausalLM"} <= names
    assert "MetaplasticQwen3NextForCausalLM" in names
    assert not any(name.startswith(("Mamba2", "Qwen3")) for name in names)
    for family in families().values():
        assert {family.converted_architecture(x) for x in family.architectures} <= names
    assert len(set(registry.models.values())) == 1
    served_model = registry.load("GlazooForCausalLM")
    assert served_model.is_hybrid
    assert served_model.has_inner_state


def test_the_entry_point_is_the_plugin() -> None:
    from glazoo.serving.plugin import register

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = project["entry-points"]["vllm.general_plugins"]
    assert EntryPoint("glazoo", named["glazoo"], "vllm.general_plugins").load() is register


@pytest.mark.parametrize(
    "change",
    [
        {"parallel_config__tensor_parallel_size": 2},
        {"parallel_config__pipeline_parallel_size": 2},
        {"quant_config": object()},
        {"speculative_config": object()},
        {"lora_config": object()},
        {"cache_config__mamba_cache_mode": "align"},
        {"model_config__enforce_eager": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_supported_is_refused_by_its_name(
    change: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    from glazoo.serving.vllm import ServedModel

    config = configuration(tmp_path, None, torch.float32, **change)
    with pytest.raises(
        ValueError, match=r"not supported for glazoo's models in vLLM; accepted"
    ) as e:
        ServedModel(vllm_config=config)
    wanted = {"mamba_cache_mode": "enable_prefix_caching", "lora_config": "enable_lora"}
    wanted["quant_config"] = "quantization"
    name = next(iter(change)).rpartition("__")[2]
    assert re.match(wanted.get(name, name), str(e.value))


def test_states_have_the_shapes_that_the_layers_pack(registry: Registry, tmp_path: Path) -> None:
    """A convolution's inputs, and memory and importance in one tensor; of the largest layer."""
    from glazoo.families.mixer import pack_state
    from glazoo.serving.vllm import ServedModel

    made = tiny_model("mamba2")
    glazoo.metaplasticize(made)
    config = configuration(tmp_path, made.config, torch.bfloat16)
    conv, packed = ServedModel.get_mamba_state_shape_from_config(config)
    mixer = next(m for m in made.modules() if hasattr(m, "metaplastic"))
    heads, value, key = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    state = glazoo.State(torch.zeros(1, heads, key, value), torch.zeros(1, heads, key))
    assert packed == tuple(pack_state(state).shape[1:])
    assert conv == (mixer.conv_dim, mixer.conv_kernel_size)
    # States stay wide where tokens are not.
    dtypes = ServedModel.get_mamba_state_dtype_from_config(config)
    assert dtypes == (torch.bfloat16, torch.float32)

"""Models that are not transformers' own, converted in memory: those of flash-linear-attention."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from converters.converting import VOCABULARY, open_gates, prompts
from torch import Tensor, nn

from glazoo import attention, metaplasticize
from glazoo.converters import ConversionError, import_original
from glazoo.families import LiveFamily
from glazoo.families.calls import CALLS, Recurrence
from glazoo.models import GlazooForCausalLM
from glazoo.zoo import load

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("fla") is None,
        reason="flash-linear-attention is not installed: its own layers are what is tested",
    ),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="fla's layers are Triton, which runs on a GPU or in its interpreter",
    ),
    # Of fla and of the interpreter.
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def fla() -> Iterator[Any]:
    """Import fla, and take it away again: it puts its classes behind names of transformers, and
    what else is tested here is transformers without it."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from triton.runtime.autotuner import Autotuner

    mappings = [CONFIG_MAPPING] + [
        mapping
        for auto in vars(modeling_auto).values()
        if isinstance(auto, type) and (mapping := getattr(auto, "_model_mapping", None)) is not None
    ]
    kept = [dict(mapping._extra_content) for mapping in mappings]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if DEVICE == "cpu":
            # The choice between configurations is timed, and the interpreter has no clock for it.
            patch.setattr(Autotuner, "_bench", lambda *_args, **_options: [0.0, 0.0, 0.0])
        import fla
        import fla.layers
        import fla.models

        yield fla
    for mapping, content in zip(mappings, kept, strict=True):
        mapping._extra_content.clear()
        mapping._extra_content.update(content)
    for name in [n for n in sys.modules if n.partition(".")[0] == "fla"]:
        del sys.modules[name]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow mixers on short inputs only: the interpreter takes seconds for long ones."""
    if DEVICE == "cpu":
        monkeypatch.setattr(LiveFamily, "lengths", (2,))


quick = pytest.mark.usefixtures("_quick")


# The functions.


def operands(spec: str, tokens: int = 11) -> dict[str, Tensor]:
    """Random arguments of a function of two rows; the write gate is activated already."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, tokens, *shape, generator=generator)

    heads, key, value = 2, 8, 6
    found = {"q": draw(heads, key), "k": draw(heads, key), "v": draw(heads, value)}
    if spec in ("deltanet", "gated_deltanet", "kda"):
        found["k"] = F.normalize(found["k"], dim=-1)
        found["beta"] = draw(heads).sigmoid()
    if spec in ("gla", "kda"):
        found["g"] = F.logsigmoid(draw(heads, key))
    if spec in ("simple_gla", "gated_deltanet"):
        found["g"] = F.logsigmoid(draw(heads))
    return found


def ours(name: str, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a call computes after conversion, without importance."""
    call = CALLS[name]
    x: Recurrence = call.bind((), arguments)
    gates = {k: t for k, t in (("g", x.g), ("beta", x.beta)) if t is not None}
    out = attention(
        load(call.spec), x.q, x.k, x.v, **gates, scale=x.scale, output_final_state=x.keep
    )
    memory = None if out.final_state is None else out.final_state.memory
    return x.finish(out.output, memory)  # type: ignore[no-any-return]


def naive(spec: str, a: Mapping[str, Tensor]) -> Tensor:
    """What fla's own reference computes."""
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.retention.naive import naive_retention
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    q, k, v = a["q"], a["k"], a["v"]
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    if spec == "retnet":
        return naive_retention(*heads_first).transpose(1, 2)
    if spec == "deltanet":
        beta = a["beta"].transpose(1, 2)
        return delta_rule_recurrence(*heads_first, beta)[0].transpose(1, 2)
    if spec == "gla":
        return naive_recurrent_gla(q, k, v, a["g"])[0]
    if spec == "simple_gla":
        return naive_recurrent_simple_gla(q, k, v, a["g"])[0]
    if spec == "gated_deltanet":
        return naive_recurrent_gated_delta_rule(q, k, v, a["beta"], a["g"])[0]
    return naive_recurrent_kda(q, k, v, a["g"], a["beta"])[0]


MODULES = {
    "gla": "gla",
    "simple_gla": "simple_gla",
    "retnet": "retention",
    "deltanet": "delta_rule",
    "gated_deltanet": "gated_delta_rule",
    "kda": "kda",
}


def functions() -> list[str]:
    ends = tuple(f"_{end}" for end in MODULES.values())
    return [name for name in CALLS if name.endswith(ends) and not name.startswith("torch_")]


# What older versions had, and fla 0.6.0 only raises an error from.
RETIRED = ("fused_chunk_gla", "fused_chunk_delta_rule")


@pytest.mark.parametrize("name", [name for name in functions() if name not in RETIRED])
def test_an_entry_has_the_parameters_of_the_function(name: str) -> None:
    call = CALLS[name]
    module = __import__(f"fla.ops.{MODULES[call.spec]}", fromlist=[name])
    there = tuple(inspect.signature(inspect.unwrap(getattr(module, name))).parameters)
    assert there[: len(call.parameters)] == call.parameters


@pytest.mark.parametrize("name", functions())
def test_a_call_computes_what_the_reference_of_fla_does(name: str) -> None:
    call = CALLS[name]
    arguments = operands(call.spec)
    given = {call.operands.get(k, k): t for k, t in arguments.items()}
    output, state = ours(name, given)
    assert state is None
    torch.testing.assert_close(output, naive(call.spec, arguments), rtol=1e-5, atol=1e-5)
    scaled, _ = ours(name, {**given, "scale": 0.5})
    torch.testing.assert_close(scaled, output * 0.5 * 8**0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("fused_recurrent_gated_delta_rule", None),
        ("fused_recurrent_kda", None),
        ("fused_recurrent_kda", -5.0),
    ],
)
def test_gates_that_a_function_computes_itself(
    name: str, negative: bool, bound: float | None
) -> None:
    """As the function itself does, on grouped heads with everything raw."""
    call = CALLS[name]
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    rows, tokens, heads, values, key, value = 2, 5, 2, 4, 8, 8
    per_key = (key,) if call.spec == "kda" else ()
    arguments: dict[str, Any] = {
        "q": draw(rows, tokens, heads, key),
        "k": draw(rows, tokens, heads, key),
        "v": draw(rows, tokens, values, value),
        "g": draw(rows, tokens, values, *per_key),
        "beta": draw(rows, tokens, values),
        "A_log": draw(values),
        "dt_bias": draw(values * (key if per_key else 1)),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": negative,
        "output_final_state": True,
    }
    if bound is not None:
        arguments["lower_bound"] = bound
    module = __import__(f"fla.ops.{MODULES[call.spec]}", fromlist=[name])
    with torch.no_grad():
        expected, last = getattr(module, name)(**arguments)
        output, state = ours(name, arguments)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("chunk_gla", {"cp_context": object()}),
        ("fused_recurrent_gla", {"gv": torch.zeros(2, 11, 2, 6)}),
        ("fused_recurrent_simple_gla", {"reverse": True}),
        ("fused_recurrent_gated_delta_rule", {"gk": torch.zeros(2, 11, 2, 8)}),
        ("chunk_kda", {"return_intermediate_states": True}),
        ("parallel_retention", {"output_attentions": True}),
        ("chunk_delta_rule", {"head_first": True}),
    ],
)
def test_what_a_converted_call_does_not_compute_is_refused(name: str, odd: dict[str, Any]) -> None:
    call = CALLS[name]
    given = {call.operands.get(k, k): t for k, t in operands(call.spec).items()}
    with pytest.raises(ValueError, match=f"{name} was called with {next(iter(odd))}"):
        ours(name, {**given, **odd})


def test_more_arguments_by_position_than_are_known_are_refused() -> None:
    a = operands("kda")
    with pytest.raises(ValueError, match="6 arguments by position; known are q, k, v, g, beta"):
        CALLS["chunk_kda"].bind((a["q"], a["k"], a["v"], a["g"], a["beta"], a["beta"]), {})


# The models.

COMMON = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "intermediate_size": 48,
    "fuse_norm": False,
    "fuse_swiglu": False,
    "fuse_cross_entropy": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gla": ("GLA", {}),
    "gla-convolution": ("GLA", {"use_short_conv": True, "num_kv_heads": 1}),
    "retnet": ("RetNet", {}),
    "delta_net": ("DeltaNet", {}),
    "delta_net-negative": ("DeltaNet", {"allow_neg_eigval": True, "use_gate": True}),
    "gated_deltanet": ("GatedDeltaNet", {"head_dim": 8, "num_v_heads": 4}),
    "gated_deltanet-negative": ("GatedDeltaNet", {"head_dim": 8, "allow_neg_eigval": True}),
    "kda": ("KDA", {"head_dim": 8, "num_v_heads": 4}),
    "kda-bounded": (
        "KDA",
        {"head_dim": 8, "safe_gate": True, "lower_bound": -5.0, "allow_neg_eigval": True},
    ),
}


class LoneModel(nn.Module):
    """A model of no package: one mixer with a cache, between an embedding and a head."""

    def __init__(self) -> None:
        from fla.layers.simple_gla import SimpleGatedLinearAttention

        super().__init__()
        self.config = SimpleNamespace(hidden_size=32)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.mixer = SimpleGatedLinearAttention(hidden_size=32, num_heads=2, layer_idx=0)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        from fla.models.utils import Cache

        if use_cache and past_key_values is None:
            past_key_values = Cache()
        x, _, _ = self.mixer(
            self.embedding(input_ids),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return SimpleNamespace(logits=self.head(x), past_key_values=past_key_values)


def make(name: str) -> Any:
    """A random model whose every tensor differs from its default start."""
    import fla.models as models

    torch.manual_seed(0)
    if name == "lone":
        model: Any = LoneModel()
    else:
        kind, options = MODELS[name]
        config = getattr(models, f"{kind}Config")(**{**COMMON, **options})
        model = getattr(models, f"{kind}ForCausalLM")(config)
    return scattered(model)


def scattered(model: Any) -> Any:
    """Moves every tensor of a model from its default start."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif "conv1d" not in name:
                p.mul_(5.0)
    return model.eval().to(DEVICE)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.abs().max()))


QUICK = ("gla", "retnet", "lone")


def each(*names: str) -> Any:
    """The names as parameters; those whose convolutions take the interpreter long are slow."""
    return pytest.mark.parametrize(
        "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]
    )


EVERY = each(*MODELS, "lone")


@quick
@EVERY
def test_a_converted_model_computes_the_same(name: str) -> None:
    source = make(name)
    ids, mask = (x.to(DEVICE) for x in prompts(2, 9))
    kept = dict(source.named_parameters())
    with torch.no_grad():
        plain, padded = source(ids).logits, source(ids, attention_mask=mask).logits
        base = type(source)
        assert metaplasticize(source) is source
        assert isinstance(source, base)
        assert type(source).__name__ == f"Metaplastic{base.__name__}"
        after = dict(source.named_parameters())
        assert all(after[n] is p for n, p in kept.items())
        assert any(".metaplastic." in n for n in after)
        close(source(ids).logits, plain)
        shown = mask.bool()
        close(source(ids, attention_mask=mask).logits[shown], padded[shown])


@quick
@EVERY
def test_decoding_and_padding_agree_with_open_gates(name: str) -> None:
    model = metaplasticize(make(name), 0.5)
    open_gates(model)
    ids, mask = (x.to(DEVICE) for x in prompts(2, 9))
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        # A row without its padding.
        alone = model(ids[1:, 5:]).logits
        close(whole[1:, 5:], alone)
        out = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
        for t in (7, 8):
            out = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            close(out.logits[:, -1], whole[:, t])
        state = out.past_key_values[0]["recurrent_state"]
        unchanged = metaplasticize(make(name))
        assert not torch.allclose(unchanged(ids).logits, model(ids).logits, atol=1e-3)
    # Values and the importance that they share, in one tensor.
    assert state.dtype == torch.float32
    assert state.shape[0] == 2


@quick
@each("gla-convolution", "retnet", "gated_deltanet")
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_goes_on_working(name: str, beams: int) -> None:
    source = make(name)
    ids, mask = (x.to(DEVICE) for x in prompts(2, 9))
    options = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    before = source.generate(ids, **options)
    after = metaplasticize(source).generate(ids, **options)
    assert torch.equal(before, after)


@quick
@each("gla", "retnet", "delta_net", "kda")
def test_packed_sequences_stay_apart(name: str) -> None:
    model = metaplasticize(make(name), 0.5)
    open_gates(model)
    ids = prompts(1, 11)[0].to(DEVICE)
    with torch.no_grad():
        apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
        bounds = torch.tensor([0, 4, 11], device=DEVICE)
        close(model(ids, cu_seqlens=bounds).logits, apart)
        positions = torch.cat([torch.arange(4), torch.arange(7)])[None].to(DEVICE)
        close(model(ids, position_ids=positions).logits, apart)


@quick
@each("gla", "gated_deltanet")
def test_gates_learn(name: str) -> None:
    model = metaplasticize(make(name)).train()
    ids = prompts(2, 9)[0].to(DEVICE)
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gates = {n: p for n, p in model.named_parameters() if n.endswith("metaplastic.b_scale")}
    assert len(gates) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gates.values())
    assert model.lm_head.weight.grad is not None


@quick
@each("gated_deltanet-negative", "delta_net-negative", "kda-bounded")
def test_a_write_above_one_has_no_exact_gain(name: str) -> None:
    model = make(name)
    with pytest.raises(ConversionError, match="allow_neg_eigval lets the write gate exceed 1"):
        metaplasticize(model, gain="exact")
    assert metaplasticize(model).config.metaplastic["gain"] == "first_order"


# The refusals.


def test_saving_is_refused(tmp_path: Path) -> None:
    model = metaplasticize(make("gla"))
    with pytest.raises(ConversionError, match=r"in memory.*glazoo convert --import"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = metaplasticize(make("gla"))
    again.load_state_dict(model.state_dict())
    copy.deepcopy(again)


@quick
def test_a_cache_from_before_the_conversion_is_refused() -> None:
    model = make("gla")
    ids = prompts(2, 9)[0].to(DEVICE)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        metaplasticize(model)
        with pytest.raises(ValueError, match="or from before the conversion"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Mom", "gives its scan other tokens than those of its input"),
        ("GatedDeltaProduct", "could not be followed to its scan|other tokens"),
        ("Mamba2", "mamba_chunk_scan_combined, .* would be called if it were installed"),
        ("HGRN", "none calls a known scan function; known are"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(kind: str, message: str) -> None:
    import fla.models as models

    options = {"head_dim": 16, "state_size": 8}
    if kind == "Mamba2":
        options["num_heads"] = 4
    model = getattr(models, f"{kind}ForCausalLM")(
        getattr(models, f"{kind}Config")(**{**COMMON, **options})
    ).to(DEVICE)
    with pytest.raises(ConversionError, match=message) as caught:
        metaplasticize(model)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton runs here")
def test_layers_that_need_triton_say_so_on_a_cpu() -> None:
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import fla.models as m\n"
        "from glazoo import metaplasticize\n"
        "for conv in (False, True):\n"
        "    c = m.GLAConfig(hidden_size=32, num_heads=2, num_hidden_layers=1, vocab_size=61,"
        " use_short_conv=conv)\n"
        "    try:\n"
        "        metaplasticize(m.GLAForCausalLM(c)); print('converted')\n"
        "    except Exception as e:\n"
        "        print(type(e).__name__, e)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    plain, convolved = done.stdout.splitlines()
    assert plain == "converted"
    assert convolved.startswith("ConversionError GatedLinearAttention")
    assert "its code before the scan is Triton, which runs on a GPU only" in convolved


# Mamba2, which fla computes with functions of mamba_ssm.


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any
) -> Any:
    """What mamba_ssm's function computes, token by token."""
    assert options["z"] is None
    dt = F.softplus(dt + options["dt_bias"])
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        write = step * x[:, t, :, :, None] * B[:, t, :, None]
        state = (step * A[:, None, None]).exp() * state + write
        outputs.append((state * C[:, t, :, None]).sum(-1))
    skip = options["D"]
    output = torch.stack(outputs, 1) + skip.view(skip.shape[0], -1) * x
    return (output, state) if options["return_final_states"] else output


def state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **options: Any
) -> Tensor:
    """What mamba_ssm's function computes."""
    assert options["z"] is None
    dt = F.softplus(dt + options["dt_bias"])
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    decayed = (dt[..., None] * A).exp() * state
    state.copy_(decayed + (dt * x)[..., None] * B[:, :, None])
    return (state * C[:, :, None]).sum(-1) + D * x


@pytest.mark.slow
@quick
@pytest.mark.parametrize("wide_skip", [False, True])
def test_mamba2_with_the_functions_of_mamba_ssm(
    wide_skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fla.layers.mamba2 as module
    import fla.models as models
    from fla.layers.utils import get_layer_cache, update_layer_cache

    monkeypatch.setattr(module, "mamba_chunk_scan_combined", chunk_scan)
    monkeypatch.setattr(module, "selective_state_update", state_update)

    class Kernels(module.Mamba2):  # type: ignore[misc, name-defined]
        """The path that fla takes on GPUs, without asking for one."""

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool = False,
            output_attentions: bool = False,
            **kwargs: Any,
        ) -> Any:
            last = get_layer_cache(self, past_key_values)
            output, conv, state = self.cuda_kernels_forward(
                hidden_states, last, use_cache, attention_mask
            )
            update_layer_cache(
                self,
                past_key_values,
                recurrent_state=state,
                conv_state=conv,
                offset=hidden_states.shape[1],
            )
            return output, None, past_key_values

    torch.manual_seed(0)
    options = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2}
    config = models.Mamba2Config(**{**COMMON, **options})
    source = models.Mamba2ForCausalLM(config).eval().to(DEVICE)
    for layer in source.backbone.layers:
        layer.mixer.__class__ = Kernels
        if wide_skip:
            layer.mixer.D_has_hdim = True
            layer.mixer.D = nn.Parameter(torch.randn(64, device=DEVICE))
    ids, mask = (x.to(DEVICE) for x in prompts(2, 9))
    with torch.no_grad():
        plain, padded = source(ids).logits, source(ids, attention_mask=mask).logits
        tokens = source.generate(ids, max_new_tokens=4, do_sample=False)
        metaplasticize(source)
        close(source(ids).logits, plain)
        shown = mask.bool()
        close(source(ids, attention_mask=mask).logits[shown], padded[shown])
        assert torch.equal(source.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    # There fla has projections and scan in one kernel, and no way around it.
    with pytest.raises(RuntimeError, match="did not call its scan on this path"):
        source.train()(ids, use_cache=False)


# Files, which are read without the package.


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "comba": ("Comba", {"num_v_heads": 4}),
    "comba_plain": ("Comba", {"use_output_gate": False, "use_short_conv": False}),
    "product": ("GatedDeltaProduct", {"num_householder": 2, "use_forget_gate": True}),
    "product_plain": ("GatedDeltaProduct", {"num_householder": 3, "use_output_gate": False}),
    "precond_gdn": ("PrecondGatedDeltaNet", {"squash_x": 2.0, "allow_neg_eigval": True}),
    "precond_kda": ("PrecondKDA", {"squash_eps": 1e-3}),
    "precond_safe": ("PrecondKDA", {"safe_gate": True, "lower_bound": -5.0}),
    "lightnet": ("LightNet", {"expand_ratio": 16, "gate_low_rank_dim": 8}),
    "lightnet_conv": ("LightNet", {"expand_ratio": 16, "use_short_conv": True}),
    "mesa": ("MesaNet", {"use_output_gate": True, "lambda_lower_bound": 0.5}),
}


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace two kernels that the interpreter does not run."""
    from fla.ops.mesa_net.naive import naive_mesa_net_exact

    def mesa(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, **_: Any
    ) -> Any:
        return naive_mesa_net_exact(_unit(q), _unit(k), v, g, lamb, beta)

    def gate(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        total = x.logcumsumexp(1)
        return (x - total).exp(), -total.diff(dim=1, prepend=total[:, :1]), total[:, -1:]

    modules = sys.modules
    monkeypatch.setattr(modules["fla.layers.mesa_net"], "chunk_mesa_net", mesa)
    where = modules["fla.ops.lightnet.fused_recurrent"]
    monkeypatch.setattr(where, "fused_additive_gate", gate)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", FILES)
def test_imported_files_compute_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fla.models as models

    if DEVICE == "cpu":
        _stand_in(monkeypatch)
    kind, options = FILES[name]
    sizes = {} if kind == "LightNet" else {"head_dim": 16, "num_heads": 2}
    sizes |= {} if kind in ("LightNet", "MesaNet") else {"expand_v": 1.0}
    config = getattr(models, f"{kind}Config")(**{**COMMON, **sizes, **options})
    source = scattered(getattr(models, f"{kind}ForCausalLM")(config))
    source.save_pretrained(tmp_path / "s")
    import_original(tmp_path / "s", tmp_path / "i")
    imported = GlazooForCausalLM.from_pretrained(tmp_path / "i").to(DEVICE)
    ids = prompts(2, 9)[0].to(DEVICE)
    close(imported(ids).logits, source(ids).logits)

"""Models as graphs: torch.export with any batch and length, ONNX in another program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_cases import VARIANTS, VOCABULARY, model
from tiny import tiny_model
from torch import Tensor, nn

import glazoo
from glazoo.families.mixer import MetaplasticMixer

DYNAMIC = torch.export.Dim.DYNAMIC
SHAPES = ((2, 9), (1, 2), (3, 3), (2, 70))
# One of each kernel class, and of what only some have: two writes a token, a shifted token, a
# normaliser, diffusion, a decay per key.
CLASSES = {
    "bayesian_layer",
    "gated_deltaproduct",
    "kdn",
    "longhorn",
    "mamba3",
    "mesanet",
    "metaplastic_comba",
    "mlstm",
    "palimpsa",
    "precond_kda",
    "rwkv7",
}
FAMILIES = ("mamba2", "qwen3_next", "bamba", "falcon_h1", "kimi_linear", "olmo_hybrid")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Torch compares a scan with those that it met before, and may fail at it."""
    torch._dynamo.reset()


class Logits(nn.Module):
    """A model as a function of tokens, and of a mask where one is given."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.made(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def traced(made: nn.Module, impl: str) -> nn.Module:
    """The model on an engine, without gradients, which a graph of inference has none of."""
    for module in made.modules():
        if isinstance(module, MetaplasticMixer):
            module.metaplastic_impl = impl
        elif hasattr(module, "impl"):
            module.impl = impl
    return Logits(made.eval().requires_grad_(False))


def ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def check_export(function: nn.Module, *, mask: bool = False) -> None:
    """Export once; compare with eager at several shapes, and once more at one token."""
    axes = {0: DYNAMIC, 1: DYNAMIC}
    dynamic = {"input_ids": axes} | ({"attention_mask": axes} if mask else {})

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        given = {"input_ids": ids(batch, length)}
        if mask:
            # Ragged: every row begins with another number of tokens that are none.
            given["attention_mask"] = (
                torch.arange(length) >= torch.arange(batch)[:, None].clamp(max=length - 1)
            ).long()
        return given

    exported = torch.export.export(function, (), inputs(2, 9), dynamic_shapes=dynamic, strict=False)
    graph = exported.module()
    for shape in SHAPES:
        given = inputs(*shape)
        torch.testing.assert_close(graph(**given), function(**given), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_hybrid_exports_with_any_batch_and_length() -> None:
    check_export(traced(model(["metaplastic_deltanet", "attention"]), "chunked"))


def test_ragged_rows_export_with_any_batch_and_length() -> None:
    check_export(traced(model(["metaplastic_deltanet", "attention"]), "chunked"), mask=True)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["chunked", "compiled", "traceable"])
@pytest.mark.parametrize("name", [x for x in VARIANTS if x in CLASSES])
def test_variants_export_with_any_batch_and_length(name: str, impl: str) -> None:
    if impl == "compiled":
        pytest.importorskip("numba")
    check_export(traced(model(name), impl))


@pytest.mark.slow
def test_one_token_is_an_example_of_its_own() -> None:
    """torch.export takes sizes of 0 and 1 for constants; a graph of one token is another graph."""
    function = traced(model("gated_deltanet"), "chunked")
    graph = torch.export.export(
        function, (ids(2, 1),), dynamic_shapes=({0: DYNAMIC},), strict=False
    ).module()
    for batch in (2, 5):
        torch.testing.assert_close(graph(ids(batch, 1)), function(ids(batch, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["chunked", "traceable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_families_export_with_any_batch_and_length(family: str, impl: str) -> None:
    made = tiny_model(family)
    glazoo.metaplasticize(made, plasticity=0.5)
    check_export(traced(made, impl))


def check_onnx(function: nn.Module, path: Path) -> None:
    """Export to ONNX with torch's exporter; compare onnxruntime with eager at several shapes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(
        function,
        (ids(2, 5),),
        path,
        dynamo=True,
        dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (x.name for x in session.get_inputs())
    for shape in (*SHAPES, (1, 1)):
        (found,) = session.run(None, {name: ids(*shape).numpy()})
        wanted = function(ids(*shape))
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


# The exporter says that torchvision is absent, and deprecates what it calls itself.
onnx_warnings = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.slow
@onnx_warnings
@pytest.mark.parametrize("name", [x for x in VARIANTS if x in CLASSES])
def test_variants_run_in_onnxruntime(name: str, tmp_path: Path) -> None:
    check_onnx(traced(model(name), "traceable"), tmp_path / "model.onnx")


@pytest.mark.slow
@onnx_warnings
@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_converted_families_run_in_onnxruntime(family: str, tmp_path: Path) -> None:
    made = tiny_model(family)
    glazoo.metaplasticize(made, plasticity=0.5)
    check_onnx(traced(made, "traceable"), tmp_path / "model.onnx")


def test_the_classes_are_all() -> None:
    def kernels(names: object) -> set[str]:
        return {str(glazoo.lower(glazoo.load(name)).kernel) for name in names}

    assert kernels(CLASSES) == kernels(VARIANTS)
    assert set(VARIANTS) >= CLASSES

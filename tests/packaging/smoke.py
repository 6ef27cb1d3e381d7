"""What an installation with one extra has to be able to do: one small use of each.

    build/empty/plots/bin/python -I tests/packaging/smoke.py plots

`make dist` runs this in an environment that holds the wheel with that extra and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def _glazoo(*arguments: str) -> None:
    """Run the installed command in an empty folder."""
    command = [str(Path(sys.executable).with_name("glazoo")), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def core() -> None:
    import torch

    import glazoo
    from glazoo.layers import GatedLinearAttention

    assert Path(glazoo.__file__).is_relative_to(sys.prefix), glazoo.__file__
    layer = GatedLinearAttention("gla", 8, num_heads=2, head_k_dim=4, head_v_dim=4)
    before = layer(x := torch.randn(1, 3, 8)).output
    glazoo.metaplasticize(layer)
    torch.testing.assert_close(layer(x).output, before)
    try:
        import rich
    except ImportError:
        return
    raise AssertionError(f"an installation without extras has {rich.__name__}")


def cli() -> None:
    _glazoo("list")
    _glazoo("show", "mamba2")


def models() -> None:
    import torch

    import glazoo
    from glazoo.models import GlazooConfig, GlazooForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_k_dim": 4}
    model = GlazooForCausalLM(GlazooConfig(pattern=["gla"], vocab_size=16, head_v_dim=4, **sizes))
    glazoo.metaplasticize(model)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False, pad_token_id=0)


def train() -> None:
    from glazoo.training import TrainConfig, run

    with tempfile.TemporaryDirectory() as folder:
        training = {"output_dir": folder, "max_steps": 1, "use_cpu": True, "disable_tqdm": True}
        model = {"pattern": ["gla"], "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}
        data = {"corpus": "pydoc", "length": 16, "validation": 0.0}
        sizes = {"head_k_dim": 4, "head_v_dim": 4}
        run(TrainConfig(model=model | sizes, data=data, training=training))


def evaluation() -> None:
    from lm_eval.models.huggingface import HFLM

    models()
    assert HFLM


def compare(*options: str) -> None:
    _glazoo("capacity", "gla", "--pairs", "4", "--seeds", "2", "--jobs", "1", "--no-plots")
    sizes = ["--load", "3", "--length", "12", "--vocab", "32", "--steps", "2", "--batch", "4"]
    model = ["--width", "16", "--heads", "2", "--state", "512", "--jobs", "1", "--no-plots"]
    _glazoo("compare", "gla", *sizes, *model, "--rates", "0.01", "--seeds", "2", *options)


def cluster() -> None:
    compare("--cluster", "local")


def verify() -> None:
    _glazoo("verify", "retnet-is-simple-gla", "freeze-inverts-metaplasticize", "--examples", "1")


def plots() -> None:
    from glazoo.plotting import Axes, Line, panels

    assert panels([Axes("a", "x", "y", [Line("gla", [0, 1], [0, 1])])]).startswith(b"\x89PNG")


def cpu() -> None:
    import torch

    import glazoo

    q, k, v, b = torch.rand(4, 1, 3, 1, 4)
    g, beta = -torch.rand(1, 3, 1), torch.rand(1, 3, 1)
    glazoo.attention("palimpsa", q, k, v, g=g, beta=beta, b=b, impl="compiled")


def fla() -> None:
    version("flash-linear-attention")  # its kernels need a GPU


def export() -> None:
    import onnxruntime
    import torch

    import glazoo

    class Recurrence(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            g = -x.square().sum(-1)
            return glazoo.attention("simple_gla", x, x, x, g=g, impl="traceable").output

    x, tokens = torch.rand(1, 3, 2, 4), {1: torch.export.Dim.DYNAMIC}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recurrence.onnx"
        torch.onnx.export(Recurrence(), (x,), path, dynamo=True, dynamic_shapes=(tokens,))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        x = torch.rand(1, 7, 2, 4)
        (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Recurrence()(x))


def everything() -> None:
    for name, check in CHECKS.items():
        if name not in ("core", "cpu", "fla", "export", "all"):
            check()


CHECKS = {
    "core": core,
    "cli": cli,
    "models": models,
    "train": train,
    "eval": evaluation,
    "compare": compare,
    "cluster": cluster,
    "verify": verify,
    "plots": plots,
    "cpu": cpu,
    "fla": fla,
    "export": export,
    "all": everything,
}
"""By extra; `core` is an installation without any."""

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()

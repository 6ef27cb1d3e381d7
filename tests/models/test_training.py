"""`glazoo train`: configuration, data, exact resume, several processes."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import HIDDEN, tiny
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging
from typer.testing import CliRunner

import glazoo
from glazoo.terminal import step_progress
from glazoo.train import train
from glazoo.training import Blocks, byte_tokenizer, read_config, run, tokens_of

TEXT = "".join(f"the {i}th line of a small text: {i * i}\n" for i in range(120))
LENGTH = 32


def tables(folder: Path, name: str = "out", **training: Any) -> dict[str, Any]:
    """Return the tables of a tiny configuration whose text lies in the folder."""
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return {
        "model": {
            "pattern": ["gated_deltanet", "attention"],
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **tiny(glazoo.load("gated_deltanet")),
        },
        "data": {"files": ["text.txt"], "length": LENGTH},
        "training": {
            "output_dir": str(folder / name),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **training,
        },
    }


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "train.toml"
    plain = {k: v for k, v in data.items() if not isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for table in data.keys() - plain.keys():
        # JSON's strings, numbers, booleans and lists are TOML's too.
        lines += [f"[{table}]", *(f"{k} = {json.dumps(v)}" for k, v in data[table].items())]
    path.write_text("\n".join(lines), "utf-8")
    return path


class Stop(TrainerCallback):
    """Stops like an interruption, after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        control.should_training_stop = state.global_step >= self.step


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_trains_and_resumes_exactly(tmp_path: Path) -> None:
    whole = read_config(write(tmp_path, tables(tmp_path, "whole")))
    metrics = run(whole)
    history = losses(tmp_path / "whole")
    assert history[-1] < history[0]
    assert metrics["eval_loss"] < history[0]

    path = write(tmp_path, tables(tmp_path, "parts"))
    run(read_config(path), callbacks=[Stop(3)])
    assert len(losses(tmp_path / "parts")) == 3
    with pytest.raises(ValueError, match="has checkpoints; continue with --resume"):
        run(read_config(path))
    resumed = CliRunner().invoke(_app(), [str(path), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert "eval_loss = " in resumed.output
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    assert losses(tmp_path / "parts") == history

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "parts")
    prompt = tokenizer("the 7", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("the 7")


def test_the_command_says_what_it_would_do_and_what_it_did(tmp_path: Path) -> None:
    data = tables(tmp_path, num_train_epochs=1.5, gradient_accumulation_steps=3, save_strategy="no")
    del data["training"]["max_steps"]
    path = str(write(tmp_path, data))
    planned = CliRunner().invoke(_app(), [path, "--dry-run", "--json"])
    assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "out").exists()
    plan = json.loads(planned.stdout)
    assert plan["trained_parameters"] == plan["parameters"] > 0
    assert plan["tokens_per_step"] == 3 * 4 * LENGTH
    assert "evaluation_examples = " in CliRunner().invoke(_app(), [path, "--dry-run"]).stdout

    done = CliRunner().invoke(_app(), [path, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["output_dir"] == plan["output_dir"] == str(tmp_path / "out")
    assert found["metrics"]["eval_loss"] > 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == state["max_steps"] == plan["steps"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == plan["parameters"]


def test_steps_are_reported_in_place_of_the_trainers_bars(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = read_config(write(tmp_path, tables(tmp_path, disable_tqdm=False)))
    capfd.readouterr()
    before = logging.is_progress_bar_enabled()  # whatever this process did earlier
    logging.enable_progress_bar()
    with step_progress(quiet=False) as report:
        assert not logging.is_progress_bar_enabled()
        run(config, progress=report)
    assert logging.is_progress_bar_enabled()
    if not before:
        logging.disable_progress_bar()
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 7  # six losses and that on what was held out, of 6 steps
    assert re.fullmatch(r"step 1 of 6: loss \d\.\d+", lines[0])
    assert re.fullmatch(r"step 6 of 6: loss \d\.\d+, held-out loss \d\.\d+", lines[-1])


def _app() -> Any:
    import typer

    app = typer.Typer()
    app.command()(train)
    return app


SGD = {"optim": "sgd", "learning_rate": 0.1, "data_seed": 1}
TWO = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SHARDING = str(Path(__file__).with_name("fsdp_training.py"))
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
"""


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process trained, with all of the batch."""
    folder = tmp_path_factory.mktemp("one")
    run(read_config(write(folder, tables(folder, **SGD, save_strategy="no"))))
    return folder / "out"


def assert_as_one(two: Path, one: Path) -> None:
    """Two processes with half the batch each give the losses and weights of one with all of it."""
    assert len(losses(one)) == 6
    # Rounding of the sums over a batch's tokens, once per step that builds on the one before.
    eps = 4 * LENGTH * 6 * torch.finfo(torch.float32).eps
    for step, (a, b) in enumerate(zip(losses(one), losses(two), strict=True)):
        assert abs(a - b) < eps * a, step
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        scale = float(value.abs().max()) + SGD["learning_rate"]  # type: ignore[operator]
        assert (found[key] - value).abs().max() < eps * scale, key
    loaded = AutoModelForCausalLM.from_pretrained(two)
    ids = AutoTokenizer.from_pretrained(two)("the 7", return_tensors="pt")
    assert loaded(**ids).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["DDP", "FSDP2", "FSDP2 of accelerate"])
def test_two_processes_train_as_one(tmp_path: Path, one: Path, launcher: str) -> None:
    half = SGD | {"per_device_train_batch_size": 2, "save_strategy": "no"}
    command = [*TWO, SHARDING]
    if launcher == "DDP":
        command = [*TWO, "-m", "glazoo.train"]
    elif launcher == "FSDP2":
        half["fsdp"] = True
    else:
        (tmp_path / "fsdp.yaml").write_text(ACCELERATE)
        start = [sys.executable, "-P", "-m", "accelerate.commands.launch"]
        command = [*start, "--config_file", str(tmp_path / "fsdp.yaml"), SHARDING]
    done = launch(*command, str(write(tmp_path, tables(tmp_path, **half))))
    assert done.returncode == 0, done.stderr[-4000:]
    # The first process alone speaks.
    assert done.stdout.count("eval_loss = ") == 1
    assert done.stderr.count("step 1 of 6: ") == 1
    assert_as_one(tmp_path / "out", one)


@pytest.mark.slow
def test_sharded_training_resumes_exactly(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "fsdp": True}
    path = str(write(tmp_path, tables(tmp_path, **options)))
    done = launch(*TWO, SHARDING, path)
    assert done.returncode == 0, done.stderr[-4000:]
    out = tmp_path / "out"
    expected, history = weights(out), losses(out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "model.safetensors").unlink()
    done = launch(*TWO, SHARDING, path, "--resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 4 of 6: " in done.stderr
    assert "step 3 of 6: " not in done.stderr
    assert losses(out) == history
    for key, value in weights(out).items():
        assert torch.equal(value, expected[key]), key


def test_sharding_that_would_not_happen_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `accelerate launch` starts processes with a configuration of FSDP.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shards on accelerators only"):
        run(read_config(write(tmp_path, tables(tmp_path))))


SHARDED = """
import torch
import torch.distributed as dist
from layer_cases import model, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

torch.set_num_threads(1)
dist.init_process_group("gloo")
made = model(["hgrn2", "palimpsa", "attention"]).double().train()
x, rank = tokens(4, 9), dist.get_rank()


def loss_of(x):
    # In float64 throughout: the model's own loss is in float32.
    return cross_entropy(made(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


whole = loss_of(x)
whole.backward()
gradients = {key: p.grad.clone() for key, p in made.named_parameters() if p.requires_grad}
made.zero_grad()
mesh = init_device_mesh("cpu", (2,))
for block in made.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(made, mesh=mesh)
loss = loss_of(x[2 * rank : 2 * rank + 2])
loss.backward()
mean = loss.detach().clone()
dist.all_reduce(mean)
error = [(mean / 2 - whole).abs().item()]
error += [(p.grad.full_tensor() - gradients[key]).abs().max().item()
          for key, p in made.named_parameters() if p.requires_grad]
print(f"largest difference {max(error):.3e}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fully_sharded_model_gives_the_same_loss_and_gradients(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, "utf-8")
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": tests, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [float(line.split()[-1]) for line in done.stdout.splitlines() if "largest" in line]
    assert len(found) == 2
    # In float64, so that the float32 rounding unit is far above every honest difference.
    assert max(found) < torch.finfo(torch.float32).eps


def test_importance_gates_can_be_trained_alone(tmp_path: Path) -> None:
    run(read_config(write(tmp_path, tables(tmp_path, "base", max_steps=2, save_strategy="no"))))
    data = tables(tmp_path, "gates", max_steps=2, save_strategy="no", learning_rate=0.1)
    data |= {
        "model": {"path": str(tmp_path / "base")},
        "metaplastic": {"plasticity": 0.1, "rank": 2},
        "trainable": "importance",
    }
    run(read_config(write(tmp_path, data)))
    base, gates = weights(tmp_path / "base"), weights(tmp_path / "gates")
    new = gates.keys() - base.keys()
    assert new
    assert all(".metaplastic." in key for key in new)
    for key, value in base.items():
        assert torch.equal(gates[key], value), key
    scale = gates["model.layers.0.mixer.metaplastic.b_scale"]
    assert (scale != 0.1).any()


@pytest.mark.parametrize("rate", [0.0, 10.0])
def test_the_plasticity_has_a_rate_of_its_own(tmp_path: Path, rate: float) -> None:
    data = tables(tmp_path, "m", max_steps=1, save_strategy="no", learning_rate=1e-3)
    data |= {"metaplastic": {"plasticity": 0.1}, "plasticity_rate": rate}
    run(read_config(write(tmp_path, data)))
    scale = weights(tmp_path / "m")["model.layers.0.mixer.metaplastic.b_scale"]
    # Adam's first step is the rate, whatever the gradient.
    torch.testing.assert_close((scale - 0.1).abs(), torch.full_like(scale, 1e-3 * rate))


def test_byte_tokenizer_is_exact(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    text = "na\u00efve \u4f60\u597d \U0001f600 \x00\t\r\n  end"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_blocks_cover_the_text_once(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, tables(tmp_path)))
    tokens = tokens_of(config.data, byte_tokenizer())
    assert tokens.tolist() == [*TEXT.encode(), 256]
    blocks = Blocks(tokens, 10, 2, 5)
    assert len(blocks) == 3
    assert blocks[0]["input_ids"].tolist() == list(TEXT.encode()[20:30])
    assert torch.equal(blocks[2]["labels"], blocks[2]["input_ids"])


def test_token_files_are_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    data = tables(tmp_path)
    data["data"] = {"tokens": ["ids.npy"]}
    tokens = tokens_of(read_config(write(tmp_path, data)).data, byte_tokenizer())
    assert isinstance(tokens, np.memmap)
    assert Blocks(tokens, 4, 1, 3)[1]["input_ids"].tolist() == [8, 9, 10, 11]
    np.save(tmp_path / "ids.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"got float64 \[2, 3\], accepted are integers"):
        tokens_of(read_config(write(tmp_path, data)).data, byte_tokenizer())


def test_the_built_in_corpus_needs_no_file(tmp_path: Path) -> None:
    data = tables(tmp_path)
    data["data"] = {"corpus": "pydoc"}
    tokens = tokens_of(read_config(write(tmp_path, data)).data, byte_tokenizer())
    assert len(tokens) > 100_000


BAD = [
    ({"training": {"max_step": 3}}, "has no 'max_step'; did you mean 'max_steps'"),
    ({"model": {"hidden_sizes": 3}}, "has no 'hidden_sizes'; did you mean 'hidden_size'"),
    ({"model": {"path": "x", "hidden_size": 3}}, "model.path stands alone"),
    ({"data": {"length": 4}}, "data: Value error, give one of corpus, files and tokens"),
    ({"data": {"files": ["a"], "corpus": "pydoc"}}, "give one of corpus, files and tokens"),
    ({"training": {}}, "training.output_dir is missing"),
    ({"plasticity_rate": -1}, "plasticity_rate: Input should be greater than or equal to 0"),
    ({"extra": 1}, "extra: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_configurations_are_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, tables(tmp_path) | change))


def test_what_torchrun_starts_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "absent.toml")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(glazoo.train.__file__), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glazoo: cannot read the configuration")


def test_bad_runs_are_named(tmp_path: Path) -> None:
    data = tables(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint to resume"):
        run(read_config(write(tmp_path, data)), resume=True)
    data["data"]["length"] = 10_000
    with pytest.raises(ValueError, match="at least one must be left for training"):
        run(read_config(write(tmp_path, data)))
    data = tables(tmp_path)
    data["model"]["vocab_size"] = 100
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens"):
        run(read_config(write(tmp_path, data)))
    data = tables(tmp_path) | {"trainable": "importance"}
    with pytest.raises(ValueError, match=r"add a \[metaplastic\] table"):
        run(read_config(write(tmp_path, data)))
    (tmp_path / "bad.toml").write_text("model = [", "utf-8")
    with pytest.raises(ValueError, match="not a TOML file"):
        read_config(tmp_path / "bad.toml")
    for path, reason in ((tmp_path / "none.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot read the configuration {path}: {reason}"):
            read_config(path)


def test_data_that_is_no_text_is_named(tmp_path: Path) -> None:
    data = tables(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    data["data"]["files"] = ["latin.txt"]
    with pytest.raises(ValueError, match=r"latin\.txt is no UTF-8 text"):
        tokens_of(read_config(write(tmp_path, data)).data, byte_tokenizer())
    (tmp_path / "ids.npy").write_text("1 2 3")
    data["data"] = {"tokens": ["ids.npy"]}
    with pytest.raises(ValueError, match=r"ids\.npy: not an array that numpy\.save wrote"):
        tokens_of(read_config(write(tmp_path, data)).data, byte_tokenizer())

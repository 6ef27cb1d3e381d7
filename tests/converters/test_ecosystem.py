"""Trainers, quantisers and compilers on converted models: each does what it does on the source."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converters.converting import open_gates
from converters.tiny import VOCABULARY, tiny_model
from torch import Tensor

from glazoo import metaplasticize


def converted(name: str = "mamba2") -> Any:
    model = metaplasticize(tiny_model(name))
    open_gates(model)
    return model


def gates(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".metaplastic." in n}


def tokens(rows: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_compute_the_same() -> None:
    model, ids = metaplasticize(tiny_model("mamba2", num_hidden_layers=1)), tokens()
    open_gates(model)
    compiled: Any = torch.compile(model)
    expected = model(ids, use_cache=False).logits
    found = compiled(ids, use_cache=False).logits
    # Fused operations round elsewhere.
    error = float((found - expected).abs().max())
    assert error <= 256 * torch.finfo(torch.float32).eps * float(expected.abs().max())


# What torchao says of kernels and of torch's names on the machine that it runs on.
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_int8_weights_move_logits_as_on_the_source(name: str) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="quantising needs torchao (pip install torchao)"
    )
    source, ids = tiny_model(name), tokens()
    model = metaplasticize(copy.deepcopy(source))
    moved = []
    for m in (source, model):
        before = m(ids, use_cache=False).logits
        quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
        moved.append(float((m(ids, use_cache=False).logits - before).abs().max()))
    quantised = {n for n, p in model.named_parameters() if "torchao" in type(p).__module__}
    assert any(".in_proj" in n for n in quantised)
    assert not any(".metaplastic." in n for n in quantised)
    assert {p.dtype for p in gates(model).values()} == {torch.float32}
    assert moved[0] > 0
    # With closed gates it is the same function of the same int8 weights.
    assert abs(moved[1] - moved[0]) < 1e-2 * moved[0]


def text_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 2)}
    words |= {"<end>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ImportWarning")
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_trl_trains_on_packed_documents(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="packing needs trl (pip install trl)")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (24,), generator=generator).tolist()
    texts = [
        " ".join(f"w{int(i)}" for i in torch.randint(0, 50, (n,), generator=generator))
        for n in lengths
    ]
    model = converted(name)
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        packing=True,
        max_length=16,
        padding_free=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=text_tokenizer(),
    )
    before = {n: p.detach().clone() for n, p in gates(model).items()}
    seen: list[dict[str, Tensor]] = []

    def remember(_: Any, args: Any, kwargs: Any) -> None:
        seen.append({n: x for n, x in kwargs.items() if isinstance(x, Tensor)})

    # The trainer computes the loss itself, from the model below the head.
    hook = model.base_model.register_forward_pre_hook(remember, with_kwargs=True, prepend=True)
    trainer.train()
    hook.remove()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3
    assert all(torch.tensor(history).isfinite())
    assert all(not torch.equal(p, before[n]) for n, p in gates(model).items())
    # Several documents in a row, which are what they are alone.
    batch = seen[-1]
    assert (batch["position_ids"] == 0).sum() > 1
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ids = batch["input_ids"]
    bounds = [*starts, ids.shape[1]]
    model.eval()
    with torch.no_grad():
        parts = [ids[:, a:b] for a, b in itertools.pairwise(bounds)]
        alone = torch.cat([model.base_model(part).last_hidden_state for part in parts], 1)
        found = model.base_model(**batch, use_cache=False).last_hidden_state
    assert float((found - alone).abs().max()) < 1e-4 * float(alone.abs().max())


TOGETHER = """
import sys

import torch
from accelerate import Accelerator
from converters.test_ecosystem import converted, tokens

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model = converted().train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
prepared, optimizer = accelerator.prepare(model, optimizer)
rows = 4 // accelerator.num_processes
first = rows * accelerator.process_index
for step in range(3):
    x = tokens(4, 17, seed=step)[first : first + rows]
    loss = prepared(x, labels=x, use_cache=False).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
if accelerator.is_main_process:
    torch.save({n: p.detach() for n, p in model.named_parameters()}, sys.argv[1])
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="two processes are accelerate's to start")
    script = tmp_path / "together.py"
    script.write_text(TOGETHER, "utf-8")
    many = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    found = []
    for name, how in (("one", []), ("two", many)):
        out = tmp_path / f"{name}.pt"
        done = subprocess.run(
            [sys.executable, "-P", *how, str(script), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(torch.load(out))
    one, two = found
    start = dict(converted().named_parameters())
    for key, value in one.items():
        step = float((value - start[key]).detach().abs().max())
        assert step > 0, key
        assert float((two[key] - value).abs().max()) <= 1e-3 * step + 1e-6, key

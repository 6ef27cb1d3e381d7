"""The demonstration: its start, its measurements, and the whole of it, interrupted and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from glazoo import metaplasticize
from glazoo.compare.tasks import draw, generator
from glazoo.compare.train import fit

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
_spec = spec_from_file_location("demo", DEMO)
assert _spec is not None
assert _spec.loader is not None
demo: Any = module_from_spec(_spec)
_spec.loader.exec_module(demo)
SOURCE = demo._source(demo._TASK, 0, 2)


def test_a_source_starts_as_a_working_associative_memory() -> None:
    model = demo._start(SOURCE)
    inputs = draw(demo._TASK, 2, generator("start")).inputs[:, :48]
    values = torch.arange(3, 48, 4)
    asked = inputs.index_fill(1, values, 0)
    with torch.no_grad():
        (key, _), (_, query) = demo._projected(model, inputs), demo._projected(model, asked)
    assert torch.equal(key[:, values], query[:, values])
    mixer = model.backbone.layers[0].mixer
    inner = mixer.intermediate_size
    there = mixer.in_proj.weight[inner : 2 * inner].double()
    back = mixer.out_proj.weight.double() @ there
    # An orthogonal matrix of float32 numbers: each of them is rounded.
    rounding = inner * torch.finfo(torch.float32).eps
    assert (back - torch.eye(inner)).abs().max() < rounding


def test_equal_seeds_start_equal_models_and_others_do_not() -> None:
    first, again, other = (
        torch.cat([p.flatten() for p in demo._start(run).parameters()])
        for run in (SOURCE, SOURCE, SOURCE.model_copy(update={"seed": 1}))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_plasticity_of_a_converted_model_has_its_own_rate(rate: float) -> None:
    model = metaplasticize(demo._start(SOURCE))
    *_, run = demo._after(SOURCE, 1)
    training = run.training.model_copy(update={"batch": 2})
    changes = {"training": training, "plasticity_rate": rate}
    fit(demo._Logits(model), run.model_copy(update=changes))
    kappa = model.backbone.layers[0].mixer.metaplastic.b_scale
    assert bool((kappa != 0).any()) == (rate > 0)


def test_without_importance_all_reads_are_alike(tmp_path: Path) -> None:
    metaplasticize(demo._start(SOURCE)).save_pretrained(tmp_path)
    picture, (plain, own, other) = demo._look(tmp_path)
    assert plain == own == other
    assert picture.startswith(b"\x89PNG")


def rows(**models: list[float]) -> list[dict[str, Any]]:
    return [{"task": "records"} | {k.replace("_", " "): v for k, v in models.items()}]


def test_the_report_pairs_by_seed_and_says_what_failed() -> None:
    table = rows(source=[70.0, 72.0], source_on=[80.0, 90.0], converted_on=[91.0, 99.0])
    conversion = {"passed": True, "max_logit_change": 1e-6, "state_bytes": [2048, 2176]}
    text = demo._report(table, [conversion] * 2, 200, [0.4, 1.0, 0.3])
    # 11 and 9: their mean, and 12.706 standard errors of one, Student's t at one degree of freedom.
    assert "| +10.0 ± 12.7 |" in text
    assert "models agree" in text
    text = demo._report(table, [conversion, conversion | {"passed": False}], 200, [0.4, 1.0, 0.3])
    assert "models DIFFER" in text


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_demo_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--seeds", "1", "--steps", "2", "--more", "1", "--jobs", "1"]
    command = [sys.executable, "-P", str(DEMO), "--out", str(out), *options]
    # As a terminal sends it: to the process and all that it has started.
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    runs = out / "runs.jsonl"
    while first.poll() is None and not (runs.exists() and runs.read_bytes()):
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "the same command goes on" in said
    # Nothing that it started stays: multiprocessing's tracker ends once it sees its parent gone.
    deadline = time.monotonic() + 10
    while alive(first.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    before = runs.read_text().splitlines()
    subprocess.run(command, check=True, timeout=600)
    after = runs.read_text().splitlines()
    assert after[: len(before)] == before
    done = [json.loads(line) for line in after]
    # Two tasks: a source, and it and its conversion trained on.
    assert len({d["key"] for d in done}) == len(done) == 6
    assert [d["conversion"]["passed"] for d in done if "conversion" in d] == [True] * 2
    assert {p.name for p in out.iterdir()} >= {"demo.md", "importance.png", "records-0", "static-0"}
    again = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True)
    assert "seed 0: " not in again.stdout
    assert runs.read_text().splitlines() == after

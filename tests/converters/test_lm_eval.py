"""Converted folders under lm-eval's own command, on small tasks from local files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from converters.tiny import tiny_model

from glazoo.converters import convert_checkpoint, verify_checkpoint
from glazoo.training import byte_tokenizer

TASKS = {
    # The form of piqa, hellaswag, winogrande, arc, social_iqa and boolq ...
    "sums": """
        task: sums
        dataset_path: json
        dataset_kwargs: {data_files: {test: FILE}}
        output_type: multiple_choice
        test_split: test
        doc_to_text: question
        doc_to_choice: choices
        doc_to_target: gold
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
    """,
    # ... and of lambada, without its perplexity, whose error the command would bootstrap for long.
    "last": """
        task: last
        dataset_path: json
        dataset_kwargs: {data_files: {test: FILE}}
        output_type: loglikelihood
        test_split: test
        doc_to_text: question
        doc_to_target: " {{choices[0]}}"
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
    """,
}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {
            "question": f"{'so ' * (i % 3)}{i} and {j} make",
            "choices": [str(i + j), f"{i + j + 1} at most", "nothing"],
            "gold": (i * j) % 3,
        }
        for i in range(4)
        for j in range(3)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(textwrap.dedent(text).replace("FILE", str(data)))


def found(folder: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Scores by task, and the log-likelihood of every answer."""
    (results,) = folder.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    likelihoods: dict[str, list[float]] = {}
    for name in TASKS:
        (samples,) = folder.rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda r: r["doc_id"])
        likelihoods[name] = [float(r[0]) for row in rows for r in row["filtered_resps"]]
    return scores, likelihoods


def lm_eval(where: Path, *models: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the command for one model after the other, in one process that imports nothing of
    glazoo by itself."""
    code = """
    import sys
    from lm_eval.__main__ import cli_evaluate
    where, *models = sys.argv[1:]
    for name, arguments in zip(models[::2], models[1::2]):
        assert ("glazoo" in sys.modules) == (name == "opened")
        sys.argv = [
            "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "sums,last",
            "--include_path", where + "/tasks", "--batch_size", "8", "--device", "cpu",
            "--output_path", where + "/" + name + "-scores", "--log_samples",
        ]
        cli_evaluate()
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(where), *(x for m in models for x in m)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=where,
        env={
            **os.environ,
            "HF_HOME": str(where / "home"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        },
    )


@pytest.mark.slow
def test_scores_are_those_of_the_source(tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    # Bytes, the end of text and padding.
    tiny_model("mamba2", vocab_size=258).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    convert_checkpoint(source, converted)
    convert_checkpoint(source, tmp_path / "opened", plasticity=1.0)
    write_tasks(tmp_path / "tasks")
    done = lm_eval(
        tmp_path,
        ("source", f"pretrained={source}"),
        ("converted", f"pretrained={converted},trust_remote_code=True"),
        ("opened", f"pretrained={tmp_path / 'opened'},trust_remote_code=True"),
    )
    assert done.returncode == 0, done.stderr
    assert "|sums" in done.stdout
    before, expected = found(tmp_path / "source-scores")
    after, got = found(tmp_path / "converted-scores")

    # What rounding may move one logit by, for the softmax and its denominator, over every token.
    verified = verify_checkpoint(source, converted, batch=2, tokens=24, new_tokens=4)
    assert verified.passed
    assert verified.at_source
    longest = len(" nothing at most")
    budget = 2 * longest * max(c.budget for c in verified.checks if c.budget is not None)
    for name in TASKS:
        assert len(expected[name]) == len(got[name]) == (36 if name == "sums" else 12)
        assert all(x < 0 and math.isfinite(x) for x in got[name])
        distance = max(abs(a - b) for a, b in zip(expected[name], got[name], strict=True))
        assert distance <= budget
        for metric, value in before[name].items():
            if metric.startswith("acc"):
                assert after[name][metric] == value
    # Scores do come from the gates: at full plasticity it is another model.
    moved = found(tmp_path / "opened-scores")[1]["sums"]
    assert max(abs(a - b) for a, b in zip(expected["sums"], moved, strict=True)) > 100 * budget

"""Converting checkpoint folders, and giving their sources back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from converters.conftest import MakeSource
from converters.converting import contents, edit_json, make_model, prompts
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM
from typer.testing import CliRunner

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo import metaplasticize, versions
from glazoo.cli import app
from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
)
from glazoo.converters.files import Terminated, leftovers, remove_leftovers
from glazoo.converters.tensors import read_shard

LAYOUTS = [
    pytest.param({"sharded": True}, id="shards"),
    pytest.param({"sharded": False}, id="single-file"),
    pytest.param({"sharded": True, "tie_word_embeddings": True}, id="tied"),
    pytest.param({"sharded": True, "dtype": torch.bfloat16, "n_groups": 1}, id="bfloat16"),
]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - not a dict
    return found


def siblings(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p.name != folder.name)


def test_versions_that_nobody_tested_are_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "TESTED", {"transformers": ("5.1", "5.2")})
    expected = f"transformers {transformers.__version__} is newer than 5.2, the newest that was"
    warnings = convert_checkpoint(source, tmp_path / "converted").warnings
    assert sum(w.startswith(expected) for w in warnings) == 1
    with pytest.warns(UserWarning, match=expected):
        metaplasticize(make_model())


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["head", "value"])
def test_converted_folder_is_the_source_with_gates(
    make_source: MakeSource, tmp_path: Path, layout: dict[str, Any], gate: str
) -> None:
    src, dst = make_source(**layout), tmp_path / "converted"
    before = contents(src)
    report = convert_checkpoint(src, dst, gate=gate)
    assert contents(src) == before
    old, new = tensors(src), tensors(dst)
    added = {t.name for t in report.added}
    assert set(new) == set(old) | added
    assert all(torch.equal(new[key], old[key]) and new[key].dtype == old[key].dtype for key in old)
    assert {new[key].dtype for key in added} == {torch.float32}

    index = json.loads((dst / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in dst.glob("*.safetensors"))
    n = len(files)
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for key, name in index["weight_map"].items():
        assert key in read_shard(dst / name).tensors
    assert set(index["weight_map"]) == set(new)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
    assert all(key in read_shard(dst / files[-1]).tensors for key in added)
    assert read_shard(dst / files[-1]).metadata == {"format": "pt"}

    # Converted in memory and on disk, with the same seed: the same model.
    live: Any = metaplasticize(Mamba2ForCausalLM.from_pretrained(src).eval(), gate=gate)
    loaded = load(dst)
    assert type(loaded) is type(live)
    configs = [m.config.to_dict() for m in (loaded, live)]
    assert [c.pop("_name_or_path") for c in configs] == [str(dst), str(src)]
    assert configs[0] == configs[1]
    ids, mask = prompts()
    assert torch.equal(
        loaded(ids, attention_mask=mask).logits, live(ids, attention_mask=mask).logits
    )


def test_everything_else_is_carried_over(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "converted"
    convert_checkpoint(source, dst)
    old, new = contents(source), contents(dst)
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "notes/eval.md",
    ):
        assert new[name] == old[name]
    before, after = (json.loads(c["config.json"]) for c in (old, new))
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"model_type", "architectures", "metaplastic", "auto_map"}
    assert after["model_type"] == "metaplastic_mamba2"
    assert after["architectures"] == ["MetaplasticMamba2ForCausalLM"]
    assert after["metaplastic"] == {
        "format_version": 3,
        "base_model_type": "mamba2",
        "base_architectures": ["Mamba2ForCausalLM"],
        "spec": "mamba2",
        "gate": "head",
        "rank": 2,
        "plasticity": 0.0,
        "layers": [0, 1],
        "seed": 0,
        "gain": "first_order",
        "beta": "precision",
        "tie": "write",
        "precision": "diagonal",
        "basis": "own",
        "forgetting": "temper",
    }
    assert (dst.stat().st_mode & 0o777) == (source.stat().st_mode & 0o777)


def test_weights_are_linked_and_small_files_copied(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "converted"
    report = convert_checkpoint(source, dst)
    assert {f.how for f in report.files if f.path.endswith(".safetensors")} == {"linked"}
    assert {f.how for f in report.files if not f.path.endswith(".safetensors")} == {"copied"}
    for f in report.files:
        same = os.path.samefile(source / f.path, dst / f.stored)
        assert same == (f.how == "linked")


def test_copy_shares_nothing(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "converted"
    report = convert_checkpoint(source, dst, link=False)
    assert {f.how for f in report.files} == {"copied"}
    assert all(p.stat().st_nlink == 1 for p in dst.rglob("*") if p.is_file())


def test_falls_back_to_copies_where_links_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = convert_checkpoint(source, tmp_path / "converted")
    assert {f.how for f in report.files} == {"copied"}
    assert revert_checkpoint(tmp_path / "converted", tmp_path / "back").files
    assert contents(tmp_path / "back") == contents(source)


@torch.no_grad()
def test_plasticity_is_stored(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c", plasticity=0.25, rank=5, layers=[1], seed=3)
    model = load(tmp_path / "c")
    assert model.config.metaplastic["plasticity"] == 0.25
    gate = model.backbone.layers[1].mixer.metaplastic
    assert torch.equal(gate.b_scale, torch.full((4,), 0.25))
    assert gate.b_down.shape == (5, 32)
    assert not hasattr(model.backbone.layers[0].mixer, "metaplastic")
    ids, _ = prompts()
    moved = model(ids).logits - Mamba2ForCausalLM.from_pretrained(source)(ids).logits
    assert float(moved.abs().max()) > 1e-3


@torch.no_grad()
def test_loads_in_bfloat16_with_wide_gates(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    model = load(tmp_path / "c", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    wide = {p.dtype for name, p in model.named_parameters() if ".metaplastic." in name}
    assert wide == {torch.float32}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("link", [True, False])
def test_revert_gives_back_every_byte(
    make_source: MakeSource, tmp_path: Path, layout: dict[str, Any], link: bool
) -> None:
    src = make_source(**layout)
    (src / "pytorch_model.bin").write_bytes(b"old pickle")
    (src / "pytorch_model.bin.index.json").write_text("{}")
    (src / "glazoo").mkdir()
    (src / "glazoo" / "mine.txt").write_text("a folder that happens to have our name")
    before = contents(src)
    convert_checkpoint(src, tmp_path / "c", link=link)
    assert not (tmp_path / "c" / "pytorch_model.bin").exists()
    shutil.rmtree(src)
    report = revert_checkpoint(tmp_path / "c", tmp_path / "back", link=link)
    assert contents(tmp_path / "back") == before
    assert {f.path for f in report.files} == set(before)
    # What came back can be converted again.
    assert inspect_checkpoint(tmp_path / "back").layers == (0, 1)


def test_links_of_a_download_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(p for p in source.iterdir() if p.is_file())):
        shutil.copy(path, blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    before = contents(snapshot)
    convert_checkpoint(snapshot, tmp_path / "c")
    assert not any(p.is_symlink() for p in (tmp_path / "c").rglob("*"))
    revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_hidden_folders_are_left_out_and_named(source: Path, tmp_path: Path) -> None:
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    report = convert_checkpoint(source, tmp_path / "c")
    assert report.skipped_files == (".git/",)
    assert not (tmp_path / "c" / ".git").exists()


def test_dry_run_writes_nothing_and_reads_no_tensor(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = convert_checkpoint(source, tmp_path / "c")
    # Shards of the same length whose data is a hole: only headers can be read.
    for shard in source.glob("*.safetensors"):
        size = shard.stat().st_size
        with shard.open("r+b") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            f.truncate(8 + length)
            f.truncate(size)
    before, around = contents(source), siblings(source)
    monkeypatch.setattr(tmp_path.__class__, "mkdir", None)
    report = convert_checkpoint(source, tmp_path / "d", dry_run=True)
    assert report.dry_run
    assert (contents(source), siblings(source)) == (before, around)
    assert report.added == real.added
    assert [(f.path, f.stored, f.bytes) for f in report.files] == [
        (f.path, f.stored, f.bytes) for f in real.files
    ]
    assert {(f.sha256, f.how) for f in report.files} == {(None, "planned")}


def test_paths_may_be_relative(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert_checkpoint(source.name, "c/").destination == "c/"
    assert convert_checkpoint("source", "x/../c", force=True).source == "source"
    monkeypatch.chdir(tmp_path / "c")
    revert_checkpoint(".", "../back")
    assert contents(tmp_path / "back") == contents(source)
    with pytest.raises(ConversionError, match="exists already"):
        revert_checkpoint(tmp_path / "c", tmp_path / "back")


def test_report(source: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(source, tmp_path / "c", gate="head")
    data = json.loads(json.dumps(report.to_json()))
    model = make_model()
    assert data["base_parameters"] == sum(p.numel() for p in model.parameters())
    per_layer = 2 * 32 + 4 * 2 + 4 + 4
    assert data["added_parameters"] == 2 * per_layer == data["added_bytes"] // 4
    assert data["state_bytes_source"] == 2 * 4 * 4 * 16 * 8
    assert data["state_bytes_converted"] == 2 * 4 * 4 * (16 * 8 + 8)
    assert set(data["versions"]) == {"python", "glazoo", "torch", "transformers", "safetensors"}
    report.write(tmp_path / "r.json")
    report.write(tmp_path / "r.md")
    assert json.loads((tmp_path / "r.json").read_text()) == data
    assert "head-shaped, rank 2" in (tmp_path / "r.md").read_text()


def test_progress_reaches_its_total(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert_checkpoint(source, tmp_path / "c", progress=lambda *a: calls.append(a))
    done = [d for _, d, _ in calls]
    assert done == sorted(done)
    assert len({total for *_, total in calls}) == 1
    assert done[-1] >= calls[-1][2] > 0


def test_force_replaces_and_failure_keeps_what_was_there(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    convert_checkpoint(source, dst, plasticity=0.5)
    before = contents(dst)
    with pytest.raises(ConversionError, match="exists already; --force replaces it"):
        convert_checkpoint(source, dst)
    assert contents(dst) == before

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        convert_checkpoint(source, dst, force=True, progress=fail)
    assert contents(dst) == before
    convert_checkpoint(source, dst, force=True)
    assert contents(dst) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "source"]


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
@pytest.mark.parametrize("at", [0, 3, -1])
def test_signals_leave_nothing_behind(
    source: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    number: signal.Signals,
    error: type[BaseException],
    at: int,
) -> None:
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    counted: list[str] = []
    convert_checkpoint(source, tmp_path / "count", progress=lambda name, *_: counted.append(name))
    shutil.rmtree(tmp_path / "count")
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == (at if at > 0 else len(counted) if at < 0 else 1):
            os.kill(os.getpid(), number)

    with pytest.raises(error):
        convert_checkpoint(source, tmp_path / "c", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def run(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_killed_conversion_leaves_no_destination(source: Path, tmp_path: Path) -> None:
    killed = run(
        """
        import os, signal, sys
        from glazoo.converters import convert_checkpoint
        def kill(name, done, total):
            if done == total or "00003" in name:
                os.kill(os.getpid(), signal.SIGKILL)
        convert_checkpoint(sys.argv[1], sys.argv[2], link=False, progress=kill)
        """,
        source,
        tmp_path / "c",
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "c").exists()
    (left,) = leftovers(tmp_path, "c")
    assert left.bytes > 0
    report = convert_checkpoint(source, tmp_path / "c")
    (warning,) = (w for w in report.warnings if "a killed run has left" in w)
    assert str(left.path) in warning
    assert "--remove-leftovers removes it" in warning
    assert load(tmp_path / "c") is not None
    # Asked for, it goes; another destination's stays.
    other = tmp_path / ".other.partial-x"
    other.mkdir()
    command = ["convert", str(source), str(tmp_path / "c"), "--force", "--remove-leftovers"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert str(left.path) in done.output
    assert not left.path.exists()
    assert other.exists()


def test_reversions_say_what_killed_runs_have_left(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    (tmp_path / ".back.partial-x").mkdir()
    (tmp_path / ".c.partial-y").mkdir()
    report = revert_checkpoint(tmp_path / "c", tmp_path / "back")
    (warning,) = report.warnings
    assert ".back.partial-x" in warning
    assert f"glazoo doctor {tmp_path} --remove-leftovers removes it" in warning
    assert warning in report.to_markdown()


def test_a_run_that_is_still_going_has_left_nothing(source: Path, tmp_path: Path) -> None:
    seen = []

    def look(name: str, done: int, total: int) -> None:
        seen.append([p.name for p in tmp_path.iterdir() if p.name.startswith(".c.partial-")])
        assert not remove_leftovers(tmp_path)

    convert_checkpoint(source, tmp_path / "c", progress=look)
    assert all(len(names) == 1 for names in seen)
    assert load(tmp_path / "c") is not None


@pytest.mark.slow
def test_a_conversion_killed_at_any_moment_is_absent_or_complete(
    source: Path, tmp_path: Path
) -> None:
    """Killed from outside at random times, from before the first file to after the rename."""
    before = contents(source)
    done = run(
        """
        import os, random, signal, sys, time
        from pathlib import Path
        from glazoo.converters import convert_checkpoint, revert_checkpoint
        import glazoo.converters.convert, glazoo.models
        random.seed(0)
        src, where = sys.argv[1], Path(sys.argv[2])

        def converting(target):
            child = os.fork()
            if child == 0:
                try:
                    convert_checkpoint(src, target)
                finally:
                    os._exit(0)
            return child

        begun = time.monotonic()
        os.waitpid(converting(where / "whole"), 0)
        duration = time.monotonic() - begun
        for i in range(16):
            target = where / f"c{i}"
            child = converting(target)
            time.sleep(random.random() * 1.1 * duration)
            os.kill(child, (signal.SIGKILL, signal.SIGINT)[i % 2])
            os.waitpid(child, 0)
            # Asked to stop, it has taken away what it began; killed, it could not.
            assert i % 2 == 0 or not [*where.glob(f".c{i}.partial-*")]
            if target.exists():
                revert_checkpoint(target, where / f"back{i}")
                print("complete", i)
            else:
                print("absent", i)
        """,
        source,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert len(outcomes) == 16
    whole = contents(tmp_path / "whole")
    for outcome, i in outcomes:
        if outcome == "complete":
            assert contents(tmp_path / f"c{i}") == whole
            assert contents(tmp_path / f"back{i}") == before
    assert contents(source) == before
    assert any(outcome == "absent" for outcome, _ in outcomes)


def test_the_card_names_the_source_and_keeps_its_licence(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "plain")
    assert "base_model: source" in (tmp_path / "plain" / "README.md").read_text()
    own = (
        "---\nlicense: apache-2.0\nbase_model:\n- someone/else\nlanguage:\n- en\n---\n# Mine\n"
        "license: none of the metadata\n"
    )
    (source / "README.md").write_text(own)
    hub = tmp_path / "models--org--some-model" / "snapshots" / "main"
    shutil.copytree(source, hub)
    convert_checkpoint(hub, tmp_path / "c")
    card = (tmp_path / "c" / "README.md").read_text()
    head = card.split("---")[1].splitlines()
    assert head == [
        "",
        "license: apache-2.0",
        "language:",
        "- en",
        "library_name: transformers",
        "base_model: org/some-model",
    ]
    assert (tmp_path / "c" / "glazoo" / "source" / "README.md").read_text() == own
    revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(hub)


def test_the_card_shows_how_to_load_without_an_import(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    assert "trust_remote_code=True" in (tmp_path / "c" / "README.md").read_text()
    revert_checkpoint(tmp_path / "c", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.slow
def test_remote_code_needs_no_import(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    done = run(
        """
        import sys
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        print(type(model).__name__, sum(".metaplastic." in n for n, _ in model.named_parameters()))
        """,
        tmp_path / "c",
        HF_HOME=str(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MetaplasticMamba2ForCausalLM", "8"]


@pytest.mark.slow
def test_twenty_gigabytes_are_converted_in_less_than_one(tmp_path: Path) -> None:
    done = run(
        """
        import json, resource, struct, sys
        from pathlib import Path
        import torch
        from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
        from transformers.core_model_loading import revert_weight_conversion
        from glazoo.converters import convert_checkpoint

        folder = Path(sys.argv[1]) / "s"
        config = Qwen3NextConfig(
            hidden_size=2048, num_hidden_layers=4, num_experts=512, moe_intermediate_size=780,
            architectures=["Qwen3NextForCausalLM"],
        )
        config.save_pretrained(folder)
        with torch.device("meta"):
            model = Qwen3NextForCausalLM(config)
            state = revert_weight_conversion(model, model.state_dict())
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for key, t in state.items():
            offsets = [end, end + 2 * t.numel()]
            header[key] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": offsets}
            end = offsets[1]
        raw = json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            f.truncate(8 + len(raw) + end)
        del model, state
        report = convert_checkpoint(folder, sys.argv[1] + "/c")
        print(end, report.added_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    size, added, memory = map(int, done.stdout.split())
    assert size > 20e9
    assert added > 0
    assert memory < 1e9


@pytest.mark.slow
def test_without_glazoo_transformers_refuses_the_folder(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c", remote_code=False)
    done = run(
        """
        import sys
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
        """,
        tmp_path / "c",
    )
    assert done.returncode != 0
    assert "metaplastic_mamba2" in done.stderr
    assert "does not recognize this architecture" in done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # Weights that are holes in a file: nothing but the conversion reads them.
    done = run(
        """
        import json, resource, struct, sys
        from pathlib import Path
        import torch
        from transformers import Mamba2Config, Mamba2ForCausalLM
        from glazoo.converters import convert_checkpoint

        for vocabulary in (500, 1_000_000):
            folder = Path(sys.argv[1]) / str(vocabulary)
            config = Mamba2Config(
                hidden_size=64, num_heads=4, head_dim=32, state_size=8, n_groups=1,
                num_hidden_layers=1, vocab_size=vocabulary, architectures=["Mamba2ForCausalLM"],
            )
            config.save_pretrained(folder)
            with torch.device("meta"):
                state = Mamba2ForCausalLM(config).state_dict()
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for key, t in state.items():
                offsets = [end, end + 4 * t.numel()]
                header[key] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": offsets}
                end = offsets[1]
            raw = json.dumps(header).encode()
            with open(folder / "model.safetensors", "wb") as f:
                f.write(struct.pack("<Q", len(raw)) + raw)
                f.truncate(8 + len(raw) + end)
            convert_checkpoint(folder, str(folder) + "-converted")
            print(end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert large - small > 500_000_000
    # Room for the allocator's moods; a copy of the larger table alone would be half of it.
    assert after - before < (large - small) / 10


def test_changed_files_are_not_given_back(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    convert_checkpoint(source, dst, link=False)
    shard = dst / "model-00001-of-00005.safetensors"
    if not shard.exists():
        shard = sorted(dst.glob("model-*"))[0]
    original = shard.read_bytes()
    for damaged in (original[:-1], original[:-1] + bytes([original[-1] ^ 1])):
        shard.write_bytes(damaged)
        with pytest.raises(ConversionError, match="was changed since the conversion"):
            revert_checkpoint(dst, tmp_path / "back")
    shard.unlink()
    with pytest.raises(ConversionError, match="is missing from"):
        revert_checkpoint(dst, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "source"]


def test_manifests_cannot_reach_outside(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    convert_checkpoint(source, dst)
    manifest = dst / "glazoo" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    for key in ("path", "stored"):
        for name in ("../escaped", "/etc/hostname"):
            edit_json(manifest, files=[{**files[0], key: name}])
            with pytest.raises(ConversionError, match="names a file outside the folder"):
                revert_checkpoint(dst, tmp_path / "back")
    edit_json(manifest, files=[{"path": "x"}])
    with pytest.raises(ConversionError, match="is damaged"):
        revert_checkpoint(dst, tmp_path / "back")
    edit_json(manifest, format_version=99)
    with pytest.raises(ConversionError, match="format_version 99"):
        revert_checkpoint(dst, tmp_path / "back")
    manifest.unlink()
    with pytest.raises(ConversionError, match="only folders that `glazoo convert` wrote"):
        revert_checkpoint(dst, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_trained_folder_saved_again_cannot_be_reverted(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "c")
    load(tmp_path / "c").save_pretrained(tmp_path / "tuned")
    with pytest.raises(ConversionError, match="only folders that `glazoo convert` wrote"):
        revert_checkpoint(tmp_path / "tuned", tmp_path / "back")

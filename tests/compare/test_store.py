import json
from pathlib import Path

import pytest

from glazoo.compare.errors import CompareError
from glazoo.compare.files import write_text
from glazoo.compare.store import Store

CONFIG = {"task": {"name": "mqar", "load": 4}, "steps": 3}


def test_finished_runs_come_back(tmp_path: Path) -> None:
    with Store(tmp_path / "out", CONFIG) as store:
        store.add({"key": "a", "accuracy": 0.5})
        store.add({"key": "b", "accuracy": 0.25})
    with Store(tmp_path / "out", CONFIG) as store:
        assert store.results["a"]["accuracy"] == 0.5
        assert set(store.results) == {"a", "b"}


def test_a_line_that_was_cut_off_costs_only_its_own_run(tmp_path: Path) -> None:
    with Store(tmp_path, CONFIG) as store:
        store.add({"key": "a"})
    path = tmp_path / "runs.jsonl"
    with path.open("ab") as f:
        f.write(b'{"key": "b", "accur')
    with Store(tmp_path, CONFIG) as store:
        assert set(store.results) == {"a"}
        store.add({"key": "c"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_folder_of_another_config_is_refused_with_what_differs(tmp_path: Path) -> None:
    with Store(tmp_path, CONFIG) as store:
        store.add({"key": "a"})
    other = {"task": {"name": "mqar", "load": 8}, "steps": 3}
    before = (tmp_path / "runs.jsonl").read_bytes()
    with pytest.raises(CompareError, match=r"task\.load: 4 there, 8 here.*another --out"):
        Store(tmp_path, other)
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    # The refusal lets go of the folder.
    Store(tmp_path, CONFIG).close()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    Store(tmp_path, CONFIG).close()
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\nnot json\n{"key": "b"}\n')
    with pytest.raises(CompareError, match=r"line 2 is damaged"):
        Store(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CompareError, match=r"cannot read .*config\.json"):
        Store(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CompareError, match=r"results but no config\.json"):
        Store(tmp_path, CONFIG)


def test_a_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        Store(tmp_path, CONFIG),
        pytest.raises(CompareError, match="another process is working"),
    ):
        Store(tmp_path, CONFIG)


def test_a_full_disk_is_said_and_costs_no_earlier_run(tmp_path: Path) -> None:
    with Store(tmp_path, CONFIG) as store:
        store.add({"key": "a"})
        kept = tmp_path / "kept"
        (tmp_path / "runs.jsonl").rename(kept)
        (tmp_path / "runs.jsonl").symlink_to("/dev/full")
        with pytest.raises(CompareError, match=r"No space left on device; the 1 runs stored"):
            store.add({"key": "b"})
        assert set(store.results) == {"a"}
        (tmp_path / "runs.jsonl").unlink()
        kept.rename(tmp_path / "runs.jsonl")
    with Store(tmp_path, CONFIG) as store:
        assert set(store.results) == {"a"}


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CompareError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_a_file_in_the_way_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CompareError, match="cannot write results to"):
        Store(tmp_path / "out", CONFIG)

"""The list of models on disk: what it says, what it changes, and what it never touches."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from napari_resfinetune import library
from napari_resfinetune.cli.app import app
from napari_resfinetune.config import make_config, write_config
from napari_resfinetune.errors import ConfigError, ModelError
from napari_resfinetune.training.run_folder import COPIES_MARK, RunFolder, training_alone

FINISHED = {"event": "Finished", "status": "early_stopped", "best_epoch": 1}
STARTED = {"event": "Started", "epoch": 0}


def make_run(folder: Path, model: str = "vit_b", events: list[dict] | None = None, age: float = 3600) -> Path:
    """Write a run folder as training leaves one, without weights."""
    folder.mkdir(parents=True)
    write_config(make_config({"model": model, "strategy": {"kind": "lora"}}, "test"), folder / "config.yaml")
    lines = [json.dumps(event) for event in ([STARTED, FINISHED] if events is None else events)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "metrics.csv").write_text("epoch,metric\n0,0.5\n1,0.25\n2,\n", encoding="utf-8")
    (folder / "model.pt").write_bytes(b"weights")
    (folder / "checkpoints" / "best").mkdir(parents=True)
    for path in (folder / "config.yaml", folder / "events.jsonl"):
        os.utime(path, (time.time() - age,) * 2)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a list of three models: one, one that was continued from it, and one deeper down that failed."""
    runs = tmp_path / "my runs"
    make_run(runs / "first", age=7200)
    make_run(runs / "second", model=str(runs / "first" / "model.pt"))
    make_run(runs / "sweep" / "a", model="vit_t", events=[STARTED, {"event": "Failed", "error": "x"}], age=9000)
    comparison = {
        "verdict": "better",
        "mode": "ais",
        "before": {"sa50": 0.1, "sa75": 0.0, "msa": 0.05},
        "after": {"sa50": 0.8, "sa75": 0.5, "msa": 0.4},
    }
    (runs / "second" / "comparison.json").write_text(json.dumps(comparison))
    (runs / "notes.txt").write_text("not a model")
    (runs / "images").mkdir()
    return runs


def names(runs: Path) -> list[str]:
    return [entry.name for entry in library.list_models(runs)]


def test_the_list_says_what_is_there(runs: Path) -> None:
    second, first, failed = library.list_models(runs)
    assert (first.name, second.name, failed.name) == ("first", "second", "sweep/a")
    assert first.strategy == "lora" and first.start_model == "vit_b"
    assert (first.status, failed.status) == ("early_stopped", "failed")
    assert first.scores == {"metric": 0.25} and first.verdict == ""
    assert second.scores == {"sa50": 0.8, "sa75": 0.5, "msa": 0.4} and second.verdict == "better"
    assert (second.continued_from, first.continued_by) == ("first", ("second",))
    assert first.continued_from is None and second.continued_by == failed.continued_by == ()


def test_a_session_that_was_resumed_is_not_finished(runs: Path) -> None:
    with (runs / "first" / "events.jsonl").open("a") as file:
        file.write(json.dumps(STARTED) + "\n" + json.dumps({"event": "Message", "text": 'not "Finished"'}) + "\n{cut o")
    assert library.find_model(runs, "first").status == "unfinished"


@pytest.mark.parametrize("name", ["config.yaml", "library.json", "comparison.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1, 2]", b'{"name": 3, "created": 5, "after": {"sa50": "x"}}'])
def test_damaged_files_do_not_take_the_list_away(runs: Path, name: str, content: bytes) -> None:
    (runs / "second" / name).write_bytes(content)
    assert len(library.list_models(runs)) == 3


def test_names_and_notes(runs: Path) -> None:
    library.rename_model(runs, "first", "Zellen, größer")
    entry = library.set_note(runs, "Zellen, größer", " from Tuesday ")
    assert (entry.name, entry.note, entry.path) == ("Zellen, größer", "from Tuesday", runs / "first")
    assert library.find_model(runs, "first").path == entry.path
    assert library.find_model(runs, "second").continued_from == "Zellen, größer"
    for bad in ("", "  ", "a/b", "..\\x", "x" * 101, "细" * 40, "a\nb", ".", "..", "second", "Zellen, größer"):
        with pytest.raises(ConfigError, match="name"):
            library.rename_model(runs, "sweep/a", bad)
    with pytest.raises(ConfigError, match=r"no such model.*Zellen"):
        library.rename_model(runs, "third", "x")
    with pytest.raises(ConfigError, match="no such folder"):
        library.list_models(runs / "elsewhere")


def test_a_name_that_a_later_folder_has_too_names_neither(runs: Path) -> None:
    library.rename_model(runs, "first", "good")
    later = make_run(runs / "good")
    with pytest.raises(ConfigError, match=r"several models are called so.*first"):
        library.delete_model(runs, "good")
    assert library.delete_model(runs, str(later)) == later
    assert library.find_model(runs, "good").path == runs / "first"


def test_a_list_that_was_moved_keeps_its_lineage(runs: Path, tmp_path: Path) -> None:
    os.rename(runs, tmp_path / "moved")
    assert library.find_model(tmp_path / "moved", "second").continued_from == "first"


def test_delete_takes_real_models_of_this_list_only(runs: Path, tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside")
    (runs / "link").symlink_to(outside, target_is_directory=True)
    make_run(runs / "first" / "inner")
    for name in ("link", "first", "images", "notes.txt", "../outside", str(outside), "..", "."):
        with pytest.raises(ConfigError):
            library.delete_model(runs, name)
    assert outside.is_dir() and (runs / "first").is_dir() and (runs / "images").is_dir()
    library.delete_model(runs, "second")
    assert not (runs / "second").exists()
    assert not any(path.name.startswith(".deleted") for path in runs.iterdir())


def test_copies_of_layers_go_with_their_run_and_nobody_elses_data_do(runs: Path) -> None:
    for name in ("first", "second"):
        (runs / f"{name}-data" / "images").mkdir(parents=True)
    (runs / "first-data" / COPIES_MARK).touch()  # as the window's engine leaves it
    library.delete_model(runs, "first")
    library.delete_model(runs, "second")
    assert not (runs / "first-data").exists()
    assert (runs / "second-data" / "images").is_dir()


def test_a_model_in_training_is_not_deleted(runs: Path) -> None:
    live = make_run(runs / "live", events=[STARTED, {"event": "Step"}])
    with training_alone(RunFolder(live)):
        assert library.find_model(runs, "live").status == "in training"
        with pytest.raises(ConfigError, match="in training"):
            library.delete_model(runs, "live")
    assert library.find_model(runs, "live").status == "unfinished"
    library.delete_model(runs, "live")
    assert "live" not in names(runs)


def _rename_often(runs: Path, folder: str) -> None:
    name = folder
    for i in range(20):
        library.set_note(runs, name, f"{folder} {i}")
        library.rename_model(runs, name, f"{folder} then" if i % 2 else f"{folder} now")
        name = f"{folder} then" if i % 2 else f"{folder} now"


def test_two_processes_at_once(runs: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_rename_often, args=(runs, name)) for name in ("first", "second")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert set(names(runs)) == {"first then", "second then", "sweep/a"}
    assert {entry.note for entry in library.list_models(runs)} == {"first 19", "second 19", ""}


def test_only_one_of_two_gets_a_name(runs: Path) -> None:
    code = (
        "import sys; from napari_resfinetune import library, errors\n"
        "try: library.rename_model(sys.argv[1], sys.argv[2], 'best')\n"
        "except errors.ConfigError: sys.exit(2)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, runs, name]) for name in ("first", "second")]
    assert sorted(process.wait(120) for process in started) == [0, 2]
    assert names(runs).count("best") == 1


def test_import_of_everything(cells: Path, runs: Path, tmp_path: Path) -> None:
    entry = library.import_model(runs, cells / "start.pt", name="from Ana", note="nuclei")
    assert (entry.name, entry.note, entry.status) == ("from Ana", "nuclei", "imported")
    assert entry.path == runs / "from Ana" and (entry.path / "model.pt").is_file()
    with pytest.raises(ConfigError, match="called so"):
        library.import_model(runs, cells / "start.pt", name="from Ana")
    with pytest.raises(ConfigError, match="lies in"):
        library.import_model(runs, runs / "second", name="copy")
    (tmp_path / "text.pt").write_text("no weights")
    for bad in (tmp_path / "text.pt", tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(ModelError):
            library.import_model(runs, bad, name="bad")
    whole = make_run(tmp_path / "whole")
    with pytest.raises(ModelError):
        library.import_model(runs, whole)
    (whole / "model.pt").write_bytes((cells / "start.pt").read_bytes())
    (whole / "features").mkdir()
    again = library.import_model(runs, entry.path.rename(tmp_path / "a list entry"), name="again")
    assert not (again.path / "adapter").exists()
    copied = library.import_model(runs, whole)
    assert copied.strategy == "lora" and not (copied.path / "features").exists()
    assert sorted(path.name for path in runs.iterdir() if path.name.startswith(".")) == [".resfinetune.lock"]


def call(*arguments: object, status: int = 0, answer: str | None = None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    assert result.exit_code == status, result.output
    return result


def test_the_command(cells: Path, runs: Path, tmp_path: Path) -> None:
    at = ("--folder", runs)
    listed = json.loads(call("models", "list", *at, "--json").stdout)["models"]
    assert [entry["name"] for entry in listed] == ["second", "first", "sweep/a"]
    assert "better" in call("models", "list", *at).stdout
    assert json.loads(call("models", "show", "second", *at, "--json").stdout)["continued_from"] == "first"
    assert "first" in call("models", "show", "second", *at).stdout
    call("models", "rename", "second", "best [1]", *at)
    assert "try it" in call("models", "note", "best [1]", "try it", *at).stdout
    assert "best [1]" in call("models", "list", *at).stdout
    refused = call("models", "delete", "first", *at, status=2, answer="n\n")
    assert "best [1] were started from it" in refused.stderr and (runs / "first").exists()
    call("models", "delete", "first", *at, status=2, answer="")
    call("models", "delete", "first", *at, answer="y\n")
    deleted = call("models", "delete", "sweep/a", *at, "--yes", "--json").stdout
    assert json.loads(deleted) == {"deleted": str(runs / "sweep" / "a")}
    imported = json.loads(call("models", "import", cells / "start.pt", *at, "--name", "new", "--json").stdout)
    assert imported["status"] == "imported"
    out = tmp_path / "out.pt"
    assert json.loads(call("models", "export", "new", out, *at, "--json").stdout)["path"] == str(out)
    assert "exists already" in call("export", cells / "start.pt", out, status=2).stderr
    assert call("models", "show", "nobody", *at, status=2).stderr.startswith("error:")


def test_listing_loads_no_torch(runs: Path) -> None:
    code = (
        "import sys; from napari_resfinetune import library; library.list_models(sys.argv[1]); "
        "library.rename_model(sys.argv[1], 'first', 'one'); library.delete_model(sys.argv[1], 'second'); "
        "print(sorted({'torch', 'micro_sam', 'napari', 'zarr'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, runs], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

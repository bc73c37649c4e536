"""Sweeps: what a grid becomes, how jobs come to their end, and the tables and figures of their numbers."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import napari_resfinetune as rf
from napari_resfinetune.cli.app import app
from napari_resfinetune.evaluation import MODES
from napari_resfinetune.events import StopToken
from napari_resfinetune.experiments import make_grid, plates, pools, sweep, worker
from napari_resfinetune.experiments.datasets import dataset_values
from napari_resfinetune.experiments.expand import _notes, expand
from napari_resfinetune.experiments.figures import MODE_COLOURS
from napari_resfinetune.experiments.grid import LocalSettings, SlurmSettings
from napari_resfinetune.experiments.jobs import Job, Need, job_folder, last_submitted, read_result, write_json
from napari_resfinetune.experiments.manage import run_jobs, working_alone
from napari_resfinetune.experiments.report import best_epochs, best_setting, write_report
from napari_resfinetune.experiments.results import published_rows, read_rows
from napari_resfinetune.planning import Hardware, probe_hardware

NEED = Need(1.0, 1.0, 60.0, "cpu-8gb", "cpu", 1)
SMALL = {
    "data.patch_px": 64, "training.input_px": 128, "training.epochs": 1, "training.samples_per_epoch": 2,
    "training.objects": 2, "training.sub_iterations": 1,
    "resources.precision": "fp32", "resources.device": "cpu", "resources.threads": 1, "resources.nice": 0,
}  # fmt: skip


def values(cells: Path, output: Path, **changes):
    return {
        "images": str(cells / "images"), "labels": str(cells / "labels"), "output": str(output),
        "model": str(cells / "start.pt"), "preset": "cpu-8gb", "modes": ["box"], "set": SMALL, **changes,
    }  # fmt: skip


def call(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_all_that_is_wrong_with_a_grid_is_said_at_once():
    with pytest.raises(rf.ConfigError) as caught:
        make_grid({"output": "x", "models": ["vit_b"], "preset": "gtx1081", "n_images": [0], "seed": -1})
    said = "\n".join(caught.value.problems)
    for part in ("unknown key 'models'", "gtx1081", "n_images", "seed"):
        assert part in said
    assert len(caught.value.problems) == 4
    with pytest.raises(rf.ConfigError) as caught:
        make_grid({"output": "x", "set": {"training.seed": 3, "strategy.kind": "lora"}, "exclude": [{"colour": 1}],
                   "model": []})  # fmt: skip
    said = str(caught.value)
    for part in (
        "images and labels",
        "training.seed is what the key seed",
        "strategy.kind is what",
        "colour",
        "model: an empty list",
    ):
        assert part in said


def test_a_grid_becomes_runs_and_says_what_makes_no_sense(cells, tmp_path):
    planned = {key: value for key, value in SMALL.items() if key != "training.objects"}
    axes = {
        "strategy": ["full", {"kind": "lora", "rank": 8}, {"kind": "late", "blocks": 99}],
        "preset": ["cpu-8gb", "v100"], "n_images": [1, 2, 5, 2],
        "exclude": [{"strategy": {"kind": "lora", "rank": 8}, "n_images": 2}, {"model": "none", "seed": [0]}],
        "set": [f"{key}={value}" for key, value in planned.items()],
    }  # fmt: skip
    found = expand(make_grid(values(cells, tmp_path / "sweep", **axes)))
    names = [run.job.name for run in found.runs]
    assert names == [
        "cpu-8gb_start_full_n1_s0",
        "cpu-8gb_start_full_n2_s0",
        "cpu-8gb_start_lora-rank8_n1_s0",
    ]
    assert [run.job.name for run in found.initial] == ["initial_start_s0"]
    reasons = dict(found.left_out)
    assert reasons["cpu-8gb_start_lora-rank8_n2_s0"] == "excluded"
    assert reasons["cpu-8gb_start_full_n5_s0"] == "only 2 images left to train on"
    assert "99 blocks shall learn" in reasons["cpu-8gb_start_late-blocks99_n1_s0"]
    assert "is for cuda" in reasons["v100_start_full_n1_s0"] or names[0] == "v100_start_full_n1_s0"
    config = found.runs[1].config
    assert (config.data.max_images, config.training.samples_per_epoch, config.resources.preset) == (2, 2, "cpu-8gb")
    assert all(run.config.training.objects == run.plan.work.objects for run in found.runs)
    assert found.notes == ("exclude: {'model': 'none', 'seed': [0]} matches no combination",)
    assert 0.5 < found.runs[0].plan.peak_gb < 8
    assert found.runs[0].job.need.seconds > 0
    assert not (tmp_path / "sweep").exists()


def test_a_cluster_is_one_section_and_presets_change_it(tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("kind: slurm\npartition: gpu\nminutes: 60\npresets: {cpu-8gb: {partition: medium, cpus: 2}}\n")
    grid = make_grid({"images": "a", "labels": "b", "output": "x", "executor": str(cluster)})
    assert isinstance(grid.executor, SlurmSettings)
    here, other = grid.executor.request("cpu-8gb"), grid.executor.request("v100")
    assert (here.partition, here.cpus, here.minutes) == ("medium", 2, 60)
    assert (other.partition, other.cpus) == ("gpu", None)
    with pytest.raises(rf.ConfigError, match="executor: has no kind"):
        make_grid({"images": "a", "labels": "b", "output": "x", "executor": {"partition": "gpu"}})


class Here:
    """A pool that does a job at once, in this process; `lost` are names that end without a word the first time."""

    def __init__(self, output: Path, lost: set[str] = frozenset(), stop: StopToken | None = None) -> None:
        self.output, self.lost, self.stop = output, set(lost), stop or StopToken()
        self.begun: list[str] = []

    def submit(self, jobs):
        for job in jobs:
            self.begun.append(job.name)
            if job.name in self.lost:
                self.lost.remove(job.name)
            else:
                worker.run_job(self.output, job.name, list(job.work), self.stop)
        return [job.name for job in jobs]

    def alive(self):
        return {}

    def cancel(self, *, running):
        pass


@pytest.fixture
def counted(monkeypatch):
    """A step that notes what it was called with; it fails where it is told to."""
    calls = []

    def step(folder, work, stop):
        calls.append(folder.name)
        if work.get("fails"):
            raise rf.DataError("labels/1.tif: cannot be read")
        if work.get("stops"):
            stop.stop()
        return {"number": len(calls)}

    monkeypatch.setattr(worker, "STEPS", {"first": step, "second": step})
    return calls


def test_jobs_come_to_their_end_and_are_not_done_twice(tmp_path, counted):
    jobs = [Job(name, {"first": {}, "second": {}}, NEED) for name in ("a", "lost")]
    jobs.append(Job("bad", {"first": {}, "second": {"fails": True}}, NEED))
    pool = Here(tmp_path, lost={"lost"})
    states = run_jobs(tmp_path, jobs, pool, stop=StopToken(), look_seconds=0)
    assert [state.state for state in states] == ["done", "done", "failed"]
    assert states[2].note == "second: labels/1.tif: cannot be read"
    assert pool.begun == ["a", "lost", "bad", "lost"]
    again = Here(tmp_path)
    run_jobs(tmp_path, jobs, again, stop=StopToken(), look_seconds=0)
    assert again.begun == []
    before = len(counted)
    jobs[2] = Job("bad", {"first": {}, "second": {}}, NEED)
    states = run_jobs(tmp_path, jobs, again, stop=StopToken(), retry=True, look_seconds=0)
    assert states[2].state == "done"
    assert counted[before:] == ["bad"]  # the first step was kept


def test_a_job_that_is_lost_again_and_again_is_given_up(tmp_path, counted):
    class Never(Here):
        def submit(self, jobs):
            return [job.name for job in jobs]

    states = run_jobs(tmp_path, [Job("a", {"first": {}}, NEED)], Never(tmp_path), stop=StopToken(), look_seconds=0)
    assert states[0].state == "failed"
    assert f"its log tells: {tmp_path / 'logs'}" in states[0].note


def test_what_is_handed_over_already_is_not_waited_for(tmp_path):
    class Busy(Here):
        def alive(self):
            return {"a": "queued"}

    jobs = [Job("a", {"first": {}}, NEED)]
    states = run_jobs(tmp_path, jobs, Busy(tmp_path), stop=StopToken(), wait=False, look_seconds=0)
    assert [state.state for state in states] == ["queued"]
    with pytest.raises(rf.ConfigError, match="--no-wait"):
        rf.sweep({"images": "a", "labels": "b", "output": str(tmp_path)}, wait=False)


def test_what_an_earlier_call_left_running_takes_room(tmp_path, monkeypatch):
    pool = pools.LocalPool(tmp_path, LocalSettings(at_once=1), probe_hardware())
    monkeypatch.setattr(pool, "alive", lambda: {"left": "running"})
    assert pool.submit([Job("a", {"first": {}}, NEED)]) == []


@pytest.mark.parametrize(("given", "jobs", "at_once", "threads"), [("", 5, None, 2), ("", 1, None, 8), ("4", 5, 2, 2)])
def test_jobs_at_the_same_time_share_the_cores(tmp_path, monkeypatch, given, jobs, at_once, threads):
    seen = []

    class Executor:
        def __init__(self, folder):
            pass

        def update_parameters(self, **_):
            pass

        def submit(self, command):
            seen.append(os.environ["OMP_NUM_THREADS"])
            return SimpleNamespace(job_id="1", done=lambda: False)

    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(pools, "LocalExecutor", Executor)
    hardware = Hardware("a CPU", 8, 16, 64.0, 60.0)
    pool = pools.LocalPool(tmp_path, LocalSettings(at_once=at_once), hardware)
    begun = pool.submit([Job(str(number), {"first": {}}, NEED) for number in range(jobs)])
    assert len(begun) == min(jobs, at_once or 4)
    assert seen == [str(threads)] * len(begun)
    assert os.environ["OMP_NUM_THREADS"] == given


def test_slurm_takes_back_the_steps_before_one_that_was_refused(tmp_path, monkeypatch):
    class Executor:
        def __init__(self, folder, **_):
            pass

        def update_parameters(self, **parameters):
            self.step = parameters["job_name"]

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, command):
            if self.step == "second":
                raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit")
            return SimpleNamespace(job_id="7_0")

    commands = []
    monkeypatch.setattr(pools, "SlurmExecutor", Executor)
    monkeypatch.setattr(pools.subprocess, "run", lambda words, **_: commands.append(words))
    with pytest.raises(rf.ResourceError, match="QOSMaxSubmitJobPerUserLimit"):
        pools.SlurmPool(tmp_path, SlurmSettings()).submit([Job("a", {"first": {}, "second": {}}, NEED)])
    assert commands == [["scancel", "7"]]
    assert last_submitted(tmp_path) == {"a": ["7_0"]}


def test_a_card_that_is_not_asked_for_is_said():
    run = SimpleNamespace(
        combination=SimpleNamespace(preset="auto"),
        config=SimpleNamespace(resources=SimpleNamespace(device="auto")),
        plan=SimpleNamespace(work=SimpleNamespace(device="cpu")),
    )
    for gpus, said in ((None, 1), (1, 0)):
        executor = {"kind": "slurm", "gpus": gpus}
        grid = make_grid({"images": "a", "labels": "b", "output": "x", "executor": executor})
        assert len(list(_notes(grid, [run]))) == said


def test_stop_begins_nothing_more(tmp_path, counted):
    stop = StopToken()
    jobs = [Job("a", {"first": {"stops": True}, "second": {}}, NEED), Job("b", {"first": {}}, NEED)]
    states = run_jobs(tmp_path, jobs, Here(tmp_path, stop=stop), stop=stop, look_seconds=0)
    assert [state.state for state in states] == ["waiting", "waiting"]
    assert list(read_result(tmp_path, "a")) == ["first"]
    assert (tmp_path / "stop").exists()


def test_results_of_another_model_file_are_not_taken_over(cells, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(worker, "STEPS", dict.fromkeys(("train", "evaluate"), worker.STEPS["first"]))
    monkeypatch.setattr(sweep, "open_pool", lambda output, settings, hardware: Here(output))
    output = tmp_path / "sweep"
    grids = []
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        shutil.copy(cells / "start.pt", tmp_path / folder)
        grids.append(values(cells, output, model=str(tmp_path / folder / "start.pt")))
    for _ in range(2):
        assert rf.sweep(grids[0]).count("done") == 2
    with pytest.raises(rf.ConfigError) as caught:
        rf.sweep(grids[1])
    assert [problem.partition(": ")[2] for problem in caught.value.problems[:2]] == [
        "was begun with another model file or other settings"
    ] * 2
    with working_alone(output), pytest.raises(rf.ConfigError, match="another call is at work here"):
        rf.sweep(grids[0])
    (output / "sweep.yaml").write_text("{")
    with pytest.raises(rf.ConfigError, match="not valid YAML"):
        rf.sweep(grids[0])


def test_images_to_score_on_without_their_labels_are_refused(cells, tmp_path):
    labels = tmp_path / "labels"
    shutil.copytree(cells / "labels", labels)
    next(labels.iterdir()).rename(labels / "typo.tif")
    test = {"test_images": str(cells / "images"), "test_labels": str(labels)}
    with pytest.raises(rf.DataError, match=r"typo.tif: no image of that name"):
        expand(make_grid(values(cells, tmp_path / "sweep", **test)))
    (tmp_path / "config.yaml").write_text("model: random:vit_t\nresources: {device: cpu}\n")
    work = {"config": "config.yaml", "model": "random:vit_t", "modes": ["ais"]}
    with pytest.raises(rf.DataError, match=r"typo.tif: no image of that name"):
        worker.evaluate(tmp_path, {**work, "test": {"images": cells / "images", "labels": labels}}, StopToken())
    # This model has no instance decoder, so there is nothing to score.
    test = {"images": cells / "images", "labels": cells / "labels"}
    assert worker.evaluate(tmp_path, {**work, "test": test}, StopToken()) == {"scores": {}, "images": 0}


def test_every_mode_has_a_colour():
    assert set(MODE_COLOURS) == set(MODES)


def test_paths_with_brackets_are_printed_whole(tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").touch()
    monkeypatch.setattr(rf.api, "report_sweep", lambda *_, **__: [Path("[red]/runs.csv")])
    assert call("report", tmp_path).stdout.strip() == str(Path("[red]/runs.csv"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="submitit does not run on Windows, and sweeps say so")
def test_a_sweep_here_from_grid_to_figures(cells, tmp_path):
    output, grid = tmp_path / "sweep", tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(values(cells, output, n_images=[1, 9])))
    plan = json.loads(call("sweep", grid, "--dry-run", "--json").stdout)
    assert (plan["count"], len(plan["left_out"])) == (2, 1)
    assert not output.exists()
    done = json.loads(call("sweep", grid, "--json").stdout)
    assert (done["done"], done["failed"]) == (2, 0)
    run = output / "jobs" / "cpu-8gb_start_full_n1_s0"
    assert (run / "run" / "model.pt").is_file()
    assert "epoch 1: loss" in call("sweep", grid, "--log", run.name).stdout
    assert "no such job" in call("sweep", grid, "--log", "none", status=2).stderr
    written = (run / "submitted.json").read_text()
    assert json.loads(call("sweep", grid, "--json").stdout)["done"] == 2
    assert (run / "submitted.json").read_text() == written
    rows = {row.name: row for row in read_rows(output)}
    assert set(rows["initial_start_s0"].scores) == set(rows[run.name].scores) == {"box"}
    assert rows[run.name].best_epoch == 1
    files = json.loads(call("report", output, "--json").stdout)["files"]
    assert {f"scores-cpu-8gb.{kind}" for kind in ("png", "svg", "pdf", "csv")} <= {Path(file).name for file in files}
    assert "not a run folder" in call("report", tmp_path, status=2).stderr
    changed = values(cells, output, modes=["point"])
    grid.write_text(yaml.safe_dump(changed))
    assert "holds a sweep with other modes" in call("sweep", grid, status=2).stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_process_of_a_job_saves_when_it_is_told_to_stop_and_goes_on(cells, tmp_path):
    settings = {**SMALL, "training.epochs": 500, "training.early_stopping": None}
    found = expand(make_grid(values(cells, tmp_path, set=settings, initial=False)))
    folder = job_folder(tmp_path, found.runs[0].job.name)
    folder.mkdir(parents=True)
    rf_config = found.runs[0].config
    (folder / "config.yaml").write_text(yaml.safe_dump(rf_config.model_dump(mode="json")))
    write_json(folder / "job.json", found.runs[0].job.work)
    command = [sys.executable, "-m", "napari_resfinetune.experiments.worker", str(tmp_path), folder.name, "train"]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 600
        while not (folder / "run" / "checkpoints" / "latest").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(120) == worker.STOPPED
    assert read_result(tmp_path, folder.name) == {}
    config = folder / "run" / "config.yaml"
    written = yaml.safe_load(config.read_text())
    written["training"]["epochs"] = json.loads((folder / "run/checkpoints/latest/state.json").read_text())["epoch"] + 1
    config.write_text(yaml.safe_dump(written))
    assert worker.run_job(tmp_path, folder.name, ["train"], StopToken()) == worker.DONE
    result = read_result(tmp_path, folder.name)["train"]
    assert result["epochs"] == written["training"]["epochs"]
    assert 0 < result["seconds_to_best"] <= result["seconds"] + 1


def made_up(output: Path, preset: str, model: str, strategy: str, n_images: int, seed: int, score: float) -> None:
    """Write what a finished job leaves."""
    folder = job_folder(output, f"{preset}_{model}_{strategy}_n{n_images}_s{seed}")
    combination = {"preset": preset, "model": model, "strategy": strategy, "n_images": n_images, "seed": seed}
    write_json(folder / "plan.json", {"combination": combination, "plan": {"peak_gb": 5.0, "seconds_per_epoch": 60.0}})
    write_json(folder / "job.json", {"evaluate": {}})
    scores = {mode: {"sa50": score, "sa75": score / 2, "msa": score / 2} for mode in ("box", "ais", "point")}
    train = {"best_epoch": 4 + seed, "seconds": 900.0, "seconds_to_best": 300.0 + 60 * seed, "epochs": 15,
             "peak_memory_gb": 5.2}  # fmt: skip
    result = {"evaluate": {"scores": scores, "images": 3}}
    write_json(folder / "result.json", result if strategy == "initial" else {**result, "train": train})


def test_tables_and_figures_hold_the_numbers_of_the_runs(tmp_path):
    (tmp_path / "sweep.yaml").touch()
    assert write_report(tmp_path) == []
    for model in ("vit_b", "vit_b_lm"):
        made_up(tmp_path, "gtx1080", model, "initial", 0, 0, 0.3)
        for n_images in (1, 10, 2):
            for seed in (0, 1):
                made_up(tmp_path, "gtx1080", model, "frozen", n_images, seed, 0.4 + n_images / 100 + seed / 10)
    files = {path.name for path in write_report(tmp_path, with_published=True)}
    kinds = ("png", "svg", "pdf", "csv")
    assert {f"{name}.{kind}" for name in ("scores-gtx1080", "cost") for kind in kinds} <= files
    trained = [row for row in read_rows(tmp_path) if row.strategy != "initial"]
    table = best_epochs(trained, with_published=True)
    assert [line["images"] for line in table] == [1, 2, 10, 1, 2, 10]
    first = table[0]
    assert (first["seeds"], first["best_epoch"], first["train_time"]) == (2, 5.5, "0:05:30")
    # The study's own: vit_b, encoder frozen, one image, on a GTX 1080: epoch 6 counted from 0, after 0:13:39.
    assert (first["published_best_epoch"], first["published_train_time"]) == (7, "0:13:39")
    assert [line["images"] for line in best_setting(table)] == [10, 10]
    page = (tmp_path / "best-epochs.md").read_text(encoding="utf-8")
    assert "image encoder frozen" in page and "Resource Efficient Finetuning" in page
    with (tmp_path / "scores-gtx1080.csv").open(newline="", encoding="utf-8") as file:
        numbers = list(csv.DictReader(file))
    drawn = {(n["model"], n["mode"], n["images"]): n for n in numbers}
    assert float(drawn["vit_b", "box", "initial"]["mean"]) == pytest.approx(0.15)
    assert float(drawn["vit_b_lm", "point", "10"]["mean"]) == pytest.approx(0.275)
    assert float(drawn["vit_b_lm", "point", "10"]["most"]) == pytest.approx(0.3)
    assert "generalist" in (tmp_path / "scores-gtx1080.svg").read_text(encoding="utf-8")
    again = (tmp_path / "cost.svg").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "cost.svg").read_bytes() == again


def test_the_published_table_is_whole():
    rows = published_rows()
    assert len(rows) == 72
    assert len({(row.preset, row.model, row.strategy, row.n_images) for row in rows}) == 72
    # Best epochs count from 1 here: then time is in proportion to them, within a resource and strategy.
    v100 = [row.seconds / row.best_epoch for row in rows if (row.preset, row.strategy) == ("v100", "full")]
    assert max(v100) / min(v100) < 1.06


def test_many_images_go_through_in_chunks_and_a_later_call_goes_on(cells, tmp_path, monkeypatch):
    pools = []

    def in_this_process(folder, work, stop):
        return json.loads(call(*work["arguments"]).stdout)

    def open_here(output, settings, hardware):
        pools.append(Here(output))
        return pools[-1]

    monkeypatch.setattr(worker, "STEPS", {"command": in_this_process})
    monkeypatch.setattr(plates, "open_pool", open_here)
    small = ["--model", cells / "start.pt", "--set", "data.patch_px=512", "--executor", "local", "--chunk", "2"]
    arguments = ["evaluate", "--images", cells / "images", "--labels", cells / "labels", "--mode", "box", *small]
    output = tmp_path / "plate"
    said = json.loads(call(*arguments, "--output", output, "--json").stdout)
    assert (said["images"], said["done"], [job["state"] for job in said["jobs"]]) == (3, 3, ["done", "done"])
    with (output / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["image"], row["mode"]) for row in csv.DictReader(file)] == [(f"c{i}", "box") for i in range(3)]
    (output / "jobs" / "chunk-00002" / "result.json").unlink()
    (output / "jobs" / "chunk-00002" / "scores.csv").unlink()
    call(*arguments, "--output", output)
    assert pools[1].begun == ["chunk-00002"]
    refused = call(*arguments[:-1], "3", "--output", output, status=2)
    assert "was begun with other chunk" in refused.stderr
    (tmp_path / "labels").mkdir()
    shutil.copy(cells / "labels" / "c0.tif", tmp_path / "labels")
    fewer = ["evaluate", "--images", cells / "images", "--labels", tmp_path / "labels", "--mode", "box", *small]
    said = call(*fewer, "--output", tmp_path / "fewer", "--json")
    assert "images/c1.tif, images/c2.tif: no label image, left out" in said.stderr
    assert json.loads(said.stdout)["done"] == 1
    assert "already holds files" in call(*arguments, "--output", cells / "images", status=2).stderr


def test_chunks_are_tried_again_and_their_arguments_may_be_mended(cells, tmp_path, monkeypatch):
    full = [True]

    def step(folder, work, stop):
        if full:
            raise rf.ResourceError("disk full")
        return {"results": []}

    monkeypatch.setattr(worker, "STEPS", {"command": step})
    monkeypatch.setattr(plates, "open_pool", lambda output, settings, hardware: Here(output))
    monkeypatch.chdir(cells)
    output = tmp_path / "plate"

    def run(*words):
        return plates.run_plate("segment", "images", None, output, words, LocalSettings(), chunk=2)

    for words, error in (
        (("--mode", "box"), rf.ConfigError),
        (("--format", "png"), rf.ConfigError),
        (("--model", "none.pt"), rf.ModelError),
    ):
        with pytest.raises(error):
            run(*words)
    assert not output.exists()
    words = ("--model", "start.pt", "--set", "data.images=all", "--set", "data.patch_px=512")
    assert [job.state for job in run(*words).jobs] == ["failed", "failed"]
    full.clear()
    again = run(*words, "--overwrite")
    assert ([job.state for job in again.jobs], again.done) == (["done", "done"], 3)
    written = json.loads((output / "jobs" / "chunk-00001" / "job.json").read_text())["command"]["arguments"]
    assert written[2:7] == ["--model", str(cells / "start.pt"), "--set", "data.patch_px=512", "--overwrite"]
    with pytest.raises(rf.ConfigError, match="was begun with other arguments"):
        run(*words)
    with working_alone(output), pytest.raises(rf.ConfigError, match="another call is at work here"):
        run(*words, "--overwrite")
    again.table.unlink()
    again.table.mkdir()
    with pytest.raises(rf.ResourceError, match=r"segmented.csv: cannot be used"):
        run(*words, "--overwrite")


def test_data_by_name_is_downloaded_only_on_request(tmp_path, monkeypatch):
    with pytest.raises(rf.ConfigError, match="add --download"):
        dataset_values("covid_if", tmp_path, download=False)
    with pytest.raises(rf.DataError, match="cannot be downloaded"):
        dataset_values("covid_if", tmp_path, download=True)
    folder = tmp_path / "covid_if"
    folder.mkdir(exist_ok=True)
    for number in range(49):
        (folder / f"gt_image_{number:03}.h5").touch()
    data, test = dataset_values("covid_if", tmp_path, download=False)
    assert (len(data["images"]), len(data["validation_images"]), len(test)) == (10, 1, 38)
    assert not set(data["images"]) & set(test)

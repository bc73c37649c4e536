"""Many images on the workers of a dask cluster, through the command."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import distributed
import psutil
import pytest
from typer.testing import CliRunner

import napari_resfinetune as rf
from napari_resfinetune.cli.app import app
from napari_resfinetune.experiments.dask_pool import DaskPool
from napari_resfinetune.experiments.grid import DaskSettings, read_executor
from napari_resfinetune.experiments.jobs import Job, Need, job_folder, last_submitted, log_files, write_json

# From Python 3.12 on it warns of what is done between fork and exec beside other threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
NEED = Need(1.0, 1.0, 60.0, "auto", "cpu", 1)


@pytest.fixture(scope="module")
def address():
    """Begin a scheduler and one worker with one thread, as ``dask scheduler`` and ``dask worker`` do."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def call(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def wait_until(there, seconds=60):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


def endless(output, monkeypatch, *names):
    """Make jobs that run until there is a file "stop"."""
    code = f"import os, time\nwhile not os.path.exists({str(output / 'stop')!r}):\n    time.sleep(0.1)"
    monkeypatch.setattr("napari_resfinetune.experiments.dask_pool.worker_command", lambda *_: ["python", "-c", code])
    jobs = [Job(name, {"command": {}}, NEED) for name in names]
    for job in jobs:
        write_json(job_folder(output, job.name) / "job.json", {})
    return jobs


@pytest.mark.slow
def test_images_are_scored_on_its_workers(cells, tmp_path, address):
    small = ["--model", cells / "start.pt", "--set", "data.patch_px=512", "--chunk", "2", "--mode", "box"]
    arguments = ["evaluate", "--images", cells / "images", "--labels", cells / "labels", *small]
    output = tmp_path / "plate"
    said = json.loads(call(*arguments, "--executor", address, "--output", output, "--json").stdout)
    assert (said["images"], said["done"], [job["state"] for job in said["jobs"]]) == (3, 3, ["done", "done"])
    with (output / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["c0", "c1", "c2"]
    assert list((output / "logs").glob("resfinetune-chunk-00001-*_0_log.err"))


def test_a_later_process_finds_what_runs_and_what_waits_is_taken_back(tmp_path, address, monkeypatch):
    jobs = endless(tmp_path, monkeypatch, "a.1", "b.2")
    first = DaskPool(tmp_path, DaskSettings(scheduler=address))
    assert first.submit(jobs) == ["a.1", "b.2"]
    wait_until(lambda: "running" in first.alive().values())
    first.client.close()
    later = DaskPool(tmp_path, DaskSettings(scheduler=address))
    assert later.alive() == {"a.1": "running", "b.2": "queued"}
    later.cancel(running=False)
    assert later.alive() == {"a.1": "running"}
    later.cancel(running=True)
    wait_until(lambda: not later.alive())
    assert later.client.list_datasets() == ()
    later.client.close()


def test_a_broken_connection_is_not_the_end_of_a_job(tmp_path, address, monkeypatch):
    pool = DaskPool(tmp_path, DaskSettings(scheduler=address))
    pool.submit(endless(tmp_path, monkeypatch, "a.1"))
    wait_until(lambda: pool.alive() == {"a.1": "running"})
    pool.client.loop.add_callback(pool.client.scheduler_comm.comm.abort)
    wait_until(lambda: [task.status for task in pool._tasks.values()] == ["cancelled"])
    wait_until(lambda: pool.client.status == "running")
    assert pool.alive() == {"a.1": "running"}
    (tmp_path / "stop").touch()
    wait_until(lambda: not pool.alive())
    pool.client.close()
    with pytest.raises(rf.ResourceError, match="the dask scheduler does not answer"):
        pool.alive()


def test_what_dask_could_not_run_says_why_in_its_log(tmp_path, address, monkeypatch):
    jobs = endless(tmp_path, monkeypatch, "a.1")
    (tmp_path / "logs").touch()
    pool = DaskPool(tmp_path, DaskSettings(scheduler=address))
    pool.submit(jobs)
    wait_until(lambda: pool._task(last_submitted(tmp_path)["a.1"][0]).status == "error")
    (tmp_path / "logs").unlink()
    assert pool.alive() == {}
    assert "FileExistsError" in log_files(tmp_path, "a.1")[0].read_text()
    pool.client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_job_ends_with_its_worker(tmp_path):
    words = ["python", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    out = tmp_path / "out"
    out.write_text("before\n")
    code = f"from napari_resfinetune.experiments.dask_pool import run_logged; run_logged({words}, {str(out)!r}, 'err')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as parent:
        wait_until(lambda: len(out.read_text().splitlines()) == 2)
        before, number = out.read_text().splitlines()
        parent.kill()
    assert before == "before"
    wait_until(lambda: not psutil.pid_exists(int(number)))


def test_without_dask_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(rf.ConfigError, match=r'pip install "napari-resfinetune\[dask\]"'):
        DaskPool(tmp_path, DaskSettings(scheduler="tcp://127.0.0.1:9"))


def test_no_scheduler_there_is_said_in_words(tmp_path, monkeypatch):
    assert read_executor("tcp://127.0.0.1:9") == DaskSettings(scheduler="tcp://127.0.0.1:9")
    monkeypatch.setattr("napari_resfinetune.experiments.dask_pool.CONNECT_SECONDS", 1)
    for place in ("tcp://127.0.0.1:9", "nonsense://127.0.0.1:9"):
        with pytest.raises(rf.ResourceError, match=f"no dask scheduler at {place}"):
            DaskPool(tmp_path, DaskSettings(scheduler=place))

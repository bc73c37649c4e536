"""A sweep on a real SLURM of one node: arrays, chains, a job that is cancelled, and one that meets its time limit."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

import napari_resfinetune as rf
from napari_resfinetune.experiments import make_grid
from napari_resfinetune.experiments.sweep import read_log

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm.sh"
CANCELLED = "cpu-8gb_start_full_n1_s0"
TOO_LONG = "cpu-8gb_start_full_n2_s0"


def as_root() -> list[str] | None:
    if os.geteuid() == 0:
        return []
    asked = shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
    return ["sudo", "-n"] if asked and asked.returncode == 0 else None


@pytest.fixture(scope="module")
def slurm():
    """Start munged, slurmctld and slurmd, and let this process and its jobs use them."""
    if sys.platform != "linux" or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        pytest.skip("needs slurm-wlm and munge (make test installs them on Debian)")
    root = as_root()
    if root is None:
        pytest.skip("needs root, or sudo without a password, to start the daemons of SLURM")
    # Not where pytest has its folders, which nobody else may enter: munged runs as its own user.
    folder = Path(tempfile.mkdtemp(prefix="resfinetune-slurm-"))
    folder.chmod(0o755)
    started = subprocess.run([*root, "bash", str(SCRIPT), "start", str(folder)], capture_output=True, text=True)
    if started.returncode:
        subprocess.run([*root, "bash", str(SCRIPT), "stop", str(folder)], check=False)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", started.stdout.strip().partition("=")[2])
        yield folder
    subprocess.run([*root, "bash", str(SCRIPT), "stop", str(folder)], check=True)
    subprocess.run([*root, "rm", "-rf", str(folder)], check=True)


def grid(cells: Path, output: Path):
    small = {
        "data.patch_px": 64, "training.input_px": 128, "training.epochs": 1, "training.samples_per_epoch": 2,
        "training.objects": 2, "training.sub_iterations": 1, "training.save_minutes": 0.05,
        "resources.precision": "fp32", "resources.device": "cpu", "resources.threads": 1, "resources.nice": 0,
    }  # fmt: skip
    executor = {"kind": "slurm", "partition": "main", "cpus": 1, "memory_gb": 3, "minutes": 30, "warn_seconds": 60}
    return make_grid({
        "images": str(cells / "images"), "labels": str(cells / "labels"), "output": str(output),
        "model": str(cells / "start.pt"), "strategy": ["full", "frozen"], "preset": "cpu-8gb", "n_images": [1, 2],
        "seed": [0, 1], "modes": ["box"], "initial": False, "set": small, "executor": executor,
    })  # fmt: skip


class Trouble:
    """Watches the sweep and makes what happens on clusters happen."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.seen: set[str] = set()
        self.states: set[tuple[str, str]] = set()
        self.began = math.inf

    def __call__(self, states) -> None:
        now = {state.name: state.state for state in states}
        self.states |= set(now.items())
        run = self.output / "jobs" / TOO_LONG / "run"
        if "begun" not in self.seen:
            self.seen.add("begun")
            self.set_epochs(run.parent / "config.yaml", 10_000)
        if now[CANCELLED] == "running" and "cancelled" not in self.seen:
            self.seen.add("cancelled")
            subprocess.run(["scancel", self.number(CANCELLED)], check=True)
        if now[TOO_LONG] == "running":
            self.began = min(self.began, time.monotonic())
        if "limited" not in self.seen and (run / "checkpoints" / "latest").is_dir():
            self.seen.add("limited")
            # SLURM looks every half minute, and only then sends the warning.
            self.limit(math.ceil((time.monotonic() - self.began + 45) / 60))
        log = "".join(path.read_text() for path in (self.output / "logs").glob(f"{self.number(TOO_LONG)}_0_log.out"))
        if "limited" in self.seen and "requeued" not in self.seen and "Requeued job" in log:
            self.seen.add("requeued")
            self.set_epochs(run / "config.yaml", self.epochs_done(run) + 1)
            self.limit(30)

    def number(self, name: str) -> str:
        path = self.output / "jobs" / name / "submitted.json"
        return json.loads(path.read_text())["ids"][0] if path.is_file() else "none"

    def limit(self, minutes: int) -> None:
        subprocess.run(["scontrol", "update", f"JobId={self.number(TOO_LONG)}", f"TimeLimit={minutes}"], check=True)

    def set_epochs(self, path: Path, epochs: int) -> None:
        config = yaml.safe_load(path.read_text())
        config["training"] |= {"epochs": epochs, "early_stopping": None}
        path.write_text(yaml.safe_dump(config))

    def epochs_done(self, run: Path) -> int:
        return json.loads((run / "checkpoints" / "latest" / "state.json").read_text())["epoch"]


def test_a_sweep_ends_complete_whatever_happens_to_its_jobs(slurm, cells, tmp_path):
    output = tmp_path / "sweep"
    settings = grid(cells, output)
    trouble = Trouble(output)
    result = rf.sweep(settings, on_change=trouble)
    logs = read_log(output, TOO_LONG)
    assert trouble.seen == {"begun", "cancelled", "limited", "requeued"}, logs
    assert (result.count("done"), len(result.jobs)) == (8, 8), result.jobs
    assert not result.stopped
    # The cancelled one was handed over again, as a chain of its own.
    assert len(json.loads((output / "jobs" / CANCELLED / "submitted.json").read_text())["ids"]) == 4
    # The one that met its limit went on from its checkpoint.
    events = (output / "jobs" / TOO_LONG / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    started = [json.loads(line) for line in events if '"Started"' in line]
    assert len(started) == 2
    assert (started[0]["epoch"], started[0]["step"]) == (0, 0) < (started[1]["epoch"], started[1]["step"])
    # The others came as arrays, each evaluation waiting for its training.
    numbers = [json.loads(path.read_text())["ids"] for path in (output / "jobs").glob("*/submitted.json")]
    assert len({train.partition("_")[0] for train, *_ in numbers}) <= 2
    assert all("_" in train for train, *_ in numbers)
    assert {"queued", "running", "done"} <= {state for _, state in trouble.states}
    names = {path.name for path in result.files}
    assert {"runs.csv", "best-epochs.md", "scores-cpu-8gb.png", "cost.svg"} <= names
    again = rf.sweep(settings)
    assert again.count("done") == 8
    assert numbers == [json.loads(path.read_text())["ids"] for path in (output / "jobs").glob("*/submitted.json")]

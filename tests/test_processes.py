"""Several processes share one training: what is learned is what one process learns, and a lost one costs no work."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

import napari_resfinetune as rf
from napari_resfinetune.events import EpochEnded, Failed, Step
from small_runs import SMALL, run, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform == "win32", reason="gloo's meeting over loopback is arranged for POSIX"),
]

# Three samples in batches of two: the last step of an epoch leaves nothing for the second process. A point of a prompt
# is drawn from what was predicted, so after large steps a difference in rounding may become one of points.
SHARED = {"samples_per_epoch": 3, "batch_size": 2, "epochs": 2, "learning_rate": 1e-5}
CPU = {**SMALL["resources"], "threads": 2, "nice": 0}
LORA = {"kind": "lora", "rank": 2, "dropout": 0.2}


def steps(events):
    return [(e.epoch, e.step, e.loss, e.mask_loss, e.instance_loss) for e in events if isinstance(e, Step)]


def metrics(events):
    return [(e.epoch, e.metric, e.best_epoch) for e in events if isinstance(e, EpochEnded)]


def second_process() -> psutil.Process:
    (found,) = [child for child in psutil.Process().children() if child.environ().get("RANK") == "1"]
    return found


def test_two_processes_learn_what_one_learns(cells, tmp_path):
    one, two = [], []
    run(cells, tmp_path / "one", one, training=SHARED, strategy=LORA, resources={**CPU, "threads": 1})
    result = run(cells, tmp_path / "two", two, training=SHARED, strategy=LORA, resources=CPU, processes=2)
    assert result.status == "finished"
    assert len(steps(one)) == 4
    torch.testing.assert_close(torch.tensor(steps(two)), torch.tensor(steps(one)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(metrics(two)), torch.tensor(metrics(one)), rtol=1e-5, atol=1e-5)
    alone, shared = (weights(tmp_path / name / "checkpoints" / "latest") for name in ("one", "two"))
    # Statistics that no mode of the model reads follow one process's samples.
    learned = [name for name in alone if "running_" not in name and "num_batches" not in name]
    ours, theirs = (torch.cat([found[name].flatten().double() for name in learned]) for found in (shared, alone))
    differs = (ours - theirs).abs() > 1e-5 + 1e-4 * theirs.abs()
    # Where a gradient is nothing but rounding, AdamW makes a step of it, either way.
    assert differs.double().mean() < 1e-6


def test_a_killed_process_ends_the_run_with_a_checkpoint_that_resumes(cells, tmp_path):
    output, events = tmp_path / "run", []
    changes = {**SHARED, "early_stopping": 3}

    class Kill(list):
        def append(self, event):
            events.append(event)
            if isinstance(event, Step) and (event.epoch, event.step) == (1, 0):
                second_process().kill()

    with pytest.raises(rf.TrainingError, match=r"another process of the run ended.*resfinetune resume"):
        run(cells, output, Kill(), training=changes, strategy={"kind": "frozen"}, resources=CPU, processes=2)
    assert isinstance(events[-1], Failed) and events[-1].resumable
    resumed, whole = [], []
    result = rf.resume(output, on_event=resumed.append)
    assert result.status == "finished"
    assert (output / "model.pt").is_file()
    run(cells, tmp_path / "whole", whole, training=changes, strategy={"kind": "frozen"})
    torch.testing.assert_close(
        torch.tensor(metrics(whole)), torch.tensor(metrics(events) + metrics(resumed)), rtol=1e-5, atol=1e-5
    )


def test_more_processes_than_patches_in_a_step_are_refused(cells, tmp_path):
    with pytest.raises(rf.ConfigError, match=r"training\.batch_size: 2 patches a step cannot be shared by 3 processes"):
        run(cells, tmp_path / "run", processes=3)
    assert not (tmp_path / "run").exists()

"""The process of one job: does its steps one after another, and writes down what came out.

``python -m napari_resfinetune.experiments.worker OUTPUT NAME STEP...`` is a plain command, so that nothing but text
goes to a cluster, and so that a job can be run by hand. A step that was begun before goes on where it stopped. A
signal, or a file ``stop`` in the sweep's folder, asks it to save and end with status 130.
"""

from __future__ import annotations

import csv
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from napari_resfinetune.errors import ResFinetuneError, TrainingError
from napari_resfinetune.events import EpochEnded, Event, MemoryLever, Message, StopToken
from napari_resfinetune.experiments.jobs import (
    STOP_FILE,
    WITH_PARENT,
    job_folder,
    read_json,
    read_result,
    write_json,
)

logger = logging.getLogger(__name__)

DONE, FAILED, STOPPED = 0, 1, 130
LOOK_SECONDS = 1.0


class _Stopped(Exception):
    """A step was asked to stop, and what it reached is saved."""


def run_job(output: Path, name: str, steps: Sequence[str], stop: StopToken) -> int:
    """Do steps of a job that are not done yet.

    Parameters
    ----------
    output
        The sweep's folder.
    name
        The job's.
    steps
        Names from `STEPS`, in the order of the job.
    stop
        Asked between steps of training, and between images.

    Returns
    -------
    int
        Exit status: 0 done, 1 failed with the reason in ``result.json``, 130 stopped.
    """
    folder = job_folder(output, name)
    work = read_json(folder / "job.json")
    for step in steps:
        result = read_result(output, name)
        if step in result:
            continue
        before = [other for other in list(work)[: list(work).index(step)] if other not in result]
        if before or stop.stopped:
            return STOPPED
        result.pop("error", None)
        try:
            result[step] = STEPS[step](folder, work[step], stop)
        except _Stopped:
            return STOPPED
        except ResFinetuneError as error:
            logger.error("%s: %s", step, error)
            result["error"] = {"step": step, "kind": type(error).__name__, "problems": list(error.problems)}
            write_json(folder / "result.json", result)
            return FAILED
        write_json(folder / "result.json", result)
    return DONE


def train(folder: Path, work: Mapping[str, Any], stop: StopToken) -> dict[str, Any]:
    """Train, or go on with a training."""
    from napari_resfinetune.config import read_config
    from napari_resfinetune.training.run_folder import open_run
    from napari_resfinetune.training.session import run_training

    config = read_config(folder / str(work["config"]))
    run = Path(str(config.output))
    begun = (run / "config.yaml").is_file()
    if begun:
        config = open_run(run)[1].model_copy(update={"output": run, "resources": config.resources})
    result = run_training(config, on_event=_log_event, stop=stop, resume=begun, enforce=True)
    if result.status == "stopped":
        raise _Stopped
    metrics = read_metrics(run / "metrics.csv")
    to_best = next((row["seconds"] for row in metrics if int(row["epoch"]) == result.best_epoch), None)
    return {
        **result.to_dict(),
        "epochs": len(metrics),
        "seconds_to_best": None if to_best is None else float(to_best),
        "preset": (read_json(run / "plan.json")).get("preset"),
        "device": (read_json(run / "plan.json")).get("device"),
    }


def evaluate(folder: Path, work: Mapping[str, Any], stop: StopToken) -> dict[str, Any]:
    """Score a model, on images to score on or on those that its training held out."""
    from napari_resfinetune.config import read_config
    from napari_resfinetune.data.pairs import Pairs
    from napari_resfinetune.evaluation import evaluate_model
    from napari_resfinetune.experiments.datasets import pairs_to_score
    from napari_resfinetune.models import load_model, resolve_model
    from napari_resfinetune.planning import choose_precision, device_of, probe_hardware
    from napari_resfinetune.training.prepare import open_data
    from napari_resfinetune.training.step import DTYPES

    config = read_config(folder / str(work["config"]))
    data, hardware = config.data, probe_hardware()
    if work.get("test"):
        where: dict[str, Any] = data.model_dump(include={"image_key", "label_key", "axes", "channels"})
        pairs = pairs_to_score(work["test"]["images"], work["test"]["labels"], **where)
    else:
        opened = open_data(config)
        pairs = Pairs(tuple(opened.pairs[i] for i in sorted({region.pair for region in opened.split.validation})))
    device = device_of(config.resources, hardware)[0]
    location = resolve_model(work["model"])
    modes = list(work["modes"])
    if not _has_decoder(location):
        modes = [mode for mode in modes if mode not in ("ais", "apg")]
    if not modes:
        return {"scores": {}, "images": 0}
    decoder = "required" if {"ais", "apg"} & set(modes) else "none"

    def look(done: int, total: int, name: str) -> None:
        logger.info("%d of %d: %s", done, total, name)
        if stop.stopped:
            raise _Stopped

    found = evaluate_model(
        load_model(location, decoder=decoder, device=device),  # type: ignore[arg-type]
        pairs,
        modes=modes,
        percentiles=data.percentiles,
        patch_px=data.patch_px * 1024 // config.training.input_px,
        precision=DTYPES[choose_precision("auto", device.partition(":")[0], hardware).name],
        on_progress=look,
    )
    columns = ("image", "plane", "mode", "sa50", "sa75", "msa", "n_true", "n_pred")
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([getattr(row, name) for name in columns] for row in found.rows)
    return {"scores": found.to_dict(), "images": len({row.image for row in found.rows})}


def command(folder: Path, work: Mapping[str, Any], stop: StopToken) -> dict[str, Any]:
    """Run the command ``resfinetune`` with ``--json``, and return what it printed."""
    if work.get("replaces"):
        Path(work["replaces"]).unlink(missing_ok=True)
    words = [sys.executable, "-P", "-m", "napari_resfinetune.cli", *work["arguments"]]
    said: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes, preexec_fn=WITH_PARENT) as process:
        over = threading.Event()

        def forward() -> None:
            while not over.wait(LOOK_SECONDS):
                if stop.stopped:
                    process.terminate()

        def hear() -> None:
            for line in process.stderr or ():
                sys.stderr.write(line)
                said.append(line.strip())

        threads = [threading.Thread(target=target, daemon=True) for target in (forward, hear)]
        for thread in threads:
            thread.start()
        printed = process.stdout.read() if process.stdout is not None else ""
        process.wait()
        over.set()
        for thread in threads:
            thread.join()
    if stop.stopped:
        raise _Stopped
    if process.returncode:
        problems = [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[-1:]
        raise TrainingError(*(problems or [f"ended with status {process.returncode}"]))
    return dict(json.loads(printed))


STEPS: Mapping[str, Callable[[Path, Mapping[str, Any], StopToken], dict[str, Any]]] = {
    "train": train,
    "evaluate": evaluate,
    "command": command,
}


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the whole lines of a run's ``metrics.csv``; none when it is not there."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values() and row["epoch"].isdigit()]
    except OSError:
        return []


def _has_decoder(location: Any) -> bool:
    from napari_resfinetune.models.weights import load_state

    if location.adapter is not None or location.decoder_path is not None:
        return True
    return location.path is not None and bool(load_state(location.path).decoder_state)


def _log_event(event: Event) -> None:
    if isinstance(event, Message):
        logger.info(event.text)
    elif isinstance(event, MemoryLever):
        logger.info("memory: %s; %s=%s instead of %s", event.reason, event.lever, event.after, event.before)
    elif isinstance(event, EpochEnded):
        logger.info(
            "epoch %d: loss %.4f, validation %.4f, best %d",
            event.epoch + 1, event.train_loss, event.metric, event.best_epoch + 1,
        )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Be the process of a job."""
    stop = StopToken()

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    output, name, *steps = arguments
    folder = Path(output)
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            if (folder / STOP_FILE).exists():
                stop.stop()

    threading.Thread(target=look, name="stop file", daemon=True).start()
    try:
        return run_job(folder, name, steps, stop)
    finally:
        over.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What happens to a run that has ended, before it says so: the comparison with its start model, and its report."""

from __future__ import annotations

from typing import Any

from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.evaluation.compare import Stopped, compare_run
from napari_resfinetune.events import Finished, Message, OnEvent, StopToken
from napari_resfinetune.reporting.page import report_of_run
from napari_resfinetune.training.job import TrainingJob
from napari_resfinetune.training.survival import free, is_out_of_memory

LATER = "resfinetune resume {} makes up for it"


def end_run(job: TrainingJob, finished: Finished, stop: StopToken, tell: OnEvent) -> dict[str, Any] | None:
    """Compare and report as far as the configuration, a request to stop, and memory allow.

    The model is written by then, so nothing here ends the run with an error: what cannot be made is said.

    Parameters
    ----------
    job
        With the best weights in its model.
    finished
        The event that is told next.
    stop
        Asked between windows.
    tell
        Told `Compared`, and messages about what was left out.

    Returns
    -------
    dict or None
        The fields of `Compared`.
    """
    if finished.status == "stopped" or finished.best_epoch < 0:
        return None
    comparison = None
    if job.config.training.compare:
        tell(Message("comparing with the start model on held-out images"))
        try:
            compared = compare_run(job, finished.best_epoch, stop)
            tell(compared)
            comparison = {name: value for name, value in compared.to_dict().items() if name != "event"}
        except Stopped:
            tell(Message(f"not compared with the start model, since a stop was asked for; {_later(job)}"))
        except Exception as error:  # whatever it is, the run has its model
            tell(Message(f"not compared with the start model: {_words(error)}; {_later(job)}"))
    free()
    if job.config.training.report and not stop.stopped:
        try:
            report_of_run(job.run, finished)
        except Exception as error:
            tell(Message(f"no report: {_words(error)}; resfinetune report {job.run.path} makes it"))
    return comparison


def _later(job: TrainingJob) -> str:
    return LATER.format(job.run.path)


def _words(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "memory ran out"
    return str(error) if isinstance(error, ResFinetuneError | OSError) else f"{type(error).__name__}: {error}"

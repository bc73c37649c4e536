"""Training, in a child of the engine: the trainer, its limits and its process are those of `api.train`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from napari_resfinetune.config import FinetuneConfig, make_config
from napari_resfinetune.engine.process import Request, Say
from napari_resfinetune.events import StopToken
from napari_resfinetune.training.child import train_in_child
from napari_resfinetune.training.run_folder import COPIES_MARK, check_output, open_run


def train(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Train or go on with a run; events are those of the trainer.

    The request holds ``config``, or ``run_dir`` of a run to go on with, and with the latter maybe ``epochs``. Files in
    ``copy`` (from, to) are put in place before, so that a run keeps the layers that it was given.
    """
    if "run_dir" in request:
        return _go_on(request, say, stop)
    config = make_config(request["config"])
    check_output(Path(str(config.output)))
    for source, target in request.get("copy", ()):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_dir():  # a zarr array
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    for folder in {Path(target).parents[1] for _, target in request.get("copy", ())}:
        (folder / COPIES_MARK).touch()
    return _train(config, say, stop, resume=False)


def _go_on(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    run_dir = Path(request["run_dir"])
    config = open_run(run_dir)[1].model_copy(update={"output": run_dir})
    if request.get("epochs"):
        longer = config.training.model_copy(update={"epochs": int(request["epochs"]), "minutes": None})
        config = config.model_copy(update={"training": longer})
    return _train(config, say, stop, resume=True)


def _train(config: FinetuneConfig, say: Say, stop: StopToken, *, resume: bool) -> dict[str, Any]:
    result = train_in_child(config, on_event=lambda event: say(event.to_dict()), stop=stop, resume=resume)
    return result.to_dict()

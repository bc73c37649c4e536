"""Check, plan, train and go on training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_resfinetune.config import FinetuneConfig, as_config, make_config, merge, not_given
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.events import OnEvent, StopToken
from napari_resfinetune.training.result import TrainResult

if TYPE_CHECKING:
    from napari_resfinetune.data.doctor import CheckReport
    from napari_resfinetune.planning import Plan


def train(
    images: Any = None,
    labels: Any = None,
    *,
    output: str | Path | None = None,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    resume: bool = False,
    isolate: bool = False,
    enforce_limits: bool = False,
    processes: int = 1,
    **settings: Any,
) -> TrainResult:
    """Finetune a model on labelled images.

    Parameters
    ----------
    images, labels
        A folder, a glob, a list of paths, or a list of arrays ("YX", "YXC", "ZYX"); labels hold one id per object, 0 is
        background. Or one `FinetuneConfig` as the only positional argument.
    output
        The run folder; it must be new or empty, unless `resume`.
    on_event
        Called with every event, in this thread.
    stop
        Ask it to stop and the run saves a checkpoint and ends after the current step.
    resume
        Continue the run in `output` when there is one.
    isolate
        Train in a process of its own, inside its limits: on Linux the system refuses it more memory, all of it is given
        back at the end, and a process that is killed leaves its checkpoint and an error here.
    enforce_limits
        Let the system keep the limits for this process too, all of it, while it trains; without, training looks after
        each step whether it is inside them.
    processes
        So many processes share every step, on CPUs or with a card each; ``training.batch_size`` is the batch of all of
        them, and the result that of one process with that batch size. They are processes of their own, as `isolate`.
    **settings
        ``model``, ``strategy`` and ``preset`` by name, and the sections ``data``, ``training``, ``resources`` as
        mappings, with the keys of `FinetuneConfig`.

    Returns
    -------
    TrainResult

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError, TrainingError
        Before anything is written wherever possible.
    """
    with_settings = bool(settings) or isinstance(images, FinetuneConfig)
    config, images, labels = as_config(images, labels, output, settings)
    output = config.output
    if output is None:
        problem = "output: not given; name a new folder for the run, as in --output runs/my-cells"
        raise ConfigError(problem, *not_given(config, images, labels))
    if resume and (output / "config.yaml").is_file():
        from napari_resfinetune.training.run_folder import open_run

        written = open_run(output)[1].model_copy(update={"output": output})
        config = _same_run(written, config, whole=with_settings)
    else:
        from napari_resfinetune.training.ranks import is_first_rank
        from napari_resfinetune.training.run_folder import check_output

        resume = False
        if is_first_rank():
            check_output(output)
    return _train(
        config,
        images,
        labels,
        on_event,
        stop,
        resume=resume,
        isolate=isolate,
        enforce=enforce_limits,
        processes=processes,
    )


def resume(
    run_dir: str | Path,
    images: Any = None,
    labels: Any = None,
    *,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    resources: Mapping[str, Any] | None = None,
    isolate: bool = False,
    enforce_limits: bool = False,
    processes: int = 1,
) -> TrainResult:
    """Continue a run exactly where it was.

    Parameters
    ----------
    run_dir
        The run folder.
    images, labels
        Needed only for a run that was given arrays.
    on_event, stop
        As for `train`.
    epochs, minutes
        A new number of epochs, or of minutes, those of before included. More epochs without minutes lift that limit.
    resources
        Changes to that section of the configuration, as ``{"memory_gb": 12}``. What an earlier session had to switch on
        when its memory ran out is then no longer kept.
    isolate, enforce_limits, processes
        As for `train`; the number of processes need not be that of before.

    Raises
    ------
    ConfigError
        When there is no run.
    """
    from napari_resfinetune.training.run_folder import open_run

    _, config = open_run(Path(run_dir))
    config = config.model_copy(update={"output": Path(run_dir)})
    changes: dict[str, Any] = {"resources": resources or {}}
    if epochs is not None or minutes is not None:
        changes["training"] = {
            "epochs": config.training.epochs if epochs is None else epochs,
            "minutes": minutes,
        }
    config = make_config(merge(config.model_dump(mode="json"), changes), "resume")
    return _train(
        config,
        images,
        labels,
        on_event,
        stop,
        resume=True,
        isolate=isolate,
        enforce=enforce_limits,
        processes=processes,
        keep_levers=not resources,
    )


def plan(images: Any = None, labels: Any = None, **settings: Any) -> Plan:
    """Say what a training run would take, before it starts.

    Parameters
    ----------
    images, labels
        As for `train`; without them, two held-out images are assumed.
    **settings
        As for `train`. A preset for another computer than this one is planned as if on it.

    Returns
    -------
    Plan
        Memory, time, disk, and which levers were switched on to make it fit.

    Raises
    ------
    ConfigError, DataError, ModelError
        For settings or data that a run would refuse.
    """
    from napari_resfinetune.planning import probe_hardware
    from napari_resfinetune.training.planned import architecture_of, length_of, plan_anywhere
    from napari_resfinetune.training.prepare import open_data

    config, images, labels = as_config(images, labels, None, settings)
    hardware = probe_hardware()
    architecture = architecture_of(config.model)
    if images is None and config.data.images is None:
        held_out = 2
    else:
        held_out = len(open_data(config, images, labels).split.validation)
    return plan_anywhere(config, hardware, architecture, length_of(config, held_out), larger=True)


def check(images: Any = None, labels: Any = None, **settings: Any) -> CheckReport:
    """Look for everything that is wrong with images and labels, before any model is loaded.

    Parameters
    ----------
    images, labels
        As for `train`.
    **settings
        The section ``data`` as for `train`.

    Returns
    -------
    CheckReport
        ``errors`` stop a training, ``warnings`` do not; each names its fix.

    Raises
    ------
    DataError
        When there is nothing to look at.
    """
    from napari_resfinetune.data.doctor import check_pairs
    from napari_resfinetune.data.pairs import find_pairs, join_held_out

    config, images, labels = as_config(images, labels, None, settings)
    data = config.data
    images, labels = images if images is not None else data.images, labels if labels is not None else data.labels
    missing = not_given(config, images, labels)
    if missing:
        raise ConfigError(*missing)
    where: dict[str, Any] = data.model_dump(include={"image_key", "label_key", "axes", "channels"})
    pairs = find_pairs(images, labels, **where)
    if data.validation_images is not None:
        pairs = join_held_out(pairs, find_pairs(data.validation_images, data.validation_labels, **where))
    return check_pairs(pairs, patch_px=data.patch_px, min_object_px=data.min_object_px)


def _same_run(written: FinetuneConfig, asked: FinetuneConfig, *, whole: bool) -> FinetuneConfig:
    """Let a resumed run differ from what is written in its number of epochs and in resources only.

    `whole` says whether `asked` holds settings at all, or paths of the data only.
    """
    data = asked.data.with_absolute_paths()
    named = {name: getattr(data, name) for name in ("images", "labels") if getattr(data, name) is not None}
    differs = [f"data.{name}" for name, value in named.items() if value != getattr(written.data, name)]
    if whole:
        # What a preset or strategy decided when the run began is no difference.
        decided = {
            name: getattr(written.training, name)
            for name in ("objects", "patch_bank")
            if getattr(asked.training, name) is None
        }
        training = asked.training.model_copy(update={"epochs": written.training.epochs, **decided})
        kept = {name: getattr(written.data, name) for name in ("images", "labels")}
        pairs = {
            "data": (data.model_copy(update=kept), written.data),
            "model": (asked.model, written.model)
            if not Path(asked.model).exists()
            else (str(Path(asked.model).absolute()), written.model),
            "strategy": (asked.strategy, written.strategy),
            "training": (training, written.training),
        }
        differs += [name for name, (now, before) in pairs.items() if now != before]
    if differs:
        raise ConfigError(
            f"{written.output}: holds a run with another {' and another '.join(differs)}; choose another folder, "
            "or resume it with what its config.yaml names"
        )
    if not whole:
        return written
    epochs = written.training.model_copy(update={"epochs": asked.training.epochs})
    return written.model_copy(update={"training": epochs, "resources": asked.resources})


def _train(
    config: FinetuneConfig,
    images: Any,
    labels: Any,
    on_event: OnEvent | None,
    stop: StopToken | None,
    *,
    resume: bool,
    isolate: bool,
    enforce: bool,
    processes: int,
    keep_levers: bool = True,
) -> TrainResult:
    how: dict[str, Any] = {"on_event": on_event, "stop": stop, "resume": resume, "keep_levers": keep_levers}
    if isolate or processes != 1:
        from napari_resfinetune.training.child import train_in_child

        return train_in_child(config, images, labels, processes=processes, **how)
    from napari_resfinetune.reporting.ending import end_run
    from napari_resfinetune.training.session import run_training

    return run_training(config, images, labels, enforce=enforce, ending=end_run, **how)

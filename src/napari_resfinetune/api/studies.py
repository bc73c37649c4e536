"""Compare runs, search for a start model, sweep over settings, and look at the computer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_resfinetune.config import as_config
from napari_resfinetune.events import OnEvent, StopToken

if TYPE_CHECKING:
    from napari_resfinetune.experiments.sweep import SweepResult
    from napari_resfinetune.search import Suggestions


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of a run anew, or one page that compares several runs.

    Parameters
    ----------
    runs
        A run folder, or a list of them.
    output
        The page; for one run its ``report.html``. A comparison needs a name that is not taken.

    Returns
    -------
    Path
        The page: one file that needs nothing else.

    Raises
    ------
    ConfigError
        When there is no run, or the page cannot be written.
    """
    from napari_resfinetune.reporting import write_report

    return write_report([runs] if isinstance(runs, str | Path) else list(runs), output)


def suggest_models(
    images: Any = None,
    labels: Any = None,
    *,
    candidates: Sequence[str | Path] | str | Path | None = None,
    output: str | Path | None = None,
    patches: int = 16,
    pilot_epochs: int = 0,
    timing: bool = False,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    **settings: Any,
) -> Suggestions:
    """Rank models to start from on images and their labels, before any training.

    Parameters
    ----------
    images, labels
        As for `train`; without labels, models are ranked by how steady their results are.
    candidates
        Names, checkpoints, run folders, adapters, or folders of them. By default all models that are downloaded, and
        the one that comes with the package.
    output
        A folder for a report, and for what was computed: a search that was stopped goes on from there.
    patches
        Patches of the images that are looked at, at most.
    pilot_epochs
        Settle what is too close to call by training for so many epochs with a frozen image encoder.
    timing
        Measure what finetuning would take beside the search.
    on_event, stop
        As for `train`; `Searched` says how far it is.
    **settings
        As for `train`, of the training to come.

    Returns
    -------
    Suggestions
        A sequence, best first, each with ``model``, ``score`` and more; and ``advice``, ``left_out``, ``downloads``.

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError
        When there is nothing to compare, or nothing to compare it on.
    """
    from napari_resfinetune.search import SearchOptions, suggest

    config, images, labels = as_config(images, labels, None, settings)
    folder = None if output is None else Path(output)
    options = SearchOptions(candidates, folder, patches, pilot_epochs, timing)
    return suggest(config, images, labels, options, on_event=on_event, stop=stop)


def sweep(
    grid: Any,
    *,
    on_change: Any = None,
    stop: StopToken | None = None,
    published: bool = False,
    **options: Any,
) -> SweepResult:
    """Train and score every combination of a grid, here or on a cluster; call it again to go on.

    Parameters
    ----------
    grid
        A `GridConfig`, a mapping with its keys, or the path of a YAML file.
    on_change
        Called with the states of all jobs, time and again.
    stop
        Ask it to stop, and what runs saves itself and ends.
    published
        Show the values of the published study in the tables.
    **options
        ``retry``, ``wait``, ``download`` and ``expansion`` as for `experiments.sweep.run_sweep`.

    Returns
    -------
    SweepResult
        How each job ended, and the tables and figures.
    """
    from napari_resfinetune.experiments import GridConfig, make_grid, read_grid
    from napari_resfinetune.experiments.sweep import run_sweep

    if isinstance(grid, str | Path):
        grid = read_grid(grid)
    elif not isinstance(grid, GridConfig):
        grid = make_grid(grid)
    return run_sweep(grid, on_change=on_change, stop=stop, published=published, **options)


def report_sweep(folder: str | Path, *, published: bool = False) -> list[Path]:
    """Write tables and figures of what a sweep has so far, and return their paths."""
    from napari_resfinetune.experiments.report import write_report

    return write_report(Path(folder), with_published=published)


def doctor() -> dict[str, Any]:
    """Say what this computer has and what of the product works on it, as plain data."""
    from napari_resfinetune.planning import doctor_report

    return doctor_report()

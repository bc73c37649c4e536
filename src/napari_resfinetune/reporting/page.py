"""``report.html``: one file that needs no network, for light and dark screens and for paper.

Everything that comes from users (names, paths, settings) goes through the template's escaping; what does not, drawings
and pictures, is made here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from napari_resfinetune.errors import ConfigError
from napari_resfinetune.events import Finished
from napari_resfinetune.reporting.curves import draw_comparison, draw_curves
from napari_resfinetune.reporting.pictures import draw_pictures
from napari_resfinetune.reporting.run import RunView, view_run
from napari_resfinetune.training.run_folder import RunFolder, check_writable
from napari_resfinetune.words import duration

NAME = "report.html"


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of one run anew, or a page that compares several.

    Parameters
    ----------
    runs
        Run folders.
    output
        The page. By default that of a run is its ``report.html``; a comparison needs a name, and nothing is there yet.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        When there is no run, or the page cannot be written.
    """
    views = [view_run(Path(run)) for run in dict.fromkeys(map(str, runs))]
    if not views:
        raise ConfigError("report: no run given; name at least one run folder")
    if len(views) > 1 and output is None:
        raise ConfigError("report: a page about several runs needs a name, as in --output comparison.html")
    page = Path(output) if output is not None else views[0].path / NAME
    own = views[0].path / NAME
    if page.exists() and not (len(views) == 1 and own.exists() and page.samefile(own)):
        raise ConfigError(f"{page}: exists already and is not overwritten; name another file")
    check_writable(page.parent)
    _write(page, views)
    return page


def report_of_run(run: RunFolder, finished: Finished) -> Path:
    """Write the page of a run that is about to say how it ended."""
    page = run.path / NAME
    _write(page, [view_run(run.path, finished)])
    return page


def _write(page: Path, views: Sequence[RunView]) -> None:
    try:
        text = _render(views)
    except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
        names = ", ".join(str(view.path) for view in views)
        raise ConfigError(f"{names}: no page can be made, something in the folder is damaged ({error})") from None
    new = page.with_name(f".{page.name}.new")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        os.replace(new, page)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigError(f"{page}: cannot be written ({error.strerror or error}); name another file") from None


def _render(views: Sequence[RunView]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("napari_resfinetune", "reporting/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, score=_score, signed=_signed)
    if len(views) == 1:
        (view,) = views
        content: dict[str, Any] = {"run": view, "curves": draw_curves(view), "pictures": draw_pictures(view)}
        return environment.get_template("run.html.j2").render(content)
    return environment.get_template("several.html.j2").render(runs=views, curves=draw_comparison(views))


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")

"""The command's ``models`` and ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from napari_resfinetune import library
from napari_resfinetune.cli.options import AsJson
from napari_resfinetune.cli.output import errors, plain_errors, print_json, print_table, results
from napari_resfinetune.errors import ConfigError

app = typer.Typer(help="List, name, delete, import and export your models.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--folder", "-f", metavar="FOLDER", help="Folder that your runs are in.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model, or of its folder.")]
Kind = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="checkpoint, bioimageio or adapter. Default: what the suffix of PATH says."),
]
RUNS = Path("runs")


@app.command("list")
def list_(folder: Folder = RUNS, as_json: AsJson = False) -> None:
    """List models, newest first."""
    with plain_errors():
        entries = library.list_models(folder)
        if as_json:
            print_json({"models": [entry.to_dict() for entry in entries]})
            return
        columns = dict.fromkeys(("name", "created", "from", "strategy", "status", "scores", "note"), "left")
        rows = [
            [
                entry.name,
                entry.created[:16].replace("T", " "),
                entry.continued_from or entry.start_model,
                entry.strategy,
                entry.status,
                _scores(entry),
                entry.note,
            ]
            for entry in entries
        ]
        print_table(columns, rows)


@app.command()
def show(name: Name, folder: Folder = RUNS, as_json: AsJson = False) -> None:
    """Show what is known of a model."""
    with plain_errors():
        _show(library.find_model(folder, name), as_json)


@app.command()
def rename(
    name: Name,
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="What to call it.")],
    folder: Folder = RUNS,
    as_json: AsJson = False,
) -> None:
    """Call a model something else; its folder stays where it is."""
    with plain_errors():
        _show(library.rename_model(folder, name, new_name), as_json)


@app.command()
def note(
    name: Name,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to say of it; '' for nothing.")],
    folder: Folder = RUNS,
    as_json: AsJson = False,
) -> None:
    """Write down something about a model."""
    with plain_errors():
        _show(library.set_note(folder, name, text), as_json)


@app.command()
def delete(
    name: Name,
    folder: Folder = RUNS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a model's folder with all that is in it; asks first."""
    with plain_errors():
        entry = library.find_model(folder, name)
        if not yes:
            others = f"; {', '.join(entry.continued_by)} were started from it" if entry.continued_by else ""
            size_gb = sum(file.stat().st_size for file in entry.path.rglob("*") if file.is_file()) / 1e9
            try:
                sure = typer.confirm(f"delete {entry.name} ({entry.path}, {size_gb:.2f} GB{others})?", err=True)
            except typer.Abort:
                sure = False
            if not sure:
                raise ConfigError(f"{entry.name}: not deleted; say yes, or give --yes")
        gone = library.delete_model(folder, name)
        if as_json:
            print_json({"deleted": str(gone)})
        else:
            results.print(f"deleted {gone}", markup=False)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run folder, checkpoint, adapter or bioimage.io package.")
    ],
    folder: Folder = RUNS,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What to call it.")] = None,
    text: Annotated[str, typer.Option("--note", metavar="TEXT", help="What to say of it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Copy a model into the list."""
    with plain_errors():
        _show(library.import_model(folder, source, name=name, note=text), as_json)


@app.command("export")
def export_named(
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New file (.pt, .zip) or folder (adapter).")],
    folder: Folder = RUNS,
    kind: Kind = None,
    as_json: AsJson = False,
) -> None:
    """Write a model of the list for other tools."""
    with plain_errors():
        _export(str(library.find_model(folder, name).path), path, kind, as_json)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model name, checkpoint, run folder or package.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New file (.pt, .zip) or folder (adapter).")],
    kind: Kind = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for other tools: micro-sam (.pt), bioimage.io (.zip), or as an adapter (folder)."""
    with plain_errors():
        _export(model, path, kind, as_json)


def _export(model: str, path: Path, kind: str | None, as_json: bool) -> None:
    errors.print("writing ...")
    written = library.export_model(model, path, kind=kind)
    if as_json:
        print_json({"model": model, "path": str(written)})
    else:
        results.print(f"wrote {written}", markup=False)


def _show(entry: library.ModelEntry, as_json: bool) -> None:
    content = entry.to_dict()
    if as_json:
        print_json(content)
        return
    for key, value in content.items():
        text = ", ".join(value) if isinstance(value, list) else value
        text = _scores(entry) if isinstance(value, Mapping) else text
        if text:
            results.print(f"{key.replace('_', ' '):15} {text}", markup=False)


def _scores(entry: library.ModelEntry) -> str:
    scores = ", ".join(f"{name} {value:.3f}" for name, value in entry.scores.items())
    return f"{scores} ({entry.verdict})" if entry.verdict else scores

"""Does the search find the model that is best after finetuning? Its ranking against the truth, on real images.

    python benchmarks/search_truth.py WORK --data DATA --targets fluo_mixed histology

`DATA` holds a folder for each modality, with `images/` and `labels/`. Candidates are made on the spot: the start model,
the start model finetuned as each of `--make` says (or, with `--candidates`, models that exist already, as those of a
sweep), untrained weights, and a model trained from them for as short a time. The truth is the SA50 of the automatic
segmentation on images that neither search nor training has seen, after every candidate was finetuned with one fixed
small budget. Of stacks and time series, planes of the first half are searched and learned, planes of the second half
are the unseen ones.

Everything is kept in `WORK`; a run that was stopped goes on there. Once the candidates are made, several processes can
work there at once on different targets.

The table says Kendall's tau between ranking and truth, of the combined score and of each part alone, and the regret of
the first choice: how much SA50 is lost against the best candidate. `--table` prints it from what is there, with means
over all targets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from scipy.stats import kendalltau

import napari_resfinetune as rf
from napari_resfinetune.config import make_config
from napari_resfinetune.models import load_model
from napari_resfinetune.planning import probe_hardware
from napari_resfinetune.planning.precision import choose_precision
from napari_resfinetune.search import SearchOptions, suggest
from napari_resfinetune.search.features import SharedEncoder
from napari_resfinetune.search.patches import search_patches
from napari_resfinetune.search.zero_shot import agreement, automatic
from napari_resfinetune.training.step import DTYPES, StepSettings

HALF, UNTRAINED = "half-trained", "random:vit_t"
MODALITIES = "brightfield_cytology", "fluo_mixed", "fluo_u2os", "histology", "phase_t98g", "stack3d", "timelapse"
MAKE = [*(f"{modality}:full" for modality in MODALITIES), "fluo_mixed:late", "fluo_u2os:frozen", "phase_t98g:lora"]
# Of each half of a stack or time series.
PLANES = 4
# Candidates shall differ, so they are moved far; the truth is what a careful finetuning comes to.
MAKE_LEARNING_RATE, TRUTH_LEARNING_RATE = 3e-4, 1e-4
SEED = 0


def main() -> None:
    """Make candidates, finetune each, search, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--start", default="starter")
    parser.add_argument("--make", nargs="*", default=MAKE, metavar="MODALITY:STRATEGY", help="candidates to make")
    parser.add_argument("--candidates", nargs="*", type=Path, help="finetuned models that exist already")
    parser.add_argument("--targets", nargs="+", default=["fluo_mixed"])
    parser.add_argument("--learn", default="instances", choices=["instances", "both"], help="which decoders learn")
    parser.add_argument("--steps", type=int, default=32, help="of the training that makes a candidate")
    parser.add_argument("--truth-steps", type=int, default=24, help="of the finetuning whose outcome is the truth")
    parser.add_argument("--patches", type=int, default=16, help="that the search looks at")
    parser.add_argument("--images", type=int, default=4, help="to search and to finetune on")
    parser.add_argument("--test-patches", type=int, default=24)
    parser.add_argument("--alone", action="store_true", help="search again without sharing blocks, to compare times")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    check_settings(options, parser)
    for modality in options.targets:
        if not options.table:
            candidates = make_candidates(options)
            (options.work / modality).mkdir(exist_ok=True)
            search(options, modality, candidates)
            truth(options, modality, candidates)
        print(table(options.work / modality, options.start))
    if len(options.targets) > 1:
        print(overview([options.work / modality for modality in options.targets], options.start))


def check_settings(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse to go on in a folder that was begun with other settings."""
    names = ("start", "steps", "truth_steps", "patches", "images", "test_patches")
    asked = {**{name: getattr(options, name) for name in names}, "precision": precision(), **settings(options, 0)}
    path = options.work / "options.json"
    before = read(path) or asked
    changed = [name for name in asked if before.get(name) != asked[name]]
    if changed and not options.table:
        parser.error(f"{options.work}: was begun with other {', '.join(changed)}; name another folder")
    write(path, before)


def settings(options: argparse.Namespace, steps: int, learning_rate: float = TRUTH_LEARNING_RATE) -> dict[str, Any]:
    """Return what all trainings have in common: a quarter of the field of view, few steps."""
    return {
        "data": {"patch_px": 128},
        "training": {
            "input_px": 256,
            "targets": options.learn,
            "learning_rate": learning_rate,
            "epochs": 1,
            "samples_per_epoch": steps,
            "objects": 5,
            "sub_iterations": 3,
            "early_stopping": None,
            "compare": False,
            "report": False,
        },
        "resources": {"device": "cpu", "threads": 1},
    }


def precision() -> str:
    """Return the number format that trainings on this machine take by themselves."""
    return choose_precision("auto", "cpu", probe_hardware()).name


def files(options: argparse.Namespace, modality: str) -> dict[str, tuple[list[Path], list[Path]]]:
    """Return images and labels to learn from, and others to be judged on."""
    folder = options.data / modality
    images = sorted((folder / "images").iterdir())
    labels = [next((folder / "labels").glob(f"{path.stem}.*")) for path in images]
    if all(has_planes(path) for path in images):
        return planes_as_files(options, modality, images, labels)
    count = min(options.images, len(images) - 1)
    return {"learn": (images[:count], labels[:count]), "test": (images[count:], labels[count:])}


def has_planes(path: Path) -> bool:
    """Whether an image is a stack or a time series."""
    with tifffile.TiffFile(path) as file:
        shape = file.series[0].shape
    return len(shape) == 3 and shape[-1] > 4


def planes_as_files(
    options: argparse.Namespace, modality: str, images: list[Path], labels: list[Path]
) -> dict[str, tuple[list[Path], list[Path]]]:
    """Write some planes of each half as files of their own, those with the most objects of a few."""
    parts: dict[str, tuple[list[Path], list[Path]]] = {"learn": ([], []), "test": ([], [])}
    for pair in zip(images, labels, strict=True):
        pixels, objects = (tifffile.imread(path) for path in pair)
        for part, half in zip(parts, np.array_split(np.arange(len(pixels)), 2), strict=True):
            share = min(len(half), PLANES)
            for group in np.array_split(half, share):
                index = int(max(group, key=lambda plane: len(np.unique(objects[plane]))))
                for kind, whole, found in zip(("images", "labels"), (pixels, objects), parts[part], strict=True):
                    path = options.work / "planes" / modality / kind / f"{pair[0].stem}-{index:03d}.tif"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.is_file():
                        tifffile.imwrite(path, whole[index])
                    found.append(path)
    return parts


def make_candidates(options: argparse.Namespace) -> list[str]:
    """Return all candidates; finetune the start model as `--make` says unless that was done before."""
    made = [options.start, UNTRAINED, *map(str, options.candidates or ())]
    todo = [(each.replace(":", "-"), *each.split(":")) for each in options.make if not options.candidates]
    for name, maker, strategy in [*todo, (HALF, "fluo_mixed", "full")]:
        run = options.work / "candidates" / name
        if not (run / "model.pt").is_file():
            shutil.rmtree(run, ignore_errors=True)
            chosen = settings(options, options.steps, MAKE_LEARNING_RATE)
            if name == HALF:
                chosen["training"]["batch_norm"] = "measure"
            images, labels = files(options, maker)["learn"]
            start = UNTRAINED if name == HALF else options.start
            timed(f"make {name}", lambda: rf.train(
                images, labels, model=start, strategy=strategy, output=run, **chosen))  # noqa: B023  # fmt: skip
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        made.append(str(run))
    write(options.work / "candidates.json", made)
    return made


def truth(options: argparse.Namespace, modality: str, candidates: list[str]) -> None:
    """Finetune every candidate alike and score it on unseen images."""
    folder = options.work / modality
    found = read(folder / "truth.json")
    chosen = settings(options, options.truth_steps)
    images, labels = files(options, modality)["learn"]
    # In any order, so that a part of them is not a part of one kind.
    for candidate in np.random.default_rng(SEED).permutation(candidates).tolist():
        if candidate in found:
            continue
        run = folder / ".finetuned"
        shutil.rmtree(run, ignore_errors=True)
        seconds = timed(f"{modality}: finetune {candidate}", lambda: rf.train(
            images, labels, model=candidate, output=run, **chosen))  # noqa: B023  # fmt: skip
        found[candidate] = {"sa50": sa50(options, modality, run), "seconds": seconds}
        write(folder / "truth.json", found)
        shutil.rmtree(run)


def sa50(options: argparse.Namespace, modality: str, model: Path) -> float:
    """Return the SA50 of the automatic segmentation on patches of unseen images."""
    config = make_config(settings(options, options.truth_steps), "benchmark")
    patches = search_patches(config, *files(options, modality)["test"], options.test_patches).patches
    loaded = load_model(model, decoder="required")
    step = StepSettings(autocast=DTYPES[precision()], input_px=config.training.input_px)
    features = options.work / modality / ".features"
    embed = SharedEncoder(features, step, 1.0, print).open(loaded, ())
    rows = []
    with torch.no_grad():
        for each in patches:
            size = (each.labels.shape[0], each.labels.shape[1])
            rows.append(agreement(each.labels, automatic(loaded, embed(each.patch), size, step)))
    shutil.rmtree(features, ignore_errors=True)
    matched, together = np.sum(rows, axis=0)
    return float(matched / together)


def search(options: argparse.Namespace, modality: str, candidates: list[str]) -> None:
    """Rank the candidates, with what their encoders share computed once, and if asked for without."""
    config = make_config(settings(options, options.truth_steps), "benchmark")
    for name, share in (("shared", True), ("alone", False))[: 1 + options.alone]:
        path = options.work / modality / f"search-{name}.json"
        before = read(path)
        if before and {each["model"] for each in (*before["ranked"], *before["left_out"])} == set(candidates):
            continue
        out = options.work / modality / f"search-{name}"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        found = suggest(
            config,
            *files(options, modality)["learn"],
            SearchOptions(candidates, out, options.patches, share=share, halving=False),
        )
        print(f"{modality}: search {name} {time.perf_counter() - began:.0f} s", flush=True)
        write(path, found.to_dict())


def compare(folder: Path, start: str) -> tuple[dict[str, tuple[float | None, float]], list[str]]:
    """Return Kendall's tau and the regret of the first choice for each rule, and the candidates that were compared."""
    known = {name: value["sa50"] for name, value in read(folder / "truth.json").items()}
    ranked = {each["model"]: each for each in read(folder / "search-shared.json").get("ranked", ())}
    models = [model for model in read(folder.parent / "candidates.json") if model in ranked and model in known]
    if not models:
        return {}, []
    best = max(known[model] for model in models)
    rules: dict[str, Callable[[str], float]] = {
        "combined": lambda model: ranked[model]["score"],
        **{
            name: lambda model, name=name: ranked[model]["scores"].get(name, 0.0)  # type: ignore[misc]
            for name in ("ais_sa50", "probe_r2", "logme_share", "logme", "box_iou", "point_iou")
        },
        "always the last made": lambda model: float(models.index(model)),
    }
    rows: dict[str, tuple[float | None, float]] = {}
    for name, rule in rules.items():
        values = [rule(model) for model in models]
        tau = kendalltau(values, [known[model] for model in models]).statistic
        rows[name] = (float(tau), best - known[models[int(np.argmax(values))]])
    if start in known:
        rows["always the start model"] = (None, best - known[start])
    rows["at random, on average"] = (0.0, float(best - np.mean([known[model] for model in models])))
    return rows, models


def table(folder: Path, start: str) -> str:
    """Return the comparison as markdown, and write it beside its numbers."""
    rows, models = compare(folder, start)
    if not models:
        return f"{folder.name}: no candidate was searched and finetuned yet"
    truths = read(folder / "truth.json")
    found = {name: read(folder / f"search-{name}.json").get("ranked", []) for name in ("shared", "alone")}
    ranked = {each["model"]: each for each in found["shared"]}
    missing = [Path(model).name for model in read(folder.parent / "candidates.json") if model not in models]
    lines = [
        f"## {folder.name}: {len(models)} candidates",
        *([f"without {', '.join(missing)}: not searched or not finetuned yet"] if missing else []),
        "",
        "| rule | Kendall tau | regret in SA50 |",
        "|---|---|---|",
        *(f"| {name} | {in_words(tau)} | {regret:.3f} |" for name, (tau, regret) in rows.items()),
        "",
        "| candidate | SA50 after finetuning | score | automatic SA50 before |",
        "|---|---|---|---|",
    ]
    for model in sorted(models, key=lambda model: -truths[model]["sa50"]):
        before = ranked[model]["scores"].get("ais_sa50", 0.0)
        after, score = truths[model]["sa50"], ranked[model]["score"]
        lines.append(f"| {Path(model).name} | {after:.3f} | {score:.3f} | {before:.3f} |")
    finetuning = np.mean([value["seconds"] for value in truths.values()])
    searching = np.mean([sum_of(each, "load", "encode", "score") for each in found["shared"]])
    lines += [
        "",
        f"finetuning {finetuning:.1f} s a model, search {searching:.1f} s ({finetuning / searching:.1f} times faster)",
    ]
    if found["alone"]:
        encoding = {name: sum(sum_of(each, "encode") for each in found[name]) for name in found}
        lines.append(
            f"image encoders {encoding['shared']:.1f} s with shared blocks, {encoding['alone']:.1f} s without "
            f"({encoding['alone'] / encoding['shared']:.2f} times)"
        )
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def overview(folders: list[Path], start: str) -> str:
    """Return tau and regret of each rule for all modalities, and their means, as markdown."""
    tables = {folder.name: compare(folder, start)[0] for folder in folders}
    tables = {name: rows for name, rows in tables.items() if rows}
    rules = list(dict.fromkeys(rule for rows in tables.values() for rule in rows))
    lines = [f"| rule | {' | '.join(tables)} | mean |", "|---" * (len(tables) + 2) + "|"]
    for rule in rules:
        cells = [rows.get(rule, (None, np.nan)) for rows in tables.values()]
        taus = [tau for tau, _ in cells if tau is not None]
        mean = (float(np.mean(taus)) if taus else None, float(np.mean([regret for _, regret in cells])))
        texts = [f"{in_words(tau)} / {regret:.3f}" for tau, regret in [*cells, mean]]
        lines.append(f"| {rule} | {' | '.join(texts)} |")
    return "\n".join(["## Kendall tau / regret in SA50", "", *lines])


def in_words(tau: float | None) -> str:
    """Return Kendall's tau, or a dash where a rule does not rank."""
    return "–" if tau is None else f"{tau:.2f}"


def sum_of(each: dict[str, Any], *names: str) -> float:
    """Add up what a model of a ranking took."""
    return float(sum(each["seconds"][name] for name in names))


def timed(what: str, action: Callable[[], Any]) -> float:
    """Return the seconds that an action takes, and say them."""
    began = time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    print(f"{what}: {seconds:.0f} s", flush=True)
    return seconds


def read(path: Path) -> Any:
    """Read JSON; nothing when it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all, since another process may be reading."""
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(new, path)


if __name__ == "__main__":
    main()

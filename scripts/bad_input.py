"""Try bad input through the real command, and write what it says to docs/bad-input.md.

A case is data: what is tried, the files it needs, the command line, and what must come of it. `tests/test_bad_input.py`
goes through the same list.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bad_files import make_files

DONE, BAD_INPUT, RESOURCES, MODEL = 0, 2, 3, 4
PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"
HEAD = """# Bad input, and what is said about it

Made by `scripts/bad_input.py`, which runs each of these through the command; `tests/test_bad_input.py` goes through the
same list. Exit status: 0 done, 2 bad input, usage or configuration, 3 does not fit the resources, 4 model or checkpoint
unusable. In every case there was no traceback, files that were there stayed as they were byte by byte, no file came to
be where none was asked for, and with `--json` standard output held one JSON object or nothing.

`images/` and `labels/` hold four small images and their labels, apart from what the first column says.
"""


@dataclass(frozen=True)
class Case:
    """Something to try.

    Attributes
    ----------
    tried
        In a few words.
    command
        Everything after ``resfinetune``, run in the folder with the files.
    status
        The exit status it must end with.
    says
        Regular expression that the messages must match.
    files
        Path to kind of file, see `bad_files.KINDS`; these go over four good images with labels.
    without
        Beginnings of paths that are left out of the four.
    writes
        Beginnings of paths where new files may appear.
    needs
        "no GPU" or "/proc": skipped elsewhere.
    """

    tried: str
    command: str
    status: int
    says: str
    files: Mapping[str, str] | None = None
    without: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    needs: str | None = None


def _all(kind: str, folder: str = "labels") -> dict[str, str]:
    return {f"{folder}/c{i}.tif": kind for i in range(4)}


GOOD = {**_all("image", "images"), **_all("labels")}
BOTH = "-i images -l labels"
CHECK = f"check {BOTH}"
TRAIN = f"train {BOTH} -m random:vit_t -o run --set resources.device=cpu"
SEGMENT = "segment -i images --device cpu"
EVALUATE = f"evaluate {BOTH} --device cpu"
TINY = (
    "data.patch_px=64 training.input_px=128 training.epochs=1 training.samples_per_epoch=1 training.objects=1 "
    "training.targets=instances resources.device=cpu"
)
TINY_OPTIONS = " ".join(f"--set {setting}" for setting in TINY.split())
RUN_CONFIG = "text: {model: 'random:vit_t', data: {images: images, labels: labels}, resources: {device: cpu}}"
SPLIT = 'text: {"kind": "by image", "note": "", "train": [], "validation": []}'

DATA_CASES = [
    Case("folder that is not there", "check -i imagse -l labels", BAD_INPUT, "imagse does not exist"),
    Case("both folders not there", "check -i a -l b --json", BAD_INPUT, "images: a does not.*labels: b does not"),
    Case("no labels given", "check -i images", BAD_INPUT, "labels"),
    Case("a path longer than any file name", f"check -i {'c0.tif,' * 50} -l labels", BAD_INPUT, "too long"),
    Case("glob that matches nothing", "check -i 'images/*.png' -l labels", BAD_INPUT, "matches no file"),
    Case("images and labels swapped", "check -i labels -l images", BAD_INPUT, "swapped"),
    Case("one folder as images and labels", "check -i labels -l labels", BAD_INPUT, "image and as labels"),
    Case("RGB labels", CHECK, BAD_INPUT, "3 channels", _all("RGB labels")),
    Case("JPEG labels", CHECK, BAD_INPUT, "JPEG", {"labels/c0.jpg": "JPEG"}, ("labels/c0",)),
    Case("image of 0 bytes", CHECK, BAD_INPUT, r"c1.tif: is empty", {"images/c1.tif": "empty"}),
    Case("TIFF cut off", CHECK, BAD_INPUT, "c1.tif: .*cut off", {"images/c1.tif": "cut off"}),
    Case("TIFF cut in its header", CHECK, BAD_INPUT, "c1.tif: cannot be read", {"images/c1.tif": "cut in its header"}),
    Case("TIFF with damaged pixels", CHECK, BAD_INPUT, "c1.tif: cannot be read", {"images/c1.tif": "scrambled"}),
    Case("text named .tif", CHECK, BAD_INPUT, "c1.tif: cannot be read", {"labels/c1.tif": "text: not an image"}),
    Case("empty folder", CHECK, BAD_INPUT, "images is empty", {"images": "folder"}, ("images",)),
    Case("only files of other kinds", CHECK, BAD_INPUT, ".czi", {"images/c0.czi": "text: x"}, ("images",)),
    Case("folders named .tif", CHECK, BAD_INPUT, "only folders", {"images/c0.tif": "folder"}, ("images",)),
    Case("labels all zero", CHECK, BAD_INPUT, "no labelled object", _all("zeros")),
    Case("one label image all zero", CHECK, DONE, "no labelled object", {"labels/c1.tif": "zeros"}),
    Case("labels with fractions", CHECK, BAD_INPUT, "fractions", _all("fractions")),
    Case("float labels with whole numbers", f"{CHECK} --json", DONE, "used as integers", _all("whole floats")),
    Case("negative labels", CHECK, BAD_INPUT, "negative label ids", _all("negative")),
    Case("a foreground mask as labels", CHECK, BAD_INPUT, "foreground mask", _all("mask")),
    Case("no object of min_object_px", CHECK, BAD_INPUT, "no object of 25 px or more", _all("specks")),
    Case("4D images", CHECK, BAD_INPUT, "4D", _all("4D", "images")),
    Case("5 channels, none chosen", CHECK, BAD_INPUT, "5 channels", _all("5 channels", "images")),
    Case(
        "5 planes of nothing known",
        CHECK,
        BAD_INPUT,
        "data.axes",
        {f"images/c{i}.npy": "5 planes" for i in range(4)},
        ("images",),
    ),
    Case(
        "channel that is not there",
        f"{CHECK} --set data.channels=[7]",
        BAD_INPUT,
        "0 to 4",
        _all("5 channels", "images"),
    ),
    Case("axes that do not fit", f"{CHECK} --set data.axes=CZYX", BAD_INPUT, "CZYX"),
    Case("axes that do not exist", f"{CHECK} --set data.axes=XYZ", BAD_INPUT, "XYZ"),
    Case("shapes that differ", CHECK, BAD_INPUT, "differs from images/c1.tif", {"labels/c1.tif": "narrow labels"}),
    Case("names that do not match", CHECK, BAD_INPUT, "same file name", {"labels/d0.tif": "labels"}, ("labels/c0",)),
    Case("two images of one name", CHECK, BAD_INPUT, "stem 'c0'", {"images/c0.npy": "5 planes"}),
    Case("two label images for one image", CHECK, BAD_INPUT, "two label images", {"labels/c0_mask.tif": "labels"}),
    Case("NaN in an image", CHECK, DONE, "NaN or infinite", {"images/c1.tif": "image with NaN"}),
    Case("constant image", CHECK, DONE, "constant image", {"images/c1.tif": "constant"}),
    Case("complex numbers", CHECK, BAD_INPUT, "not numbers|complex", {"images/c0.npy": "complex numbers"}, ("images",)),
    Case(
        "npy file with code in it", CHECK, BAD_INPUT, "cannot be read", {"labels/c0.npy": "npy with code"}, ("labels",)
    ),
    Case(
        "HDF5 with two arrays, no key", CHECK, BAD_INPUT, "image_key", {"images/c0.h5": "HDF5 with two arrays"}, ("im",)
    ),
    Case(
        "HDF5 with another key",
        f"{CHECK} --set data.image_key=rwa",
        BAD_INPUT,
        "no array 'rwa'",
        {"images/c0.h5": "HDF5 with two arrays"},
        ("images",),
    ),
    Case(
        "HDF5 without array", CHECK, BAD_INPUT, "holds no array", {"labels/c0.h5": "HDF5 without arrays"}, ("labels",)
    ),
    Case(
        "zarr group without array", CHECK, BAD_INPUT, "no array", {"images/c0.zarr": "zarr without arrays"}, ("images",)
    ),
    Case("empty folder named .zarr", CHECK, BAD_INPUT, "c0.zarr", {"images/c0.zarr": "folder"}, ("images",)),
    Case(
        "held-out images that are also trained on",
        f"{CHECK} --set data.validation_images=images --set data.validation_labels=labels",
        BAD_INPUT,
        "both training and held-out images",
    ),
    Case(
        "held-out images not there",
        f"{CHECK} --set data.validation_images=held --set data.validation_labels=labels",
        BAD_INPUT,
        "held does not exist",
    ),
    Case(
        "space and umlaut in paths, one image (works)",
        "check -i 'zwölf Zellen' -l 'Masken für [1]'",
        DONE,
        "0 errors",
        {"zwölf Zellen/c 1.tif": "image", "Masken für [1]/c 1.tif": "labels"},
    ),
]

CONFIG_CASES = [
    Case("unknown verb", "trian", BAD_INPUT, "No such command"),
    Case("unknown option", f"{CHECK} --fast", BAD_INPUT, "No such option"),
    Case("option without its value", "check --images", BAD_INPUT, "requires an argument"),
    Case("resume without a run", "resume", BAD_INPUT, "Missing argument"),
    Case("unknown key", f"{CHECK} --set training.epoch=3", BAD_INPUT, "did you mean 'training.epochs'"),
    Case("unknown section", f"{CHECK} --set trainig.epochs=3", BAD_INPUT, "did you mean 'training'"),
    Case("value of another type", f"{TRAIN} --set training.epochs=many", BAD_INPUT, "training.epochs: found 'many'"),
    Case("a value for a whole section", f"{CHECK} --set data=3", BAD_INPUT, "data"),
    Case("--set without =", f"{CHECK} --set training.epochs", BAD_INPUT, "expected section.key=value"),
    Case("--set with a broken value", f"{CHECK} --set data.channels=[1", BAD_INPUT, "not valid YAML"),
    Case("--set with a day that is none", f"{CHECK} --set data.images=2024-13-45", BAD_INPUT, "not valid YAML"),
    Case("0 epochs", f"{TRAIN} --set training.epochs=0 --json", BAD_INPUT, "training.epochs: found 0"),
    Case("two mistakes at once", f"{TRAIN} --set training.seed=-1 --set data.patch_px=9", BAD_INPUT, "patch_px.*seed"),
    Case("unknown preset", f"{TRAIN} -p gtx9999", BAD_INPUT, "gtx9999.*gtx1080"),
    Case("unknown strategy", f"{TRAIN} -s frozn", BAD_INPUT, "frozn.*frozen"),
    Case("configuration file not there", "train run.yaml", BAD_INPUT, "run.yaml: cannot be read"),
    Case("configuration is a folder", "train images", BAD_INPUT, "images: cannot be read"),
    Case("configuration is an image", "train images/c0.tif", BAD_INPUT, "not valid YAML"),
    Case("YAML malformed", "train run.yaml", BAD_INPUT, "not valid YAML", {"run.yaml": "text: model: [vit_b"}),
    Case("YAML with a list", "train run.yaml", BAD_INPUT, "expected a mapping", {"run.yaml": "text: [1, 2]"}),
    Case("YAML that holds itself", "train run.yaml", BAD_INPUT, "itself", {"run.yaml": "text: &a {data: *a}"}),
    Case(
        "YAML with code in it",
        "train run.yaml",
        BAD_INPUT,
        "not valid YAML",
        {"run.yaml": "text: model: !!python/object/apply:os.mkdir [the-code-in-it-ran]"},
    ),
]

RUN_CASES = [
    Case("nothing given", "train", BAD_INPUT, "output: not given.*images.*labels"),
    Case("output below a file", f"train {BOTH} -o notes.txt/run", BAD_INPUT, "notes.txt", {"notes.txt": "text: x"}),
    Case("output that cannot be written", f"train {BOTH} -o /proc/run", BAD_INPUT, "cannot be written", needs="/proc"),
    Case("output is a file", f"train {BOTH} -o notes.txt", BAD_INPUT, "is a file", {"notes.txt": "text: x"}),
    Case("output with files in it", TRAIN, BAD_INPUT, "nothing is overwritten", {"run/notes.txt": "text: x"}),
    Case("output name too long", f"train {BOTH} -o {'run' * 90}", BAD_INPUT, "too long"),
    Case("bad labels, in train", TRAIN, BAD_INPUT, "negative", _all("negative")),
    Case(
        "held-out images without objects",
        f"{TRAIN} --set data.validation_images=held --set data.validation_labels=none",
        BAD_INPUT,
        "held-out",
        {"held/h0.tif": "image", "none/h0.tif": "zeros"},
    ),
    Case(
        "GPU on a machine without",
        f"train {BOTH} -o run --set resources.device=cuda",
        RESOURCES,
        "cuda",
        needs="no GPU",
    ),
    Case("fp16 on a CPU", f"{TRAIN} --set resources.precision=fp16", RESOURCES, "does not train in fp16"),
    Case("model name nearly right", f"train {BOTH} -o run -m vit_b_ml", MODEL, "did you mean 'vit_b_lm'"),
    Case("model name nothing like one", f"train {BOTH} -o run -m cellpose", MODEL, "vit_b_lm"),
    Case("unknown network, untrained", f"train {BOTH} -o run -m random:vit_x", MODEL, "random:vit_t"),
    Case(
        "no network for a download", f"{SEGMENT} -o out -m vit_t_lm", MODEL, "without network here", writes=("cache",)
    ),
    Case("checkpoint not there", f"train {BOTH} -o run -m model.pt", MODEL, "no such file"),
    Case("checkpoint cut off", f"train {BOTH} -o run -m m.pt", MODEL, "not a whole", {"m.pt": "truncated vit_t"}),
    Case(
        "checkpoint lacks a part",
        f"train {BOTH} -o run -m m.pt",
        MODEL,
        "do not fit",
        {"m.pt": "vit_t without mask decoder"},
    ),
    Case(
        "pickle with code in it", f"train {BOTH} -o run -m m.pt", MODEL, "would run code", {"m.pt": "pickle with code"}
    ),
    Case(
        "torch file with code in it", f"{EVALUATE} -m m.pt", MODEL, "would run code", {"m.pt": "torch file with code"}
    ),
    Case("text as checkpoint", f"{EVALUATE} -m m.pt", MODEL, "not a (whole )?checkpoint", {"m.pt": "text: weights"}),
    Case("empty checkpoint", f"{EVALUATE} -m m.pt", MODEL, "m.pt: not a", {"m.pt": "empty"}),
    Case(
        "text as safetensors", f"{EVALUATE} -m m.safetensors", MODEL, "safetensors", {"m.safetensors": "text: weights"}
    ),
    Case(
        "checkpoint of something else",
        f"{EVALUATE} -m m.pt",
        MODEL,
        "not a Segment Anything",
        {"m.pt": "another network"},
    ),
    Case("image as model", f"{EVALUATE} -m images/c0.tif", MODEL, "not a"),
    Case(
        "run folder without model.pt", f"{SEGMENT} -o out -m run", MODEL, "no model.pt", {"run/config.yaml": RUN_CONFIG}
    ),
    Case("no decoder for AIS", f"{SEGMENT} -o out -m m.pt", MODEL, "no decoder", {"m.pt": "vit_t without decoder"}),
    Case("unknown mode", f"{SEGMENT} -o out -m m.pt --mode auto --json", BAD_INPUT, "ais, apg, amg"),
    Case("unknown mode, in evaluate", f"{EVALUATE} -m m.pt --mode boxes", BAD_INPUT, "box"),
    Case(
        "unknown device", "segment -i images -o out -m random:vit_t --device gpu", BAD_INPUT, "auto, cpu, cuda or mps"
    ),
    Case("segment without --output", f"{SEGMENT} -m vit_t", BAD_INPUT, "--output"),
    Case("segment: one image damaged", f"{SEGMENT} -o out -m m.pt", BAD_INPUT, "c1.tif", {"images/c1.tif": "cut off"}),
    Case("segment: label files there", f"{SEGMENT} -o out -m m.pt", BAD_INPUT, "--overwrite", {"out/c0.tif": "labels"}),
    Case("segment onto its own images", f"{SEGMENT} -o images -m m.pt --overwrite", BAD_INPUT, "is one of the images"),
    Case(
        "segment: output is a file", f"{SEGMENT} -o notes.txt -m m.pt", BAD_INPUT, "is a file", {"notes.txt": "text: x"}
    ),
    Case(
        "segment: output below a file",
        f"{SEGMENT} -o n.txt/out -m m.pt",
        BAD_INPUT,
        "n.txt is a file",
        {"n.txt": "text: x"},
    ),
    Case(
        "segment: output cannot be written",
        f"{SEGMENT} -o /proc/out -m m.pt",
        BAD_INPUT,
        "cannot be written",
        needs="/proc",
    ),
    Case(
        "segment: channel not there",
        f"{SEGMENT} -o out -m m.pt --set data.channels=[7]",
        BAD_INPUT,
        "c0.tif: data.channels",
        {"m.pt": "vit_t"},
    ),
    Case("evaluate without labels", "evaluate -i images -m m.pt", BAD_INPUT, "--labels"),
    Case("evaluate: labels not there", "evaluate -i images -l masks -m m.pt --json", BAD_INPUT, "masks does not exist"),
    Case("evaluate: table there", f"{EVALUATE} -m m.pt -o t.csv", BAD_INPUT, "t.csv: exists", {"t.csv": "text: mine"}),
    Case(
        "evaluate: table below a file", f"{EVALUATE} -m m.pt -o n.txt/t.csv", BAD_INPUT, "n.txt", {"n.txt": "text: x"}
    ),
    Case("report on what is no run", "report images", BAD_INPUT, "not a run folder"),
    Case(
        "report: two runs without a name",
        "report run other --json",
        BAD_INPUT,
        "--output",
        {"run/config.yaml": RUN_CONFIG, "other/config.yaml": RUN_CONFIG},
    ),
    Case(
        "report: page there",
        "report run -o p.html",
        BAD_INPUT,
        "p.html: exists",
        {"run/config.yaml": RUN_CONFIG, "p.html": "text: mine"},
    ),
    Case(
        "report: log of numbers damaged",
        "report run",
        BAD_INPUT,
        "metrics.csv: cannot be read",
        {"run/config.yaml": RUN_CONFIG, "run/metrics.csv": "text: epoch,metric\n1,x"},
    ),
    Case("resume what is no run", "resume images", BAD_INPUT, "not a run folder"),
    Case("resume what is not there", "resume runs/mine", BAD_INPUT, "not a run folder"),
    Case("resume with 0 epochs", "resume run --epochs 0", BAD_INPUT, "epochs", {"run/config.yaml": RUN_CONFIG}),
    Case(
        "resume: configuration damaged",
        "resume run",
        BAD_INPUT,
        "not valid YAML",
        {"run/config.yaml": "text: model: [vi"},
    ),
    Case(
        "resume: images gone", "resume run", BAD_INPUT, "images does not", {"run/config.yaml": RUN_CONFIG}, ("images",)
    ),
    Case(
        "resume: other images than before",
        "resume run",
        BAD_INPUT,
        "other images or labels",
        {"run/config.yaml": RUN_CONFIG, "run/split.json": SPLIT},
    ),
    Case(
        "resume: checkpoint damaged",
        "resume run",
        MODEL,
        "damaged",
        {"run/config.yaml": RUN_CONFIG, "run/checkpoints/latest/state.json": "text: []"},
        writes=("run/.training.lock",),
    ),
    Case("demo: output with files in it", "demo -o labels --json", BAD_INPUT, "nothing is overwritten"),
    Case("demo: output below a file", "demo -o notes.txt/demo", BAD_INPUT, "notes.txt", {"notes.txt": "text: x"}),
    Case(
        "train on one image, space and umlaut in paths (works)",
        f"train -i 'zwölf Zellen' -l 'Masken für [1]' -m random:vit_t -o 'Lauf 1/ä' --json {TINY_OPTIONS}",
        DONE,
        "only one image",
        {"zwölf Zellen/c 1.tif": "image", "Masken für [1]/c 1.tif": "labels"},
        writes=("Lauf 1",),
    ),
]
SUGGEST = f"suggest {BOTH}"
GRID = "text: {images: images, labels: labels, output: out, model: 'random:vit_t'"
MANY_CASES = [
    Case("suggest: no candidate can be used", f"{SUGGEST} -c no.pt vit_bb", MODEL, "no.pt.*vit_bb.*did you mean"),
    Case("suggest: no patch", f"{SUGGEST} -c starter --patches 0", BAD_INPUT, "patches: found 0"),
    Case("suggest: output of another kind", f"{SUGGEST} -c starter -o labels", BAD_INPUT, "not of a search"),
    Case("sweep: grid not there", "sweep grid.yaml", BAD_INPUT, "grid.yaml: cannot be read"),
    Case("sweep: key that does not exist", "sweep g.yaml", BAD_INPUT, "seeds", {"g.yaml": f"{GRID}, seeds: [0]}}"}),
    Case(
        "sweep: an axis set twice",
        "sweep g.yaml",
        BAD_INPUT,
        "seed",
        {"g.yaml": f"{GRID}, set: {{training.seed: 1}}}}"},
    ),
    Case("sweep: executor of no kind", "sweep g.yaml", BAD_INPUT, "kind", {"g.yaml": f"{GRID}, executor: {{a: 1}}}}"}),
    Case("sweep: here and without waiting", "sweep g.yaml --no-wait", BAD_INPUT, "--no-wait", {"g.yaml": f"{GRID}}}"}),
    Case(
        "segment: executor not there",
        f"{SEGMENT} -m starter -o o --executor c.yaml",
        BAD_INPUT,
        "executor: found 'c.yaml'",
    ),
    Case(
        "segment: no dask there",
        f"{SEGMENT} -m starter -o o --executor tcp://127.0.0.1:9",
        RESOURCES,
        "no dask scheduler",
    ),
    Case("chunks: unknown mode", f"{SEGMENT} -m starter -o o --executor local --mode aiss", BAD_INPUT, "aiss"),
    Case("chunks: model not there", f"{EVALUATE} -m no.pt -o o --executor local", MODEL, "no.pt"),
    Case(
        "chunks: output with files in it", f"{SEGMENT} -m starter -o labels --executor local", BAD_INPUT, "holds files"
    ),
]
CASES = DATA_CASES + CONFIG_CASES + RUN_CASES + MANY_CASES


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    status: int
    stdout: str
    stderr: str


def prepare(case: Case, folder: Path) -> None:
    """Make the files of a case."""
    good = {name: kind for name, kind in GOOD.items() if not (case.without and name.startswith(case.without))}
    make_files(folder, {**good, **(case.files or {})})


def arguments(case: Case) -> list[str]:
    """Return the command line as a list, without the name of the command."""
    return shlex.split(case.command)


def run_command(case: Case, folder: Path) -> Outcome:
    """Run a case as a person would, in a process of its own, without network."""
    nowhere = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "MICROSAM_CACHEDIR": "cache",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), nowhere),
    }
    command = [sys.executable, "-c", "from napari_resfinetune.cli import main; main()", *arguments(case)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Return every file below a folder with a hash of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def complaints(case: Case, outcome: Outcome, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return in what way an outcome is not what was promised; nothing when all is well."""
    found = []
    said = re.sub(r"[\s│]+", " ", outcome.stderr + outcome.stdout)
    if outcome.status != case.status:
        found.append(f"exit status {outcome.status} instead of {case.status}")
    if not re.search(case.says, said, re.IGNORECASE):
        found.append(f"no {case.says!r} in what it said")
    if "Traceback" in said:
        found.append("a traceback")
    if "--json" in case.command and outcome.stdout:
        try:
            json.loads(outcome.stdout)
        except ValueError:
            found.append("standard output is not JSON")
    changed = [name for name, content in before.items() if after.get(name) != content]
    new = [name for name in after if name not in before and not (case.writes and name.startswith(case.writes))]
    found += [f"{name} changed" for name in changed] + [f"{name} appeared" for name in new]
    return found


def message(case: Case, outcome: Outcome, folder: Path) -> str:
    """Return what a person reads, in one line, without paths of this machine."""
    lines = [re.sub(r"^[│ ]+|[│ ]+$", "", line) for line in (outcome.stderr + outcome.stdout).splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰{"]
    if not lines and "--json" in case.command:
        report = json.loads(outcome.stdout)
        lines = [f"{level} {item['message']}" for level in ("error", "warning") for item in report[f"{level}s"]]
    marked = [line for line in lines if re.match(r"(error|warning)\b", line)]
    if case.status == DONE:
        chosen = marked or lines
        chosen = [line for line in chosen if re.search(case.says, line, re.IGNORECASE)][:1] or chosen[-1:]
    else:
        errors = [line for line in marked if line.startswith("error")]
        chosen = errors or lines[-1:]
    shown = [re.sub(r"^(error:?|warning) +", "", line).replace(f"{folder}/", "") for line in chosen]
    text = "<br>".join(line if len(line) < 600 else f"{line[:600]} ..." for line in shown)
    return re.sub(r"(\S{60})\S{40,}", r"\1...", text.replace("|", r"\|"))


def skipped(case: Case) -> bool:
    """Whether this machine has what the case is about not having."""
    if case.needs == "/proc":
        return not sys.platform.startswith("linux")
    if case.needs == "no GPU":
        import torch

        return torch.cuda.is_available()
    return False


def main() -> None:
    """Run the cases whose name holds one of the arguments (all without), and write the page after all of them."""
    rows, bad = [], 0
    chosen = [case for case in CASES if not sys.argv[1:] or any(word in case.tried for word in sys.argv[1:])]
    for case in chosen:
        if skipped(case):
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(case, folder)
            before = contents(folder)
            outcome = run_command(case, folder)
            found = complaints(case, outcome, before, contents(folder))
            said = message(case, outcome, folder)
        command = re.sub(r"(\S{60})\S{40,}", r"\1...", case.command.replace("|", r"\|"))
        rows.append(f"| {case.tried} | `{command}` | {outcome.status} | {said} |")
        print(f"{'; '.join(found) or 'ok':<12} {outcome.status} {case.tried}: {said}", flush=True)
        bad += bool(found)
    if len(chosen) == len(CASES):
        table = "| what was tried | command | exit status | message |\n|---|---|---|---|\n" + "\n".join(rows)
        PAGE.write_text(f"{HEAD}\n{table}\n", encoding="utf-8")
    sys.exit(f"{bad} of {len(rows)} not as promised" if bad else None)


if __name__ == "__main__":
    main()

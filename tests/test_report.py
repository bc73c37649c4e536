"""The report of a run: what is in it, that names cannot break it, and how a browser shows it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import napari_resfinetune as rf
from napari_resfinetune.config import make_config
from napari_resfinetune.evaluation.compare import Result, judge
from napari_resfinetune.evaluation.scores import score_objects
from napari_resfinetune.reporting.citations import citations_for
from napari_resfinetune.training.run_folder import METRICS, RunFolder, create_run

BAD = "<script>alert(1)</script>&\"' $x_1$"
CHROMIUM = next(
    (found for found in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if found), None
)


class Loads(HTMLParser):
    """Collects tags, and what a browser would fetch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        self.fetched += [value or "" for name, value in attrs if name.endswith("href") and tag not in ("a", "use")]


def squares(count: int, seed: int) -> np.ndarray:
    labels = np.zeros((120, 120), np.uint32)
    for number in np.random.default_rng(seed).permutation(16)[:count]:
        y, x = 30 * (number // 4) + 5, 30 * (number % 4) + 5
        labels[y : y + 20, x : x + 20] = number + 1
    return labels


def make_run(folder: Path, *, epochs: int = 4, compared: bool = True) -> Path:
    """Write a run folder as training leaves it, without training."""
    config = {
        "model": f"/models/{BAD}.pt",
        "strategy": {"kind": "lora"},
        "data": {"images": f"/data/{BAD}", "labels": "/data/labels"},
    }
    run = create_run(folder, make_config(config))
    plan = {"peak_gb": 2.5, "limit_gb": 8.0, "limit_reason": "preset cpu-8gb", "device": "cpu", "precision": "fp32"}
    plan |= {"seconds_per_step": 1.5, "seconds_per_epoch": 30.0, "architecture": "vit_t", "levers": []}
    run.write_json("plan.json", plan)
    region = {"plane": None, "y": [0, 120], "x": [0, 120]}
    images = {"train": [{"image": "one", **region}], "validation": [{"image": BAD, **region}]}
    run.write_json("split.json", {"kind": "by image", "note": "1 image to train on, 1 held out", **images})
    run.write_json("environment.json", {"packages": {"torch": "2.99", "micro-sam": "1.8.10"}})
    with run.metrics.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        for epoch in range(epochs):
            loss = 1 / (epoch + 1)
            numbers = [epoch, loss, loss, loss / 2, loss / 2, 1e-5, 31 * (epoch + 1), 2.1, 8.0]
            writer.writerow(dict(zip(METRICS, numbers, strict=True)))
    ended = {"event": "Finished", "status": "finished", "best_epoch": epochs - 1, "best_metric": 0.1,
             "peak_memory_gb": 2.1, "seconds": 31.0 * epochs}  # fmt: skip
    run.events.write_text(json.dumps(ended) + '\n{"event": "Ste', encoding="utf-8")
    if compared:
        write_comparison(run)
    return folder


def write_comparison(run: RunFolder) -> None:
    truth, before, after = squares(12, 0), squares(7, 1), squares(12, 0)
    results = [[Result(found, *score_objects(truth, found))] for found in (before, after)]
    facts = {"name": BAD, "objects": 12}
    for when, (result,) in zip(("before", "after"), results, strict=True):
        facts |= {
            f"{when}_{name}": result.scores[name] for name in ("sa50", "msa", "missed", "extra", "merged", "split")
        }
    run.write_json("comparison.json", {**judge([BAD], *results, mode="ais"), "best_epoch": 3, "pictures": [facts]})
    (run.path / "comparison").mkdir()
    image = np.where(truth > 0, 200, 30).astype(np.uint8)[..., None].repeat(3, 2)
    arrays = {"image": image, "labels": truth, "before": before, "after": after}
    np.savez_compressed(run.path / "comparison" / "0.npz", **arrays)


def test_one_file_with_all_of_it_and_nothing_to_fetch(tmp_path):
    run = make_run(tmp_path / "my run")
    page = rf.report(run)
    assert page == run / "report.html"
    text = page.read_text(encoding="utf-8")
    loads = Loads()
    loads.feed(text)
    assert "script" not in loads.tags
    assert "iframe" not in loads.tags
    assert len(loads.fetched) == 3
    assert all(url.startswith("data:image/png;base64,") for url in loads.fetched)
    assert not re.search(r"url\(|@import", text.replace("url(#", ""))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for said in (
        "Better than the start model", "prefers-color-scheme: dark", "@media print", "2.50 GB", "2.10 GB", "<svg",
        "2.99", "LoRA", "micro_sam.automatic_segmentation -i", "resfinetune segment --model", "rf.segment(",
        "annotator_2d", "micro-sam", "1 image to train on, 1 held out", "training.learning_rate",
        "4 epochs in 2 min 04 s",
    ):  # fmt: skip
        assert said in text, said
    # Paths with a space are typed in quotes.
    assert f"&#39;{tmp_path / 'my run'}&#39;" in text
    assert rf.report(run) == page  # made anew


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path):
    run = create_run(tmp_path / "run", make_config({"model": "vit_b"})).path
    text = rf.report(run).read_text(encoding="utf-8")
    assert "not finished" in text
    assert "not compared with its start model" in text
    assert "<svg" not in text


def test_a_session_that_was_killed_hides_how_the_one_before_it_ended(tmp_path):
    run = make_run(tmp_path / "run", compared=False)
    whole = '{"event": "Started"}\n{"event": "Finished", "status": "finished", "seconds": 60}\n{"event": "Started"}\n'
    (run / "events.jsonl").write_text(whole, encoding="utf-8")
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("4,1.0\n")  # torn
    text = rf.report(run).read_text(encoding="utf-8")
    assert "not finished" in text
    assert "2 min 04 s" in text


def test_a_damaged_comparison_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "comparison.json").write_text('{"verdict": "better"}', encoding="utf-8")
    with pytest.raises(rf.ConfigError, match="damaged"):
        rf.report(run)


def test_several_runs_on_one_page_that_is_never_written_over(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", epochs=2, compared=False)]
    with pytest.raises(rf.ConfigError, match="--output"):
        rf.report(runs)
    page = rf.report(runs, tmp_path / "both.html")
    text = page.read_text(encoding="utf-8")
    assert "2 runs" in text
    assert "not compared" in text
    assert "<script" not in text
    with pytest.raises(rf.ConfigError, match="exists already"):
        rf.report(runs, page)
    with pytest.raises(rf.ConfigError, match="exists already"):
        rf.report(runs[0], page)
    with pytest.raises(rf.ConfigError, match="not a run folder"):
        rf.report([tmp_path])


@pytest.mark.parametrize("content", [b"no zip", b"PK\x03\x04 torn"])
def test_damaged_pictures_are_said(tmp_path, content):
    run = make_run(tmp_path / "run")
    (run / "comparison" / "0.npz").write_bytes(content)
    with pytest.raises(rf.ConfigError, match=r"0\.npz"):
        rf.report(run)


def test_what_is_cited_is_what_was_used():
    def cited(**settings):
        return {citation.what for citation in citations_for(make_config(settings), "vit_b", compared=False)}

    plain, lora = cited(), cited(strategy={"kind": "lora"})
    assert lora - plain == {"LoRA", "LoRA layers"}
    assert plain - cited(training={"targets": "masks"}) == {"instance decoder's targets and loss"}


def in_browser(*arguments: str, profile: Path) -> None:
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--window-size=1100,2400"]
    subprocess.run([*command, *arguments], check=True, timeout=120, capture_output=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which make test installs on Debian")
def test_a_browser_shows_it_in_light_and_dark_and_prints_it(tmp_path):
    page = rf.report(make_run(tmp_path / "run"))
    brightness = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        settings = f"--blink-settings=preferredColorScheme={number}"
        in_browser(settings, f"--screenshot={shot}", page.as_uri(), profile=tmp_path / "profile")
        pixels = np.asarray(Image.open(shot).convert("L"), float)
        brightness[scheme] = np.median(pixels)
        # Text and drawings stand out from the page.
        assert np.percentile(np.abs(pixels - brightness[scheme]), 99.5) > 100, scheme
        # Nothing is wider than the page: its margins are empty.
        assert np.ptp(pixels[:, :20]) == 0
        assert np.ptp(pixels[:, -20:]) == 0
    assert brightness["dark"] < 60 < 200 < brightness["light"]
    printed = tmp_path / "page.pdf"
    in_browser(f"--print-to-pdf={printed}", page.as_uri(), profile=tmp_path / "profile")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 8

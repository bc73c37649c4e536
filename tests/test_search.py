"""Which model to start from: on images and labels, through the command and the Python interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

import napari_resfinetune as rf
from napari_resfinetune import search
from napari_resfinetune.cli.app import app
from napari_resfinetune.config import make_config
from napari_resfinetune.errors import ConfigError, DataError, ModelError
from napari_resfinetune.events import Event, Message, Searched
from napari_resfinetune.models import load_model, save_model
from napari_resfinetune.search import SearchOptions, measure, pilot, ranking, report, zero_shot
from napari_resfinetune.search import run as run_search
from napari_resfinetune.search.candidates import LeftOut, find_candidates
from napari_resfinetune.search.compare import count_looks
from napari_resfinetune.search.features import SharedEncoder, hash_units, shared_cuts
from napari_resfinetune.search.patches import search_patches
from napari_resfinetune.search.zero_shot import steadiness
from napari_resfinetune.training.feature_cache import SUBFOLDER
from napari_resfinetune.training.run_folder import holding
from napari_resfinetune.training.step import StepSettings
from small_runs import SMALL, TRAINING, run

SETTINGS: dict[str, Any] = {**SMALL, "training": {**TRAINING, "epochs": 1, "samples_per_epoch": 2}}
STEP = StepSettings(input_px=128)
PATCHES = 3


@pytest.fixture(scope="module")
def models(cells, tmp_path_factory) -> Path:
    """A folder with a model whose neck is another one, and a file that is no model."""
    folder = tmp_path_factory.mktemp("models")
    model = load_model(cells / "start.pt", decoder="required")
    with torch.no_grad():
        for parameter in model.sam.image_encoder.neck.parameters():
            parameter.mul_(0.9)
    save_model(folder / "late.pt", model)
    (folder / "broken.pt").write_bytes(b"half of a model")
    return folder


def suggest(cells: Path, models: Any, labels: Any = ..., **options: Any) -> search.Suggestions:
    labels = cells / "labels" if labels is ... else labels
    return rf.suggest_models(cells / "images", labels, candidates=models, **{"patches": PATCHES, **SETTINGS, **options})


def found_of(found: search.Suggestions, stem: str) -> search.Suggestion:
    return next(each for each in found if Path(each.model).stem == stem)


def entries(folder: Path) -> int:
    """Number of patches whose features are kept."""
    return len([path for path in (folder / SUBFOLDER).glob("*/*") if not path.name.startswith(".")])


def test_the_command_ranks_models_and_says_what_it_left_out(cells, models, tmp_path):
    out = tmp_path / "out"
    options = ["--images", cells / "images", "--labels", cells / "labels", "--output", out, "--patches", 4, "--json"]
    sets = ["data.patch_px=64", "training.input_px=128", "training.samples_per_epoch=2", "resources.precision=fp32"]
    for each in sets:
        options += ["--set", each]
    names = ["--candidates", cells / "start.pt", models, "vit_b"]  # which cannot be downloaded in a test
    result = CliRunner().invoke(app, ["suggest", *map(str, [*options, *names])])
    assert result.exit_code == 0, result.output
    ranked = json.loads(result.stdout)
    assert {Path(each["model"]).name for each in ranked} == {"start.pt", "late.pt"}
    assert [each["rank"] for each in ranked] == [1, 2]
    assert ranked[0]["score"] >= ranked[1]["score"]
    for each in ranked:
        assert {"ais_sa50", "box_iou", "point_iou", "probe_r2", "logme", "logme_share"} <= set(each["scores"])
        assert each["low"] < each["high"]  # else it draws nothing again
    assert "broken.pt: left out" in result.stderr
    assert "vit_b" in result.stderr and "cannot be downloaded" in result.stderr
    whole = json.loads((out / "search.json").read_text())
    assert whole["advice"].startswith("start from") or "too close" in whole["advice"]
    assert {each["model"] for each in whole["left_out"]} == {str(models / "broken.pt"), "vit_b"}
    downloads = {each["model"] for each in whole["downloads"]}
    assert "vit_t_lm" in downloads and "vit_b" not in downloads  # which was asked for
    page = (out / "report.html").read_text(encoding="utf-8")
    assert whole["advice"][1:] in page and "broken.pt" in page and "vit_b_histopathology" in page
    assert "note    2 images to train on, 1 held out" in result.stderr
    for picture in ("pictures/01.png", "pictures/02.png"):
        assert picture in page and (out / picture).stat().st_size > 5000
    # Training with a frozen encoder finds the patches there, and adds the held-out ones that nobody looked at.
    before = entries(out / "features")
    resources = {**SMALL["resources"], "feature_cache_dir": out / "features"}
    run(
        cells,
        tmp_path / "run",
        strategy={"kind": "frozen"},
        resources=resources,
        training={"epochs": 1, "samples_per_epoch": 2},
    )
    assert before == 2 * 4 + 4  # two models, and where they part
    assert entries(out / "features") == before + 2


def test_shared_blocks_are_computed_once_and_give_the_same(cells, models, tmp_path):
    data = search_patches(make_config(SETTINGS, "test"), cells / "images", cells / "labels", 2)
    loaded = {name: load_model(path, decoder="none") for name, path in
              (("start", cells / "start.pt"), ("late", models / "late.pt"))}  # fmt: skip
    cuts = shared_cuts({name: hash_units(model, STEP) for name, model in loaded.items()})
    units = len(hash_units(loaded["start"], STEP).hashes)
    assert cuts == {"start": (units - 1,), "late": (units - 1,)}
    found, counts = {}, {}
    for how in ("shared", "alone"):
        encoder = SharedEncoder(tmp_path / how, STEP, 1.0, pytest.fail)
        for name, model in loaded.items():
            embed = encoder.open(model, cuts[name] if how == "shared" else ())
            found[how, name] = [embed(patch.patch) for patch in data.patches]
        counts[how] = encoder.units_run
    assert counts == {"shared": 2 * (units + 1), "alone": 2 * 2 * units}
    for name in loaded:
        for one, other in zip(found["shared", name], found["alone", name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(found["alone", "start"][0], found["alone", "late"][0], atol=0.05)


def test_a_stopped_search_goes_on_where_it_was(cells, models, tmp_path, monkeypatch):
    looked: list[str] = []
    plain = measure.score_patch

    def counted(model: Any, *rest: Any) -> Any:
        looked.append(model.name)
        return plain(model, *rest)

    monkeypatch.setattr(measure, "score_patch", counted)
    stop, events = rf.StopToken(), []

    def watch(event: Event) -> None:
        events.append(event)
        if isinstance(event, Searched) and event.done == PATCHES + 1:
            stop.stop()

    both = [cells / "start.pt", models / "late.pt"]
    first = suggest(cells, both, output=tmp_path / "out", on_event=watch, stop=stop)
    assert first.status == "stopped"
    assert "was stopped before" in first.advice and first.start_from is None
    assert [Path(each.model).name for each in first] == ["start.pt", "late.pt"]  # more patches come first
    assert [each.patches for each in first] == [PATCHES, 1]
    assert any(f"2 models on {PATCHES} patches" in event.text for event in events if isinstance(event, Message))
    assert len(looked) == PATCHES + 1
    again = suggest(cells, both, output=tmp_path / "out")
    assert again.status == "finished" and again.start_from is not None
    # What a score took when it was computed counts, not that it was found.
    assert again[0].seconds["score"] > 0.5 * first[0].seconds["score"]
    assert len(looked) == 2 * PATCHES
    fresh = suggest(cells, both)
    for one, other in zip(again, fresh, strict=True):
        assert (one.model, one.patches) == (other.model, PATCHES)
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_one_image_and_labels_of_one_object(cells):
    image, labels = (tifffile.imread(cells / kind / "c0.tif") for kind in ("images", "labels"))
    one_image = rf.suggest_models([image], [labels], candidates=cells / "start.pt", patches=PATCHES, **SETTINGS)
    assert one_image[0].patches == PATCHES and "probe_r2" in one_image[0].scores
    assert "patches of only one image" in one_image.notes[-1]
    single = np.where(labels == 5, labels, 0)
    one_object = rf.suggest_models([image], [single], candidates=cells / "start.pt", patches=PATCHES, **SETTINGS)
    assert "box_iou" in one_object[0].scores
    assert any("training would refuse" in note for note in one_object.notes)
    small = np.zeros_like(labels)
    small[10:13, 10:13] = 1
    with pytest.raises(DataError, match=r"no object of 25 px or more.*lower data.min_object_px"):
        rf.suggest_models([image], [small], candidates=cells / "start.pt", patches=PATCHES, **SETTINGS)


def test_without_labels_models_are_ranked_by_how_steady_they_are(cells, models):
    both = [cells / "start.pt", models / "late.pt"]
    found = suggest(cells, both, labels=None, patches=2)
    assert len(found) == 2 and "no labels" in found.notes[0]
    said: list[Event] = []
    timed = suggest(cells, both[:1], labels=None, patches=1, timing=True, pilot_epochs=1, on_event=said.append)
    assert timed[0].timing is None
    texts = [event.text for event in said if isinstance(event, Message)]
    assert any("not timed" in text for text in texts) and any("no short training" in text for text in texts)
    assert set(found[0].scores) == {"point_steadiness", "ais_steadiness"}
    images = [tifffile.imread(cells / "images" / f"c{i}.tif") for i in range(2)]
    empty = [np.zeros(image.shape, np.uint16) for image in images]
    unlabelled = rf.suggest_models(images, empty, candidates=both[:1], patches=2, **SETTINGS)
    assert "hold no object" in unlabelled.notes[0]


def test_a_model_that_masks_everything_is_steady_and_gets_nothing_for_it(monkeypatch):
    patch = type("Patch", (), {"image": torch.zeros(3, 20, 20)})()
    model = type("Model", (), {"instance_decoder": None})()
    points = zero_shot.grid_points((20, 20))

    def everything(*_: Any) -> np.ndarray:
        return np.ones((len(points), 20, 20), bool)

    def around_the_point(model: Any, embedding: Any, prompts: Any, *_: Any) -> np.ndarray:
        y, x = np.mgrid[:20, :20]
        return np.stack([(abs(x - px) < 2) & (abs(y - py) < 2) for (px, py) in prompts.points[:, 0].tolist()])

    for masks, expected in ((everything, 0.0), (around_the_point, 1.0)):
        monkeypatch.setattr(zero_shot, "prompted_masks", masks)
        total, count = steadiness(model, patch, None, None, STEP)["point_steadiness"]
        assert total / count == pytest.approx(expected, abs=0.05)


def test_nothing_to_compare_is_said_with_every_reason(cells, models, tmp_path):
    with pytest.raises(ModelError) as failed:
        suggest(cells, [models / "broken.pt", "vit_bb"])
    assert "broken.pt" in str(failed.value) and "did you mean" in str(failed.value)
    nan = load_model(cells / "start.pt", decoder="required")
    torch.nn.init.constant_(next(nan.sam.image_encoder.neck.parameters()), float("nan"))
    save_model(tmp_path / "nan.pt", nan)
    save_model(tmp_path / "copy.pt", load_model(cells / "start.pt", decoder="required"))
    found = suggest(cells, [cells / "start.pt", tmp_path / "copy.pt", tmp_path / "nan.pt"], patches=1)
    assert [each.model for each in found] == [str(cells / "start.pt")]
    reasons = {Path(each.model).name: each.reason for each in found.left_out}
    assert "the same weights as" in reasons["copy.pt"] and "not all numbers" in reasons["nan.pt"]


def test_a_folder_with_other_things_in_it_is_left_alone(cells, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not of a search"):
        suggest(cells, cells / "start.pt", output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
    for name in ("config.yaml", "report.html", "search.json"):  # a run, searched into by an older version
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(ConfigError, match="not of a search"):
        suggest(cells, cells / "start.pt", output=tmp_path / "run")


def test_what_fails_behind_the_ranking_leaves_the_ranking(cells, models, tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device", "cells.png")

    monkeypatch.setattr(ranking, "_is_close", lambda *_: True)
    monkeypatch.setattr(pilot, "_pilot", full)
    monkeypatch.setattr(report, "_draw", full)
    events: list[Event] = []
    both = [cells / "start.pt", models / "late.pt"]
    found = suggest(cells, both, patches=1, output=tmp_path / "out", pilot_epochs=1, on_event=events.append)
    assert {each.model for each in found} == {str(path) for path in both} and not found.left_out
    assert "pilot" not in found[0].scores
    said = [event.text for event in events if isinstance(event, Message)]
    assert sum("no picture (cells.png: No space left on device)" in text for text in said) == 2
    assert sum("its short training failed (cells.png: No space left on device)" in text for text in said) == 2
    assert len(json.loads((tmp_path / "out" / "search.json").read_text())["ranked"]) == 2
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_search_stopped_at_once_names_what_it_did_not_look_at(cells, models):
    stop = rf.StopToken()
    found = suggest(
        cells,
        [cells / "start.pt", models / "late.pt"],
        on_event=lambda event: stop.stop() if isinstance(event, Searched) else None,
        stop=stop,
    )
    assert [each.model for each in found] == [str(cells / "start.pt")]
    assert [(Path(each.model).name, each.reason.partition(":")[0]) for each in found.left_out] == [
        ("late.pt", "not looked at")
    ]


def test_a_known_name_is_that_model_though_a_folder_is_called_like_it(cells, tmp_path, monkeypatch):
    (tmp_path / "vit_b").mkdir()
    save_model(tmp_path / "vit_b" / "own.pt", load_model(cells / "start.pt", decoder="required"))
    monkeypatch.chdir(tmp_path)
    found, left_out = find_candidates(["vit_b", "vit_b/"])
    assert [each.model for each in found] == [str(Path("vit_b") / "own.pt")]
    assert [each.model for each in left_out] == ["vit_b"]


@pytest.mark.parametrize(
    ("reason", "brief"),
    [
        ("runs/a/model.pt: not a whole checkpoint (0.1 MB, bad zip); copy it again", "not a whole checkpoint"),
        (
            "cannot be downloaded: no server. Without network here: download https://a/b",
            "cannot be downloaded: no server",
        ),
        ("the same weights as starter", "the same weights as starter"),
    ],
)
def test_what_is_wrong_is_said_briefly(reason, brief):
    assert LeftOut("a", reason).brief == brief


def test_a_model_that_is_too_large_is_left_out_with_the_numbers(cells, tmp_path):
    save_model(tmp_path / "large.pt", load_model("random:vit_b", decoder="new"))
    found = suggest(
        cells,
        [cells / "start.pt", tmp_path / "large.pt"],
        patches=1,
        resources={**SMALL["resources"], "memory_gb": 2.1},
    )
    assert [Path(each.model).name for each in found] == ["start.pt"]
    assert "too large" in found.left_out[0].reason and "2.1 GB may be taken" in found.left_out[0].reason


def test_of_many_models_the_worse_half_is_dropped_and_the_time_left_comes_true(cells, tmp_path):
    for number in range(9):
        model = load_model(cells / "start.pt", decoder="none")
        with torch.no_grad():
            for parameter in model.sam.image_encoder.neck.parameters():
                parameter.mul_(1 - number / 10)
        save_model(tmp_path / f"{number}.pt", model)
    events: list[Event] = []
    training = {**SETTINGS["training"], "samples_per_epoch": 4}
    found = suggest(cells, tmp_path, patches=8, on_event=events.append, training=training)
    searched = [event for event in events if isinstance(event, Searched)]
    rounds = [(9, 4), (5, 8)]
    assert [each.patches for each in found] == [8] * 5 + [4] * 4
    assert [event.done for event in searched] == list(range(1, 9 * 4 + 5 * 4 + 1))
    assert {event.total for event in searched} == {count_looks(rounds)} == {56}
    assert searched[-1].seconds_left == 0
    assert all(event.seconds_left > 0 for event in searched[:-1])


def test_a_copy_that_was_dropped_early_is_too_close_to_call(cells, monkeypatch):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "samples_per_epoch": 8}}
    data = search_patches(make_config(settings, "test"), cells / "images", cells / "labels", 12)
    monkeypatch.setattr(measure, "score_patch", lambda *_: {"box_iou": (3.0, 4.0)})
    scored = {"long": measure.Scored("a"), "early": measure.Scored("b")}
    for name, count in (("long", 12), ("early", 5)):
        for patch in data.patches[:count]:
            # Tokens that say little of the classes, and the less the fewer there are.
            seed = torch.Generator().manual_seed(int(patch.key[:6], 16))
            tokens = torch.randn(1, 256, 8, 8, generator=seed) + patch.patch.targets[:1, ::8, ::8]
            scored[name].look(patch, None, lambda _, tokens=tokens: tokens, STEP, measure.ScoreStore(None))
    evidence = {name: each.evidence() for name, each in scored.items()}
    images = [patch.image for patch in data.patches]
    _, early = ranking.rank(evidence, images, ranking.WEIGHTS["both"], lambda name, n: scored[name].evidence(n))
    assert early.model == "early" and early.close
    assert scored["long"].evidence(5).whole == evidence["early"].whole != evidence["long"].whole


def test_a_search_with_more_models_keeps_what_is_there_and_says_how_long_the_rest_takes(cells, models, tmp_path):
    out, events = tmp_path / "out", []
    suggest(cells, cells / "start.pt", output=out, patches=2)
    (out / "search.json").write_text('{"ranked": [{}]')  # damaged, but only an output
    with holding(out / run_search.LOCK, "busy"), pytest.raises(ConfigError, match="another search is at work there"):
        suggest(cells, cells / "start.pt", output=out, patches=2)
    found = suggest(cells, [cells / "start.pt", models / "late.pt"], output=out, patches=2, on_event=events.append)
    assert len(found) == 2
    left = [event.seconds_left for event in events if isinstance(event, Searched)]
    # Two patches were found in no time, so nothing is known of the pace yet; then one of two is left.
    assert left[0] == left[1] > 0 and left[3] == 0
    assert left[2] == pytest.approx(
        sum(found_of(found, "late").seconds[part] for part in ("encode", "score")) / 2, rel=1
    )


def test_models_that_learned_from_these_images_are_named(cells, tmp_path):
    run(cells, tmp_path / "own", training={"epochs": 1, "samples_per_epoch": 2})
    found = suggest(cells, [cells / "start.pt", tmp_path / "own"])
    (note,) = (note for note in found.notes if "trained on images of the same names" in note)
    assert note.startswith(f"{tmp_path / 'own'}: ")


def test_a_pilot_settles_a_close_call_and_times_stand_beside_those_of_finetuning(cells, models, tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "_is_close", lambda *_: True)
    both = [cells / "start.pt", models / "late.pt"]
    events: list[Event] = []
    found = suggest(cells, both, output=tmp_path / "out", pilot_epochs=1, timing=True, on_event=events.append)
    said = [event.text for event in events if isinstance(event, Message)]
    assert found[0].scores["pilot"] >= found[1].scores["pilot"]
    assert sum("trained for 1 epoch with" in text for text in said) == 2
    assert sum("measuring 3 steps" in text for text in said) == 1  # one architecture
    for each in found:
        times = each.timing
        assert times["full"] == pytest.approx(times["full_step"])  # 2 samples in one batch, once
        assert times["frozen"] == pytest.approx(2 * times["encode"] + times["frozen_step"])
        searching = sum(sum(one.seconds.values()) for one in found) / 2
        assert times["break_even_models"] == pytest.approx(times["full"] / searching)
        assert min(times.values()) > 0
    assert (tmp_path / "out" / "times.png").is_file()
    assert "searching takes longer than training" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    left = {path.name for path in (tmp_path / "out").iterdir() if path.name != run_search.LOCK}
    assert left == {"features", "pictures", "report.html", "scores.json", "search.json", "times.png"}


def test_a_stop_in_a_short_training_leaves_the_ranking_and_says_that_nothing_was_settled(cells, models, monkeypatch):
    monkeypatch.setattr(ranking, "_is_close", lambda *_: True)
    stop = rf.StopToken()

    def watch(event: Event) -> None:
        if isinstance(event, Message) and "trained for 1 epoch with" in event.text:
            stop.stop()

    both = [cells / "start.pt", models / "late.pt"]
    found = suggest(cells, both, patches=1, pilot_epochs=1, on_event=watch, stop=stop)
    assert found.status == "stopped" and found.compared and found.start_from is not None
    assert any("before its short trainings had ended" in note for note in found.notes)
    assert not any("pilot" in each.scores for each in found)


def test_options_that_cannot_be_are_refused(cells, tmp_path):
    config = make_config({**SETTINGS, "data": {**SMALL["data"], "images": str(cells / "images")}}, "test")
    with pytest.raises(ConfigError, match=r"patches: found 2\.5; expected a whole number"):
        search.suggest(config, options=SearchOptions(cells / "start.pt", patches=2.5))
    with pytest.raises(ConfigError, match="patches: found 0"):
        search.suggest(config, options=SearchOptions(cells / "start.pt", patches=0))
    with pytest.raises(ConfigError, match="pilot epochs: found -1"):
        search.suggest(config, options=SearchOptions(cells / "start.pt", pilot_epochs=-1))

"""Ranking: intervals, close calls, rounds, what encoders share, and advice, without any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from napari_resfinetune.search import ranking
from napari_resfinetune.search.compare import plan_rounds
from napari_resfinetune.search.features import UnitHashes, shared_cuts
from napari_resfinetune.search.ranking import WEIGHTS, Evidence, Standing, uncertainty_in_words
from napari_resfinetune.search.results import Suggestion, advise
from napari_resfinetune.search.zero_shot import agreement

GROUPS = [f"image {index // 2}" for index in range(12)]


def evidence(sa50: float, spread: float = 0.05, patches: int = 12, seed: int = 0, **whole: float) -> Evidence:
    """A model that finds about this share of 10 objects a patch, and fits its boxes alike."""
    found = 10 * np.clip(sa50 + spread * np.random.default_rng(seed).normal(size=patches), 0, 1)
    rows = np.stack([found, np.full(patches, 10.0)], axis=1)
    return Evidence({"ais_sa50": rows, "box_iou": rows}, whole)


def rank(found: dict[str, Evidence], groups: list[str], weights: Mapping[str, float]) -> list[Standing]:
    def earlier(model: str, patches: int) -> Evidence:
        return Evidence({name: rows[:patches] for name, rows in found[model].sums.items()}, found[model].whole)

    return ranking.rank(found, groups, weights, earlier)


def test_better_models_come_first_with_intervals_around_their_scores():
    ranked = rank({"worse": evidence(0.3), "better": evidence(0.8, seed=1)}, GROUPS, WEIGHTS["both"])
    assert [each.model for each in ranked] == ["better", "worse"]
    for each, expected in zip(ranked, (0.8, 0.3), strict=True):
        assert each.low < each.score < each.high
        # What nobody has, as the probe here, counts as 0; so a score does not depend on who else is there.
        share = WEIGHTS["both"]["ais_sa50"] + WEIGHTS["both"]["box_iou"]
        assert each.score == pytest.approx(share * expected, abs=0.05)
        assert each.scores["ais_sa50"] == pytest.approx(expected, abs=0.05)
    assert not ranked[1].close


def test_models_that_differ_less_than_images_do_are_too_close_to_call():
    noisy = {name: evidence(sa50, 0.3, seed=seed) for seed, (name, sa50) in enumerate({"a": 0.5, "b": 0.5}.items())}
    assert rank(noisy, GROUPS, WEIGHTS["both"])[1].close
    # The same images for both: a small difference that is there on every image is seen.
    steady = {"a": evidence(0.54, 0.2, seed=3), "b": evidence(0.5, 0.2, seed=3)}
    assert not rank(steady, GROUPS, WEIGHTS["both"])[1].close
    # But not one that means nothing, or a small one on few images.
    nearly = {"a": evidence(0.505, 0.2, seed=3), "b": evidence(0.5, 0.2, seed=3)}
    assert rank(nearly, GROUPS, WEIGHTS["both"])[1].close
    assert rank(steady, ["one image"] * 6 + ["another"] * 6, WEIGHTS["both"])[1].close


def test_a_missing_decoder_counts_as_zero_whoever_else_is_there():
    without = Evidence({"box_iou": evidence(0.9).sums["box_iou"]}, {})
    ranked = rank({"without": without, "with": evidence(0.6)}, GROUPS, WEIGHTS["both"])
    assert [each.model for each in ranked] == ["with", "without"]
    (alone,) = rank({"without": without}, GROUPS, WEIGHTS["both"])
    assert alone.score == ranked[1].score == pytest.approx(WEIGHTS["both"]["box_iou"] * alone.scores["box_iou"])


def test_what_was_dropped_early_stays_behind_what_was_looked_at_longer():
    ranked = rank({"early": evidence(0.9, patches=4), "long": evidence(0.5)}, GROUPS, WEIGHTS["both"])
    assert [each.model for each in ranked] == ["long", "early"]


def test_who_was_dropped_is_compared_with_what_was_known_of_the_first_one_then():
    # LogME of all patches says more than that of a few; it is no reason to call the other one clearly behind.
    found = {"long": evidence(0.5, 0.3, logme_share=0.7), "early": evidence(0.5, 0.3, patches=6, logme_share=0.1)}
    then = {"same": evidence(0.5, 0.3, patches=6, logme_share=0.1), "better": evidence(0.9, patches=6, logme_share=0.1)}
    for name, close in (("same", True), ("better", False)):
        ranked = ranking.rank(found, GROUPS, WEIGHTS["both"], lambda *_, name=name: then[name])
        assert [(each.model, each.close) for each in ranked] == [("long", False), ("early", close)]


def test_one_patch_in_common_is_too_little_to_be_clearly_behind():
    ranked = rank({"long": evidence(0.52), "early": evidence(0.51, patches=1)}, GROUPS, WEIGHTS["both"])
    assert (ranked[1].close, ranked[1].low) == (True, None)


def test_one_patch_gives_a_ranking_without_intervals():
    ranked = rank(
        {"a": evidence(0.5, 0, 1), "b": evidence(0.49, 0, 1), "c": evidence(0.1, 0, 1)}, ["x"], {"box_iou": 1}
    )
    assert [(each.model, each.low, each.close) for each in ranked] == [
        ("a", None, False),
        ("b", None, True),
        ("c", None, False),
    ]
    assert "one patch" in uncertainty_in_words(["x"])
    assert "only one image" in uncertainty_in_words(["x", "x"])
    assert "4 images" in uncertainty_in_words(["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("models", "patches", "rounds"),
    [
        (3, 16, [(3, 16)]),
        (8, 16, [(8, 16)]),
        (9, 16, [(9, 8), (5, 16)]),
        (40, 16, [(40, 4), (20, 8), (10, 16)]),
        (40, 6, [(40, 6)]),
    ],
)
def test_many_models_are_halved_while_patches_double(models, patches, rounds):
    assert plan_rounds(models, patches, halving=True) == rounds
    assert plan_rounds(models, patches, halving=False) == [(models, patches)]


def test_encoders_share_what_they_have_in_common_from_the_start():
    is_block = (False, True, True, True, False)

    def units(*hashes: str) -> UnitHashes:
        return UnitHashes(hashes, is_block)

    cuts = shared_cuts(
        {
            "start": units("s", "1", "2", "3", "n"),
            "late": units("s", "1", "2", "3x", "nx"),
            "later": units("s", "1", "2", "3", "ny"),
            "frozen": units("s", "1", "2", "3", "n"),
            "full": units("s", "1x", "2x", "3", "n"),
            "other": UnitHashes(("t", "1", "2"), (False, True, True)),
        }
    )
    assert cuts == {
        "start": (3, 4, 5),
        "late": (3,),
        "later": (3, 4),
        "frozen": (3, 4, 5),
        "full": (),  # a stem alone is not worth a file
        "other": (),
    }


def test_agreement_is_the_segmentation_accuracy_as_sums():
    one = np.zeros((20, 20), np.int64)
    one[2:8, 2:8], one[12:18, 12:18] = 1, 2
    other = np.where(one == 1, 5, 0)
    assert agreement(one, one) == (2.0, 2.0)
    assert agreement(one, other) == pytest.approx((1.0, 2.0))
    assert agreement(one, np.zeros_like(one)) == (0.0, 2.0)
    assert agreement(np.zeros_like(one), np.zeros_like(one)) == (1.0, 1.0)


def suggestion(model: str, architecture: str, close: bool) -> Suggestion:
    return Suggestion(model, 0.5, 1, None, None, close, architecture, True, {}, 4, {})


def test_advice_prefers_the_smaller_of_models_that_are_too_close_to_call():
    clear = [suggestion("vit_b_lm", "vit_b", False), suggestion("vit_t", "vit_t", False)]
    assert advise(clear, labelled=True).startswith("start from vit_b_lm")
    close = [suggestion("vit_b_lm", "vit_b", True), suggestion("vit_t_lm", "vit_t", True)]
    assert "start from vit_t_lm, which is smaller" in advise(close, labelled=True)
    same = [suggestion("one.pt", "vit_t", True), suggestion("two.pt", "vit_t", True)]
    assert advise(same, labelled=True).startswith("start from one.pt")
    assert "two.pt is too close to call" in advise(same, labelled=True)
    settled = [dataclasses.replace(each, scores={"pilot": 0.5}) for each in close]
    assert "start from vit_b_lm: of the models that were too close" in advise(settled, labelled=True)
    assert "only model that was compared, with a score of 0.50" in advise(clear[:1], labelled=True)

"""One model on some patches: embeddings, scores of each patch, and what they add up to."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_resfinetune.data.patches import Patch
from napari_resfinetune.errors import ConfigError, ModelError
from napari_resfinetune.models import SamModel
from napari_resfinetune.search.logme import explained_share
from napari_resfinetune.search.patches import SearchPatch, token_targets
from napari_resfinetune.search.probe import TARGETS, leave_one_out, moments
from napari_resfinetune.search.ranking import Evidence, sums_of_probe
from napari_resfinetune.search.zero_shot import perturb, score_patch, steadiness
from napari_resfinetune.training.step import StepSettings

# Tokens of each class that LogME looks at, in all and of one patch.
TOKENS_PER_CLASS, TOKENS_PER_PATCH = 400, 100
QUARTERS = 4
FORMAT = 3
Embed = Callable[[Patch], Tensor]


@dataclass
class Scored:
    """What is known of one model so far; `patches` are looked at in order.

    Attributes
    ----------
    key
        Hash of its weights and of how patches are brought to it.
    by_quarter
        Whether the probe leaves out quarters of patches, as there is a single image.
    rows
        Zero-shot scores of each patch.
    seconds
        What took how long.
    """

    key: str
    by_quarter: bool = False
    rows: list[Mapping[str, tuple[float, float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "encode": 0.0, "score": 0.0})
    groups: list[str] = field(default_factory=list)
    products: list[NDArray[np.float64]] = field(default_factory=list)
    tokens: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = field(default_factory=list)

    def look(
        self, patch: SearchPatch, model: SamModel, embed: Embed, settings: StepSettings, store: ScoreStore
    ) -> None:
        """Score the model on one more patch with labels.

        Raises
        ------
        ModelError
            When what the image encoder gives are no numbers.
        """
        began = time.perf_counter()
        embedding = _numbers(embed(patch.patch), model)
        encoded = time.perf_counter()
        kept = store.get(self.key, patch.key)
        row = kept.row if kept is not None else score_patch(model, patch.patch, embedding, settings)
        self._learn_tokens(patch, embedding)
        new = Kept(row, encoded - began, time.perf_counter() - encoded)
        self._done(patch, store.put(self.key, patch.key, kept or new))

    def look_unlabelled(
        self, patch: SearchPatch, model: SamModel, embed: Embed, settings: StepSettings, store: ScoreStore
    ) -> None:
        """The same for a patch without labels."""
        began = time.perf_counter()
        kept = store.get(self.key, patch.key)
        if kept is None:
            embedding = _numbers(embed(patch.patch), model)
            changed = _numbers(embed(perturb(patch.patch, _seed_of(patch))), model)
            encoded = time.perf_counter()
            row = steadiness(model, patch.patch, embedding, changed, settings)
            kept = store.put(self.key, patch.key, Kept(row, encoded - began, time.perf_counter() - encoded))
        self._done(patch, kept)

    def evidence(self, patches: int | None = None) -> Evidence:
        """Add up what is known, or what was known after so many patches."""
        rows = self.rows[:patches]
        names = dict.fromkeys(name for row in rows for name in row)
        sums = {name: np.array([row[name] for row in rows], np.float64) for name in names}
        whole: dict[str, float] = {}
        if self.products:
            sums |= self._probe(len(rows))
            classes = _balanced(self.tokens[:patches])
            if classes is not None:
                whole["logme"], whole["logme_share"] = explained_share(*classes)
        return Evidence(sums, whole)

    def _done(self, patch: SearchPatch, kept: Kept) -> None:
        self.rows.append(kept.row)
        self.groups.append(patch.group)
        self.seconds["encode"] += kept.encode_seconds
        self.seconds["score"] += kept.score_seconds

    def _learn_tokens(self, patch: SearchPatch, embedding: Tensor) -> None:
        side = int(embedding.shape[-1])
        targets, classes, inside = token_targets(patch.patch, side)
        tokens = embedding[0].flatten(1).T.cpu().numpy()
        parts = [_quarters(side) == number for number in range(QUARTERS)] if self.by_quarter else [inside]
        self.products += [moments(tokens[inside & part], targets[inside & part]) for part in parts]
        rng = np.random.default_rng(_seed_of(patch))
        chosen = [rng.permutation(np.flatnonzero(inside & (classes == each)))[:TOKENS_PER_PATCH] for each in range(3)]
        kept = np.concatenate(chosen)
        self.tokens.append((tokens[kept], classes[kept]))

    def _probe(self, patches: int) -> dict[str, NDArray[np.float64]]:
        """Leave out image by image, or quarter by quarter; sums are of patches."""
        groups = self.groups[:patches]
        names = list(dict.fromkeys(groups))
        if self.by_quarter:
            units = [number % QUARTERS for number in range(QUARTERS * patches)]
        else:
            units = [names.index(group) for group in groups]
        found = leave_one_out(self.products[: len(units)], units, len(TARGETS))
        shape = (patches, -1, len(TARGETS))
        return sums_of_probe(found.explained.reshape(shape).sum(1), found.spread.reshape(shape).sum(1))


@dataclass(frozen=True)
class Kept:
    """Scores of a model on a patch, and what they took when they were computed."""

    row: Mapping[str, tuple[float, float]]
    encode_seconds: float
    score_seconds: float


class ScoreStore:
    """Scores of patches that were computed before, in one file, so that a search can go on where it stopped.

    Parameters
    ----------
    path
        The file; `None` keeps nothing.

    Raises
    ------
    ConfigError
        When the file is damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Kept]] = {}
        if path is None or not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] == FORMAT:
                self._rows = {
                    key: {patch: _kept(**each) for patch, each in rows.items()} for key, rows in content["rows"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); delete it, and scores are computed again") from None

    def get(self, key: str, patch: str) -> Kept | None:
        """Return the scores of a model on a patch, if they are there."""
        return self._rows.get(key, {}).get(patch)

    def put(self, key: str, patch: str, kept: Kept) -> Kept:
        """Remember the scores of a model on a patch, and return them."""
        self._rows.setdefault(key, {})[patch] = kept
        return kept

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        new = self.path.with_name(f".{self.path.name}.new")
        rows = {key: {patch: asdict(kept) for patch, kept in each.items()} for key, each in self._rows.items()}
        new.write_text(json.dumps({"format": FORMAT, "rows": rows}), encoding="utf-8")
        os.replace(new, self.path)


def _kept(row: Mapping[str, tuple[float, float]], encode_seconds: float, score_seconds: float) -> Kept:
    return Kept({name: (float(a), float(b)) for name, (a, b) in row.items()}, encode_seconds, score_seconds)


def key_of(weights: str, settings: StepSettings) -> str:
    """Return the name of a model and of how patches are brought to it."""
    described = json.dumps([weights, settings.input_px, settings.positions, str(settings.autocast)])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _balanced(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]],
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Return as many tokens of each class as there are of the rarest; `None` when there is one class only."""
    tokens, classes = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    there, counts = np.unique(classes, return_counts=True)
    if len(there) < 2:
        return None
    count = min(int(counts.min()), TOKENS_PER_CLASS)
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(classes == each))[:count] for each in there])
    return tokens[chosen], classes[chosen]


def _seed_of(patch: SearchPatch) -> int:
    """Return a seed that a patch has in every search."""
    return int(patch.key[:8], 16)


def _numbers(embedding: Tensor, model: SamModel) -> Tensor:
    if not bool(torch.isfinite(embedding).all()):
        raise ModelError(f"{model.name}: its image encoder gives values that are no numbers; use another checkpoint")
    return embedding


def _quarters(side: int) -> NDArray[np.int64]:
    """Return which quarter of the patch each token is in."""
    half = np.arange(side) >= side / 2
    return np.asarray((2 * half[:, None] + half[None, :]).ravel().astype(np.int64))

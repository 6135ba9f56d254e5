"""Scores a trained cell on a split: classification, class maps of every reading, entropy of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acr_reg import (
    AttentionCapture,
    HorizontalFlip,
    capture_attention,
    class_token_gradient_cam,
    propagate_cam,
)
from acr_reg.demo.class_tokens import class_token_attention, fused
from acr_reg.demo.scoring import mean_average_precision, resized
from acr_reg.demo.train import with_grid
from acr_reg.metrics import CamMeanIoU, CamScores
from benchmarks.study.counts import ImageCounts, multi_label
from benchmarks.study.photos import Photos
from benchmarks.study.settings import CLASS_TOKENS, NETWORKS, PROPAGATIONS, Reading, readings
from benchmarks.study.training.networks import Run, StudyNetwork
from benchmarks.study.training.objective import entropies

_AT_ONCE = 32
RAW = "raw"
GRADIENT_START = -3  # of the gradient maps of the network with class tokens, which are read for comparison alone

Key = tuple[int, str]  # start layer; how it was propagated, RAW, or another kind of map


@dataclass(frozen=True)
class Scored:
    """The scores of a split. ``images``: a counter for each image, by the maps of the requested reading; ``totals``: by
    all readings. ``agreement``: the correlation of a map of the photo with that of the flip, flipped back, as a mean
    over the present classes of all photos, of the maps of the requested reading."""

    mean_ap: float
    totals: dict[Key, CamMeanIoU]
    images: dict[Key, list[CamMeanIoU]]
    agreement: dict[Key, float]
    entropies: list[list[float]]


def keys_of(network: str, reading: Reading) -> dict[str, Key]:
    """Which maps stand for the names of a network's maps at a reading."""
    keys = {RAW: (reading.start, RAW), "propagated": (reading.start, reading.propagation)}
    others = {
        "patch": (0, "patch"),
        "attention": (reading.start, "attention"),
        "gradient": (GRADIENT_START, "gradient"),
    }
    return keys | {name: others[name] for name in NETWORKS[network].maps if name in others}


def score(
    photos: Photos,
    model: StudyNetwork,
    split: str,
    network: str,
    reading: Reading,
    every_reading: bool,
    advance: Callable[[], None] = lambda: None,
) -> Scored:
    """Score class maps of the photos and their flips from cached tokens; the frozen blocks do not run.
    ``every_reading`` scores all readings, at the cost of a backward pass for each start layer of gradient maps. The
    model is left in eval mode, with parameters that take no gradient."""
    shown = readings(network) if every_reading else (reading,)
    tokens, labels, masks = photos.tokens(split), photos.labels(split), photos.masks(split)
    first = int(photos.folder.background)
    totals: dict[Key, CamMeanIoU] = {}
    kept: dict[Key, dict[int, CamMeanIoU]] = {key: {} for key in keys_of(network, reading).values()}
    agreements: dict[Key, list[float]] = {key: [] for key in kept}
    logits = torch.zeros_like(labels)
    entropy, sizes = [], []
    # A batch takes as many backward passes as its photo with most labels has, so photos with equally many go together.
    order = labels.sum(1).argsort(stable=True)
    model = model.eval().requires_grad_(False)
    lowest = GRADIENT_START if network == CLASS_TOKENS else min(each.start for each in shown)
    with capture_attention(model, graph_from=len(model.blocks) + lowest) as attention:
        for part in order.split(_AT_ONCE):
            batch = torch.from_numpy(np.array(tokens[:, part.numpy()])).float()
            found = class_maps(model, attention, batch, labels[part], photos.grid, shown)
            logits[part] = found.logits
            entropy.append(found.entropies)
            sizes.append(len(part))
            for position, image in enumerate(part.tolist()):
                present = labels[image].nonzero()[:, 0]
                for key, views in found.views.items():
                    a, b = (cams[position, present] for cams in views)
                    counter = CamMeanIoU(photos.classes + first, background=bool(first))
                    counter.update(resized(a + b, masks[image].shape).numpy(), masks[image], (present + first).tolist())
                    totals[key] = totals[key] + counter if key in totals else counter
                    if key in kept:
                        kept[key][image] = counter
                        agreements[key] += correlations(a, b).tolist()
            advance()
    weights = torch.tensor(sizes, dtype=torch.float32) / sum(sizes)
    mean_entropy = (torch.stack(entropy) * weights[:, None, None]).sum(0)
    images = {key: [counters[image] for image in range(len(labels))] for key, counters in kept.items()}
    agreement = {key: float(np.mean(values)) for key, values in agreements.items()}
    return Scored(mean_average_precision(logits, labels), totals, images, agreement, mean_entropy.tolist())


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """(K,): the correlation over pixels of each map of ``a`` (K,h,w) with that of ``b``; 0 where a map is constant."""
    a, b = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (a, b))
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


# ------------------------------------------------------------ class maps


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """``views``: the class maps (B,C,h,w) of photos and of their flips, flipped back. Also the photos' logits and the
    entropies of both views."""

    views: dict[Key, tuple[Tensor, Tensor]]
    logits: Tensor
    entropies: Tensor

    @property
    def merged(self) -> dict[Key, Tensor]:
        """Their sum, which is scored."""
        return {key: a + b for key, (a, b) in self.views.items()}


def class_maps(
    model: StudyNetwork,
    attention: AttentionCapture,
    tokens: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    shown: Sequence[Reading],
) -> ClassMaps:
    """Class maps of each reading. ``tokens`` (2,B,1+N,D) are those of the photos and of their flips."""
    back = HorizontalFlip().inverse
    found: list[dict[Key, Tensor]] = []
    runs: list[Run] = []
    for inputs in tokens:
        output = model(inputs)
        run = Run.of(output, with_grid(attention.take(), grid, model.num_prefix_tokens))
        cams = _gradient_maps(run, labels, shown) if run.output is None else _class_token_maps(run, labels, shown)
        found.append(cams)
        runs.append(Run(run.logits.detach(), run.maps.detach()))
    with torch.no_grad():
        entropy = torch.stack([entropies(run.maps) for run in runs]).mean(0)
    photo, flip = found
    return ClassMaps({key: (photo[key], back(flip[key])) for key in photo}, runs[0].logits, entropy)


def _gradient_maps(run: Run, labels: Tensor, shown: Sequence[Reading]) -> dict[Key, Tensor]:
    """The gradient of the logits from each start layer, and spread over the affinity."""
    raws = {start: class_token_gradient_cam(run.logits, run.maps, labels, start) for start in _starts(shown)}
    return _with_spread(raws, run, shown)


def _class_token_maps(run: Run, labels: Tensor, shown: Sequence[Reading]) -> dict[Key, Tensor]:
    """Head's map, attention of class tokens, fused and spread, and the gradient of the class tokens' logits."""
    assert run.output is not None
    logits = run.output.class_logits
    gradient = class_token_gradient_cam(logits, run.maps, labels, GRADIENT_START)
    head = run.output.maps.detach().float()
    with torch.no_grad():
        layers = range(len(run.maps))
        attention = {start: class_token_attention(run.maps, layers[start:]) for start in _starts(shown)}
        raws = {start: fused(head, cams) for start, cams in attention.items()}
    others = {(start, "attention"): cams for start, cams in attention.items()}
    return _with_spread(raws, run, shown) | others | {(0, "patch"): head.relu(), (GRADIENT_START, "gradient"): gradient}


def _starts(shown: Sequence[Reading]) -> list[int]:
    return sorted({reading.start for reading in shown}, reverse=True)


@torch.no_grad()
def _with_spread(raws: dict[int, Tensor], run: Run, shown: Sequence[Reading]) -> dict[Key, Tensor]:
    cams: dict[Key, Tensor] = {(start, RAW): cam for start, cam in raws.items()}
    for reading in shown:
        cam = propagate_cam(raws[reading.start], run.maps, PROPAGATIONS[reading.propagation])
        cams[reading.start, reading.propagation] = cam
    return cams


# ------------------------------------------------------------ figures


@dataclass(frozen=True)
class MapFigures:
    """Scores of one kind of class maps. ``threshold``, the best one on dev, gives ``miou``, the rates (pixels over the
    union, averaged over classes) and the counts; ``oracle`` is the split's own best. Thresholds are None in a set
    without a background. ``multi_label`` is the mIoU of the photos with two labels or more."""

    miou: float
    threshold: float | None
    oracle: float
    oracle_threshold: float | None
    curve: list[float]
    per_class_iou: list[float | None]
    false_positive: float
    false_negative: float
    multi_label: float
    counts: str


def figures(
    total: CamMeanIoU, images: Sequence[CamMeanIoU], present: Sequence[Sequence[int]], threshold: float | None
) -> MapFigures:
    """``threshold`` None takes the best of these images: on dev, where it is chosen for the other splits."""
    scores: CamScores = total.compute()
    if not total.background:
        index = 0
    else:
        chosen = scores.best_threshold if threshold is None else threshold
        assert chosen is not None
        index = int(np.abs(scores.thresholds - chosen).argmin())
    counts = image_counts(images, index)
    predicted, correct, truth = (part.sum(0) for part in (counts.predicted, counts.correct, counts.truth))
    union = predicted + truth - correct
    occurs = union > 0
    first = int(total.background)
    iou, wrong, missed = (
        np.where(occurs, part / np.maximum(union, 1), np.nan)
        for part in (correct, predicted - correct, truth - correct)
    )
    return MapFigures(
        miou=counts.miou(),
        threshold=float(scores.thresholds[index]) if total.background else None,
        oracle=scores.best_miou,
        oracle_threshold=scores.best_threshold,
        curve=[round(float(value), 4) for value in scores.miou],
        per_class_iou=[None if np.isnan(value) else round(float(value), 4) for value in iou],
        false_positive=float(np.nanmean(wrong[first:])),
        false_negative=float(np.nanmean(missed[first:])),
        multi_label=counts.miou(multi_label(present)),
        counts=counts.pack(),
    )


def image_counts(images: Sequence[CamMeanIoU], index: int) -> ImageCounts:
    """The counts of every image at the threshold of that index."""
    found = [counter.counts() for counter in images]
    return ImageCounts(
        np.stack([each.predicted[:, index] for each in found]),
        np.stack([each.correct[:, index] for each in found]),
        np.stack([each.truth for each in found]),
    )

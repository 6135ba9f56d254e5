"""What each condition adds to classification: the library's consistency loss, or the control without views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, class_token_gradient_cam
from benchmarks.study.photos import Batch
from benchmarks.study.settings import CLASS_TOKENS, CONDITIONS, LAYERS, Setting, StudyError
from benchmarks.study.training.networks import Run
from benchmarks.study.views import blurred, misreported

# Of the squared distance, whose pull fades as the entropy is reached. The absolute distance at a weight of 10 kept
# pulling at full strength: after two epochs on MSRC the classification loss was 0.50 ("both": 0.36, reference: 0.31)
# and the entropy still 0.025 off. The record of every such cell says how far off it stays.
ENTROPY_WEIGHT = 30.0


class Objective(nn.Module):
    """The added loss of a step, and its terms for the record.

    ``targets`` (steps, layers, 2) are the :func:`entropies` of the cell "both", which "smoothing" follows step by step.
    ``recorded`` (steps, layers, 2) is filled for the cells whose entropies may be needed.
    """

    def __init__(self, setting: Setting, steps: int, seed: int, targets: Tensor | None = None) -> None:
        super().__init__()
        self.setting, self.steps, self.targets = setting, steps, targets
        self.condition = condition = CONDITIONS[setting.condition]
        self.acr: AllPairsConsistencyLoss | None = None
        if condition.activation or condition.affinity or condition.cam:
            self.acr = AllPairsConsistencyLoss(
                activation_weight=setting.weight if condition.activation else 0.0,
                affinity_weight=setting.weight if condition.affinity else 0.0,
                cam_weight=setting.cam_weight,
                distance=setting.distance,
                layers=LAYERS[setting.layers],
                # Dense takes less time where maps are this small. The other network's cells were run before.
                blockwise=False if setting.network == CLASS_TOKENS else None,
                blur_alike=condition.blur_alike,
            )
        if condition.entropy_of_both and (targets is None or len(targets) != steps):
            found = "no entropies" if targets is None else f"the entropies of {len(targets)} steps"
            raise StudyError(
                f"{setting.slug} has {found} to follow and needs those of {steps}. Train the cell 'both' first, by the "
                "same setting and seed."
            )
        self.recorded: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def needs_maps(self) -> bool:
        return self.acr is not None or self.condition.entropy_of_both

    def forward(self, runs: Sequence[Run], batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """``runs`` are those of the photos and of their view; the tokens of their maps are on a grid."""
        if self.condition.entropy_of_both:
            assert self.targets is not None
            found = torch.stack([entropies(run.maps) for run in runs]).mean(0)
            gap = found - self.targets[step]
            self.recorded.append(found.detach())
            terms = {"entropy_gap": gap.detach().abs().mean().item(), "entropy": found.mean().item()}
            return ENTROPY_WEIGHT * gap.square().mean(), terms
        if self.acr is None:
            return runs[0].logits.new_zeros(()), {}
        a, b = runs
        maps_b = b.maps.detach() if self.setting.stop_gradient else b.maps
        if self.condition.blurred:
            maps_b = blurred(maps_b)
        cams, labels = self._cams(runs, batch.labels)
        view = batch.view if self.condition.reported else misreported(batch.view)
        labels = batch.labels if self.setting.network == CLASS_TOKENS else labels  # of the class tokens that count
        loss, terms = self.acr(
            a.maps, maps_b, *cams, view=view, labels=labels, scale=self._scale(step), return_terms=True
        )
        if self.condition.activation and self.condition.affinity and self.condition.reported and not cams:
            with torch.no_grad():
                self.recorded.append(torch.stack([entropies(run.maps) for run in runs]).mean(0))
        return loss, {name: term.item() for name, term in terms.items()}

    def _scale(self, step: int) -> float:
        rising = self.setting.warmup * self.steps
        return min(1.0, (step + 1) / rising) if rising else 1.0

    def _cams(self, runs: Sequence[Run], labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Differentiable class maps of both views, and the labels of those that count. The head has a map of every
        class. A gradient map takes one more backward pass with a graph, so there it is that of one class of each photo,
        drawn at random, the same in both views."""
        if not self.condition.cam:
            return [], None
        a, b = (run.output for run in runs)
        if a is not None and b is not None:
            return [a.maps.float(), b.maps.detach().float() if self.setting.stop_gradient else b.maps.float()], labels
        drawn = torch.multinomial(labels, 1, generator=self._generator)
        one = torch.zeros_like(labels).scatter_(1, drawn, 1)
        start = self.setting.cam_start
        cams = [class_token_gradient_cam(run.logits, run.maps, one, start, create_graph=True) for run in runs]
        return [cams[0], cams[1].detach() if self.setting.stop_gradient else cams[1]], one


def entropies(maps: AttentionMaps) -> Tensor:
    """(layers, 2): the mean entropy of the class token's rows and of the patches' rows, over ln M; differentiable."""
    found = []
    for layer in maps:
        rows = layer.weights()
        tiny = torch.finfo(rows.dtype).tiny
        entropy = -(rows * rows.clamp_min(tiny).log()).sum(-1) / torch.log(torch.tensor(float(rows.shape[-1])))
        prefix = layer.layout.num_prefix_tokens
        found.append(torch.stack([entropy[..., :prefix].mean(), entropy[..., prefix:].mean()]))
    return torch.stack(found)

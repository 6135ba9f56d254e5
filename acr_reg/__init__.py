"""acr_reg: all-pairs consistency regularization (arXiv 2308.04321) for any vision transformer, in three lines."""

from ._versions import require_supported_versions

require_supported_versions()

from acr_reg._hooks import CaptureError  # noqa: E402
from acr_reg.alignment import align_attention, align_tokens, token_validity  # noqa: E402
from acr_reg.attention import AttentionMaps, LayerAttention  # noqa: E402
from acr_reg.cam import class_token_gradient_cam, multi_view_cam, propagate_cam  # noqa: E402
from acr_reg.capture import AttentionCapture, capture_attention  # noqa: E402
from acr_reg.check import Check, LayerCheck, check  # noqa: E402
from acr_reg.functional import normalize_cam  # noqa: E402
from acr_reg.gradient_cam import GradientCam  # noqa: E402
from acr_reg.losses import AllPairsConsistencyLoss  # noqa: E402
from acr_reg.metrics import CamCounts, CamMeanIoU, CamScores  # noqa: E402
from acr_reg.samplers import (  # noqa: E402
    RandomApply,
    RandomChoice,
    RandomCompose,
    RandomResizedCrop,
    RandomScale,
)
from acr_reg.tokens import Lattice, LayoutError, TokenLayout, Window  # noqa: E402
from acr_reg.views import (  # noqa: E402
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    PerImage,
    Rotate90,
    Scale,
    VerticalFlip,
    View,
)

__version__ = "0.1.0"

__all__ = [
    "AllPairsConsistencyLoss",
    "AttentionCapture",
    "AttentionMaps",
    "CamCounts",
    "CamMeanIoU",
    "CamScores",
    "CaptureError",
    "Check",
    "Compose",
    "Crop",
    "GradientCam",
    "HorizontalFlip",
    "Identity",
    "Lattice",
    "LayerAttention",
    "LayerCheck",
    "LayoutError",
    "PerImage",
    "RandomApply",
    "RandomChoice",
    "RandomCompose",
    "RandomResizedCrop",
    "RandomScale",
    "Rotate90",
    "Scale",
    "TokenLayout",
    "VerticalFlip",
    "View",
    "Window",
    "align_attention",
    "align_tokens",
    "capture_attention",
    "check",
    "class_token_gradient_cam",
    "multi_view_cam",
    "normalize_cam",
    "propagate_cam",
    "token_validity",
]

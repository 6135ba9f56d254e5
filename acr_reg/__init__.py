"""acr_reg: all-pairs consistency regularization (arXiv 2308.04321) for any vision transformer, in three lines."""

from ._versions import require_supported_versions

require_supported_versions()

from acr_reg.alignment.functional import align_attention, align_tokens, token_validity  # noqa: E402
from acr_reg.attention.layer import LayerAttention  # noqa: E402
from acr_reg.attention.maps import AttentionMaps  # noqa: E402
from acr_reg.cam.attention import attention_rollout, class_attention  # noqa: E402
from acr_reg.cam.gradient import class_token_gradient_cam  # noqa: E402
from acr_reg.cam.inference import GradientCam  # noqa: E402
from acr_reg.cam.refinement import (  # noqa: E402
    multi_view_cam,
    normalize_cam,
    propagate_cam,
)
from acr_reg.capture.handle import AttentionCapture, capture_attention  # noqa: E402
from acr_reg.errors import (  # noqa: E402
    CaptureError,
    LayoutError,
)
from acr_reg.inspection.check import check  # noqa: E402
from acr_reg.inspection.report import Check, LayerCheck  # noqa: E402
from acr_reg.losses.all_pairs import AllPairsConsistencyLoss  # noqa: E402
from acr_reg.metrics import CamCounts, CamMeanIoU, CamScores, LabelMeanIoU, LabelScores  # noqa: E402
from acr_reg.tokens import Lattice, TokenLayout, Window  # noqa: E402
from acr_reg.views.constructors import (  # noqa: E402
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    PerImage,
    Rotate90,
    Scale,
    VerticalFlip,
)
from acr_reg.views.samplers import RandomApply, RandomChoice, RandomCompose, RandomResizedCrop, RandomScale  # noqa: E402
from acr_reg.views.view import View  # noqa: E402

__version__ = "0.2.0"

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
    "LabelMeanIoU",
    "LabelScores",
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
    "attention_rollout",
    "capture_attention",
    "check",
    "class_attention",
    "class_token_gradient_cam",
    "multi_view_cam",
    "normalize_cam",
    "propagate_cam",
    "token_validity",
]

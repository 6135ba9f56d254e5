"""A folder of photos, and weights for the model that reads it. Imports stand inside: the core's tests load this too."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

LABELS = {"a": [1], "b": [3], "c": [1, 3], "d": [2], "e": [1, 2], "f": [3]}
SPLITS = {"train": "a b c d", "dev": "e f", "test": "c e"}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's own first weights in half precision, as the .npz that the demo reads; positions of a 3 x 3 grid."""
    import numpy as np
    import timm

    from acr_reg.demo.photos.pretrained import NAME

    torch.manual_seed(0)
    state = timm.create_model(NAME, pretrained=False, img_size=42, num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(path, **{name: tensor.half().numpy() for name, tensor in state.items()})
    return path


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """Writes six photos of three classes, by default with a background."""

    def make(classes: Sequence[str] = ("background", "cat", "bird", "dog")) -> Path:
        from tests.support.photo_folder import write_photo_folder

        return write_photo_folder(tmp_path / "photos", classes, LABELS, SPLITS)

    return make

"""The pretrained model in two halves, and its weights."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from acr_reg.demo.photos.pretrained import NAME, build, describe, load_weights, resize_positions
from acr_reg.errors import CommandError
from tests.support.attention import says


def test_the_two_halves_are_the_whole_model(weights: Path) -> None:
    lower, upper = build(num_classes=5, size=28, frozen=4, weights=weights)
    whole = timm.create_model(NAME, pretrained=False, img_size=28, num_classes=5).eval()
    state = load_weights(weights)
    state["pos_embed"] = resize_positions(state["pos_embed"], 2)
    whole.load_state_dict(state | {f"head.{name}": value for name, value in upper.head.state_dict().items()})
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(upper(lower(images)), whole(images), atol=1e-5)
    assert len(upper.blocks) == 8
    assert not any(parameter.requires_grad for parameter in lower.parameters())
    assert all(parameter.requires_grad for parameter in upper.parameters())


def test_positions_are_resized_as_an_image_and_the_class_token_kept() -> None:
    table = torch.randn(1, 1 + 9, 4)
    assert resize_positions(table, 3) is table
    larger = resize_positions(table, 6)
    expected = torch.nn.functional.interpolate(
        table[:, 1:].reshape(1, 3, 3, 4).permute(0, 3, 1, 2), (6, 6), mode="bicubic", align_corners=False
    )
    assert torch.equal(larger[:, :1], table[:, :1])
    assert torch.equal(larger[:, 1:].reshape(1, 6, 6, 4).permute(0, 3, 1, 2), expected)


def test_weights_of_unknown_origin_are_called_so(weights: Path) -> None:
    assert describe(weights) == "weights of weights.npz, which may have seen masks"


@pytest.mark.parametrize("content", [None, b"", b"no tensors", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", ["npz", "pth"])
def test_weights_that_cannot_be_read_are_refused(tmp_path: Path, suffix: str, content: bytes | None) -> None:
    path = tmp_path / f"weights.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError) as error:
        load_weights(path)
    assert says(error, f"--weights {path} cannot be read", ".npz or torch file")


def test_weights_that_are_damaged_inside_an_archive_are_refused(tmp_path: Path) -> None:
    """What zlib says is no error of zipfile."""
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, a=np.arange(1000.0))
    content = path.read_bytes()
    for at in range(60, 400, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        with pytest.raises(CommandError, match=r"weights\.npz cannot be read"):
            load_weights(path)


def test_the_origin_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as error:
        describe(tmp_path / "weights.npz")
    assert says(error, f"--weights {tmp_path / 'weights.npz'}", "FileNotFoundError")


def test_weights_of_another_model_are_refused_with_what_does_not_fit(tmp_path: Path, weights: Path) -> None:
    state = load_weights(weights)
    state["more"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CommandError) as error:
        build(num_classes=2, size=28, frozen=4, weights=tmp_path / "weights.pth")
    assert says(error, NAME, "Missing: ['norm.bias']", "Unexpected: ['more']", "--weights FILE")


@pytest.mark.parametrize(
    ("size", "frozen", "facts"),
    [
        (100, 6, ("--size is 100", "multiple of 14", "try 98")),
        (28, 0, ("--frozen is 0", "1 to 11", "12 blocks")),
        (28, 12, ("--frozen is 12", "1 to 11", "12 blocks")),
    ],
)
def test_halves_that_cannot_be_are_refused(weights: Path, size: int, frozen: int, facts: tuple[str, ...]) -> None:
    with pytest.raises(CommandError) as error:
        build(num_classes=2, size=size, frozen=frozen, weights=weights)
    assert says(error, *facts)

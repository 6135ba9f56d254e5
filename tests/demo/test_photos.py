"""The demo on a folder of photos in VOC layout: reading it, the split model, and the command from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from acr_reg.__main__ import main
from acr_reg.demo.photo_folder import open_folder
from acr_reg.demo.photo_task import PhotoSettings, PhotoTask
from acr_reg.demo.pretrained import NAME, build, describe, load_weights, resize_positions
from acr_reg.errors import CommandError
from tests.support.photo_folder import write_photo_folder

NAMES = ["background", "cat", "bird", "dog"]
LABELS = {"a": [1], "b": [3], "c": [1, 3], "d": [2], "e": [1, 2], "f": [3]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's own first weights in half precision, as the .npz that the demo reads; positions of a 3 x 3 grid."""
    torch.manual_seed(0)
    state = timm.create_model(NAME, pretrained=False, img_size=42, num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(path, **{name: tensor.half().numpy() for name, tensor in state.items()})
    return path


def make_folder(root: Path, names: list[str]) -> Path:
    return write_photo_folder(root, names, LABELS, {"train": "a b c d", "dev": "e f", "test": "c e"})


def test_classes_left_out_become_unknown_and_photos_of_them_alone_are_dropped(tmp_path: Path) -> None:
    folder = open_folder(make_folder(tmp_path, NAMES), ["dog", "cat"])
    assert folder.background
    assert folder.names == ("background", "cat", "dog")
    assert folder.splits == {"train": ["a", "b", "c"], "dev": ["e", "f"], "test": ["c", "e"]}
    assert folder.label_matrix(["a", "c", "e"]).tolist() == [[1, 0], [1, 1], [1, 0]]
    mask = folder.mask("e")  # cat, and a bird
    assert mask.shape == (40, 56)
    assert sorted(np.unique(mask)) == [0, 1, 255]
    assert (mask == 255).sum() == 4 * 56 + 30 * 14
    assert sorted(np.unique(folder.mask("c"))) == [0, 1, 2, 255]


def test_without_a_background_class_ids_start_at_the_first_class(tmp_path: Path) -> None:
    folder = open_folder(make_folder(tmp_path, NAMES[1:]))
    assert not folder.background
    assert folder.names == ("cat", "bird", "dog")
    assert sorted(np.unique(folder.mask("c"))) == [0, 2, 255]
    assert folder.label_matrix(["c"]).tolist() == [[1, 0, 1]]


def test_errors_say_what_the_folder_lacks(tmp_path: Path) -> None:
    root = make_folder(tmp_path, NAMES)
    with pytest.raises(CommandError, match="no class horse; expected some of cat, bird, dog"):
        open_folder(root, ["cat", "horse"])
    (root / "ImageSets" / "dev.txt").write_text("e\nz\n")
    with pytest.raises(CommandError, match=r"dev.txt: found 1 ids without labels, such as z"):
        open_folder(root)
    (root / "image_labels.json").write_text("[]")
    with pytest.raises(CommandError, match=r"image_labels.json cannot be read"):
        open_folder(root)


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
    assert "not known" in describe(weights)


def test_only_the_upper_half_learns(tmp_path: Path, weights: Path) -> None:
    folder = open_folder(make_folder(tmp_path, NAMES))
    task = PhotoTask(folder, weights, PhotoSettings(size=28, epochs=1), seed=0, report=lambda *_: lambda: None)
    truth = task.truths("dev")[0]
    before = task.prepare(truth.images)
    model = task.fork()
    history = task.train(model, None, lambda: None).history
    assert len(history) == task.steps == 1
    assert torch.equal(task.prepare(truth.images), before)
    untrained = dict(task.fork().named_parameters())
    assert all(not torch.equal(value, untrained[name]) for name, value in model.named_parameters())
    assert task.pixels(truth.images).shape == (2, 28, 28, 3)


@pytest.mark.parametrize("background", [True, False])
def test_the_command_runs_on_a_folder(
    tmp_path: Path, weights: Path, background: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "photos", NAMES if background else NAMES[1:])
    output = tmp_path / "out"
    options = ["--weights", str(weights), "--size", "28", "--epochs", "1", "--split", "test", "--output", str(output)]
    assert main(["demo", "--voc", str(root), *options]) == 0
    printed = capsys.readouterr().out
    assert "whether they have seen masks is not known" in printed
    run = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in run["seeds"][0]["rows"]]
    with_background = ["all background", "best centred ellipse"]
    baselines = with_background if background else ["largest present class", "location prior"]
    assert names == [*baselines, "without ACR", "with ACR"]
    assert run["settings"]["size"] == 28
    assert run["seeds"][0]["rows"][-1]["raw"]["threshold"] is None or background
    assert (output / "demo.png").stat().st_size > 1000


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "photos", NAMES)
    output = str(tmp_path / "out")
    assert main(["demo", "--voc", str(root), "--weights", str(weights), "--size", "100", "--output", output]) == 2
    assert "--size is 100, expected a multiple of 14; try 98" in capsys.readouterr().err

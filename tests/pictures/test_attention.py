"""The picture of a model's attention: what it draws is what the library computes, at the right place."""

import re
import warnings

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from acr_reg import (
    Crop,
    HorizontalFlip,
    LayoutError,
    Rotate90,
    Scale,
    attention_rollout,
    capture_attention,
    class_attention,
)
from acr_reg.pictures.attention import show_attention
from tests.support.attention import says
from tests.support.models import explicit_vit, multihead_vit
from tests.support.models.plain import PlainEncoder
from tests.support.models.published import timm_model
from tests.support.models.reduced import Pyramid
from tests.support.models.windows import windows_and_global

GRID = (4, 6)  # of 8 px
FLIP = HorizontalFlip()
CROP = Crop(8, 16, 16, 24, image_size=(32, 48))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def photo_of(size=(32, 48)):
    return torch.rand(3, *size)


def maps_of(model, image, **hints):
    with capture_attention(model.eval(), no_grad=True, **hints) as attention, torch.no_grad():
        model(image)
        return attention.take()


def panels(figure):
    """Title -> axes, for each panel in order; a title that stands twice keeps its last."""
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


def values(ax):
    return ax.images[1].get_array()


def headings(figure):
    return [text.get_text().replace("\n", " ") for text in figure.texts]


def numbers_after(text, words):
    return [float(number) for number in re.findall(r"([\d.e-]+) " + words, text)]


def corners(ax):
    return {patch.get_xy() for patch in ax.patches if isinstance(patch, Rectangle)}


# ---------------------------------------------------------------- what is drawn


def test_the_class_token_is_drawn_head_by_head_as_mean_and_as_rollout():
    model, photo = multihead_vit(), photo_of()
    figure = show_attention(model, photo[None], photo, FLIP)
    maps, drawn = maps_of(model, photo[None]), panels(figure)
    heads = class_attention(maps)[0]
    for head, expected in enumerate(heads):
        np.testing.assert_allclose(values(drawn[f"head {head}"]), expected, rtol=1e-6)
    assert f"head {len(heads)}" not in drawn
    np.testing.assert_allclose(values(drawn["mean over heads"]), heads.mean(0), rtol=1e-6)
    np.testing.assert_allclose(values(drawn["rollout, layers 0 to 1"]), attention_rollout(maps)[0], rtol=1e-5)
    assert headings(figure)[0].startswith("PlainEncoder: attention of layer 1 (")


def test_the_rollout_ends_at_the_layer_that_is_drawn():
    model, photo = multihead_vit(3), photo_of()
    drawn = panels(show_attention(model, photo[None], photo, FLIP, layer=1))
    maps = maps_of(model, photo[None])
    np.testing.assert_allclose(values(drawn["rollout, layers 0 to 1"]), attention_rollout(maps, [0, 1])[0], rtol=1e-5)
    np.testing.assert_allclose(values(drawn["head 0"]), class_attention(maps, 1)[0, 0], rtol=1e-6)


@pytest.mark.parametrize("build", [explicit_vit, multihead_vit])
def test_the_rows_of_a_patch_and_their_distances_are_those_of_the_maps(build):
    """A literal flip: token by token, in a loop."""
    model, photo = build(), photo_of()
    figure = show_attention(model, photo[None], photo, FLIP, patch=(1, 4))
    a, b = (maps_of(model, image[None])[-1].weights()[0].mean(0) for image in (photo, photo.flip(-1)))
    tokens = [(y, x) for y in range(4) for x in range(6)]
    at = {place: 1 + 6 * place[0] + place[1] for place in tokens}

    def row(of, place, mirrored):
        return [float(of[at[place], at[(y, 5 - x if mirrored else x)]]) for y, x in tokens]

    def distance(place):
        y, x = place
        here, there = row(a, place, False), row(b, (y, 5 - x), True)
        return sum(abs(p - q) for p, q in zip(here, there, strict=True))

    drawn = panels(figure)
    for title, expected in {
        "view": row(b, (1, 1), False),
        "photo, as compared": row(a, (1, 4), False),
        "view, brought back": row(b, (1, 1), True),
    }.items():
        np.testing.assert_allclose(values(drawn[title]).flatten(), expected, rtol=1e-5, err_msg=title)
    difference = [abs(p - q) for p, q in zip(row(a, (1, 4), False), row(b, (1, 1), True), strict=True)]
    np.testing.assert_allclose(values(drawn["difference"]).flatten(), difference, rtol=1e-3, atol=1e-7)
    text = headings(figure)[-1]
    assert numbers_after(text, "for this patch") == [pytest.approx(distance((1, 4)), rel=6e-3)]
    mean = sum(map(distance, tokens)) / 24
    assert numbers_after(text, "on average over all patches") == [pytest.approx(mean, rel=6e-3)]
    classes = sum(abs(float(a[0, at[y, x]] - b[0, at[y, 5 - x]])) for y, x in tokens)
    assert numbers_after(text, "for the class token") == [pytest.approx(classes, rel=6e-3)]


@pytest.mark.parametrize(
    ("view", "patch", "there"),
    [(FLIP, (1, 4), (1, 1)), (Rotate90(), (1, 4), (1, 1)), (CROP, (2, 4), (1, 2)), (Scale(2), (1, 2), (2, 4))],
    ids=["flip", "quarter turn", "crop", "scale"],
)
def test_the_patch_is_marked_in_both_views(view, patch, there):
    model = timm_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=2, dynamic_img_size=True)()
    photo = photo_of()
    drawn = panels(show_attention(model, photo[None], photo, view, patch=patch))
    for title in ("photo, as compared", "view, brought back", "difference"):
        assert corners(drawn[title]) == {(8 * patch[1], 8 * patch[0])}
    assert corners(drawn["view"]) == {(8 * there[1], 8 * there[0])}


def test_the_view_of_the_photo_lies_beneath_the_row_of_the_view():
    model, photo = multihead_vit(), photo_of()
    figure = show_attention(model, photo[None], photo, FLIP)
    drawn = panels(figure)
    under = [np.asarray(drawn[title].images[0].get_array()) for title in ("view", "view, brought back")]
    np.testing.assert_allclose(under[0], under[1][:, ::-1], rtol=1e-5)
    photo_alone = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(photo_alone, photo.movedim(0, -1))


def test_what_a_crop_hides_is_grey_and_no_value():
    model = timm_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=2, dynamic_img_size=True)()
    photo = photo_of()
    figure = show_attention(model, photo[None], photo, CROP)
    hidden = np.ones(GRID, dtype=bool)
    hidden[1:3, 2:5] = False
    for title in ("photo, as compared", "view, brought back", "difference"):
        assert np.array_equal(np.ma.getmaskarray(np.ma.masked_invalid(values(panels(figure)[title]))), hidden)
    assert headings(figure)[-1].endswith("Grey: hidden in one of them.")
    assert "Grey" not in headings(show_attention(model, photo[None], photo, FLIP))[-1]


def test_one_outlier_does_not_blank_the_picture():
    """Its colour is full at what 99 of 100 tokens stay below, and the bar says so."""
    model, photo = multihead_vit(), photo_of()
    figure = show_attention(model, photo[None], photo, FLIP)
    ax = panels(figure)["head 0"]
    low, full = ax.images[1].get_clim()
    assert low == 0
    assert full == pytest.approx(np.quantile(np.asarray(values(ax)), 0.99), rel=1e-5)
    bar = figure.axes[figure.axes.index(ax) + 1]
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0", f"{full:.2g} or more"]


def test_the_two_rows_that_the_loss_compares_share_one_scale():
    model, photo = multihead_vit(), photo_of()
    drawn = panels(show_attention(model, photo[None], photo, Rotate90()))
    assert drawn["photo, as compared"].images[1].get_clim() == drawn["view, brought back"].images[1].get_clim()


def test_without_a_class_token_the_heads_are_left_out_and_the_heading_says_so():
    model, photo = PlainEncoder(torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), photo_of()
    figure = show_attention(model, photo[None], photo, FLIP, num_prefix_tokens=1, class_tokens=0)
    drawn = panels(figure)
    assert not [title for title in drawn if title.startswith(("head", "mean"))]
    maps = maps_of(model, photo[None], num_prefix_tokens=1, class_tokens=0)
    expected = attention_rollout(maps, query="all")[0]
    np.testing.assert_allclose(values(drawn["rollout, layers 0 to 0"]), expected, rtol=1e-5)
    texts = headings(figure)
    assert "no class token" in texts[1]
    assert "mean over all queries" in texts[1]
    assert "class token" not in texts[2]


def test_the_rollout_of_a_pyramid_takes_the_layers_of_one_stage():
    model, photo = Pyramid((4, 1, 1)), photo_of((64, 96))
    model.patches[2] = torch.nn.Conv2d(32, 32, 1)
    drawn = panels(show_attention(model, photo[None], photo, FLIP))
    expected = attention_rollout(maps_of(model, photo[None]), [1, 2], query="all")[0]
    np.testing.assert_allclose(values(drawn["rollout, layers 1 to 2"]), expected, rtol=1e-5)


def test_reduced_keys_leave_the_rollout_out_with_the_reason():
    model, photo = Pyramid(), photo_of()
    figure = show_attention(model, photo[None], photo, FLIP, layer=0)
    assert not [title for title in panels(figure) if title.startswith("rollout")]
    assert "The rollout is left out: Queries or keys of layers [0]" in headings(figure)[1]
    assert headings(figure)[1].endswith("grid of layer 0.")


def test_windows_are_refused_with_the_reason_and_global_layers_beside_them_drawn():
    model, photo = windows_and_global(), photo_of()
    with pytest.raises(LayoutError, match="window"):
        show_attention(model, photo[None], photo, FLIP, layer=0)
    assert "rollout, layers 1 to 1" in panels(show_attention(model, photo[None], photo, FLIP, layer=1))


@pytest.mark.parametrize(("distance", "name"), [("l2", "l2"), ("js", "js"), (torch.nn.PairwiseDistance(1), "given")])
def test_the_distance_is_the_one_of_the_loss(distance, name):
    model, photo = multihead_vit(), photo_of()
    text = headings(show_attention(model, photo[None], photo, FLIP, distance=distance))[-1]
    assert f"by the {name} distance" in text


def test_it_can_be_saved_whatever_the_number_of_heads_and_the_shape(tmp_path):
    for heads, size in ((1, (16, 96)), (8, (96, 16)), (12, (32, 32))):
        model = timm_model("vit_tiny_patch16_224", img_size=size, depth=1, num_heads=heads, embed_dim=24 * heads)()
        photo = photo_of(size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            show_attention(model, photo[None], photo, FLIP).savefig(tmp_path / f"{heads}.png")
        assert (tmp_path / f"{heads}.png").stat().st_size > 10_000


# ---------------------------------------------------------------- what it is given


def test_the_model_and_the_inputs_are_left_as_they_were():
    model, photo = multihead_vit(dropout=0.5).train(), photo_of()
    image, state = photo[None].clone(), {name: value.clone() for name, value in model.state_dict().items()}
    first = show_attention(model, image, photo, FLIP)
    again = show_attention(model, image, photo, FLIP)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(image, photo[None])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert headings(first) == headings(again)  # dropout is off


def test_images_of_many_bands_are_drawn_with_the_pixels_given():
    model, photo = (
        timm_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=1, in_chans=7)(),
        photo_of(),
    )
    assert "head 0" in panels(show_attention(model, torch.rand(1, 7, 32, 48), photo, FLIP))


def test_another_method_of_the_model_can_run_it():
    model, photo = timm_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=1)(), photo_of()
    model.forward = None
    assert "head 0" in panels(show_attention(model, photo[None], photo, FLIP, forward=model.forward_features))


def test_one_of_several_class_tokens_is_drawn():
    model, photo = timm_model("deit_tiny_distilled_patch16_224", img_size=(32, 48), depth=2)(), photo_of()
    with pytest.raises(ValueError, match="class_token=0 to 1"):
        show_attention(model, photo[None], photo, FLIP, class_tokens=2)
    figure = show_attention(model, photo[None], photo, FLIP, class_tokens=2, class_token=1)
    maps = maps_of(model, photo[None], class_tokens=2)
    np.testing.assert_allclose(values(panels(figure)["head 2"]), class_attention(maps, class_token=1)[0, 2], rtol=1e-6)
    assert headings(figure)[1].startswith("What class token 1 attends to.")


def test_the_default_patch_is_the_shown_one_nearest_the_middle():
    model = timm_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=1, dynamic_img_size=True)()
    photo = photo_of()
    corner = Crop(16, 32, 16, 16, image_size=(32, 48))
    assert "row 1, column 2 " in headings(show_attention(model, photo[None], photo, FLIP))[-1]
    assert "row 2, column 4 " in headings(show_attention(model, photo[None], photo, corner))[-1]
    with pytest.raises(ValueError, match=r"does not show patch=\(0, 0\)") as error:
        show_attention(model, photo[None], photo, corner, patch=(0, 0))
    assert says(error, "(2, 4)")


@pytest.mark.parametrize("patch", [(4, 0), (0, 6), (-1, 0), (0, -1)])
def test_a_patch_beside_the_grid_is_an_error(patch):
    photo = photo_of()
    with pytest.raises(ValueError, match=re.escape(f"patch={patch} ")) as error:
        show_attention(multihead_vit(), photo[None], photo, FLIP, patch=patch)
    assert says(error, "4 x 6", "(3, 5)")


def test_inputs_that_do_not_fit_are_errors_with_the_way_out():
    photo, model = photo_of(), multihead_vit()
    for image, given, kind, fact in (
        (photo, photo, ValueError, "(1, bands, H, W)"),
        (photo[None].repeat(2, 1, 1, 1), photo, ValueError, "(1, bands, H, W)"),
        (photo[None], photo.movedim(0, -1), ValueError, "(3, 32, 48)"),
        (photo[None], photo[:, :16], ValueError, "(3, 32, 48)"),
        (photo[None], (255 * photo).byte(), ValueError, "photo / 255"),
        (photo[None], photo.numpy(), TypeError, "photo is a ndarray"),
        (photo.numpy(), photo, TypeError, "image is a ndarray"),
    ):
        with pytest.raises(kind) as error:
            show_attention(model, image, given, FLIP)
        assert says(error, fact)
    with pytest.raises(TypeError, match="View"):
        show_attention(model, photo[None], photo, "flip")

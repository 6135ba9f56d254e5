"""The gradient of the loss over its option grid, and its mathematical properties by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    HorizontalFlip,
    Identity,
    Rotate90,
    Scale,
    VerticalFlip,
)
from tests.support.attention import (
    VIEWS,
    any_view,
    carried,
    explicit,
    flipped_pair,
    generator,
    layout_of,
    pair_of,
    random_attention,
    random_logits,
    random_maps,
    terms_of,
    wrap,
)
from tests.support.pairs import aligned_rows, carried_rows

# Gradient

GRIDS = {
    "flip": (HorizontalFlip(), (2, 3), (2, 3)),
    "turn": (Rotate90(), (2, 3), (3, 2)),
    "scale": (Scale(2), (1, 2), (2, 4)),
}


def gradcheck_pair(view, class_tokens, **options):
    view, grid, grid_b = GRIDS[view]
    prefix = max(1, class_tokens)
    labels = torch.tensor([[1, 0, 1]]) if class_tokens == 3 else None
    acr = AllPairsConsistencyLoss(view, 1.3 if class_tokens else 0.0, 0.7, **options)
    logits = [random_logits(1, 2, prefix + g[0] * g[1], seed, sharpness=1.0) for seed, g in ((1, grid), (2, grid_b))]

    def loss(logits_a, logits_b):
        return acr(
            wrap([logits_a.softmax(-1)], grid, prefix, class_tokens),
            wrap([logits_b.softmax(-1)], grid_b, prefix, class_tokens),
            labels=labels,
        )

    return loss, logits


@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
@pytest.mark.parametrize("normalize", ["row", "mean"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("view", GRIDS)
@pytest.mark.parametrize("class_tokens", [0, 1, 3])
def test_gradcheck(distance, normalize, heads, view, class_tokens):
    loss, logits = gradcheck_pair(view, class_tokens, distance=distance, normalize=normalize, heads=heads)
    assert torch.autograd.gradcheck(loss, logits, fast_mode=True)


@pytest.mark.parametrize(
    ("view", "distance", "heads"), [("flip", "l1", "mean"), ("turn", "js", "each"), ("scale", "l2", "each")]
)
def test_gradcheck_of_every_element(view, distance, heads):
    loss, logits = gradcheck_pair(view, 1, distance=distance, heads=heads)
    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
def test_gradient_is_finite_where_attention_is_exactly_zero(distance):
    logits = [random_logits(1, 2, 7, seed, torch.float32) for seed in (1, 2)]
    mask = torch.zeros(7, 7).masked_fill(torch.rand(7, 7, generator=generator(3)) > 0.6, -1e4)
    mask[:, 0] = 0
    attention = [wrap([(one + mask).softmax(-1)], (2, 3)) for one in logits]
    assert any((maps.weights()[0] == 0).any() for maps in attention)
    AllPairsConsistencyLoss(HorizontalFlip(), distance=distance)(*attention).backward()
    assert all(one.grad.isfinite().all() and one.grad.abs().max() > 0 for one in logits)


# Properties

exact_views = st.sampled_from(list(VIEWS))
distances = st.sampled_from(["l1", "l2", "js"])


@st.composite
def cases(draw):
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)).filter(lambda g: g[0] != g[1]))
    options = {
        "distance": draw(distances),
        "normalize": draw(st.sampled_from(["row", "mean"])),
        "heads": draw(st.sampled_from(["mean", "each"])),
    }
    return draw(exact_views), grid, draw(st.integers(1, 3)), options, draw(st.integers(0, 1000))


def drawn(case):
    name, grid, prefix, options, seed = case
    maps = random_maps(grid, prefix, batch=1, heads=2, layers=1, seed=seed)
    return VIEWS[name][0], VIEWS[name][1], grid, prefix, maps, options, seed


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_zero_on_identical_views(case):
    """A model that is equivariant to the view has no loss, to the bit."""
    view, move, grid, prefix, maps, options, _ = drawn(case)
    moved, grid_b = carried(maps[0], move, grid, prefix)
    acr = AllPairsConsistencyLoss(view, 1.0, 1.0, **options)
    assert acr(wrap(maps, grid, prefix, 1), wrap([moved], grid_b, prefix, 1)).item() == 0
    same = wrap(maps, grid, prefix, 1)
    assert acr(same, same, view=Identity()).item() == 0


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_symmetric(case):
    view, move, grid, prefix, maps, options, seed = drawn(case)
    _, grid_b = carried(maps[0], move, grid, prefix)
    a = wrap(maps, grid, prefix, 1)
    b = wrap(random_maps(grid_b, prefix, batch=1, heads=2, layers=1, seed=seed + 1), grid_b, prefix, 1)
    acr = AllPairsConsistencyLoss(view, 1.0, 1.0, **options)
    assert acr(a, b).item() == pytest.approx(acr(b, a, view=view.inverse).item(), rel=1e-12)


@given(case=cases(), closeness=st.sampled_from([1.0, 1e-3, 1e-6]))
@settings(max_examples=40, deadline=None)
def test_non_negative(case, closeness):
    """Also where rounding decides: nearly equal maps in float32."""
    view, move, grid, prefix, maps, options, _ = drawn(case)
    nudged = maps[0] * (1 + closeness * torch.rand(maps[0].shape, generator=generator(case[-1])))
    moved, grid_b = carried(nudged / nudged.sum(-1, keepdim=True), move, grid, prefix)
    a, b = wrap([maps[0].float()], grid, prefix, 1), wrap([moved.float()], grid_b, prefix, 1)
    _, terms = terms_of(AllPairsConsistencyLoss(view, 1.0, 1.0, **options), a, b)
    assert terms["activation"] >= 0
    assert terms["affinity"] >= 0


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_invariant_to_head_order(heads):
    tensors_a, tensors_b = random_maps((3, 5), seed=1), random_maps((3, 5), seed=2)
    acr = AllPairsConsistencyLoss(HorizontalFlip(), heads=heads)
    before = acr(wrap(tensors_a, (3, 5)), wrap(tensors_b, (3, 5)))
    order = [2, 0, 1]
    after = acr(wrap([t[:, order] for t in tensors_a], (3, 5)), wrap([t[:, order] for t in tensors_b], (3, 5)))
    assert after.item() == pytest.approx(before.item(), rel=1e-12)


def test_each_head_is_at_least_the_mean_of_heads():
    attention = flipped_pair()
    mean, each = (
        AllPairsConsistencyLoss(HorizontalFlip(), heads=heads)(*attention).item() for heads in ("mean", "each")
    )
    assert each > mean


def test_l1_per_row_is_at_most_two():
    opposite = torch.eye(7)[None, None].repeat(1, 2, 1, 1)
    opposite[:, :, 0] = torch.eye(7)[1]
    rolled = opposite[..., [0, 2, 1, 3, 5, 4, 6]]
    pair = [AttentionMaps([explicit(rows, layout_of((2, 3)))]) for rows in (opposite.requires_grad_(), rolled)]
    _, terms = terms_of(AllPairsConsistencyLoss(Identity()), *pair)
    assert terms["activation"] == 2
    assert terms["affinity"] == pytest.approx(2 * 4 / 6)


def test_flip_twice_is_the_identity():
    a, b = flipped_pair()
    acr = AllPairsConsistencyLoss(Identity())
    for flip in (HorizontalFlip(), VerticalFlip(), Rotate90(2)):
        twice = Compose([flip, flip])
        assert twice == Identity()
        assert acr(a, b, view=twice).item() == acr(a, b).item()


@any_view
def test_alignment_commutes_with_row_sums(name):
    view, move = VIEWS[name]
    tensors_a, tensors_b, a, b = pair_of(name, (4, 6), prefix=2, class_tokens=1)
    class_rows, patch_rows = aligned_rows(a[0], b[0], view)
    mass = tensors_b[0][..., 2:].sum(-1)
    _, grid_b = carried(tensors_a[0], move, (4, 6), 2)
    patches = view.inverse(mass[..., 2:].unflatten(-1, grid_b)).flatten(-2)
    (_, of_classes), (_, of_patches) = carried_rows(class_rows), carried_rows(patch_rows)
    torch.testing.assert_close(of_patches.sum(-1), patches, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_classes.sum(-1), mass[..., :1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5, (2.0, 0.5)], ids=str)
def test_alignment_by_scale_keeps_each_rows_patch_mass(factor):
    grid, view = (4, 6), Scale(factor)
    grid_b = view.output_size(grid)
    tensors_b = random_maps(grid_b, prefix=2, layers=1, seed=2)
    class_rows, patch_rows = aligned_rows(
        random_attention(grid, 2, 1, layers=1)[0], wrap(tensors_b, grid_b, 2, 1)[0], view
    )
    mass = tensors_b[0][..., 2:].sum(-1)
    (_, of_classes), (_, of_patches) = carried_rows(class_rows), carried_rows(patch_rows)
    torch.testing.assert_close(of_classes.sum(-1), mass[..., :1], rtol=1e-12, atol=0)
    patches = view.align(mass[..., 2:].unflatten(-1, grid_b), grid).flatten(-2)
    torch.testing.assert_close(of_patches.sum(-1), patches, rtol=1e-12, atol=0)
    assert of_patches.min() >= 0


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5], ids=str)
def test_uniform_attention_is_consistent_at_every_scale(factor):
    grid, view = (4, 6), Scale(factor)
    attention = []
    for h, w in (grid, view.output_size(grid)):
        rows = torch.cat(
            [torch.full((1, 2, 1 + h * w, 1), 0.3), torch.full((1, 2, 1 + h * w, h * w), 0.7 / (h * w))], -1
        )
        attention.append(wrap([rows.requires_grad_()], (h, w)))
    assert AllPairsConsistencyLoss(view, 1.0, 1.0)(*attention).item() == pytest.approx(0, abs=1e-5)


def smooth_attention(height, width):
    """Attention of an image with smooth content, seen on a grid of height x width: between places alike and nearby."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    places = torch.stack([y, x], -1).reshape(-1, 2).double()
    content = torch.stack([places[:, 1], (2 * places[:, 0] + places[:, 1]).sin()], -1)
    scores = 3 * content @ content.mT - 8 * torch.cdist(places, places) ** 2 + 2 * places[:, 1]
    class_row = -8 * (places - torch.tensor([0.3, 0.2])).square().sum(-1)[None]
    patches = 0.8 * torch.cat([class_row, scores]).softmax(-1)
    return wrap([torch.cat([torch.full((len(patches), 1), 0.2), patches], 1)[None].requires_grad_()], (height, width))


def test_scale_nears_zero_as_the_grid_resolves_the_scene_and_not_under_another_view():
    acr = AllPairsConsistencyLoss(Scale(2), 1.0, 1.0)
    flipped = Compose([Scale(2), HorizontalFlip()])
    previous = {"activation": 0.1, "affinity": 0.2}
    for grid in [(4, 6), (8, 12), (12, 18)]:
        a, b = smooth_attention(*grid), smooth_attention(2 * grid[0], 2 * grid[1])
        terms, wrong = (terms_of(acr, a, b, view=view)[1] for view in (Scale(2), flipped))
        for name in ("activation", "affinity"):
            assert terms[name] < previous[name]
            assert wrong[name] > 5 * terms[name]
            previous[name] = terms[name] / 2


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5, (2.0, 0.5)], ids=str)
def test_smooth_attention_is_nearer_where_both_maps_are_blurred_alike(factor):
    """Both grids see one function of places: blurring one map alone sets them apart."""
    view = Scale(factor)
    a, b = smooth_attention(8, 12), smooth_attention(*view.output_size((8, 12)))
    alike, apart = (terms_of(AllPairsConsistencyLoss(view, blur_alike=each), a, b)[1] for each in (True, False))
    for name in ("activation", "affinity"):
        assert 0 < alike[name] < 0.5 * apart[name]


@any_view
def test_a_misreported_view_gives_a_loss_where_the_truth_gives_none(name):
    view, move = VIEWS[name]
    maps = random_maps((4, 6), seed=1)
    moved = [carried(layer, move, (4, 6)) for layer in maps]
    a, b = wrap(maps, (4, 6)), wrap([layer for layer, _ in moved], moved[0][1])
    assert AllPairsConsistencyLoss(view, 1.0, 1.0)(a, b).item() == 0
    for other, _ in VIEWS.values():
        if other != view and other.affines[0].transposed == view.affines[0].transposed:
            _, terms = terms_of(AllPairsConsistencyLoss(other), a, b)
            assert terms["activation"] > 0.1
            assert terms["affinity"] > 0.1


def test_heads_of_a_misaligned_pair_are_not_averaged_away():
    tensors = random_maps((3, 5), heads=2)
    swapped = [t[:, [1, 0]] for t in tensors]
    acr = {heads: AllPairsConsistencyLoss(Identity(), heads=heads) for heads in ("mean", "each")}
    assert acr["mean"](wrap(tensors, (3, 5)), wrap(swapped, (3, 5))).item() == pytest.approx(0, abs=1e-12)
    assert acr["each"](wrap(tensors, (3, 5)), wrap(swapped, (3, 5))).item() > 0.01

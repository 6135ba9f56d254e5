"""The loss against literal oracles, and what becomes of labels, padding, sampling, class maps and precision."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    HorizontalFlip,
    Identity,
    LayoutError,
    Rotate90,
    Scale,
    VerticalFlip,
    normalize_cam,
)
from acr_reg.alignment.pairs import plan_of, row_entropy
from acr_reg.alignment.token_maps import valid_tokens
from acr_reg.losses.all_pairs import DEFAULT_WEIGHT
from acr_reg.losses.terms import sample_rows
from acr_reg.tokens import Lattice, TokenLayout
from tests.support import oracles
from tests.support.attention import (
    MASKS,
    VIEWS,
    any_view,
    explicit,
    factored,
    flipped_pair,
    generator,
    layout_of,
    pair_of,
    random_attention,
    random_factors,
    random_logits,
    random_maps,
    says,
    terms_of,
    transposes,
    wrap,
)
from tests.support.pairs import aligned_rows, carried_rows, random_cams

# Oracles


@pytest.mark.parametrize("side", [1, 2, 5])
def test_paper_equals_the_official_objective(side):
    tensors_a, tensors_b = (random_maps((side, side), layers=3, seed=seed) for seed in (1, 2))
    attention_a, attention_b = wrap(tensors_a, (side, side)), wrap(tensors_b, (side, side))
    for acr, weight in [
        (AllPairsConsistencyLoss.paper(HorizontalFlip()), 100.0),
        (AllPairsConsistencyLoss.paper(HorizontalFlip(), weight=125), 125.0),
    ]:
        expected = oracles.official_objective(tensors_a, tensors_b, side, weight)
        torch.testing.assert_close(acr(attention_a, attention_b), expected, rtol=1e-12, atol=0)


def test_paper_has_the_gradient_of_the_official_objective():
    logits_a, logits_b = (random_logits(2, 3, 17, seed) for seed in (1, 2))
    expected = torch.autograd.grad(
        oracles.official_objective([logits_a.softmax(-1)], [logits_b.softmax(-1)], 4), (logits_a, logits_b)
    )
    loss = AllPairsConsistencyLoss.paper(HorizontalFlip())(
        wrap([logits_a.softmax(-1)], (4, 4)), wrap([logits_b.softmax(-1)], (4, 4))
    )
    for found, wanted in zip(torch.autograd.grad(loss, (logits_a, logits_b)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_default_weight_per_row_is_the_papers_at_576_tokens():
    assert pytest.approx(100 / 576, rel=0.03) == DEFAULT_WEIGHT
    attention = flipped_pair((2, 4))
    _, per_row = terms_of(AllPairsConsistencyLoss(HorizontalFlip()), *attention)
    _, per_pair = terms_of(AllPairsConsistencyLoss(HorizontalFlip(), normalize="mean"), *attention)
    for name in ("activation", "affinity"):
        assert per_row[name] == pytest.approx(8 * per_pair[name], rel=1e-6)


@any_view
@pytest.mark.parametrize("grid", [(4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("prefix", [1, 2])
def test_equals_the_loop_over_token_pairs(name, grid, prefix):
    view, move = VIEWS[name]
    tensors_a, tensors_b, attention_a, attention_b = pair_of(name, grid, prefix, class_tokens=1, batch=1, heads=2)
    loss, terms = terms_of(AllPairsConsistencyLoss(view, 0.3, 0.7), attention_a, attention_b)
    activation, affinity = oracles.pairwise_terms(tensors_a, tensors_b, grid, move, prefix)
    assert loss.item() == pytest.approx(0.3 * activation + 0.7 * affinity, rel=1e-12)
    assert terms["activation"] == pytest.approx(activation, rel=1e-6)
    assert terms["affinity"] == pytest.approx(affinity, rel=1e-6)


@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
@pytest.mark.parametrize("normalize", ["row", "mean"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("name", ["horizontal", "turn 3"])
def test_every_option_equals_the_loop(distance, normalize, heads, name):
    view, move = VIEWS[name]
    tensors_a, tensors_b, attention_a, attention_b = pair_of(name, (4, 6), 2, class_tokens=[1], heads=2)
    shown = torch.rand(2, 4, 6, generator=generator(3)) > 0.3
    acr = AllPairsConsistencyLoss(view, 1.0, 2.0, distance=distance, normalize=normalize, heads=heads)
    options = {"distance": distance, "normalize": normalize, "heads": heads, "class_tokens": (1,)}
    for valid, tokens in [(None, None), (shown, shown.flatten(1).tolist())]:
        activation, affinity = oracles.pairwise_terms(tensors_a, tensors_b, (4, 6), move, 2, shown=tokens, **options)
        loss = acr(attention_a, attention_b, valid=valid)
        assert loss.item() == pytest.approx(activation + 2 * affinity, rel=1e-9)


@any_view
def test_twenty_class_tokens_with_labels(name):
    view, move = VIEWS[name]
    tensors_a, tensors_b, attention_a, attention_b = pair_of(name, (4, 6), 20, class_tokens=20, heads=2, layers=1)
    labels = torch.zeros(2, 20)
    labels[0, [3, 7]] = 1
    labels[1, 11] = 1
    acr = AllPairsConsistencyLoss(view, 1.0, 0.0)
    for given_labels in (labels, labels.bool(), labels.long()):
        activation, _ = oracles.pairwise_terms(
            tensors_a, tensors_b, (4, 6), move, 20, class_tokens=tuple(range(20)), labels=labels.tolist()
        )
        assert acr(attention_a, attention_b, labels=given_labels).item() == pytest.approx(activation, rel=1e-9)
    everything, _ = oracles.pairwise_terms(tensors_a, tensors_b, (4, 6), move, 20, class_tokens=tuple(range(20)))
    assert acr(attention_a, attention_b).item() == pytest.approx(everything, rel=1e-9)
    assert everything != pytest.approx(activation, rel=1e-3)


def test_class_tokens_behind_registers_and_in_any_order():
    tensors_a, tensors_b = (random_maps((4, 6), 5, seed=seed) for seed in (1, 2))
    labels = torch.tensor([[1, 0], [0, 1]])
    attention = [wrap(tensors, (4, 6), 5, class_tokens=[4, 2]) for tensors in (tensors_a, tensors_b)]
    found = AllPairsConsistencyLoss(VerticalFlip(), 1.0, 0.0)(*attention, labels=labels)
    expected, _ = oracles.pairwise_terms(
        tensors_a, tensors_b, (4, 6), oracles.upend, 5, class_tokens=(4, 2), labels=labels.tolist()
    )
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("prefix", [0, 4])
def test_no_class_token(prefix):
    tensors_a, tensors_b = (random_maps((6, 4), prefix, seed=seed) for seed in (1, 2))
    attention = [wrap(tensors, (6, 4), prefix, class_tokens=0) for tensors in (tensors_a, tensors_b)]
    loss, terms = terms_of(AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0), *attention)
    _, affinity = oracles.pairwise_terms(tensors_a, tensors_b, (6, 4), oracles.mirror, prefix, class_tokens=())
    assert loss.item() == pytest.approx(DEFAULT_WEIGHT * affinity, rel=1e-9)
    assert sorted(terms) == ["affinity", "entropy"]


def test_labels_do_not_mask_the_one_class_token_of_all_classes():
    attention = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    labels = torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert acr(*attention, labels=labels).item() == acr(*attention).item()


def test_images_without_any_present_class_count_out():
    attention = flipped_pair(prefix=3, class_tokens=3)
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 0.0)
    labels = torch.tensor([[1, 1, 0], [0, 0, 0]])
    first = [maps.chunk(2)[0] for maps in attention]
    assert acr(*attention, labels=labels).item() == pytest.approx(acr(*first, labels=labels[:1]).item(), rel=1e-12)
    assert acr(*attention, labels=torch.zeros(2, 3)).item() == 0


def test_the_two_views_may_have_prefixes_of_their_own():
    tensors_a, tensors_b = random_maps((4, 6), 1, seed=1), random_maps((4, 6), 3, seed=2)
    loss = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)(
        wrap(tensors_a, (4, 6), 1), wrap(tensors_b, (4, 6), 3, 1)
    )
    expected = oracles.pairwise_terms(tensors_a, tensors_b, (4, 6), oracles.mirror, 1, prefix_b=3)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-9)


def test_both_sides_augmented():
    """view_a leads from the images to the first maps, view to the second."""
    tensors_a, tensors_b = random_maps((6, 4), seed=1), random_maps((4, 6), seed=2)
    loss = AllPairsConsistencyLoss(VerticalFlip(), 1.0, 1.0)(
        wrap(tensors_a, (6, 4)), wrap(tensors_b, (4, 6)), view_a=Rotate90(1)
    )
    unturn = oracles.chain(oracles.turn, oracles.turn, oracles.turn)
    expected = oracles.pairwise_terms(tensors_a, tensors_b, (6, 4), oracles.chain(unturn, oracles.upend))
    assert loss.item() == pytest.approx(sum(expected), rel=1e-9)


def test_view_of_the_call_goes_before_that_of_the_module():
    attention = flipped_pair()
    given_at_call = AllPairsConsistencyLoss(HorizontalFlip())(*attention, view=VerticalFlip())
    assert given_at_call.item() == AllPairsConsistencyLoss(VerticalFlip())(*attention).item()
    assert given_at_call.item() != AllPairsConsistencyLoss(HorizontalFlip())(*attention).item()


def test_resampled_view_equals_explicit_resampling():
    """Scale: both axes of the affinity through the same filter, each row keeping the mass that it gave to patches; the
    first view goes half way there and back."""
    grid, grid_b, view = (2, 3), (5, 6), Scale((2.5, 2.0))
    tensors_a, tensors_b = random_maps(grid, layers=1, seed=1), random_maps(grid_b, layers=1, seed=2)
    down = [
        [
            a * b
            for a in oracles.filter_row((i + 0.5) * 2.5 - 0.5, 2.5, 5)
            for b in oracles.filter_row((j + 0.5) * 2 - 0.5, 2.0, 6)
        ]
        for i in range(2)
        for j in range(3)
    ]
    blurred = {True: half_way_blur(), False: [[float(i == j) for j in range(6)] for i in range(6)]}
    for alike, own in blurred.items():
        per_head = affinity = 0.0
        for image in range(2):
            a, b = ([], [])  # mass is kept per head, so heads are averaged afterwards
            for tensors, weights, moved in ((tensors_a, own, a), (tensors_b, down, b)):
                for head in tensors[0][image].tolist():
                    rows = [row[1:] for row in head]
                    moved.append(
                        oracles.resampled_affinity(rows[:1], [[1.0]], weights)
                        + oracles.resampled_affinity(rows[1:], weights, weights)
                    )
            a, b = torch.tensor(a).double(), torch.tensor(b).double()
            per_head += (a - b)[:, 0].abs().sum(-1).mean().item() / 2
            affinity += (a - b)[:, 1:].mean(0).abs().sum(-1).mean().item() / 2
        maps = wrap(tensors_a, grid), wrap(tensors_b, grid_b)
        _, terms = terms_of(AllPairsConsistencyLoss(view, blur_alike=alike), *maps)
        assert terms["affinity"] == pytest.approx(affinity, rel=1e-5)
        _, terms = terms_of(AllPairsConsistencyLoss(view, heads="each", blur_alike=alike), *maps)
        assert terms["activation"] == pytest.approx(per_head, rel=1e-5)


def half_way_blur():
    """Of 2 x 3 tokens, by a view 2.5 and 2 times as fine: along each axis apart."""
    axes = []
    for count, fine, zoom in ((2, 5, 2.5), (3, 6, 2.0)):
        there = [oracles.filter_row((i + 0.5) / zoom - 0.5, 1 / zoom, count) for i in range(fine)]
        back = [oracles.filter_row((i + 0.5) * zoom - 0.5, zoom, fine) for i in range(count)]
        axes.append(oracles.half_way(there, back))
    y, x = axes
    return [[y[i][k] * x[j][m] for k in range(2) for m in range(3)] for i in range(2) for j in range(3)]


def test_whole_token_shift_leaves_out_what_one_view_does_not_show():
    """Token centres on multiples of the stride (a strided 3x3 stem): token j falls on n - j, and token 0 on none."""
    grid = (3, 5)
    layout = layout_of(grid, stride=(4.0, 4.0), offset=(0.0, -2.0), extent=(12.0, 20.0))
    weights = [random_maps(grid, layers=1, seed=seed)[0] for seed in (1, 2)]
    loss = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)(*(AttentionMaps([explicit(w, layout)]) for w in weights))

    def shifted(row, column, height, width):
        return row, (width - column) % width, height, width  # column 0 goes anywhere: it is left out

    shown = [[token % 5 != 0 for token in range(15)]] * 2
    expected = oracles.pairwise_terms([weights[0]], [weights[1]], grid, shifted, shown=shown)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-9)

    factors = [factored(*random_factors(grid, 1, seed), layout) for seed in (1, 2)]
    of_maps = [explicit(layer.weights(), layout) for layer in factors]
    values = [
        AllPairsConsistencyLoss(HorizontalFlip())(*(AttentionMaps([x]) for x in pair)) for pair in (factors, of_maps)
    ]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)


def test_queries_and_keys_on_lattices_of_their_own():
    """Pooled keys (a 2 x 3 lattice under 4 x 6 queries): each axis is carried on its own lattice."""
    layout = TokenLayout(Lattice(4, 6, (4.0, 4.0)), Lattice(2, 3, (8.0, 8.0)), 0, ())
    weights = [
        torch.randn(1, 2, 24, 6, generator=generator(s), dtype=torch.float64).softmax(-1).requires_grad_()
        for s in (1, 2)
    ]
    loss = AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0)(*(AttentionMaps([explicit(w, layout)]) for w in weights))
    a, b = (w.mean(1)[0].tolist() for w in weights)
    expected = 0.0
    for i, j in itertools.product(range(24), range(6)):
        query, key = (i // 6) * 6 + 5 - i % 6, (j // 3) * 3 + 2 - j % 3
        expected += abs(a[i][j] - b[query][key]) / 24
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_identity_view_compares_token_by_token():
    tensors_a, tensors_b = random_maps((3, 5), seed=1), random_maps((3, 5), seed=2)
    loss = AllPairsConsistencyLoss(Identity(), 1.0, 1.0)(wrap(tensors_a, (3, 5)), wrap(tensors_b, (3, 5)))
    assert loss.item() == pytest.approx(
        sum(oracles.pairwise_terms(tensors_a, tensors_b, (3, 5), oracles.stay)), rel=1e-9
    )


def test_mixed_maps_of_either_sign_are_resampled_by_area():
    """Heads mixed after softmax can give rows without any mass: there is none to restore."""
    a, b = (torch.randn(1, 2, 1 + n, 1 + n, generator=generator(n)).requires_grad_() for n in (6, 24))
    mixed = [AttentionMaps([explicit(w, layout_of(g), stochastic=False)]) for w, g in ((a, (2, 3)), (b, (4, 6)))]
    class_rows, patch_rows = aligned_rows(mixed[0][0], mixed[1][0], Scale(2))
    rows = F.interpolate(
        b[:, :, 0, 1:].unflatten(-1, (4, 6)), (2, 3), mode="bilinear", antialias=True, align_corners=False
    )
    scale = literal_scale(a, b)[:, None, None]
    torch.testing.assert_close(carried_rows(class_rows)[1][:, :, 0], 4 * rows.flatten(-2) / scale)
    assert carried_rows(patch_rows)[1].abs().max() < 10


# Factors: what a fused kernel leaves behind


@any_view
@pytest.mark.parametrize("mask", MASKS)
def test_factors_equal_their_maps(name, mask):
    """Tokens of query and key are permuted before any product: the same loss and gradient as of the maps."""
    grid, prefix = (2, 4), 2
    grid_b = grid[::-1] if transposes(name) else grid
    factors = [random_factors(grid, prefix, seed) for seed in (1, 2)]
    layouts = [layout_of(grid, prefix), layout_of(grid_b, prefix)]
    acr = AllPairsConsistencyLoss(VIEWS[name][0], 1.0, 1.0)
    layers = [factored(*f, layout, scale=0.6, **MASKS[mask](10)) for f, layout in zip(factors, layouts, strict=True)]
    leaves = [tensor for pair in factors for tensor in pair]

    from_factors = acr(*(AttentionMaps([layer]) for layer in layers))
    from_maps = acr(*(wrap([layer.weights()], g, prefix, 1) for layer, g in zip(layers, (grid, grid_b), strict=True)))
    torch.testing.assert_close(from_factors, from_maps, rtol=1e-12, atol=0)
    for found, expected in zip(
        torch.autograd.grad(from_factors, leaves), torch.autograd.grad(from_maps, leaves), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert found.abs().max() > 0


# Layers, gradient and its absence


def test_layers_are_chosen_by_the_models_indices():
    a, b = flipped_pair(layers=4)
    acr = AllPairsConsistencyLoss(HorizontalFlip(), layers=[1, -1])
    expected = [AllPairsConsistencyLoss(HorizontalFlip())(a.select([i]), b.select([i])).item() for i in (1, 3)]
    assert acr(a, b).item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_layers_without_gradient_count_out_of_the_mean():
    """A frozen lower half must not dilute the pull on the upper one."""
    tensors_a, tensors_b = random_maps((3, 5), layers=4, seed=1), random_maps((3, 5), layers=4, seed=2)
    frozen = [[t.detach() if i < 2 else t for i, t in enumerate(tensors)] for tensors in (tensors_a, tensors_b)]
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    upper = acr(wrap(tensors_a, (3, 5)).select([2, 3]), wrap(tensors_b, (3, 5)).select([2, 3]))
    assert acr(*(wrap(tensors, (3, 5)) for tensors in frozen)).item() == pytest.approx(upper.item(), rel=1e-12)
    reported = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0, affinity_weight=0)  # by the reference
    terms, expected = (each(*(wrap(t, (3, 5)) for t in frozen), return_terms=True)[1] for each in (reported, acr))
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-12)
    with torch.no_grad():  # where nothing carries gradient, there is nothing to leave out
        assert acr(*(wrap(tensors, (3, 5)) for tensors in frozen)).item() != pytest.approx(upper.item(), rel=1e-3)


@pytest.mark.parametrize("teacher", ["a", "b"])
def test_one_side_alone_is_a_teacher(teacher):
    logits = {side: random_logits(2, 3, 16, seed) for side, seed in (("a", 1), ("b", 2))}
    attention = {side: wrap([one.softmax(-1)], (3, 5)) for side, one in logits.items()}
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    both = acr(attention["a"], attention["b"])
    both.backward()
    student = "b" if teacher == "a" else "a"
    wanted = logits[student].grad.clone()
    for one in logits.values():
        one.grad = None

    attention = {side: wrap([one.softmax(-1)], (3, 5)) for side, one in logits.items()}
    attention[teacher] = attention[teacher].detach()
    loss = acr(attention["a"], attention["b"])
    assert loss.item() == both.item()
    loss.backward()
    assert logits[teacher].grad is None
    torch.testing.assert_close(logits[student].grad, wanted, rtol=1e-12, atol=0)


def test_no_gradient_on_either_side_is_an_error():
    a, b = (maps.detach() for maps in flipped_pair())
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    with pytest.raises(ValueError, match="no gradient") as error:
        acr(a, b)
    assert says(error, "layers (0, 1)", "torch.no_grad")


def test_under_no_grad_the_value_is_computed():
    a, b = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    expected = acr(a, b)
    with torch.no_grad():
        value = acr(a.detach(), b.detach())
    assert value.item() == expected.item()
    assert not value.requires_grad
    assert expected.requires_grad


def test_class_maps_without_gradient_on_either_side_are_an_error():
    """Maps made without create_graph would add a constant to the loss and teach nothing."""
    attention = flipped_pair()
    cam_a, cam_b = (torch.rand(2, 3, 3, 5, generator=generator(seed)) for seed in (1, 2))
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    with pytest.raises(ValueError, match="no gradient") as error:
        acr(*attention, cam_a, cam_b)
    assert says(error, "cam_a", "cam_b", "create_graph")
    assert acr(*attention, cam_a.requires_grad_(), cam_b).requires_grad
    assert AllPairsConsistencyLoss(HorizontalFlip(), cam_weight=0)(*attention, cam_a.detach(), cam_b).requires_grad
    with torch.no_grad():
        acr(*attention, cam_a.detach(), cam_b)


def test_gradient_reaches_both_views():
    logits = [random_logits(1, 2, 16, seed) for seed in (1, 2)]
    AllPairsConsistencyLoss(HorizontalFlip())(*(wrap([one.softmax(-1)], (3, 5)) for one in logits)).backward()
    assert all(one.grad.abs().sum() > 0 for one in logits)


def test_inputs_and_module_are_left_as_they_were():
    a, b = flipped_pair()
    before = [maps.weights()[0].clone() for maps in (a, b)]
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    acr(a, b, return_terms=True)
    assert all(torch.equal(maps.weights()[0], old) for maps, old in zip((a, b), before, strict=True))
    assert list(acr.parameters()) == []
    assert acr.state_dict() == {}


def test_module_is_copied_pickled_and_printed():
    a, b = flipped_pair()
    acr = AllPairsConsistencyLoss(Compose([HorizontalFlip(), Rotate90(2)]), 0.5, distance="js", layers=[1])
    for other in (copy.deepcopy(acr), pickle.loads(pickle.dumps(acr))):
        assert other(a, b).item() == acr(a, b).item()
    assert "Compose([HorizontalFlip(), Rotate90(2)])" in repr(acr)
    assert "activation_weight=0.5" in repr(acr)
    assert "'js'" in repr(acr)


# Labels, valid, scale, rows, terms


def test_valid_equals_the_loop_at_any_resolution():
    """A token counts as image where at least half of its pixels are; h != w, 4 px by 3 px tokens."""
    grid = (4, 6)
    tensors_a, tensors_b, a, b = pair_of("horizontal", grid)
    pixels = torch.rand(2, 16, 18, generator=generator(3)) > 0.45
    shown = [
        [
            sum(pixels[image, 4 * i + y, 3 * j + x].item() for y in range(4) for x in range(3)) >= 6
            for i in range(4)
            for j in range(6)
        ]
        for image in range(2)
    ]
    assert 8 < sum(map(sum, shown)) < 40
    expected = oracles.pairwise_terms(tensors_a, tensors_b, grid, oracles.mirror, shown=shown)
    loss = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)(a, b, valid=pixels)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-9)
    assert valid_tokens(pixels, Lattice(4, 6)).tolist() == shown


def test_what_is_padding_does_not_matter():
    tensors_a, tensors_b = random_maps((3, 5), layers=1, seed=1), random_maps((3, 5), layers=1, seed=2)
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    valid[:, :, 4] = False
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)
    before = acr(wrap(tensors_a, (3, 5)), wrap(tensors_b, (3, 5)), valid=valid)
    padding_rows = [1 + i * 5 + 4 for i in range(3)]
    tensors_a[0] = tensors_a[0].detach().clone()
    tensors_a[0][:, :, padding_rows] = 1 / 16
    after = acr(wrap(tensors_a, (3, 5)), wrap(tensors_b, (3, 5)), valid=valid)
    assert after.item() == pytest.approx(before.item(), rel=1e-12)
    assert after.item() != pytest.approx(acr(wrap(tensors_a, (3, 5)), wrap(tensors_b, (3, 5))).item(), rel=1e-3)


def test_all_valid_is_no_mask():
    a, b = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    assert acr(a, b, valid=torch.ones(2, 30, 70)).item() == pytest.approx(acr(a, b).item(), rel=1e-12)


def test_scale_multiplies_the_loss_and_not_the_terms():
    attention = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    loss, terms = terms_of(acr, *attention)
    ramped, same_terms = terms_of(acr, *attention, scale=0.25)
    assert ramped.item() == pytest.approx(0.25 * loss.item(), rel=1e-12)
    assert same_terms == terms
    off = acr(*attention, scale=0.0)
    assert off.item() == 0
    assert off.requires_grad


def test_sampled_rows_are_unbiased_and_class_rows_exact():
    attention = flipped_pair((3, 5), batch=1, heads=1, layers=1)
    _, exact = terms_of(AllPairsConsistencyLoss(HorizontalFlip()), *attention)
    torch.manual_seed(0)
    sampled = AllPairsConsistencyLoss(HorizontalFlip(), rows=0.2)
    draws = [terms_of(sampled, *attention)[1] for _ in range(400)]
    assert {draw["activation"] for draw in draws} == {exact["activation"]}
    values = torch.tensor([draw["affinity"] for draw in draws], dtype=torch.float64)
    error = values.std() / math.sqrt(len(draws))
    assert len(values.unique()) > 100
    assert abs(values.mean() - exact["affinity"]) < 4 * error
    assert error < 0.05 * exact["affinity"]


@pytest.mark.parametrize("name", ["turn 1", "scale"])
@pytest.mark.parametrize(("share", "count"), [(0.2, 5), (1e-9, 1), (0.99, 24)])
def test_sampled_rows_are_rows_of_the_whole(name, share, count):
    view = Scale(0.5) if name == "scale" else Rotate90()
    grid_b = view.output_size((4, 6))
    a, b = random_attention((4, 6), layers=1, seed=1)[0], random_attention(grid_b, layers=1, seed=2)[0]
    ((_, picked),), found_share = sample_rows(plan_of(a, b, view), share)
    assert found_share == count / 24
    assert len(picked.unique()) == count
    (whole_class, whole), (some_class, some) = (aligned_rows(a, b, view, picked=rows) for rows in (None, picked))
    assert some.shown.shape[-1] == count
    for of_some, of_whole in zip(carried_rows(some), carried_rows(whole), strict=True):
        torch.testing.assert_close(of_some, of_whole[:, :, picked], rtol=1e-12, atol=1e-15)
    for of_some, of_whole in zip(carried_rows(some_class), carried_rows(whole_class), strict=True):
        torch.testing.assert_close(of_some, of_whole, rtol=1e-12, atol=0)


def test_every_row_is_sampled_equally_often_whatever_the_blocks():
    a, b = random_attention((4, 6), layers=1, seed=1)[0], random_attention((4, 6), layers=1, seed=2)[0]
    torch.manual_seed(0)
    drawn = {}
    for rows in (24, 6):
        torch.manual_seed(0)
        plan, counts = plan_of(a, b, HorizontalFlip(), rows=(rows, rows)), torch.zeros(24)
        for _ in range(1500):
            blocks, share = sample_rows(plan, 0.3)
            picked = torch.cat([block.tokens[0] + tokens for block, tokens in blocks])
            assert len(picked.unique()) == 7 == round(24 * share)
            counts[picked] += 1
        drawn[rows] = counts
    assert torch.equal(drawn[24], drawn[6])
    expected = 1500 * 7 / 24
    assert ((drawn[24] - expected).abs() < 4.5 * math.sqrt(expected)).all()


def test_sampled_rows_respect_valid():
    """Whichever rows are drawn, padding is left out: the mean over draws stays between the rows' own distances."""
    tensors_a, tensors_b, a, b = pair_of("horizontal", (3, 5), batch=1, layers=1)
    shown = torch.zeros(1, 3, 5, dtype=torch.bool)
    shown[0, 1, 2] = True
    _, expected = oracles.pairwise_terms(tensors_a, tensors_b, (3, 5), oracles.mirror, shown=shown.flatten(1).tolist())
    torch.manual_seed(0)
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0, rows=0.5)
    values = [acr(a, b, valid=shown).item() for _ in range(20)]
    assert all(value == 0 or value == pytest.approx(expected, rel=1e-9) for value in values)
    assert any(value > 0 for value in values)


def test_terms_are_detached_float32_and_unweighted():
    attention = flipped_pair()
    cams = [torch.rand(2, 3, 3, 5, generator=generator(seed), dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    weights = {"activation": 0.5, "affinity": 3.0, "cam": 7.0}
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 0.5, 3.0, cam_weight=7.0)
    loss, terms = acr(*attention, *cams, return_terms=True)
    assert set(terms) == {"activation", "affinity", "cam", "entropy"}
    for term in terms.values():
        assert term.dtype == torch.float32
        assert term.shape == ()
        assert not term.requires_grad
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(weights[name] * terms[name].item() for name in weights), rel=1e-6)
    assert acr(*attention, *cams).item() == loss.item()


def test_terms_of_zero_weight_are_reported_without_gradient():
    attention = flipped_pair()
    acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
    loss, terms = acr(*attention, return_terms=True)
    _, reference = terms_of(AllPairsConsistencyLoss(HorizontalFlip()), *attention)
    assert terms["activation"].item() == pytest.approx(reference["activation"])
    assert loss.item() == pytest.approx(DEFAULT_WEIGHT * reference["affinity"], rel=1e-6)
    assert loss.item() == acr(*attention).item()


def test_entropy_is_one_for_uniform_rows_and_near_zero_for_one_hot_rows():
    uniform = torch.full((2, 3, 16, 16), 1 / 16)
    one_hot = torch.eye(16).expand(2, 3, 16, 16)
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    for rows, expected in ((uniform, 1.0), (one_hot, 0.0)):
        attention = wrap([rows.clone().requires_grad_()], (3, 5))
        assert terms_of(acr, attention, attention)[1]["entropy"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["horizontal", "turn 1"])
def test_entropy_is_the_mean_over_views_and_layers(name):
    tensors_a, tensors_b, a, b = pair_of(name, (3, 5))
    _, terms = terms_of(AllPairsConsistencyLoss(VIEWS[name][0]), a, b)
    expected = sum(oracles.row_entropy(t.tolist()) for t in tensors_a + tensors_b) / 4
    assert terms["entropy"] == pytest.approx(expected, rel=1e-6)
    assert not row_entropy(tensors_a[0]).requires_grad
    assert row_entropy(tensors_a[0]).mean().item() == pytest.approx(
        oracles.row_entropy(tensors_a[0].tolist()), rel=1e-9
    )


def literal_scale(a, b):
    """(B,): max(1, the mean over both maps, heads and rows of the absolute sum of a row), by loops."""
    scales = []
    for image in range(len(a)):
        means = []
        for rows in (a[image].flatten(0, 1).tolist(), b[image].flatten(0, 1).tolist()):
            means.append(sum(sum(abs(x) for x in row) for row in rows) / len(rows))
        scales.append(max(1.0, sum(means) / 2))
    return torch.tensor(scales, dtype=a.dtype)


def mixed_pair(change, grid=(2, 3), seeds=(1, 2)):
    """One layer of both views, changed after softmax: its tensors, and their AttentionMaps."""
    tensors = [change(random_maps(grid, layers=1, heads=4, seed=seed)[0]) for seed in seeds]
    return tensors, [AttentionMaps([explicit(each, layout_of(grid), stochastic=False)]) for each in tensors]


CHANGES = {
    "three times as much": lambda a: 3 * a,
    "summed over heads": lambda a: a.sum(1, keepdim=True),
    "gated": lambda a: 0.3 * a,
    "gated by head": lambda a: a * torch.tensor([0.0, 0.5, 1.0, 7.0], dtype=a.dtype)[:, None, None],
    "gated by row": lambda a: a * torch.linspace(0, 1, a.shape[-2], dtype=a.dtype)[:, None],
    "gated by image": lambda a: a * torch.tensor([0.1, 9.0], dtype=a.dtype)[:, None, None, None],
    "of either sign": lambda a: 2 * a - 3 * a.flip(1),
    "rows that sum to 0": lambda a: 5 * (a - a.mean(-1, keepdim=True)),
    "zero": lambda a: 0 * a,
}


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_are_no_probabilities_are_brought_to_one_scale(change, heads):
    (a, b), attention = mixed_pair(CHANGES[change])
    scale = literal_scale(a, b)[:, None, None, None]
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0, heads=heads)
    loss = acr(*attention)
    expected = sum(oracles.pairwise_terms([a / scale], [b / scale], (2, 3), oracles.mirror, heads=heads))
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, (a, b), retain_graph=True)
    probabilities = [  # divided by hand: a constant to the gradient
        AttentionMaps([explicit(each / scale, layout_of((2, 3)), stochastic=True)]) for each in (a, b)
    ]
    references = torch.autograd.grad(acr(*probabilities), (a, b))
    for found, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(found, reference)


def test_a_map_summed_over_heads_weighs_as_much_as_the_mean_and_a_gate_keeps_what_it_means():
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)
    plain = acr(*mixed_pair(lambda a: a)[1])
    assert acr(*mixed_pair(lambda a: a.sum(1, keepdim=True))[1]).item() == pytest.approx(plain.item(), rel=1e-9)
    assert acr(*mixed_pair(lambda a: 0.3 * a)[1]).item() == pytest.approx(0.3 * plain.item(), rel=1e-9)
    heads = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    (a, b), attention = mixed_pair(lambda a: a * heads)
    expected = sum(oracles.pairwise_terms([a], [b], (2, 3), oracles.mirror))
    assert acr(*attention).item() == pytest.approx(expected, rel=1e-9)


def test_the_scale_of_an_image_does_not_depend_on_the_others():
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 1.0, 1.0)
    attention = mixed_pair(CHANGES["gated by image"])[1]
    alone = [acr(a, b).item() for a, b in zip(*(each.chunk(2) for each in attention), strict=True)]
    assert acr(*attention).item() == pytest.approx(sum(alone) / 2, rel=1e-9)


@pytest.mark.parametrize("change", ["three times as much", "gated by head", "of either sign"])
def test_the_scale_is_the_same_in_blocks_and_for_sampled_rows(change):
    _, (a, b) = mixed_pair(CHANGES[change], (3, 5))
    a, b = a.detach(), b.detach()
    for view in (HorizontalFlip(), Compose([HorizontalFlip(), VerticalFlip()])):
        values = [
            AllPairsConsistencyLoss(view, 1.0, 1.0, blockwise=blockwise, block_rows=4) for blockwise in (False, True)
        ]
        with torch.no_grad():
            dense, blocks = (acr(a, b).item() for acr in values)
        assert blocks == pytest.approx(dense, rel=1e-9)
    torch.manual_seed(0)
    with torch.no_grad():
        sampled = [AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0, rows=0.4)(a, b).item() for _ in range(60)]
        whole = AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0)(a, b).item()
    assert sum(sampled) / 60 == pytest.approx(whole, rel=0.1)


def test_large_maps_in_half_precision_do_not_overflow():
    """A row of 300 keys of up to 600 sums to more than float16 holds."""
    rows = torch.full((1, 1, 301, 301), 600.0, dtype=torch.float16)
    other = rows.clone()
    other[..., 1:] = 0
    a, b = (AttentionMaps([explicit(each, layout_of((15, 20)), stochastic=False)]) for each in (rows, other))
    with torch.no_grad():
        loss = AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0)(a, b)
    assert loss.item() == pytest.approx(300 * 600 / ((301 * 600 + 600) / 2), rel=1e-3)


def test_entropy_is_the_mean_over_stochastic_layers():
    plain = [random_maps((2, 3), layers=2, seed=seed) for seed in (1, 2)]
    layout = layout_of((2, 3))
    with_gate = [
        AttentionMaps(
            [explicit(t[0], layout), explicit(0.5 * t[0], layout, 1, stochastic=False), explicit(t[1], layout, 2)]
        )
        for t in plain
    ]
    for blockwise in (None, True):
        acr = AllPairsConsistencyLoss(HorizontalFlip(), blockwise=blockwise)
        with torch.no_grad():
            found, expected = (
                acr(*pair, return_terms=True)[1] for pair in (with_gate, [wrap(tensors, (2, 3)) for tensors in plain])
            )
        assert found["entropy"].item() == pytest.approx(expected["entropy"].item(), rel=1e-6)


def test_one_key_has_an_entropy_of_0():
    attention = wrap([torch.ones(2, 3, 1, 1, requires_grad=True)], (1, 1), 0)
    acr = AllPairsConsistencyLoss(HorizontalFlip(), activation_weight=0)
    assert terms_of(acr, attention, attention)[1]["entropy"] == 0


def test_maps_mixed_after_softmax_have_no_entropy_and_no_js():
    _, (a, b) = mixed_pair(CHANGES["three times as much"])
    for blockwise in (None, True):
        terms = terms_of(AllPairsConsistencyLoss(HorizontalFlip(), blockwise=blockwise), a, b)[1]
        assert sorted(terms) == ["activation", "affinity"]
    with pytest.raises(ValueError, match="js") as error:
        AllPairsConsistencyLoss(HorizontalFlip(), distance="js")(a, b)
    assert says(error, "layer 0 (blocks.0.attn)", '"l1" or "l2"')


def test_js_is_refused_whichever_layer_is_mixed():
    proper, mixed = random_maps((2, 3), layers=2)
    layers = [explicit(proper, layout_of((2, 3)), 0), explicit(3 * mixed, layout_of((2, 3)), 1, stochastic=False)]
    attention = AttentionMaps(layers)
    with pytest.raises(ValueError, match="js") as error:
        AllPairsConsistencyLoss(HorizontalFlip(), distance="js")(attention, attention)
    assert says(error, "layer 1 (blocks.1.attn)")
    assert AllPairsConsistencyLoss(HorizontalFlip(), distance="js", layers=[0])(attention, attention).item() > 0


def test_a_term_that_cannot_exist_is_left_out_and_said_once():
    attention = [random_attention((3, 5), prefix=0, seed=seed) for seed in (1, 2)]
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    with pytest.warns(UserWarning, match="no class token") as record:
        first = acr(*attention)
    assert len(record) == 1
    assert "activation_weight=0" in str(record[0].message)
    assert record[0].filename == __file__  # it points at the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert acr(*attention).item() == first.item()


@pytest.mark.parametrize(
    ("make", "prefix", "facts"),
    [
        (lambda: AllPairsConsistencyLoss(HorizontalFlip(), 0.2), 0, ["no class token", "activation_weight=0"]),
        (lambda: AllPairsConsistencyLoss.paper(HorizontalFlip()), 0, ["no class token", "activation_weight=0"]),
        (lambda: AllPairsConsistencyLoss(HorizontalFlip(), cam_weight=1.0), 1, ["no class maps", "cam_a and cam_b"]),
    ],
    ids=["activation", "paper", "cam"],
)
def test_a_term_without_inputs_is_an_error_where_its_weight_was_given(make, prefix, facts):
    attention = [random_attention((3, 5), prefix=prefix, seed=seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match=facts[0]) as error:
        make()(*attention)
    assert says(error, *facts, f"{'cam' if prefix else 'activation'}_weight")


def test_unknown_class_tokens_matter_to_the_activation_term_alone():
    tensors_a, tensors_b = random_maps((3, 5), 4, seed=1), random_maps((3, 5), 4, seed=2)
    attention = [wrap(tensors, (3, 5), 4) for tensors in (tensors_a, tensors_b)]
    with pytest.raises(LayoutError, match="4 prefix tokens") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(*attention)
    assert says(error, "class_tokens=")
    loss = AllPairsConsistencyLoss(HorizontalFlip(), 0.0, 1.0)(*attention)
    assert loss.item() == pytest.approx(
        oracles.pairwise_terms(tensors_a, tensors_b, (3, 5), oracles.mirror, 4)[1], rel=1e-9
    )


def test_an_unknown_grid_is_an_error_that_says_why():
    maps = random_maps((2, 3), layers=1)
    attention = AttentionMaps([explicit(maps[0], None, why_unplaced="found 7 tokens; call with_layout")])
    with pytest.raises(LayoutError, match="found 7 tokens") as error:
        AllPairsConsistencyLoss(HorizontalFlip())(attention, attention)
    assert says(error, "layer 0 (blocks.0.attn)", "with_layout")


def test_all_weights_zero_is_zero():
    attention = flipped_pair()
    assert AllPairsConsistencyLoss(HorizontalFlip(), 0, 0, cam_weight=0)(*attention).item() == 0


# Class maps


@any_view
@pytest.mark.parametrize("mode", ["max", "minmax", None])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_cam_term_equals_the_loop_over_pixels(name, mode, distance):
    view, move = VIEWS[name]
    cam_a, cam_b = random_cams((4, 6), (6, 4) if transposes(name) else (4, 6))
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    shown = torch.rand(2, 4, 6, generator=generator(7)) > 0.3
    _, _, a, b = pair_of(name, (4, 6), layers=1)
    acr = AllPairsConsistencyLoss(view, 0, 0, cam_weight=2.0, distance=distance, cam_normalize=mode)
    for given_labels, valid in itertools.product((None, labels), (None, shown)):
        expected = oracles.pixelwise_cam_term(
            cam_a,
            cam_b,
            move,
            distance,
            mode,
            None if given_labels is None else given_labels.tolist(),
            None if valid is None else valid.tolist(),
        )
        found = acr(a, b, cam_a, cam_b, labels=given_labels, valid=valid)
        assert found.item() == pytest.approx(2 * expected, rel=1e-9)


def test_cam_term_adds_to_the_others():
    attention = flipped_pair()
    cams = random_cams((3, 5), (3, 5))
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    loss, terms = terms_of(acr, *attention, *cams)
    assert terms["cam"] == pytest.approx(oracles.pixelwise_cam_term(*cams, oracles.mirror), rel=1e-6)
    assert loss.item() == pytest.approx(
        acr(*attention).item() + 0.1 * oracles.pixelwise_cam_term(*cams, oracles.mirror), rel=1e-9
    )


def test_cam_term_of_float32_maps_beside_float64_attention():
    cams = [cam.detach().float().requires_grad_() for cam in random_cams((3, 5), (3, 5))]
    loss = AllPairsConsistencyLoss(HorizontalFlip())(*flipped_pair(), *cams)
    assert loss.dtype == torch.float64
    loss.backward()
    assert all(cam.grad.dtype == torch.float32 for cam in cams)


def test_normalize_cam_keeps_empty_maps_at_zero():
    cam = torch.stack([torch.zeros(4, 6), -torch.rand(4, 6, generator=generator(1)), torch.full((4, 6), 3.0)])[None]
    assert normalize_cam(cam)[0, 0].abs().max() == 0
    assert normalize_cam(cam)[0, 1].abs().max() == 0
    assert torch.equal(normalize_cam(cam)[0, 2], torch.ones(4, 6))
    by_range = normalize_cam(cam, "minmax")
    assert by_range[0, 1].min() == 0
    assert by_range[0, 1].max() == 1
    assert by_range[0, 2].abs().max() == 0


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [HorizontalFlip(), Scale(2)], ids=str)
def test_half_precision_maps_are_compared_in_float32(dtype, view):
    grid, grid_b = (3, 5), view.output_size((3, 5))
    halves = [
        random_maps(g, layers=1, seed=seed, dtype=torch.float32)[0].detach().to(dtype).requires_grad_()
        for g, seed in ((grid, 1), (grid_b, 2))
    ]
    acr = AllPairsConsistencyLoss(view)
    loss = acr(wrap([halves[0]], grid), wrap([halves[1]], grid_b))
    floats = [AttentionMaps([explicit(h.float(), layout_of(g))]) for h, g in zip(halves, (grid, grid_b), strict=True)]
    assert loss.dtype == torch.float32
    assert loss.item() == acr(*floats).item()
    loss.backward()
    assert all(h.grad.dtype == dtype and h.grad.isfinite().all() for h in halves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_multiplied_in_float32(dtype):
    factors = [
        [tensor.detach().to(dtype).requires_grad_() for tensor in random_factors((3, 5), 1, seed)] for seed in (1, 2)
    ]
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    loss = acr(*(AttentionMaps([factored(*pair, layout_of((3, 5)))]) for pair in factors))
    exact = acr(*(AttentionMaps([factored(*(t.float() for t in pair), layout_of((3, 5)))]) for pair in factors))
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()


@pytest.mark.parametrize("view", [HorizontalFlip(), Scale(2)], ids=str)
@pytest.mark.parametrize("distance", ["l1", "l2", "js", lambda a, b: (a @ a.mT - b @ b.mT).abs().sum(-1)])
def test_autocast_does_not_change_the_value(view, distance):
    grid, grid_b = (3, 5), view.output_size((3, 5))
    factors = [
        [t.detach().float().requires_grad_() for t in random_factors(g, 1, seed)]
        for g, seed in ((grid, 1), (grid_b, 2))
    ]
    cams = [cam.detach().float().requires_grad_() for cam in random_cams(grid, grid_b)]
    leaves = [tensor for pair in factors for tensor in pair] + cams
    acr = AllPairsConsistencyLoss(view, distance="l1" if callable(distance) else distance)
    if callable(distance):
        acr = AllPairsConsistencyLoss(view, 0.0, cam_weight=0.0, distance=distance)
        leaves = leaves[:-2]

    def loss():
        attention = [AttentionMaps([factored(*f, layout_of(g))]) for f, g in zip(factors, (grid, grid_b), strict=True)]
        return acr(*attention, *cams)

    plain = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss()
    assert cast.dtype == plain.dtype == torch.float32
    assert cast.item() == plain.item()
    for found, expected in zip(torch.autograd.grad(cast, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(found, expected)


def test_float32_is_close_to_float64():
    values = []
    for dtype in (torch.float32, torch.float64):
        attention = [
            AttentionMaps([factored(*(t.to(dtype) for t in random_factors((4, 6), 1, s)), layout_of((4, 6)))])
            for s in (1, 2)
        ]
        values.append(AllPairsConsistencyLoss(HorizontalFlip())(*attention).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] != values[1]


# A distance of one's own


def test_a_callable_distance():
    attention = flipped_pair()
    own = AllPairsConsistencyLoss(HorizontalFlip(), distance=lambda a, b: (a - b).abs().sum(-1))
    assert own(*attention).item() == AllPairsConsistencyLoss(HorizontalFlip())(*attention).item()


def test_a_callable_distance_must_reduce_the_last_axis_only():
    acr = AllPairsConsistencyLoss(HorizontalFlip(), 0.0, distance=lambda a, b: (a - b).abs().sum())
    with pytest.raises(ValueError, match="distance") as error:
        acr(*flipped_pair())
    assert says(error, "shape ()", "(2, 1, 15, 15)", "(2, 1, 15)", "last axis")

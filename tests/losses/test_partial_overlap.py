"""Views of which one shows a part of the other: rows over what both show, their weights, and what becomes of the rest.

The oracles are loops over pairs of tokens that both views show, apart from the package's lattices.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    PerImage,
    Rotate90,
    Scale,
)
from acr_reg.losses.functional import cam_consistency
from tests.support.attention import (
    explicit,
    factored,
    generator,
    layout_of,
    random_attention,
    random_logits,
    random_maps,
    terms_of,
    wrap,
)
from tests.support.oracles import (
    filter_row,
    half_way,
    mirror,
    pair_distance,
    resampled_affinity,
    stay,
    turn,
    weighted_mean,
)
from tests.support.pairs import aligned_rows, random_cams

GRID = (6, 7)  # tokens, which are the pixels of these images


def box(top, left, height, width, grid=GRID, pad=False):
    return Crop(top, left, height, width, image_size=grid, pad=pad)


# Oracles


def common_tokens(box_a, box_b, move=stay, shown=None, grid=GRID):
    """Pairs of token indices of both views that lie on one token of the image. A box is (top, left, height, width);
    ``move`` is what becomes of the second's tokens afterwards; ``shown[row][column]`` is False on padding."""
    pairs = []
    for token in range(box_a[2] * box_a[3]):
        row, column = token // box_a[3] + box_a[0], token % box_a[3] + box_a[1]
        inside = 0 <= row < grid[0] and 0 <= column < grid[1] and (shown is None or shown[row][column])
        i, j = row - box_b[0], column - box_b[1]
        if inside and 0 <= i < box_b[2] and 0 <= j < box_b[3]:
            i, j, _, width = move(i, j, box_b[2], box_b[3])
            pairs.append((token, i * width + j))
    return pairs


def loop_terms(
    maps_a,
    maps_b,
    common,
    prefix=1,
    class_tokens=(0,),
    distance="l1",
    normalize="row",
    heads="mean",
    labels=None,
    counted=None,
):
    """Both terms of one layer. ``common[image]`` are pairs of tokens, ``counted[image]`` the first view's tokens that
    are no padding. Of each head the rows over prefix and common tokens; heads count by the smaller of their masses."""
    class_rows, patch_rows = [], []
    for image, pairs in enumerate(common):
        partner = dict(pairs)
        of_heads = list(zip(maps_a[image].tolist(), maps_b[image].tolist(), strict=True))
        for group in [of_heads] if heads == "mean" else [[one] for one in of_heads]:

            def row(query_a, query_b, group=group, pairs=pairs):
                rows, weights = [], []
                for a, b in group:
                    a, b = a[query_a], b[query_b]
                    row_a, row_b = [a[prefix + i] for i, _ in pairs], [b[prefix + j] for _, j in pairs]
                    mass_a, mass_b = sum(row_a) + sum(a[:prefix]), sum(row_b) + sum(b[:prefix])
                    weights.append(min(mass_a, mass_b))
                    rows.append([(p / mass_a, q / mass_b) for p, q in zip(row_a, row_b, strict=True)])
                total = 0.0
                for column in zip(*rows, strict=True):
                    p, q = (
                        sum(w * pair[k] for w, pair in zip(weights, column, strict=True)) / sum(weights) for k in (0, 1)
                    )
                    total += pair_distance(p, q, distance)
                return total / len(pairs) if normalize == "mean" and pairs else total, sum(weights) / len(weights)

            for position, token in enumerate(class_tokens):
                if labels is None or labels[image][position]:
                    class_rows.append(row(token, token))
            tokens = range(maps_a.shape[-2] - prefix) if counted is None else counted[image]
            patch_rows += [row(prefix + i, prefix + partner[i]) if i in partner else (0.0, 0.0) for i in tokens]
    return weighted_mean(class_rows), weighted_mean(patch_rows)


# Each: the boxes of both views, what the second is then turned to, for every image of the batch.
WHOLE = (0, 0, *GRID)
CASES = {
    "a box": [(WHOLE, (1, 2, 4, 4), "stay")] * 2,
    "a box, flipped": [(WHOLE, (2, 3, 4, 4), "mirror")] * 2,
    "a box, turned": [(WHOLE, (2, 1, 3, 5), "turn")] * 2,
    "two boxes": [((0, 1, 4, 5), (2, 0, 4, 5), "stay")] * 2,
    "all and a box": [((1, 0, 4, 4), WHOLE, "mirror")] * 2,
    "one token": [((0, 0, 3, 4), (2, 3, 3, 4), "stay")] * 2,
    "of each image": [((0, 1, 4, 4), (2, 3, 4, 4), "stay"), ((1, 1, 4, 4), (1, 2, 4, 4), "turn")],
    "all, a part, nothing": [
        ((1, 1, 4, 4), (1, 1, 4, 4), "mirror"),
        ((0, 0, 4, 4), (2, 1, 4, 4), "stay"),
        ((0, 0, 4, 4), (1, 4, 4, 4), "stay"),
    ],
    "padded": [(WHOLE, (-2, 3, 6, 7), "mirror")] * 2,
    "padded all around": [(WHOLE, (-1, -2, 8, 10), "stay")] * 2,
}
MOVES = {"stay": (stay, Identity()), "mirror": (mirror, HorizontalFlip()), "turn": (turn, Rotate90())}
any_case = pytest.mark.parametrize("name", CASES)


def made(name, prefix=1, heads=2, seed=0):
    """Random maps of both views, their grids, the views, and the tokens that both show."""
    case = CASES[name]
    view_a = PerImage([box(*a, pad=True) for a, _, _ in case])
    view_b = PerImage([Compose([box(*b, pad=True), MOVES[move][1]]) for _, b, move in case])
    grids = case[0][0][2:], view_b.output_size(GRID)
    maps = [random_maps(grid, prefix, len(case), heads, 1, 10 * seed + k)[0] for k, grid in enumerate(grids)]
    return maps, grids, view_a, view_b, [common_tokens(a, b, MOVES[move][0]) for a, b, move in case]


def attention(maps, grids, prefix=1, class_tokens=1):
    return [wrap([m], g, prefix, class_tokens) for m, g in zip(maps, grids, strict=True)]


@pytest.mark.parametrize(
    ("name", "distance", "normalize", "heads"),
    [(name, "l1", "row", heads) for name in CASES for heads in ("mean", "each")]
    + list(
        itertools.product(["two boxes", "of each image"], ["l1", "l2", "js"], ["row", "mean"], ["mean", "each"]),
    ),
)
def test_equals_the_loop_over_common_tokens(name, distance, normalize, heads):
    maps, grids, view_a, view_b, common = made(name)
    acr = AllPairsConsistencyLoss(view_b, 1.0, 1.0, distance=distance, normalize=normalize, heads=heads)
    loss, terms = terms_of(acr, *attention(maps, grids), view_a=view_a)
    activation, affinity = loop_terms(*maps, common, distance=distance, normalize=normalize, heads=heads)
    assert loss.item() == pytest.approx(activation + affinity, rel=1e-9)
    assert terms["activation"] == pytest.approx(activation, rel=1e-5)
    assert terms["affinity"] == pytest.approx(affinity, rel=1e-5)
    assert affinity > 0


@pytest.mark.parametrize("name", ["a box", "two boxes", "of each image", "padded all around"])
@pytest.mark.parametrize(("prefix", "class_tokens"), [(3, (2, 0)), (5, (1,)), (20, tuple(range(20)))])
def test_equals_the_loop_with_class_tokens_and_labels(name, prefix, class_tokens):
    maps, grids, view_a, view_b, common = made(name, prefix)
    labels = torch.rand(2, len(class_tokens), generator=generator(4)) > 0.5
    labels[0, 0] = True
    several = len(class_tokens) > 1
    expected = loop_terms(*maps, common, prefix, class_tokens, labels=labels.tolist() if several else None)
    loss, terms = terms_of(
        AllPairsConsistencyLoss(view_b, 1.0, 1.0),
        *attention(maps, grids, prefix, list(class_tokens)),
        view_a=view_a,
        labels=labels,
    )
    assert loss.item() == pytest.approx(sum(expected), rel=1e-9)
    assert terms["activation"] == pytest.approx(expected[0], rel=1e-5)


def resampled_rows(rows, tokens, weights):
    """Of a map with one class token: its row, then those of ``tokens``, resampled over these tokens and their keys."""
    kept = [[row[0], *(row[1 + t] for t in tokens)] for row in (rows[0], *(rows[1 + t] for t in tokens))]
    unmixed = [[float(j == k) for j in range(len(kept))] for k in range(len(kept))]
    keys = resampled_affinity([row[1:] for row in kept], unmixed, weights)
    first, *patches = ([row[0], *more] for row, more in zip(kept, keys, strict=True))
    columns = list(zip(*patches, strict=True))
    return [first] + [[sum(w * p for w, p in zip(over, c, strict=True)) for c in columns] for over in weights]


@pytest.mark.parametrize("zoom", [2.0, 1.25])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("narrow", [False, True], ids=["all", "cut"])
def test_equals_the_loop_of_a_resampled_crop(zoom, heads, narrow):
    """Columns 2 to 6 of 8, ``zoom`` times as wide; cut, the first view shows columns 0 to 5 only. Rows and columns go
    through the filter of one axis, over what the first view shows, and those of the first view half way there and
    back; each row keeps the mass it gave to that."""
    count, wide = (5 if narrow else 8), round(4 * zoom)
    view = Crop(0, 2, 1, 4, size=(1, wide), image_size=(1, 8))
    view_a = Crop(0, 0, 1, count, image_size=(1, 8))
    shown = range(2, min(count, 6))
    a, b = (random_maps((1, n), 1, 2, 2, 1, seed=n)[0] for n in (count, wide))
    seen = [t for t in range(wide) if (t + 0.5) / zoom + 2 < count]
    there = [filter_row((t + 0.5) / zoom - 0.5, 1 / zoom, len(shown)) for t in seen]
    back = [filter_row((column + 0.5 - 2) * zoom - 0.5, zoom, len(seen)) for column in shown]
    blurred = half_way(there, back)

    class_rows, patch_rows = [], []
    for image in range(2):
        of_heads = []
        for head in range(2):
            rows_a = resampled_rows(a[image, head].tolist(), shown, blurred)
            rows_b = resampled_rows(b[image, head].tolist(), seen, back)
            of_heads.append(list(zip(rows_a, rows_b, strict=True)))
        for group in [of_heads] if heads == "mean" else [[one] for one in of_heads]:
            compared = []
            for pairs in zip(*group, strict=True):
                masses = [(sum(p), sum(q)) for p, q in pairs]
                least = [min(both) for both in masses]
                mean_a, mean_b = (
                    [
                        sum(w * pair[k][1 + c] / mass[k] for w, pair, mass in zip(least, pairs, masses, strict=True))
                        / sum(least)
                        for c in range(len(shown))
                    ]
                    for k in (0, 1)
                )
                compared.append((sum(abs(p - q) for p, q in zip(mean_a, mean_b, strict=True)), sum(least) / len(least)))
            class_rows.append(compared[0])
            patch_rows += compared[1:] + [(0.0, 0.0)] * (count - len(shown))
    _, terms = terms_of(
        AllPairsConsistencyLoss(view, 1.0, 1.0, heads=heads),
        *attention((a, b), ((1, count), (1, wide))),
        view_a=view_a,
    )
    assert terms["activation"] == pytest.approx(weighted_mean(class_rows), rel=1e-5)
    assert terms["affinity"] == pytest.approx(weighted_mean(patch_rows), rel=1e-5)


# Conditional rows


def masked_softmax(logits, keys):
    hidden = torch.ones(logits.shape[-1], dtype=torch.bool)
    hidden[keys] = False
    return logits.double().masked_fill(hidden, -math.inf).softmax(-1)


@pytest.mark.parametrize("away", [0.0, 10.0, 27.6, 66.0, 75.0], ids="{:g} nats away".format)
@pytest.mark.parametrize("form", ["factors", "maps"])
def test_conditional_rows_are_a_softmax_over_masked_logits(away, form):
    """In float32, down to 1e-30 of a row's mass on what both show, and below that the row fades out."""
    pairs = common_tokens(WHOLE, (2, 1, 3, 4))
    inside = [1 + i for i, _ in pairs]
    layout, layout_b = layout_of(GRID), layout_of((3, 4))
    query, key = (torch.randn(1, 2, 43, 8, generator=generator(k)) for k in (1, 2))
    outside = [k for k in range(43) if k not in [0, *inside]]
    # One channel of its own says whether a key lies outside: all queries look there.
    query[..., 0], key[..., 0] = math.sqrt(8), 0.0
    key[:, :, outside, 0] = away + 0.1
    logits = (query.double() @ key.double().mT) / math.sqrt(8)
    a = factored(query.requires_grad_(), key.requires_grad_(), layout)
    if form == "maps":
        a = explicit(a.weights(), layout)
    b = explicit(random_maps((3, 4), batch=1, heads=2, layers=1, dtype=torch.float32)[0], layout_b)
    rows, _, weight = aligned_rows(a, b, box(2, 1, 3, 4))[1].comparable("each")
    wanted = masked_softmax(logits, [0, *inside])[..., 1:, 1:]
    shown = [i - 1 for i in inside]
    if away < 75:
        torch.testing.assert_close(rows[..., shown].double(), wanted[:, :, shown][..., shown], rtol=1e-5, atol=1e-6)
    assert (weight < 20 * math.exp(-away)).all()
    loss = AllPairsConsistencyLoss(box(2, 1, 3, 4), 1.0, 1.0)(AttentionMaps([a]), AttentionMaps([b]))
    gradients = torch.autograd.grad(loss, (query, key))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert loss < 500 * math.exp(-away)


@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("empty", ["one head", "all heads"])
def test_rows_that_hold_nothing_in_common_have_a_finite_gradient(distance, heads, dtype, empty):
    """Underflow to exactly 0 of one head's mass on what both show, prefix and all, in maps of every precision."""
    logits = [random_logits(2, 2, n, n, torch.float32) for n in (43, 13)]
    pairs = common_tokens(WHOLE, (2, 1, 3, 4))
    hidden = torch.zeros(2, 1, 43)
    hidden[: 1 if empty == "one head" else 2, :, [0] + [1 + i for i, _ in pairs]] = -200
    maps = [(logits[0] + hidden).softmax(-1).to(dtype), logits[1].softmax(-1).to(dtype)]
    assert (maps[0][:, 0, :, 0] == 0).all()
    maps[0].retain_grad()
    acr = AllPairsConsistencyLoss(box(2, 1, 3, 4), 1.0, 1.0, distance=distance, heads=heads)
    loss = acr(*attention(maps, (GRID, (3, 4))))
    loss.backward()
    assert loss.isfinite()
    assert maps[0].grad.isfinite().all()
    assert all(one.grad.isfinite().all() for one in logits)
    assert (loss == 0) == (empty == "all heads")


# Gradient

FULL, PART = Identity(), Crop(2, 1, 4, 4, image_size=(8, 8))


def gradient_norms(view, grid_b, seed, of, distance, heads, half, sharpness=2.0):
    """l1, l2 and largest entry of the gradient to both views' logits or probabilities on an 8 x 8 grid."""
    logits = [
        random_logits(2, 3, n, seed + k, sharpness=sharpness) for k, n in ((0, 65), (50, 1 + grid_b[0] * grid_b[1]))
    ]

    def rows(one):
        if half:  # the class token holds half of the mass of every row
            one = torch.cat([one[..., 1:].logsumexp(-1, keepdim=True), one[..., 1:]], -1)
        return one.softmax(-1)

    maps = [rows(one) for one in logits]
    if of == "probabilities":
        logits = maps = [m.detach().requires_grad_() for m in maps]
    acr = AllPairsConsistencyLoss(view, 1.0, 1.0, distance=distance, heads=heads)
    found = torch.autograd.grad(acr(*attention(maps, ((8, 8), grid_b))), logits)
    return torch.tensor([[g.abs().sum(), g.norm(), g.abs().max()] for g in found])


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("half", [False, True], ids=["random rows", "half on the class token"])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("distance", ["l1", "js"])
def test_a_quarter_of_an_image_does_not_multiply_gradients(of, half, heads, distance):
    """By no more than 8: a row over its mass m has a gradient 2 / m times as large, counts m times, and is divided by
    at least OVERLAP_FLOOR = 1/4 of the rows. Measured: to 3.0 in l2, to 8 in the largest entry of the l1 distance."""
    for seed in range(3):
        full = gradient_norms(FULL, (8, 8), seed, of, distance, heads, half)
        part = gradient_norms(PART, (4, 4), seed, of, distance, heads, half)
        assert (part / full).max() < 8


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("half", [False, True], ids=["random rows", "half on the class token"])
def test_squares_of_conditional_rows_are_larger_and_so_is_their_gradient(heads, half):
    """l2 is a square: rows over a quarter of the keys have entries about 4 times as large, and so is their difference.
    Next to that of l1 it stays within the bound of 8."""
    for seed in range(3):
        full, part = (
            gradient_norms(view, grid, seed, "logits", "l2", heads, half)
            for view, grid in ((FULL, (8, 8)), (PART, (4, 4)))
        )
        assert (part / full).max() < 12
        assert (part[:, :2] / full[:, :2]).max() < 8


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("sharpness", [1.0, 4.0, 8.0, 16.0])
def test_sharp_heads_do_not_multiply_gradients(heads, sharpness):
    """A head that hardly looks at the common region is one of several: its share must not be 1 / m times as much."""
    full = gradient_norms(FULL, (8, 8), 0, "probabilities", "l1", heads, False, sharpness)
    part = gradient_norms(PART, (4, 4), 0, "probabilities", "l1", heads, False, sharpness)
    assert (part[:, 2] / full[:, 2]).max() <= 8.001
    assert (part / full).max() < 8.001


@pytest.mark.parametrize("side", [4, 3, 2, 1])
def test_an_overlap_that_shrinks_fades(side):
    """8 x 8 tokens of which both show side x side: value and gradient fall with the overlap, to nothing."""
    a, b = (random_logits(2, 3, 65, seed) for seed in (1, 2))

    def value(side):
        view = Crop(8 - side, 8 - side, 8, 8, image_size=(8, 8), pad=True)
        return AllPairsConsistencyLoss(view, 0.0, 1.0)(*attention((a.softmax(-1), b.softmax(-1)), ((8, 8), (8, 8))))

    this, less = value(side), value(side - 1) if side > 1 else torch.zeros(())
    assert 0 <= less < this
    assert this < 2 * (side * side / 64) ** 2 / 0.25  # rows shown, times the mass on them, over the floor
    gradients = [g.abs().max() for g in torch.autograd.grad(this, (a, b))]
    assert 0 < max(gradients) < 8 / 64 / 2 / 3


def test_it_fades_without_a_step_as_attention_leaves_the_overlap():
    a, b = random_logits(1, 2, 43, 1), random_logits(1, 2, 13, 2)
    keys = [0] + [1 + i for i, _ in common_tokens(WHOLE, (2, 1, 3, 4))]
    values = []
    for away in torch.linspace(0, 80, 161):
        moved = a.detach().clone()
        moved[..., keys] -= away
        loss = AllPairsConsistencyLoss(box(2, 1, 3, 4), 1.0, 1.0)(
            *attention([moved.softmax(-1).requires_grad_(), b.softmax(-1)], (GRID, (3, 4)))
        )
        values.append(loss.item())
    seen = torch.tensor(values, dtype=torch.float64)
    ratios = (seen[1:] / seen[:-1])[:130]  # to 65 nats; from there on rows fade faster
    assert ratios.max() < 1
    assert ratios.min() > 0.95 * math.exp(-0.5)  # no faster than the mass does
    assert seen[-1] < 1e-30


# Full overlap


@pytest.mark.parametrize("normalize", ["row", "mean"])
@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
def test_a_crop_of_all_is_no_crop_to_the_bit(normalize, distance):
    maps = [random_maps(GRID, seed=seed, layers=1)[0] for seed in (1, 2)]
    both = attention(maps, (GRID, GRID))
    acr = AllPairsConsistencyLoss(Identity(), 1.0, 1.0, distance=distance, normalize=normalize)
    expected = acr(*both)
    for view, view_a in [
        (box(*WHOLE), None),
        (PerImage([box(*WHOLE)] * 2), None),
        (box(*WHOLE), box(*WHOLE)),
        (Compose([HorizontalFlip(), HorizontalFlip()]), box(*WHOLE)),
    ]:
        assert torch.equal(acr(*both, view=view, view_a=view_a), expected)
    flipped = acr(*both, view=HorizontalFlip())
    assert torch.equal(acr(*both, view=Compose([box(*WHOLE), HorizontalFlip()])), flipped)
    if normalize == "mean" and distance == "l1":
        assert expected.item() == pytest.approx(
            sum(
                (a - b).abs().mean().item()
                for a, b in [[m.mean(1)[:, :1, 1:] for m in maps], [m.mean(1)[:, 1:, 1:] for m in maps]]
            )
        )


def test_what_nobody_looks_at_may_be_cut_off():
    """The published form, which keeps the mass on patches, is the limit of the partial one: no step between them."""
    a, b = (random_logits(1, 2, 43, seed).detach() for seed in (1, 2))
    column = [1 + 7 * i + 6 for i in range(6)]
    kept = [k for k in range(43) if k not in column]
    for one in (a, b):
        one[..., column] = -40
    maps = [a.softmax(-1).requires_grad_(), b[..., kept, :][..., kept].softmax(-1)]
    full = [maps[0], b.softmax(-1)]
    _, part = terms_of(AllPairsConsistencyLoss(box(0, 0, 6, 6)), *attention(maps, (GRID, (6, 6))))
    _, whole = terms_of(AllPairsConsistencyLoss(Identity()), *attention(full, (GRID, GRID)))
    assert part["activation"] == pytest.approx(whole["activation"], rel=1e-6)
    rows = (full[0].mean(1) - full[1].mean(1))[0, [k - 1 + 1 for k in kept[1:]], 1:].abs().sum(-1)
    assert part["affinity"] == pytest.approx(rows.mean().item(), rel=1e-6)


# A view of each image


def test_images_weigh_by_what_is_common_to_both_of_their_views():
    """sum_i S_i / max(sum_i W_i, rows / 4), with S and W an image's sums of weighted distances and of weights."""
    name = "all, a part, nothing"
    maps, grids, view_a, view_b, common = made(name)
    relation = Compose([view_a.inverse, view_b])
    acr = AllPairsConsistencyLoss(relation, 0.0, 1.0)
    found = acr(*attention(maps, grids))
    sums, weights = [], []
    for i in range(3):
        own = [m[i : i + 1] for m in maps]
        pair = attention(own, grids)
        value = acr(*pair, view=relation.of_image(i)).item()
        _, _, weight = aligned_rows(pair[0][0], pair[1][0], relation.of_image(i))[1].comparable("mean")
        total = 16.0 if weight is None else weight.sum().item()
        weights.append(total)
        sums.append(value * max(total, 4.0))
    assert found.item() == pytest.approx(sum(sums) / max(sum(weights), 12.0), rel=1e-9)
    assert weights == [pytest.approx(16), pytest.approx(weights[1]), 0]
    assert 0 < weights[1] < len(common[1])


def test_images_do_not_leak_into_each_other():
    maps, grids, view_a, view_b, _ = made("all, a part, nothing")
    loss = AllPairsConsistencyLoss(view_b, 1.0, 1.0)(*attention(maps, grids), view_a=view_a)
    for gradient in torch.autograd.grad(loss, maps):
        assert (gradient[0] != 0).any()
        assert (gradient[1] != 0).any()
        assert gradient[2].abs().max() == 0 or (gradient[2][:, 1:] == 0).all()


def test_chunks_of_one_forward_with_a_view_of_each_image():
    maps, grids, view_a, view_b, _ = made("of each image")
    a, b = attention(maps, grids)
    together = wrap([torch.cat(maps)], grids[0], 1, 1).chunk(2)
    acr = AllPairsConsistencyLoss(view_b, 1.0, 1.0)
    assert torch.equal(acr(*together, view_a=view_a), acr(a, b, view_a=view_a))


def test_sampled_rows_are_close_to_unbiased():
    """A ratio of two sums over the sample: off by the order of one over the rows sampled, here under 5 %."""
    maps, grids, view_a, view_b, common = made("two boxes")
    _, exact = loop_terms(*maps, common)
    torch.manual_seed(0)
    acr = AllPairsConsistencyLoss(view_b, rows=0.5)
    both = attention(maps, grids)
    values = torch.tensor([terms_of(acr, *both, view_a=view_a)[1]["affinity"] for _ in range(300)], dtype=torch.float64)
    error = values.std() / math.sqrt(len(values))
    assert len(values.unique()) == 36  # two of the four tokens in each of two rows
    assert abs(values.mean() - exact) < 0.05 * exact + 4 * error
    assert error < 0.05 * exact


# Padding


@pytest.mark.parametrize("by", [1, 4, 3], ids=["tokens", "4 px a token", "3 px a token"])
@pytest.mark.parametrize("name", ["a box, flipped", "two boxes", "of each image", "padded"])
def test_valid_at_any_resolution_beside_a_crop(name, by):
    """``valid`` is of the images before either view; a token is image where at least half of it is."""
    maps, grids, view_a, view_b, _ = made(name)
    shown = torch.rand(2, *GRID, generator=generator(6)) > 0.3
    common = [common_tokens(a, b, MOVES[move][0], shown[i].tolist()) for i, (a, b, move) in enumerate(CASES[name])]
    counted = [[i for i, _ in common_tokens(a, a, stay, shown[k].tolist())] for k, (a, _, _) in enumerate(CASES[name])]
    given = shown.repeat_interleave(by, 1).repeat_interleave(by, 2)
    loss = AllPairsConsistencyLoss(view_b, 1.0, 1.0)(*attention(maps, grids), view_a=view_a, valid=given)
    assert loss.item() == pytest.approx(sum(loop_terms(*maps, common, counted=counted)), rel=1e-9)
    if name in ("a box, flipped", "padded"):
        loss = AllPairsConsistencyLoss(view_b, 1.0, 1.0)(*attention(maps, grids), valid=given)
        assert loss.item() == pytest.approx(sum(loop_terms(*maps, common, counted=counted)), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 3), (2, 7), (12, 14), (5, 9), (1, 1), (13, 11)], ids=str)
def test_valid_of_another_resolution_than_the_images_goes_through_both_views(shape):
    """All of it image is no mask, whatever its resolution, with a crop on either side or on both."""
    maps, grids, view_a, view_b, _ = made("two boxes")
    both = attention(maps, grids)
    acr = AllPairsConsistencyLoss(view_b, 1.0, 1.0)
    found = acr(*both, view_a=view_a, valid=torch.ones(2, *shape, dtype=torch.bool))
    assert found.item() == pytest.approx(acr(*both, view_a=view_a).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["a box", "two boxes", "padded", "padded all around"])
def test_what_lies_on_padding_does_not_matter(name):
    """Rows of padding, and what every row gives to which of its padding keys: for a given mass on them all."""
    maps, grids, view_a, view_b, _ = made(name)
    shown = torch.ones(2, *GRID, dtype=torch.bool)
    shown[0, :, 4:] = shown[1, 3:] = False
    common = [common_tokens(a, b, MOVES[move][0], shown[i].tolist()) for i, (a, b, move) in enumerate(CASES[name])]
    acr = AllPairsConsistencyLoss(view_b, 1.0, 1.0)

    def value(maps):
        return acr(*attention(maps, grids), view_a=view_a, valid=shown).item()

    changed = [m.detach().clone().requires_grad_() for m in maps]
    with torch.no_grad():
        for side, m in enumerate(changed):
            for image, pairs in enumerate(common):
                keys = [0] + [1 + pair[side] for pair in pairs]
                others = [k for k in range(m.shape[-1]) if k not in keys]
                m[image, :, :, others] = m[image, :, :, others].roll(1, -1)
                m[image, :, others] = 1 / m.shape[-1]
    assert max((one - other).abs().max().item() for one, other in zip(maps, changed, strict=True)) > 0.1
    assert value(changed) == pytest.approx(value(maps), rel=1e-9)
    assert AllPairsConsistencyLoss(view_b, 1.0, 1.0)(*attention(changed, grids), view_a=view_a).item() != pytest.approx(
        AllPairsConsistencyLoss(view_b, 1.0, 1.0)(*attention(maps, grids), view_a=view_a).item(), rel=1e-4
    )


@pytest.mark.parametrize(
    "view", [Crop(2, 2, 6, 6, size=8, image_size=(8, 8)), Scale(2.0), Scale(1.5), Scale(2.0, keep_size=True)], ids=repr
)
def test_what_lies_on_padding_is_not_resampled_into_the_image(view):
    """Where tokens lie between others too: rows of padding, the padding keys that rows look at, and class maps."""
    shown = torch.ones(2, 8, 8, dtype=torch.bool)
    shown[0, :, 5:] = shown[1, 5:] = False
    hidden = (view(shown.double()) < 0.5).flatten(1)
    grid_b = view.output_size((8, 8))
    maps = [random_maps(grid, 1, 2, 2, 1, seed=k)[0] for k, grid in enumerate(((8, 8), grid_b))]
    cams = random_cams((8, 8), grid_b, seed=20)
    moved, bright = maps[1].detach().clone(), cams[1].detach().clone()
    for image in range(2):
        padding = 1 + hidden[image].nonzero()[:, 0]
        mass = moved[image][..., padding].sum(-1)  # all of it on the padding that is nearest to the image
        moved[image][..., padding] = 0
        moved[image][..., padding[0]] = mass
        moved[image][:, padding] = 1 / moved.shape[-1]
        bright[image].flatten(1)[:, hidden[image]] = 100.0
    acr = AllPairsConsistencyLoss(view, 1.0, 1.0)
    grids = (8, 8), grid_b
    found = terms_of(acr, *attention([maps[0], moved], grids), cams[0], bright, valid=shown)[1]
    wanted = terms_of(acr, *attention(maps, grids), *cams, valid=shown)[1]
    for name in ("activation", "affinity", "cam"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)


def test_an_image_that_is_all_padding_counts_for_nothing():
    maps, grids, view_a, view_b, _ = made("two boxes")
    shown = torch.ones(2, *GRID, dtype=torch.bool)
    shown[1] = False
    acr = AllPairsConsistencyLoss(view_b, 0.0, 1.0)
    first = [m[:1] for m in maps]
    expected = acr(*attention(first, grids), view=view_b.of_image(0), view_a=view_a.of_image(0), valid=shown[:1])
    assert acr(*attention(maps, grids), view_a=view_a, valid=shown).item() == pytest.approx(expected.item(), rel=1e-9)


# Class maps


def loop_cam_term(cams, common, counts, normalize="max", distance="l1", labels=None):
    """The mean over classes and common pixels, weighted by their share of the image; normalised over them."""
    rows = []
    for image, pairs in enumerate(common):
        for channel in range(cams[0].shape[1]):
            if labels is not None and not labels[image][channel]:
                continue
            values = [[cam[image, channel].flatten().tolist()[pair[k]] for pair in pairs] for k, cam in enumerate(cams)]
            if normalize is not None and pairs:
                values = [
                    [v - min(side) for v in side] if normalize == "minmax" else [max(0.0, v) for v in side]
                    for side in values
                ]
                values = [[v / (max(side) or 1.0) for v in side] for side in values]
            apart = [pair_distance(p, q, distance) for p, q in zip(*values, strict=True)]
            rows.append((sum(apart) / max(1, len(apart)), len(pairs) / counts[image]))
    return weighted_mean(rows)


@pytest.mark.parametrize(
    ("name", "normalize", "distance"),
    [(name, "max", "l1") for name in CASES]
    + list(itertools.product(["two boxes", "of each image"], ["max", "minmax", None], ["l1", "l2"])),
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "valid"])
def test_the_cam_term_equals_the_loop_over_common_pixels(name, normalize, distance, masked):
    _, grids, view_a, view_b, common = made(name)
    case = CASES[name]
    cams = random_cams(*grids, len(case), seed=20)
    labels = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]])[: len(case)]
    valid, counts = None, [grids[0][0] * grids[0][1]] * len(case)
    if masked:
        shown = torch.rand(len(case), *GRID, generator=generator(6)) > 0.3
        common = [common_tokens(a, b, MOVES[m][0], shown[i].tolist()) for i, (a, b, m) in enumerate(case)]
        counts = [len(common_tokens(a, a, stay, shown[i].tolist())) for i, (a, _, _) in enumerate(case)]
        valid = view_a(shown)
    relation = Compose([view_a.inverse, view_b])
    found = cam_consistency(*cams, relation, distance, labels, valid, normalize)
    expected = loop_cam_term(cams, common, counts, normalize, distance, labels.tolist())
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(
        lambda *c: cam_consistency(*c, relation, distance, labels, valid, normalize), cams, fast_mode=True
    )


@any_case
@pytest.mark.parametrize("normalize", ["max", "minmax"])
def test_the_common_region_alone_decides_on_class_maps(name, normalize):
    _, grids, view_a, view_b, common = made(name)
    cams = random_cams(*grids, len(common), seed=20)
    relation = Compose([view_a.inverse, view_b])
    before = cam_consistency(*cams, relation, normalize=normalize)
    for gradient, k in zip(torch.autograd.grad(before, cams), (0, 1), strict=True):
        outside = torch.ones(gradient.shape[0], gradient[0, 0].numel(), dtype=torch.bool)
        for image, pairs in enumerate(common):
            outside[image, [pair[k] for pair in pairs]] = False
        assert (gradient.flatten(2).movedim(1, 2)[outside] == 0).all()
        with torch.no_grad():
            cams[k].flatten(2).movedim(1, 2)[outside] = 0  # a copy: only says where
            cams[k].masked_fill_(outside.reshape(len(common), 1, *grids[k]), 1e3)
    after = cam_consistency(*cams, relation, normalize=normalize)
    assert after.item() == pytest.approx(before.item(), rel=1e-12)
    assert before > 0 or (name, normalize) == ("one token", "minmax")  # one pixel is its own range


# Training


def test_a_teacher_gives_the_student_the_same_loss_and_gradient_on_its_side():
    maps, grids, view_a, view_b, _ = made("two boxes")
    a, b = attention(maps, grids)
    acr = AllPairsConsistencyLoss(view_b, 1.0, 1.0)
    both, taught = acr(a, b, view_a=view_a), acr(a, b.detach(), view_a=view_a)
    assert torch.equal(both, taught)
    wanted, found = (torch.autograd.grad(loss, maps, allow_unused=True, retain_graph=True) for loss in (both, taught))
    assert torch.equal(found[0], wanted[0])
    assert found[1] is None
    assert wanted[1].abs().max() > 0
    with torch.no_grad():
        assert torch.equal(acr(a.detach(), b.detach(), view_a=view_a), both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_maps_under_autocast(dtype):
    maps, grids, view_a, view_b, _ = made("two boxes")
    halves = [m.detach().to(dtype).requires_grad_() for m in maps]
    precise = [m.detach().double().requires_grad_() for m in halves]
    acr = AllPairsConsistencyLoss(view_b, 1.0, 1.0)
    layouts = [layout_of(grid) for grid in grids]

    def value(maps):
        return acr(*(AttentionMaps([explicit(m, on)]) for m, on in zip(maps, layouts, strict=True)), view_a=view_a)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = value(halves)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value(precise).item(), rel=1e-5)
    loss.backward()
    assert all(m.grad.dtype == dtype and m.grad.isfinite().all() and m.grad.abs().max() > 0 for m in halves)


def test_views_that_share_nothing_are_said_once_and_train_on():
    maps = [random_maps((3, 3), batch=2, layers=1, seed=seed)[0] for seed in (1, 2)]
    both = attention(maps, ((3, 3), (3, 3)))
    cams = random_cams((3, 3), (3, 3), seed=20)
    acr = AllPairsConsistencyLoss(box(3, 4, 3, 3), 1.0, 1.0)
    with pytest.warns(UserWarning, match="nothing in common") as record:
        loss = acr(*both, *cams, view_a=box(0, 0, 3, 3))
    assert len(record) == 1
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = acr(*both, *cams, view_a=box(0, 1, 3, 3))
    for each in (loss, again):
        assert each.item() == 0
        for gradient in torch.autograd.grad(each, (*maps, *cams), retain_graph=True):
            assert (gradient == 0).all()


def test_the_order_of_calls_does_not_matter():
    """Maps between lattices are kept for views that are equal: of those of each image too."""
    maps, grids, view_a, view_b, _ = made("of each image")
    other = PerImage([view_a.of_image(1), view_a.of_image(0)])
    both = attention(maps, grids)
    values = [AllPairsConsistencyLoss(view_b, 1.0, 1.0)(*both, view_a=v).item() for v in (view_a, other, view_a, other)]
    assert values[:2] == values[2:]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_a_scale_in_place_is_a_crop_resized():
    """Scale(2, keep_size=True) shows the middle half; Scale(1/2, keep_size=True) all, and padding around it."""
    a, b = random_attention((8, 8), layers=1, seed=1), random_attention((8, 8), layers=1, seed=2)
    same = Crop(2, 2, 4, 4, size=8, image_size=(8, 8))
    values = [AllPairsConsistencyLoss(view, 1.0, 1.0)(a, b).item() for view in (Scale(2.0, keep_size=True), same)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    around = Crop(-4, -4, 16, 16, size=8, image_size=(8, 8), pad=True)
    values = [AllPairsConsistencyLoss(view, 1.0, 1.0)(a, b).item() for view in (Scale(0.5, keep_size=True), around)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_padding_around_all_of_an_image_is_no_place_to_look_at():
    """A view that shows all of the image and padding around it: rows over the image alone are compared."""
    maps = random_maps(GRID, batch=1, heads=2, layers=1)[0]
    view = box(-1, -2, 8, 10, pad=True)
    logits = torch.full((1, 2, 81, 81), 0.0, dtype=torch.float64)  # the padding gets what is left
    tokens = [0] + [1 + j for _, j in common_tokens(WHOLE, (-1, -2, 8, 10))]
    rows = torch.tensor(tokens)
    logits[:, :, rows[:, None], rows] = maps.detach().log()
    b = wrap([logits.softmax(-1)], (8, 10), 1, 1)
    assert AllPairsConsistencyLoss(view, 1.0, 1.0)(wrap([maps], GRID, 1, 1), b) < 1e-12
    cam = torch.rand(1, 2, *GRID, generator=generator(1), dtype=torch.float64).requires_grad_()
    padded = view(cam) + 5 * (1 - view(torch.ones_like(cam)))  # a class map that is high on the padding
    assert cam_consistency(cam, padded, view) < 1e-12

"""Slow literal oracles from the formulas (arXiv 2308.04321; SEAM: arXiv 2004.04581), apart from the package."""

import math

import torch

# Views as plain functions on token coordinates: (row, column, height, width) -> the same on the view.


def stay(row, column, height, width):
    return row, column, height, width


def mirror(row, column, height, width):
    return row, width - 1 - column, height, width


def upend(row, column, height, width):
    return height - 1 - row, column, height, width


def turn(row, column, height, width):
    """A quarter turn counter-clockwise: the right edge becomes the top one."""
    return width - 1 - column, row, width, height


def chain(*moves):
    def move(row, column, height, width):
        for step in moves:
            row, column, height, width = step(row, column, height, width)
        return row, column, height, width

    return move


def token_moves(move, grid):
    """The token index on the view of every token of ``grid``, and the view's grid."""
    height, width = grid
    targets = []
    for token in range(height * width):
        row, column, new_height, new_width = move(token // width, token % width, height, width)
        targets.append(row * new_width + column)
    return targets, (new_height, new_width)


# The published objective, as the official code computes it: square grids, one class token, the horizontal flip.


def official_objective(maps_a, maps_b, side, weight=100.0):
    """weight * L_act + weight * L_aff of per-layer maps (B, H, 1 + side^2, 1 + side^2), the flip undone row by row."""
    a = torch.stack([layer.mean(1) for layer in maps_a], 1)
    b = torch.stack([layer.mean(1) for layer in maps_b], 1)

    class_row = b[:, :, 0, 1:].clone()
    for row in range(side):
        row_of_grid = slice(row * side, (row + 1) * side)
        class_row[:, :, row_of_grid] = b[:, :, 0, 1:][:, :, row_of_grid].flip(2)

    affinity = b[:, :, 1:, 1:].clone()
    for row in range(side):
        row_of_grid = slice(row * side, (row + 1) * side)
        affinity[:, :, row_of_grid] = affinity[:, :, row_of_grid].flip(2)
    for row in range(side):
        row_of_grid = slice(row * side, (row + 1) * side)
        affinity[:, :, :, row_of_grid] = affinity[:, :, :, row_of_grid].flip(3)

    l_act = (a[:, :, 0, 1:] - class_row).abs().mean()
    l_aff = (a[:, :, 1:, 1:] - affinity).abs().mean()
    return weight * l_act + weight * l_aff


# Any grid and view: a loop over pairs of tokens (i, j).


def pair_distance(p, q, distance):
    if distance == "l1":
        return abs(p - q)
    if distance == "l2":
        return (p - q) ** 2
    assert distance == "js"
    middle = (p + q) / 2
    return 0.5 * sum(x * math.log(x / middle) for x in (p, q) if x > 0)


def pairwise_terms(
    maps_a,
    maps_b,
    grid,
    move,
    prefix=1,
    class_tokens=(0,),
    distance="l1",
    normalize="row",
    heads="mean",
    labels=None,
    shown=None,
    prefix_b=None,
):
    """Both terms of the loss as floats, means over layers; activation is None without a class token.

    ``labels[image][class]`` leaves out class tokens, ``shown[image][token]`` tokens that are padding on the first view:
    rows are then conditional, each over what it gives to the prefix and to shown tokens, and weighted by the smaller of
    both masses, as heads are within their mean.
    """
    prefix_b = prefix if prefix_b is None else prefix_b
    moves, _ = token_moves(move, grid)
    activation, affinity = [], []
    for layer_a, layer_b in zip(maps_a, maps_b, strict=True):
        layer_a, layer_b = layer_a.tolist(), layer_b.tolist()
        class_rows, patch_rows = [], []
        for image in range(len(layer_a)):
            visible = [j for j in range(len(moves)) if shown is None or shown[image][j]]
            pairs = list(zip(layer_a[image], layer_b[image], strict=True))
            for group in [pairs] if heads == "mean" else [[pair] for pair in pairs]:

                def row(query_a, query_b, group=group, visible=visible):
                    rows_a, rows_b, weights = [], [], []
                    for a, b in group:
                        row_a = [a[query_a][prefix + j] for j in visible]
                        row_b = [b[query_b][prefix_b + moves[j]] for j in visible]
                        mass_a = mass_b = 1.0
                        if shown is not None:
                            mass_a = sum(row_a) + sum(a[query_a][:prefix])
                            mass_b = sum(row_b) + sum(b[query_b][:prefix_b])
                        rows_a.append([p / mass_a for p in row_a])
                        rows_b.append([p / mass_b for p in row_b])
                        weights.append(min(mass_a, mass_b))
                    total = 0.0
                    shares = [1 / len(group)] * len(group) if shown is None else [w / sum(weights) for w in weights]
                    for p, q in zip(zip(*rows_a, strict=True), zip(*rows_b, strict=True), strict=True):
                        p, q = (sum(s * x for s, x in zip(shares, of, strict=True)) for of in (p, q))
                        total += pair_distance(p, q, distance)
                    return (total / len(visible) if normalize == "mean" else total), sum(weights) / len(weights)

                for c, token in enumerate(class_tokens):
                    if labels is None or len(class_tokens) == 1 or labels[image][c] > 0:
                        class_rows.append(row(token, token))
                for i in visible:
                    patch_rows.append(row(prefix + i, prefix_b + moves[i]))
        activation.append(weighted_mean(class_rows))
        affinity.append(weighted_mean(patch_rows))
    mean = sum(affinity) / len(affinity)
    return (sum(activation) / len(activation) if class_tokens else None), mean


def weighted_mean(rows):
    """Of (distance, weight) pairs; a quarter of the rows is the least that their weights are taken to sum to."""
    total = sum(value * weight for value, weight in rows)
    return total / max(sum(weight for _, weight in rows), 0.25 * len(rows)) if rows else 0.0


def pixelwise_cam_term(cam_a, cam_b, move, distance="l1", normalize="max", labels=None, shown=None):
    """SEAM's equivariance of class maps (B, C, h, w) by a loop over pixels; ``shown[image][row][column]``."""
    height, width = cam_a.shape[-2:]
    rows = []
    for image in range(cam_a.shape[0]):
        for channel in range(cam_a.shape[1]):
            if labels is not None and not labels[image][channel] > 0:
                continue
            places = [(i, j) for i in range(height) for j in range(width) if shown is None or shown[image][i][j]]
            moved = [move(i, j, height, width)[:2] for i, j in places]
            a = normalised(cam_a[image, channel].tolist(), normalize, places)
            b = normalised(cam_b[image, channel].tolist(), normalize, moved)
            pairs = [pair_distance(a[i][j], b[m][n], distance) for (i, j), (m, n) in zip(places, moved, strict=True)]
            rows.append(sum(pairs) / len(pairs))
    return sum(rows) / max(1, len(rows))


def normalised(cam, mode, places):
    """One class map (a list of rows) in [0, 1] by its values at ``places``, or as it is."""
    if mode is None:
        return cam
    lowest = min(cam[i][j] for i, j in places) if mode == "minmax" else 0.0
    cam = [[max(0.0, value - lowest) for value in row] for row in cam]
    highest = max(cam[i][j] for i, j in places)
    return [[value / highest if highest > 0 else 0.0 for value in row] for row in cam]


def row_entropy(rows):
    """The mean entropy of rows (a nested list of probabilities, any depth) over ln M."""
    if isinstance(rows[0], float):
        return -sum(p * math.log(p) for p in rows if p > 0) / math.log(len(rows))
    return sum(row_entropy(row) for row in rows) / len(rows)


# Resampling: the bilinear filter of one axis, antialiased when shrinking, by centres of half-pixel coordinates.


def filter_row(centre, reach, count):
    """Weights of ``count`` source tokens for a target centre at source position ``centre`` (token 0 is at 0)."""
    centre = min(max(centre, 0.0), count - 1.0)
    weights = [max(0.0, 1.0 - abs(token - centre) / max(1.0, reach)) for token in range(count)]
    return [weight / sum(weights) for weight in weights]


def half_way(there, back):
    """Weights of the mean of staying and of going ``there`` and ``back``, each [target][source]."""
    return [
        [((i == j) + sum(w * row[j] for w, row in zip(over, there, strict=True))) / 2 for j in range(len(back))]
        for i, over in enumerate(back)
    ]


def resampled_affinity(affinity, query_weights, key_weights):
    """Patch block of one map, a list of rows: both axes resampled, each row keeping the mass that it had.

    ``*_weights[target][source]`` are over flattened tokens.
    """
    moved = []
    for row in affinity:
        mass = sum(row)
        target = [sum(w * p for w, p in zip(weights, row, strict=True)) for weights in key_weights]
        moved.append([value * mass / sum(target) for value in target])
    return [
        [sum(w * row[j] for w, row in zip(weights, moved, strict=True)) for j in range(len(key_weights))]
        for weights in query_weights
    ]

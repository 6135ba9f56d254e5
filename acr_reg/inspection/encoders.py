"""Tells the encoders apart that ran in one forward, and chooses the one whose tokens lie on the images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from acr_reg.attention.layer import LayerAttention
from acr_reg.attention.maps import AttentionMaps


def choose_run(runs: Sequence[AttentionMaps]) -> AttentionMaps:
    """The first run with tokens on images of a known size; else with tokens on a grid; else the first."""
    return max(runs, key=lambda maps: max(map(_closeness_to_image, maps)))


def _closeness_to_image(layer: LayerAttention) -> int:
    if layer.placed is None:
        return 1 if layer.window is not None else 0
    return 1 if layer.placed.query.is_unit else 2


def other_encoders(runs: Sequence[AttentionMaps]) -> Iterator[str]:
    """A warning if more ran than the encoder of the chosen run, with the modules= that captures it alone."""
    chosen = choose_run(runs)
    groups = dict.fromkeys(_names(maps) for maps in runs)
    if len(groups) > 1:
        own = _names(chosen)
        others = [group for group in groups if group != own]
        path, paths = _encoder(own, sum(others, ())), [_encoder(group, own) for group in others]
        if path is None or None in paths:
            yield f'{len(runs)} encoder runs were seen, and one is checked. Capture with modules= or keep="all".'
        else:
            yield (
                f"{len(groups)} encoders ran: {path}, which is checked, and {', '.join(map(str, paths))}. Capture one "
                f"by modules=[{path!r}]."
            )
    elif len(runs) > 1:
        yield f'The encoder ran {len(runs)} times, and one run is checked. Capture with keep="first" or keep="all".'


def off_the_image(maps: AttentionMaps) -> Iterator[str]:
    """A problem if a run holds layers of another encoder too, whose tokens lie on no grid."""
    placed, unplaced = (
        tuple(layer.name for layer in maps if (layer.placed is None) == is_unplaced) for is_unplaced in (False, True)
    )
    path, other = _encoder(placed, unplaced), _encoder(unplaced, placed)
    # Stages of one encoder bear a number.
    if path is not None and other is not None and not (path[-1].isdigit() or other[-1].isdigit()):
        yield f"The tokens of {other} lie on no grid of the image. Capture {path} alone by modules=[{path!r}]."


def _names(maps: AttentionMaps) -> tuple[str, ...]:
    return tuple(layer.name for layer in maps)


def _encoder(names: Collection[str], others: Collection[str]) -> str | None:
    """The shortest path of a module that holds all ``names`` and none of the ``others``; None if there is none."""
    path = ""
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        path = f"{path}.{parts[0]}".lstrip(".")
        if others and not any(f"{name}.".startswith(f"{path}.") for name in others):
            return path
    return None

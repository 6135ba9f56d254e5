"""Detects the format of a .npy file's content, and refuses to guess if two formats look the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from acr_reg.integrations.formats.files import Arrays, Format, checked_arrays

# The names under which the dicts with "keys" hold their maps. Where a file has two, its own evaluation reads the first.
MAPS_OF: dict[Format, tuple[str, ...]] = {
    "irn": ("high_res",),
    "clip_es": ("attn_highres", "highres"),
    "puzzle": ("hr_cam", "rw"),
}
# How far a file may differ from a CRF pair and still be taken for one: half precision, over 20 classes.
_LIKE_A_CRF_FILE = 1e-2
_HIGHEST_ALPHA = 100.0


def format_of(content: Any, format: Format | None) -> Format:
    """The format of a .npy file's content. ``format`` decides between ``psa`` and ``psa_crf`` alone."""
    if isinstance(content, dict) and "keys" in content:
        for named, names in MAPS_OF.items():
            if content.keys() & set(names):
                return named
    maps = checked_arrays(content)
    if format == "psa_crf" and 0 not in maps:
        raise ValueError(f"The keys are {list(maps)[:5]}, without the 0 of a CRF pair's background. Read it as psa.")
    if format in ("psa", "psa_crf"):
        return format
    if _may_be_of_a_crf_pair(maps):
        raise ValueError(
            "Key 0 may be a CRF pair's background or class 0. Pass "
            'format="psa_crf" or "psa" (evaluate --format, convert --from).'
        )
    return "psa"


def _may_be_of_a_crf_pair(maps: Arrays) -> bool:
    """Whether key 0 holds 1 minus the sum of the others (after a CRF), or a power of 1 minus their maximum."""
    if 0 not in maps or not maps[0].size:
        return False
    if not all(values.min() >= -_LIKE_A_CRF_FILE and values.max() <= 1 + _LIKE_A_CRF_FILE for values in maps.values()):
        return False
    background = maps[0].astype(np.float64).clip(0, 1)
    others = [values.astype(np.float64).clip(0, 1) for number, values in maps.items() if number != 0]
    if np.abs(background + sum(others) - 1).max() < _LIKE_A_CRF_FILE:
        return True
    rest = 1 - np.max([np.zeros_like(background), *others], axis=0)
    # Alpha is read at the pixel whose background is nearest to a half. It must then explain every other pixel.
    at = np.argmin(np.abs(background - 0.5) + 1e-3 * (1 - rest))
    base, value = rest.flat[at], background.flat[at].clip(1e-30, 1)
    alpha = np.log(value) / np.log(base) if 0 < base < 1 else 1.0
    return bool(0 < alpha < _HIGHEST_ALPHA and np.abs(background - rest**alpha).max() < _LIKE_A_CRF_FILE)

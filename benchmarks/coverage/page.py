"""docs/reference/coverage.md from the measured rows."""

from __future__ import annotations

from datetime import date
from importlib.metadata import version

from benchmarks.coverage.measure import Row

LIBRARIES = ("torch", "timm", "transformers", "torchvision", "open_clip_torch", "vit-pytorch")


def table(rows: list[Row]) -> str:
    headings = (
        "library",
        "model",
        "kind",
        "layers",
        "by",
        "windows",
        "on a grid",
        "A V off",
        "rows off",
        "output change",
    )
    lines = [
        f"| {' | '.join([*headings, 'gradient to q, k', 'logit by map', 'left out, by name'])} |",
        f"|{'---|' * (len(headings) + 3)}",
    ]
    for row in rows:
        by = [f"{n} {name}" for name in ("factored", "explicit", "mixed") if (n := getattr(row, name))]
        layers = f"{row.captured} of {row.expected}" if row.green else f"**{row.captured} of {row.expected}**"
        cells = [row.library, f"`{row.name}`", row.kind, layers if row.expected else "refused", ", ".join(by) or "-"]
        cells += [str(row.windows or "-"), str(row.grids or "-"), _small(row.product_error), _small(row.row_error)]
        cells += [_small(row.output_change), str(row.gradient_to_factors or "-"), str(row.gradient_by_map or "-")]
        lines.append(f"| {' | '.join([*cells, row.reason.replace('|', '/') or '-'])} |")
    return "\n".join(lines)


def _small(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def summary(rows: list[Row]) -> str:
    having = [row for row in rows if row.expected]
    complete = [row for row in having if row.green]
    refused = [row for row in rows if not row.expected and row.green]
    return (
        f"{len(rows)} models. With token-to-token softmax: {len(having)}, captured completely {len(complete)} "
        f"({100 * len(complete) / max(1, len(having)):.1f} %). Without: {len(rows) - len(having)}, refused by name "
        f"{len(refused)}. Not green: {', '.join(row.name for row in rows if not row.green) or 'none'}."
    )


def document(rows: list[Row]) -> str:
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)
    return f"""# Coverage

{summary(rows)}

Made by `python -m benchmarks.coverage --write` on {date.today()} with {versions}; random weights, float32, CPU.

"Layers" is found of expected, counted by hand from the source; "by" says whether query and key of a fused kernel were
recorded (factored) or the map as it met V (mixed: combined across heads or gated after the softmax). "On a grid" counts
the layers whose tokens were placed on the image: the loss and the class maps take these, and refuse the others by name
(windows, tokens in another order, texts). "A V off" and "rows off" are the worst relative error of map times V against
the layer's own result, and of the sums of rows; "gradient to q, k" and "logit by map" count the layers in which a loss
on the map reaches query and key, and in which a logit has a gradient by the map.

{table(rows)}
"""

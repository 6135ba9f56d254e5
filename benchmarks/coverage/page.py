"""docs/reference/coverage.md from the measured rows."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.coverage.measure import Row
from benchmarks.marked_page import wrapped

LIBRARIES = ("torch", "timm", "transformers", "torchvision", "open_clip_torch", "vit-pytorch")
HEADINGS = ("model", "attention", "captured", "placed on the image", "skipped, and why")


def table(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for row in rows:
        layers = f"{row.captured} of {row.expected}" if row.green else f"**{row.captured} of {row.expected}**"
        cells = [f"`{row.name}`", row.kind, layers if row.expected else "refused"]
        cells += [str(row.grids or "-"), row.reason.replace("|", "/") or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    having = [row for row in rows if row.expected]
    complete = [row for row in having if row.green]
    refused = [row for row in rows if not row.expected and row.green]
    return (
        f"{len(rows)} models were measured. {len(having)} have attention between tokens with a softmax; all layers of "
        f"{len(complete)} of them ({100 * len(complete) / max(1, len(having)):.1f} %) are captured. The other "
        f"{len(rows) - len(having)} have none; {len(refused)} of them are refused with an error that names the reason. "
        f"Models with a fault: {', '.join(row.name for row in rows if not row.green) or 'none'}."
    )


def exactness(rows: list[Row]) -> str:
    """The worst errors of all rows, in one sentence."""
    product, sums = (
        max((value for row in rows if (value := getattr(row, name)) is not None), default=0.0)
        for name in ("product_error", "row_error")
    )
    changed = max(row.output_change for row in rows)
    return (
        f"The worst relative error of a captured map times V against the layer's own result is {product:.0e}, the "
        f"worst error of a row's sum {sums:.0e}, and the largest change of an output by the capture {changed:.0g}. "
        "A model is without fault only if, in every captured layer, a loss on the map reaches query and key, and a "
        "logit has a gradient with respect to the map."
    )


def document(rows: list[Row], measured: Mapping[str, str]) -> str:
    """The whole page. `measured` holds the date and the version of each library."""
    versions = ", ".join(f"{name} {version}" for name, version in measured.items() if name != "date")
    libraries = list(dict.fromkeys(row.library for row in rows))
    sections = [f"## {name}\n\n{table([row for row in rows if row.library == name])}" for name in libraries]
    origin = (
        f"Measured on {measured['date']} with random weights in float32 on a CPU, with {versions}. "
        "All measured values are in `benchmarks/coverage/results.json`; `python -m benchmarks.coverage --write` "
        "measures again."
    )
    contents = ", ".join(f"[{name}](#{name})" for name in libraries)
    tables = "\n\n".join(sections)
    return f"""# Coverage

This page lists the models that the capture was tried on. For your own model run `python -m acr_reg check`: see
[check your model](../guides/check_your_model.md).

{contents}

{wrapped(summary(rows))}

{wrapped(exactness(rows))}

The columns:

- **attention**: the kinds of attention in the model. *global*: every token attends to every token. *window*: tokens
  attend within windows. *reduced keys*: keys are pooled or strided. *mixed heads*: maps are combined across heads or
  gated after the softmax. *pooling*: one query, such as the class token, attends to all tokens. *cross*: to tokens of
  another input. *channel*, *linear* and *other* have no map between tokens.
- **captured**: the captured layers, of the layers that were counted by hand in the model's source.
- **placed on the image**: the layers whose tokens lie on one grid over the image. The loss and the class maps use these
  layers. They refuse the others with an error, such as layers of windows or of text.
- **skipped, and why**: calls that are not attention between tokens.

`structures` are layers of our own, one for each way to write attention. The names of some rows end with the kernel:
*unfused* and *eager* are plain softmax, *sdpa* is `scaled_dot_product_attention`.

{wrapped(origin)}

{tables}
"""

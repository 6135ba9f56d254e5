"""Builds the documentation: python -m sphinx -W -q docs build/docs, then open build/docs/index.html.

Pages are Markdown (MyST). The API reference comes from the docstrings. Built pages fetch nothing from the net.
References to names of acr_reg must resolve; names of torch, numpy and Python stay text.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import acr_reg

project = "acr_reg"
author = "acr_reg contributors"
release = version = acr_reg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
default_role = "py:obj"

autodoc_inherit_docstrings = False  # what a method overrides in torch is torch's to explain
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # arguments that share a description are listed once
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!acr_reg\b).*"),
    ("py:.*", r"acr_reg(\.\w+)*\._.*"),  # this and the next are not for users
    ("py:.*", r"acr_reg\.integrations\.jobs\.(meeting\.\w+|shares\.T)"),
    ("py:.*", r"acr_reg\.(attention|alignment|capture|placement|views)\.\w+\.[A-Z]\w+.*"),
]

html_theme = "furo"
html_title = f"acr_reg {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output are not copied
html_copy_source = html_show_sourcelink = html_show_copyright = False


def as_literal_blocks(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Formulas stand in docstrings as indented paragraphs, which reST takes for quotations: joins, and reads for
    markup."""
    made: list[str] = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        before = next((other for other in reversed(made) if other.strip()), "")
        begins = line.strip() and made and not made[-1].strip() and indent > len(before) - len(before.lstrip())
        if begins and not before.endswith("::") and not before.lstrip().startswith((">>>", "...")):
            made += [" " * (len(before) - len(before.lstrip())) + "::", ""]
        made.append(line)
    lines[:] = made


def by_public_name(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.TextElement
) -> nodes.reference | None:
    """Annotations name a class by the file that it is in, acr_reg.views.view.View; the reference lists acr_reg.View."""
    parts = node.get("reftarget", "").split(".")
    public = next((i for i, part in enumerate(parts) if part in acr_reg.__all__), None)
    if node.get("refdomain") != "py" or parts[0] != "acr_reg" or public in (None, 1):
        return None
    node["reftarget"] = ".".join(["acr_reg", *parts[public:]])
    domain = env.get_domain("py")
    found: nodes.reference | None = domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, content
    )
    return found


def keep_on_one_line(app: Sphinx, doctree: nodes.document) -> None:
    """Marks table cells of one word or of numbers, such as 0.643 ± 0.031, for the style sheet."""
    for cell in doctree.findall(nodes.entry):
        if re.fullmatch(r"\S+|([-+±.,()%x\d\s]|\bto\b)+|.*\d \(.*\d to .*\d\)", cell.astext()):
            cell["classes"].append("one-line")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_literal_blocks, priority=400)  # before napoleon moves paragraphs
    app.connect("doctree-read", keep_on_one_line)
    app.connect("missing-reference", by_public_name)

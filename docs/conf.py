"""Sphinx configuration: Markdown pages, API from docstrings, formulas as MathML (nothing is loaded from elsewhere)."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

import danlu

project = "danlu"
author = "the danlu authors"
project_copyright = author
version = release = danlu.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["build"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "returns_style")]

html_theme = "furo"
html_title = "danlu"
html_static_path = ["_static"]
html_css_files = ["danlu.css"]
html_math_renderer = "mathml"
html_copy_source = False


def _mathml(block: bool):
    """Visitor that writes a formula as MathML, which browsers draw without a script."""

    def visit(translator, node):
        source = node.astext()
        try:
            # The converter has no command for dots that suit both commas and operators.
            translator.body.append(tex2mathml(re.sub(r"\\dots\b", r"\\ldots", source), as_block=block))
        except (MathError, ValueError) as error:
            raise ExtensionError(f"formula not understood: {source!r}: {error}") from error
        raise nodes.SkipNode

    return visit


def _plain_stars(app, what, name, obj, options, lines):
    """Shapes such as (*positions.shape, dim) are no emphasis: escape stars outside literals."""
    for index, line in enumerate(lines):
        pieces = re.split(r"(``.*?``)", line)
        lines[index] = "".join(piece if piece.startswith("``") else piece.replace("(*", r"(\*") for piece in pieces)


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(_mathml(False), None), block_renderers=(_mathml(True), None))
    # Before napoleon, which reads the docstring at the default priority.
    app.connect("autodoc-process-docstring", _plain_stars, priority=400)

"""Sphinx: the guide from Markdown, the reference from docstrings."""

from fastseq.version import __version__

project = "fastseq"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 2

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
# Each docstring names its paper under this heading.
napoleon_custom_sections = [("Source", "returns_style")]

html_theme = "alabaster"
html_theme_options = {
    "description": "Fast recurrent encoder-decoders for PyTorch",
    "fixed_sidebar": True,
    "page_width": "1080px",
    "sidebar_width": "240px",
}
html_show_copyright = False
html_show_sphinx = False

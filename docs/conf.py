"""How Sphinx builds the documentation: `make docs`."""

import importlib.metadata

project = "netplugin_sdk"
author = "the netplugin_sdk authors"
release = importlib.metadata.version("netplugin-sdk")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # a name in single backticks, as in our docstrings
nitpicky = True
html_theme = "furo"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False

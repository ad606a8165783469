"""How Sphinx builds these pages: `make docs`."""

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation
from torch.optim.optimizer import ParamsT

import emerging_optimizers
from emerging_optimizers import megatron, scalar_optimizers

sys.path.insert(0, str(Path(__file__).parent))
import figures

project = "emerging_optimizers"
author = "the emerging_optimizers contributors"
project_copyright = author
release = version = emerging_optimizers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax itself, so that formulas need no network
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
# What is documented elsewhere: torch, Python.
nitpick_ignore_regex = [
    ("py:.*", r"torch(\..*)?"),
    ("py:.*", r"(collections|os|typing)\..*"),
    ("py:.*", r"(bool|dict|float|int|list|str|tuple|type|None|ParamsT)"),
    ("py:exc", r"\w+Error"),
    ("py:.*", r"emerging_optimizers\.(.*\.)?_.*"),
]

myst_enable_extensions = ["deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
myst_substitutions = figures.substitutions()

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_rtype = False
napoleon_custom_sections = ["Reference"]
python_maximum_signature_line_length = 88

html_theme = "furo"
pygments_style = "default"
html_title = "emerging_optimizers"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str
) -> tuple[str | None, str]:
    """Name torch's type of parameters instead of spelling it out; shared options have a page."""
    if signature is not None:
        for text, short in SHORT_TYPES.items():
            signature = signature.replace(text, short)
    return signature, returns


SHORT_TYPES = {
    stringify_annotation(ParamsT, "smart"): "ParamsT",
    ": ~typing_extensions.Unpack[~emerging_optimizers._optimizer.SharedOptions]": "",
    ": ~typing_extensions.Unpack[~emerging_optimizers.scalar_optimizers.rmsprop._Options]": "",
}


def list_rules(app: Sphinx, page: str, source: list[str]) -> None:
    """Put directives for all functions, or all optimizers, where a page names these."""
    for module in (scalar_optimizers, scalar_optimizers.update_functions, megatron):
        is_class = {name: isinstance(getattr(module, name), type) for name in module.__all__}
        classes = [n for n, is_it in is_class.items() if is_it and n not in DESCRIBED]
        functions = [n for n, is_it in is_class.items() if not is_it]
        for marker, names, directive in (
            ("functions", functions, "autofunction"),
            ("classes", classes, "autoclass"),
        ):
            lines = "\n".join(f".. {directive}:: {name}" for name in names)
            source[0] = source[0].replace(f"<{marker} of {module.__name__}>", lines)


# Classes with members on their page, which names them itself.
DESCRIBED = ("ScalarOptimizer", "SingleMomentumOptimizer", "TwoMomentsOptimizer", "MegatronMixin")


def setup(app: Sphinx) -> None:
    """Connect what is defined here."""
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("source-read", list_rules)

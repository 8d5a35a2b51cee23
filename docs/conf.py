"""Settings of the site that Sphinx makes of this folder: `sphinx-build -W docs build/site`.

The pages are read on GitHub, too. Therefore they link to each other and to files above this folder as GitHub wants it,
and what stands above, such as README.md, is included; here such links become links of the site.
"""

from __future__ import annotations

import contextlib
import inspect
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import cpc_ext
import cpc_ext.hub
from cpc_ext import __version__

project = "cpc_ext"
author = "the cpc_ext authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # The anchors that GitHub gives to headings.
nb_execution_mode = "off"  # `-D nb_execution_mode=force` for a site with the notebooks' figures.
nb_output_stderr = "remove"  # Progress.

default_role = "code"  # Docstrings write names as Markdown does.
autodoc_member_order = "groupwise"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
add_module_names = False
napoleon_numpy_docstring = False
napoleon_attr_annotations = False

html_theme = "furo"
html_title = f"cpc_ext {__version__}"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}

_DOCS = Path(__file__).parent
_INCLUDED = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "python/benchmarks/README.md": "measuring.md",
    "python/benchmarks/results/2026-11-25-nvidia-h100-80gb-hbm3/report.md": "h100.md",
    "python/benchmarks/results/2026-11-27-nvidia-h200/report.md": "h200.md",
}
_LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")


def _links_of_the_site(text: str, folder: str) -> str:
    """Markdown of a file in ``folder``, relative to the repository, with its links to files as links from ``docs/``."""

    def of_the_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path in _INCLUDED:
            target = "/" + _INCLUDED[path]
        elif path.startswith("docs/"):
            target = "/" + path.removeprefix("docs/")
        else:  # Offered for download.
            target = "/../" + path
        return f"{match[1]}{target}{match[3] or ''})"

    return _LINK.sub(of_the_site, text)


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        content[0] = _links_of_the_site(content[0], posixpath.join("docs", posixpath.dirname(docname)))


def _read_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    content[0] = _links_of_the_site(content[0], posixpath.normpath(posixpath.join("docs", path.parent.as_posix())))


def _documented_names(thing: Any) -> set[str]:
    """The names of a function's or class's arguments and fields, which its docstring may describe."""
    names = set(getattr(thing, "__annotations__", ()))
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(thing).parameters)
    return names


def _describes(line: str, names: set[str]) -> bool:
    """Whether a line begins to tell of one of the names, or of several together: "mean, std: per channel"."""
    described = re.match(r"(\w+(?:, \w+)*): \S", line)
    return described is not None and names.issuperset(described[1].split(", "))


def _one_a_line(lines: list[str], names: set[str]) -> list[str]:
    """Lines that tell of names, parted where one goes on with another: "count: images. seed: of the order."."""
    done: list[str] = []
    inside = False
    for line in lines:
        inside = _describes(line, names) or (inside and line.startswith(" "))
        done += _parted(line, names) if inside else [line]
    return done


def _parted(line: str, names: set[str]) -> list[str]:
    parts: list[str] = []
    for part in re.split(r"(?<=\.) (?=\w+(?:, \w+)*: )", line):
        if parts and not _describes(part, names):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return parts


def _in_sections(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Give a docstring's lines of "argument: what it is" the heading that napoleon knows; escape stray stars."""
    if what == "data":  # That of its type; the page says what the constant is.
        lines.clear()
        return
    names = _documented_names(thing)
    done: list[str] = []
    inside = False
    for line in _one_a_line(lines, names):
        starts = _describes(line, names)
        if starts and not inside:
            done += ["", "Args:" if what in ("function", "method", "class") else "Attributes:"]
        elif inside and not starts and not line.startswith(" "):
            done.append("")
            inside = False
        inside = inside or starts
        line = re.sub(r"``.*?``|`[^`]*`|(?<=\[)\*(?=,)|(?<= )\*(?= )", _escaped_star, line)
        done.append("    " + line if inside else line)
    lines[:] = done


def _escaped_star(match: re.Match[str]) -> str:
    return r"\*" if match[0] == "*" else match[0]


def _skipped(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out a NamedTuple's fields, which the docstring of their class describes."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def _public_modules() -> list[ModuleType]:
    """The modules whose names are public. The hub is imported by its name alone, as it needs a library of its own."""
    return [cpc_ext, cpc_ext.hub, *filter(inspect.ismodule, (getattr(cpc_ext, name) for name in cpc_ext.__all__))]


def _check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of public names that have no entry on any page, as a constant without `autodata` has none."""
    entries = {entry[0] for entry in env.domains.python_domain.get_objects()}
    for module in _public_modules():
        for name in module.__all__:
            if f"{module.__name__}.{name}" not in entries and not inspect.ismodule(getattr(module, name)):
                logging.getLogger(__name__).warning("no page describes %s.%s", module.__name__, name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _in_sections, priority=400)  # Before napoleon.
    app.connect("autodoc-skip-member", _skipped)
    app.connect("env-check-consistency", _check_complete)
    app.connect("source-read", _read)
    app.connect("include-read", _read_included)

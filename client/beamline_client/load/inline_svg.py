"""Matplotlib figures as SVG elements of an HTML page: same figure, same text, and none disturbs another."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MEASURED_FONT = "DejaVu Sans"  # comes with matplotlib, so that layout is the same everywhere; wider than _FONT
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "beamline",
    "font.family": "sans-serif",
    "font.sans-serif": [_MEASURED_FONT],
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": "#3a4149",
    "axes.edgecolor": "#aab1b9",
    "axes.labelcolor": "#3a4149",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#aab1b9",
    "ytick.color": "#aab1b9",
    "xtick.labelcolor": "#59626c",
    "ytick.labelcolor": "#59626c",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_REFERENCE = re.compile(r"#([\w-]+)")


@contextmanager
def house_style() -> Iterator[None]:
    """Within it, figures look alike, whatever the user's matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element, as wide as the page lets it be.

    To be called within house_style().

    Args:
        figure: Drawn without pyplot.
        name: Of the figure on its page; becomes part of all ids, which are unique only within a figure.
        description: What it shows, for those who cannot see it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    _rename_ids(root, name)
    box = root.attrib["viewBox"]
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-label": description,
        "style": "stroke-linejoin: round; stroke-linecap: butt",  # what the removed style element said
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Keeps only ids that something refers to, with the figure's name before them."""
    references = {
        found
        for element in root.iter()
        for key, value in element.attrib.items()
        if key == "href" or "url(#" in value
        for found in _REFERENCE.findall(value)
    }
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in references:
            element.attrib["id"] = f"{name}-{own}"
        for key, value in element.attrib.items():
            if key == "href" or "url(#" in value:
                element.attrib[key] = value.replace("#", f"#{name}-")
            elif key == "style" and _MEASURED_FONT in value:
                element.attrib[key] = value.replace(f"'{_MEASURED_FONT}', sans-serif", _FONT)


def _local(tag: str) -> str:
    """The name without its namespace: in HTML, svg needs none."""
    return tag.rpartition("}")[2]

"""Where the results of the online comparison go: data, picture, table."""

import os
from dataclasses import dataclass
from pathlib import Path

from online_plot import plot
from online_results import Results, markdown, placed

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True, slots=True)
class Places:
    """Where results go.

    Attributes:
        data: JSON.
        picture: SVG.
        page: Markdown; with markers if it exists.
    """

    data: Path
    picture: Path
    page: Path

    @classmethod
    def of(cls, folder: Path | None) -> "Places":
        """In this folder; the documentation's places without one. Makes the folders."""
        if folder is None:
            places = cls(DOCS / "benchmarks" / "online.json", DOCS / "images" / "online.svg", DOCS / "benchmarks.md")
        else:
            places = cls(folder / "online.json", folder / "online.svg", folder / "online.md")
        for path in (places.data, places.picture, places.page):
            path.parent.mkdir(parents=True, exist_ok=True)
        return places

    def render(self, results: Results) -> str:
        """Write picture and table; returns the table."""
        self.picture.write_text(plot(results), "utf-8")
        block = markdown(results, os.path.relpath(self.picture, self.page.parent))
        in_docs = self.page.name == "benchmarks.md"
        self.page.write_text(placed(self.page.read_text("utf-8"), block) if in_docs else block + "\n", "utf-8")
        return block

"""Writes the report: docs/benchmarks.md between its markers, plots beside the JSON."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offline.models import FR_EN
from offline.plots import PLOTS
from offline.ratios import Spread
from offline.results import Results
from offline.tables import (
    MODELS,
    engine_table,
    latency_table,
    quality_table,
    rate_table,
    ratio_table,
    setting_table,
    start_table,
    target_table,
)
from offline.targets import Online

BEGIN = "<!-- begin: made by `make bench`, do not edit -->"
END = "<!-- end: made by `make bench` -->"
DEFINITIONS = """\
Everybody translates the same token ids, in a process of its own that computes only in its turn; repetitions are
interleaved, so that ratios within a repetition compare like with like. Figures are medians, with the least and the
greatest in parentheses. Every contender runs in the setting that a search found fastest for it (last table), and with
huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), as Beamline's image does. Output tokens are those of each
sentence's best hypothesis, end of sequence included, for everybody.

Beam 4, length penalty 1 (score = sum of log-probabilities / length). A sentence is done when 4 hypotheses are finished:
Beamline `early_stopping: WHEN_FULL`, transformers and optimum-onnx `early_stopping=True`, CTranslate2 `patience=1`.
fr-en ends by itself, at most after 128 tokens. transformer-base (6 + 6 layers, 512 wide) has random weights, sources of
16 tokens and exactly 32 output tokens. Batch n means that n sentences come at a time, and the next n when these are
done; CTranslate2 computes a batch in two halves or whole with two threads, whichever is faster.

CTranslate2 chooses AVX2 on some processors that have AVX-512: where there is, it also runs with
`CT2_FORCE_CPU_ISA=AVX512`, and the faster of the two counts in the figures to reach. Where definitions differ: at the
limit of 128 tokens, which no test sentence reaches, CTranslate2 does not force end of sequence; each int8 rounds in its
own way; over gRPC, the server tokenizes as well. CTranslate2's converter drops the embedding that decoding starts from,
which changes the answers of fr-en; the bench converts with it (`benchmarks/ct2_convert.py`), and the tokens
are those of transformers.
"""


def replaced(page: str, section: str) -> str:
    """The page with what is between the markers replaced; without markers, they come at the end.

    Raises:
        ValueError: there is one marker without the other.
    """
    if (BEGIN in page) != (END in page):
        raise ValueError("one of the two markers is missing; put it back, or remove the other too")
    between = f"{BEGIN}\n{section.strip()}\n{END}"
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{between}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    return f"{before}{between}{rest.partition(END)[2]}"


def section(results: Results, online: Online, plots: Mapping[str, str]) -> str:
    """What stands between the markers; `plots` are files, relative to the page, by what they show."""
    return "\n\n".join(part.strip() for part in _parts(results, online, plots))


def _parts(results: Results, online: Online, plots: Mapping[str, str]) -> Iterator[str]:
    yield "## Beamline and its peers, offline - `make bench`"
    yield _about(results.about)
    yield DEFINITIONS
    yield from (f"{name} did not take part: {reason}." for name, reason in sorted(results.missing.items()))
    yield "### The figures to reach"
    yield target_table(results, online)
    for model in MODELS:
        tables = [rate_table(results, model), ratio_table(results, model)]
        if any(tables):
            yield f"### {model}"
            yield from filter(None, tables)
        if model == FR_EN:
            yield from filter(None, [latency_table(results), quality_table(results)])
        yield from (f"![{title}]({path})" for title, path in plots.items() if title.startswith(f"{model}:"))
    rest = [start_table(results), engine_table(results), setting_table(results)]
    titles = ["Start and memory", "Inside the engine", "Settings"]
    for title, part in zip(titles, rest, strict=True):
        if part:
            yield f"### {title}"
            yield part


def _about(about: Mapping[str, Any]) -> str:
    versions = ", ".join(
        f"{package} {version}"
        for name, packages in about.get("versions", {}).items()
        for package, version in (packages or {}).items()
        if name != "optimum" or package.startswith("optimum")
    )
    stamps = about.get("stages", {})
    dates = sorted({stamp["date"][:10] for stamp in stamps.values()})
    commits = sorted({f"`{stamp['commit'][:12]}`" for stamp in stamps.values() if stamp["commit"]})
    return (
        f"{about.get('cpu', 'unknown')}, {about.get('cores', '?')} cores, {about.get('memory_gb', '?')} GB "
        f"({', '.join(about.get('instructions', []))}); Python {about.get('python', '?')}; {versions}. "
        f"{about.get('repetitions', '?')} interleaved repetitions"
        f"{' of a quick run, which says little' if about.get('quick') else ''}; "
        f"{', '.join(dates) or 'no date'}, commit {', '.join(commits) or 'unknown'}. "
        "Raw repetitions: [offline.json](benchmarks/offline.json)."
    )


def read_online(path: Path) -> dict[str, Spread]:
    """Figures of the service, if its script has written them.

    The file's object `figures` has for each name in targets.py an object of median, low and high; it may hold more.
    """
    if not path.exists():
        return {}
    figures = json.loads(path.read_text("utf-8")).get("figures", {})
    return {name: Spread(value["median"], value["low"], value["high"]) for name, value in figures.items()}


def write_report(folder: Path, results: Results) -> None:
    """Write benchmarks.md, and below benchmarks/ the plots; the JSON is there already."""
    assets = folder / "benchmarks"
    assets.mkdir(parents=True, exist_ok=True)
    plots = {}
    for name, draw in PLOTS.items():
        for title, picture in draw(results):
            file = assets / f"{name}-{title.partition(':')[0].lower().replace(' ', '-')}.svg"
            file.write_text(picture, "utf-8")
            plots[title] = f"{assets.name}/{file.name}"
    page = folder / "benchmarks.md"
    before = page.read_text("utf-8") if page.exists() else ""
    page.write_text(replaced(before, section(results, read_online(assets / "online.json"), plots)), "utf-8")

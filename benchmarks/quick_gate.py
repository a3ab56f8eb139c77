"""Has Beamline become slower against its closest peer? Four ratios against the last recorded ones.

    make bench-quick [ARGS=--record]
    python benchmarks/quick_gate.py [--record]

Exits with status 1 if one has fallen by more than 10 %, with 2 if there is no record to compare with. --record looks
for everybody's best setting, measures, and writes docs/benchmarks/quick.json; later runs use the settings in it. Takes
under three minutes on two cores, which should have nothing else to do.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from offline.bench import Bench
from offline.contenders import Contender, settings
from offline.gate import PAIRS, Pair, Record, changes
from offline.machine import about, stage_stamp
from offline.plan import GATE
from offline.prepared import REPOSITORY, Prepared, Pythons, own_python
from offline.ratios import Spread
from offline.results import Results, comparison_key
from offline.task import Setting

RECORD = REPOSITORY / "docs" / "benchmarks" / "quick.json"
WORK = REPOSITORY / "build" / "bench"
EXIT_LOST, EXIT_NO_RECORD = 1, 2


def measured(pythons: Pythons, possible: Callable[[Pair, Contender], Sequence[Setting]]) -> Record:
    """The ratios of now, in the best of the possible settings of each contender."""
    ratios: dict[str, Spread] = {}
    chosen: dict[str, dict[str, Setting]] = {}
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    prepared = Prepared(WORK, pythons, say)
    for model, pairs in itertools.groupby(PAIRS, lambda pair: pair.model):
        for pair in pairs:
            names = [pair.ours, pair.theirs]
            results = Results()
            bench = Bench(prepared, GATE, results, names, say, lambda c, *_, p=pair: possible(p, c))
            with bench.together(model, names) as processes:
                bench.compare(model, pair.batch, processes)
            comparison = results.comparisons[comparison_key(model, pair.batch)]
            ratio = comparison.speedup(pair.ours, pair.theirs)
            if ratio is None:
                raise SystemExit(f"{pair.title}: {'; '.join(results.missing.values())}")
            ratios[pair.title] = ratio
            chosen[pair.title] = {name: series.setting for name, series in comparison.series.items()}
    return Record({**about(pythons), **stage_stamp()}, ratios, chosen)


def main(argv: Sequence[str]) -> int:
    """Measure, then compare or record; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the record instead of comparing with it")
    parser.add_argument("--peers-python", type=Path, default=own_python(), help="has ctranslate2 and transformers")
    arguments = parser.parse_args(argv)
    pythons = Pythons(own_python(), arguments.peers_python, arguments.peers_python)
    recorded = Record.from_json(json.loads(RECORD.read_text("utf-8"))) if RECORD.exists() else None
    if arguments.record:
        found = measured(pythons, lambda pair, contender: settings(contender.kind, pair.batch))
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(found.as_json(), indent=1) + "\n", "utf-8")
        print(f"wrote {RECORD.relative_to(REPOSITORY)}")
        return 0
    if recorded is None:
        print("there is no record: make bench-quick ARGS=--record", file=sys.stderr)
        return EXIT_NO_RECORD
    found = measured(pythons, lambda pair, contender: _recorded_settings(recorded, pair, contender))
    if found.about["cpu"] != recorded.about["cpu"]:
        print(f"note: recorded on {recorded.about['cpu']}, this is {found.about['cpu']}")
    every = list(changes(found.ratios, recorded.ratios))
    print("\n".join(map(str, every)))
    return EXIT_LOST if any(change.lost for change in every) else 0


def _recorded_settings(recorded: Record, pair: Pair, contender: Contender) -> Sequence[Setting]:
    """The one that was found best, or all where a ratio is new."""
    known = recorded.settings.get(pair.title, {}).get(contender.name)
    return settings(contender.kind, pair.batch) if known is None else [known]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

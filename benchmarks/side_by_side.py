"""Beamline and its peers offline, side by side in one run: same weights, same sentences.

    make bench [ARGS='--quick --only fr-en,quality']
    python benchmarks/side_by_side.py [--quick] [--only STAGE,…] [--render]

A whole run takes some 45 minutes on two cores, which should have nothing else to do. It writes the raw repetitions to
docs/benchmarks/offline.json, plots next to it, and the tables between the markers of docs/benchmarks.md. A partial run
(--quick, --only, --contenders) writes all of that below build/bench/report instead, unless --merge puts its stages in
the place of those of the last whole run. --render makes tables and plots anew from the JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from offline.bench import Bench
from offline.contender_process import last_words
from offline.contenders import CONTENDERS
from offline.contenders import OPTIMUM as OPTIMUM_ONNX
from offline.document import write_report
from offline.machine import about, busy, instructions, stage_stamp
from offline.plan import FULL, QUICK
from offline.prepared import REPOSITORY, Prepared, Pythons, own_python
from offline.results import Results
from offline.stages import STAGES

WORK = REPOSITORY / "build" / "bench"
DOCS = REPOSITORY / "docs"
OPTIMUM = REPOSITORY / ".venv-optimum"
BUSY = 0.5
"""Processes that may want a core besides the bench."""
EXIT_NO_RECORD = 2


def main(argv: Sequence[str]) -> int:
    """Measure and write; returns the exit status."""
    arguments = _arguments(argv)
    partial = arguments.quick or arguments.only != list(STAGES) or arguments.contenders is not None
    target = WORK / "report" if partial and not arguments.merge else DOCS
    record = target / "benchmarks" / "offline.json"
    if (arguments.render or arguments.merge) and not record.exists():
        print(f"{record.relative_to(REPOSITORY)} is not there: measure first", file=sys.stderr)
        return EXIT_NO_RECORD
    if arguments.render or arguments.merge:
        results = Results.from_json(json.loads(record.read_text("utf-8")))
    else:
        results = Results()
    if not arguments.render:
        _measure(arguments, results, record)
    write_report(target, results)
    print(f"wrote {target.relative_to(REPOSITORY)}/benchmarks.md")
    return 0


def _measure(arguments: argparse.Namespace, results: Results, record: Path) -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"[{minutes:3}:{seconds:02}] {text}", flush=True)

    pythons = Pythons(own_python(), arguments.peers_python, arguments.optimum_python)
    plan = QUICK if arguments.quick else FULL
    plan = replace(plan, repetitions=arguments.repetitions or plan.repetitions)
    usable = [c.name for c in CONTENDERS if c.instruction is None or c.instruction in instructions()]
    names = arguments.contenders or usable
    if busy() > BUSY:
        say(f"note: this machine is busy ({busy():.1f} processes want its cores); the figures will be worth little")
    results.missing.clear()
    if reason := _not_installed(arguments.optimum_python):
        results.missing[OPTIMUM_ONNX] = reason
    results.about.update(about(pythons), repetitions=plan.repetitions, quick=arguments.quick)
    bench = Bench(Prepared(WORK, pythons, say), plan, results, names, say)
    stamps = results.about.setdefault("stages", {})
    for stage in arguments.only:
        say(f"stage {stage}")
        stamps[stage] = stage_stamp()
        STAGES[stage](bench)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(results.as_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    say("done")


def _not_installed(python: Path) -> str | None:
    """Why optimum-onnx is not there; None if it is."""
    if python.exists():
        return None
    log = OPTIMUM / "install.log"
    return (last_words(log.read_text("utf-8")) if log.exists() else None) or "it was not installed"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="as little as shows that everything works")
    parser.add_argument("--only", type=_stages, default=list(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--contenders", type=_contenders, help=f"of {', '.join(c.name for c in CONTENDERS)}")
    parser.add_argument(
        "--repetitions", type=int, help=f"default: {FULL.repetitions}, with --quick {QUICK.repetitions}"
    )
    parser.add_argument("--merge", action="store_true", help="add the stages to the last whole run")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the report again")
    parser.add_argument("--peers-python", type=Path, default=own_python(), help="has ctranslate2 and transformers")
    parser.add_argument("--optimum-python", type=Path, default=OPTIMUM / "bin" / "python", help="has optimum-onnx")
    return parser.parse_args(argv)


def _stages(text: str) -> list[str]:
    return _known(text, list(STAGES))


def _contenders(text: str) -> list[str]:
    return _known(text, [contender.name for contender in CONTENDERS])


def _known(text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not known; known: {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The highest rate at which p99 stays under 500 ms: Beamline, Beamline without continuous batching, CTranslate2.

    python benchmarks/online.py [--repeat 5] [--quick] [--output FOLDER]

All three serve the embedded model over the same gRPC service, on the same cores, to `beamline load find-max` on another
core. Each is tuned first, for each workload: how many requests run at a time, or start together after what delay on how
many workers, and for CTranslate2 how a batch is cut and the instruction set. Then the three take turns. Writes
docs/benchmarks/online.json, the picture and the table in docs/benchmarks.md; with --output, the same into a folder
instead. Linux, two cores or more. Let nothing else run meanwhile.

Needs `ctranslate2` beside Beamline with its extras server and load, and to convert the model torch and transformers:
`make bench-online` has all of that.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from online_page import Places

# The generator's processes import this file again, each time that one starts: what is heavy is imported where it is
# needed.

EXIT_INTERRUPTED = 130


def main() -> int:
    """Measure, write, print."""
    arguments = parsed()
    from online_page import Places
    from online_results import Results

    places = Places.of(arguments.output)
    if arguments.render is not None:
        results = Results.model_validate_json(arguments.render.read_text("utf-8"))
        print(places.render(results))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return measure(arguments, Path(folder), places)


def parsed() -> argparse.Namespace:
    """The arguments; ends the program if they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, metavar="N", help="searches of each server (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a trial: no tuning, short windows, figures mean nothing")
    parser.add_argument("--workload", choices=["test", "mixed"], help="default: both")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: docs/")
    parser.add_argument("--precision", default="int8", choices=["fp32", "int8"], help="default: %(default)s")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="do not export the embedded model: use this")
    parser.add_argument("--ct2-model", type=Path, metavar="FOLDER", help="do not convert it: use this")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="take the tunings from an earlier online.json")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with an online.json of an interrupted run")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: make the table and the picture")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output is None:
        parser.error("--quick needs --output: its figures are not for the documentation")
    if arguments.render is None:
        try:
            importlib.metadata.version("ctranslate2")
        except importlib.metadata.PackageNotFoundError:
            parser.error("ctranslate2 is not installed here; `make bench-online` has an environment with it")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path, places: "Places") -> int:
    """Measure, with a folder for what is made on the way; returns the exit status."""
    from online_comparison import Comparison, Stopped, effort, empty_results
    from online_results import Results, complete, summary
    from online_servers import Models, convert_for_ct2, export_bundle
    from online_workloads import workloads_for

    bundle = arguments.bundle or export_bundle(folder / "bundle", arguments.precision)
    models = Models(bundle, arguments.ct2_model or convert_for_ct2(folder / "ct2", arguments.precision))
    workloads = [each for each in workloads_for(bundle) if arguments.workload in (None, each.name)]
    results = empty_results(models, workloads, quick=arguments.quick)
    if arguments.tuned is not None:
        earlier = Results.model_validate_json(arguments.tuned.read_text("utf-8"))
        results = results.model_copy(update={"tunings": earlier.tunings})
    if arguments.resume is not None:
        results = complete(Results.model_validate_json(arguments.resume.read_text("utf-8")))
    how = effort(quick=arguments.quick, repeat=arguments.repeat)
    comparison = Comparison(models, how, results, places.data)
    try:
        comparison.run(workloads)
    except (Stopped, KeyboardInterrupt):
        sys.stderr.write("interrupted; --resume goes on with what the JSON file has\n")
        return EXIT_INTERRUPTED
    print(places.render(comparison.results))
    print("\n".join(summary(comparison.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

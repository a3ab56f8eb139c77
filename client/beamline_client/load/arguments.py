"""What the command line of `beamline load` accepts."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from beamline_client.address import DEFAULT_SERVER, GRPC_PORT
from beamline_client.load.find_max import WINDOWS_THAT_AGREE
from beamline_client.load.notation import NotationUnusable, parse_duration_s, parse_share
from beamline_client.load.scrape import METRICS_PORT
from beamline_client.load.setup import LoadOptions
from beamline_client.load.workload import WorkloadOptions

_DESCRIPTION = """\
Puts a Beamline server under load and measures it. By default requests are sent at times drawn beforehand, whether or
not earlier ones have been answered (an open loop), and latency counts from those times."""

_EPILOG = """\
other commands:
  beamline load find-max --slo 'p99<=500ms,errors<=0.1%'   the highest rate that meets an SLO
  beamline load compare BEFORE.json AFTER.json             has anything become slower?
  beamline load schema                                     the JSON schema of reports

exit status: 0; 1 if the server failed at something (wrong answers, a missed SLO, no answers) or a file could not be
written; 2 if the load cannot be run as asked for; 3 if the generator itself may have made the figures (INVALID); 130 if
interrupted.

docs/load-testing.md is the guide."""


def load_options(arguments: argparse.Namespace, rate: str) -> LoadOptions:
    """What the arguments of a run, or of a search, ask for."""
    workload = WorkloadOptions(
        lengths=arguments.lengths,
        beams=arguments.beam,
        n_best=arguments.n_best,
        deadlines=arguments.deadline,
        stream=arguments.stream,
        cancel=arguments.cancel,
        cancel_within=arguments.cancel_within,
        max_new_tokens=arguments.max_new_tokens,
    )
    given = vars(arguments)
    written = [given.get(name) for name in ("request_log", "record_golden")]
    return LoadOptions(
        server=arguments.server,
        rate=rate,
        arrivals=arguments.arrivals,
        trace=given.get("trace"),
        concurrency=given.get("concurrency"),
        duration_s=given.get("duration", 0.0),
        warm_up_s=arguments.warm_up,
        seed=arguments.seed,
        sentences=arguments.sentences,
        workload=workload,
        workers=arguments.workers,
        channels=arguments.channels,
        max_in_flight=arguments.max_in_flight,
        retries=arguments.retries,
        pin=arguments.pin,
        slo=arguments.slo,
        golden=arguments.golden,
        metrics=arguments.metrics,
        output=arguments.output,
        written=tuple(path for path in written if path is not None),
    )


def run_parser() -> argparse.ArgumentParser:
    """Of `beamline load`."""
    parser = argparse.ArgumentParser(
        prog="beamline load",
        usage="beamline load [--rate R | --concurrency N | --trace FILE] [--duration D] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load = parser.add_argument_group("load").add_mutually_exclusive_group()
    load.add_argument(
        "--rate",
        default="10",
        metavar="R",
        help="requests per second: 100, ramp:10-200, step:50,100,150, spike:50,400,10s,2s (default: %(default)s)",
    )
    load.add_argument("--concurrency", type=_positive(int), metavar="N", help="closed loop: so many callers")
    load.add_argument("--trace", type=Path, metavar="FILE", help="send at the times of a file, in seconds")
    parser.add_argument(
        "--duration",
        type=_duration,
        default=30.0,
        metavar="D",
        help="such as 30s or 5m (default: 30s); a trace has its own",
    )
    parser.add_argument(
        "--slo", metavar="SLO", help="such as 'p99<=500ms,errors<=0.1%%': counts goodput, and is checked"
    )
    parser.add_argument("--record-golden", type=Path, metavar="FILE", help="write the answers for a later --golden")
    parser.add_argument(
        "--request-log", type=Path, metavar="FILE", help="write a CSV line per request (.csv or .csv.gz)"
    )
    _add_common(parser)
    return parser


def find_max_parser() -> argparse.ArgumentParser:
    """Of `beamline load find-max`."""
    parser = argparse.ArgumentParser(
        prog="beamline load find-max",
        usage="beamline load find-max --slo SLO [options]",
        description="Finds the highest arrival rate at which the server meets an SLO: brackets it, then bisects.",
    )
    parser.add_argument("--slo", required=True, metavar="SLO", help="such as 'p99<=500ms,errors<=0.1%%'")
    parser.add_argument("--start", type=_positive(float), metavar="R", help="first rate; default: asks a closed loop")
    parser.add_argument(
        "--precision",
        type=_some_share,
        default=0.05,
        metavar="SHARE",
        help="of the rate, to stop at (default: 5%%)",
    )
    parser.add_argument("--window", type=_duration, default=5.0, metavar="D", help="length of a window (default: 5s)")
    parser.add_argument(
        "--max-windows", type=_window_count, default=8, metavar="N", help="windows per rate at most (default: 8)"
    )
    parser.add_argument(
        "--stability",
        type=_some_share,
        default=0.1,
        metavar="SHARE",
        help="windows may differ by it (default: 10%%)",
    )
    _add_common(parser)
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """Of `beamline load compare`."""
    parser = argparse.ArgumentParser(
        prog="beamline load compare",
        description="Compares two reports: p50, p99 and rate, each with a bootstrap 95 % confidence interval.",
        epilog="exit status: 0; 1 if something is worse by more than the tolerance; 2 if they cannot be compared",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument(
        "--tolerance", type=_share, default=0.05, metavar="SHARE", help="by which figures may differ (default: 5%%)"
    )
    parser.add_argument("--allow-invalid", action="store_true", help="compare reports that are INVALID, too")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="default: %(default)s")
    parser.add_argument(
        "--warm-up", type=_duration_or_zero, default=2.0, metavar="D", help="left out of the figures (default: 2s)"
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of everything drawn (default: 0)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write report.json, report.html, latency.hgrm")
    parser.add_argument("--quiet", action="store_true", help="show nothing before the end")

    workload = parser.add_argument_group("workload", "mixes are written value:share,value:share")
    workload.add_argument(
        "--sentences", type=Path, metavar="FILE", help="text, or TSV with references (default: French test sentences)"
    )
    workload.add_argument(
        "--lengths", default="any", metavar="MIX", help="in words: any:80%%,60-120:20%% (default: %(default)s)"
    )
    workload.add_argument("--beam", metavar="MIX", help="beam widths: 4, or 1:20%%,4:80%% (default: the server's)")
    workload.add_argument("--n-best", metavar="MIX", help="hypotheses per answer")
    workload.add_argument("--max-new-tokens", type=_positive(int), metavar="N", help="greatest length of an answer")
    workload.add_argument(
        "--deadline", default="30s", metavar="MIX", help="30s, or 500ms:10%%,30s:90%% (default: %(default)s)"
    )
    workload.add_argument(
        "--stream", default="0%", metavar="SHARE", help="of requests that ask for streams (default: 0%%)"
    )
    workload.add_argument(
        "--cancel", default="0%", metavar="SHARE", help="of requests given up part-way (default: 0%%)"
    )
    workload.add_argument(
        "--cancel-within", default="0-200ms", metavar="RANGE", help="after the send (default: %(default)s)"
    )

    checks = parser.add_argument_group("checks")
    checks.add_argument("--golden", type=Path, metavar="FILE", help="compare every answer with recorded ones")
    checks.add_argument(
        "--metrics",
        metavar="URL",
        help=f"the server's /metrics, or off (default: port {METRICS_PORT} when the server's is {GRPC_PORT})",
    )

    generator = parser.add_argument_group("generator")
    generator.add_argument("--workers", type=_positive(int), default=1, metavar="N", help="processes (default: 1)")
    generator.add_argument(
        "--channels", type=_positive(int), default=4, metavar="N", help="connections of each process (default: 4)"
    )
    generator.add_argument(
        "--max-in-flight", type=_positive(int), default=10_000, metavar="N", help="default: %(default)s"
    )
    generator.add_argument("--retries", action="store_true", help="let gRPC send refused requests again, as clients do")
    generator.add_argument(
        "--pin",
        nargs="?",
        const="",
        metavar="CORES",
        help="keep the generator on these cores (default: the last ones) and a server on this machine on the others",
    )


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {'a whole' if kind is int else 'a'} number above 0, not {text}")
        return value

    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text}")
    return int(text)


def _duration_or_zero(text: str) -> float:
    try:
        return parse_duration_s(text)
    except NotationUnusable as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _duration(text: str) -> float:
    value = _duration_or_zero(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _share(text: str) -> float:
    try:
        return parse_share(text)
    except NotationUnusable as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _some_share(text: str) -> float:
    value = _share(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _window_count(text: str) -> int:
    if not text.isdecimal() or int(text) < WINDOWS_THAT_AGREE:
        raise argparse.ArgumentTypeError(f"must be {WINDOWS_THAT_AGREE} or more, for so many have to agree, not {text}")
    return int(text)

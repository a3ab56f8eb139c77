"""What the user asks for, and the check of all of it before any load is sent."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from beamline_client.address import DEFAULT_SERVER, AddressUnusable, endpoints
from beamline_client.advice import advice
from beamline_client.client import Client
from beamline_client.errors import BeamlineError
from beamline_client.load import scrape
from beamline_client.load.arrivals import ArrivalsUnusable, RateProfile, draw_arrivals, parse_rate, read_trace
from beamline_client.load.environment import describe
from beamline_client.load.pinning import PinningUnusable, plan_pinning
from beamline_client.load.quality import GoldenFile, GoldenUnusable, read_golden
from beamline_client.load.report import Environment, Pinning
from beamline_client.load.sentences import Sentence, SentencesUnusable, default_sentences, read_sentences
from beamline_client.load.slo import Objective, SloUnusable, parse_slo
from beamline_client.load.workload import Workload, WorkloadOptions, WorkloadUnusable, check_limits, draw_workload
from beamline_client.results import ServerInfo

CLOSED_LOOP_REQUESTS = 65_536
"""Requests that are drawn for a closed loop, which goes through them over and over."""
_ANSWER_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Everything that the user can say about a run."""

    server: str = DEFAULT_SERVER
    rate: str = "10"
    arrivals: str = "poisson"
    trace: Path | None = None
    concurrency: int | None = None
    duration_s: float = 30.0
    warm_up_s: float = 2.0
    seed: int = 0
    sentences: Path | None = None
    workload: WorkloadOptions = field(default_factory=WorkloadOptions)
    workers: int = 1
    channels: int = 4
    max_in_flight: int = 10_000
    retries: bool = False
    pin: str | None = None
    """None is not at all, "" is wherever they fit."""
    slo: str | None = None
    golden: Path | None = None
    metrics: str | None = None
    """URL; None is where it usually is, if it answers there; "off" is not at all."""
    output: Path | None = None
    """Folder that the report will be written into."""
    written: tuple[Path, ...] = ()
    """Other files that will be written."""


class SetupUnusable(Exception):
    """The load cannot be run as asked for.

    Attributes:
        problems: One line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Load:
    """One load to send: when, and for how long."""

    title: str
    mode: str
    """open or closed."""
    arrivals: str
    rate: str
    intended_s: npt.NDArray[np.float64] | None
    """Shape [requests]; None is a closed loop."""
    callers: int
    duration_s: float
    window_s: float | None = None
    """Length of the recorder's windows; None is whatever suits the duration."""

    @property
    def requests(self) -> int:
        """How many requests to draw."""
        return CLOSED_LOOP_REQUESTS if self.intended_s is None else len(self.intended_s)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for all runs, checked."""

    options: LoadOptions
    sentences: Sequence[Sentence]
    sentences_path: Path
    objective: Objective | None
    golden: GoldenFile | None
    info: ServerInfo
    metrics_url: str | None
    remarks: tuple[str, ...]
    pinning: Pinning | None
    environment: Environment

    def draw(self, load: Load) -> Workload:
        """The requests of a load."""
        return draw_workload(self.sentences, self.options.workload, load.requests, self.options.seed)


def open_load(options: LoadOptions, rate: str, duration_s: float) -> Load:
    """An open loop at this rate.

    Raises:
        ArrivalsUnusable: There is no such rate.
    """
    profile: RateProfile = parse_rate(rate)
    process: Literal["poisson", "constant"] = "constant" if options.arrivals == "constant" else "poisson"
    intended_s = draw_arrivals(profile, process, duration_s, options.seed)
    title = f"open loop, {process} {rate}/s, {duration_s:g} s"
    return Load(title, "open", process, rate, intended_s, 0, duration_s)


def closed_load(callers: int, duration_s: float) -> Load:
    """A closed loop of so many callers."""
    title = f"closed loop, {callers} callers, {duration_s:g} s"
    return Load(title, "closed", "closed", f"{callers} callers", None, callers, duration_s)


def trace_load(path: Path) -> Load:
    """An open loop that repeats recorded arrivals.

    Raises:
        ArrivalsUnusable: The file has none.
    """
    intended_s = read_trace(path)
    duration_s = float(np.nextafter(intended_s[-1], math.inf))
    title = f"trace {path.name}, {len(intended_s)} requests, {duration_s:.1f} s"
    return Load(title, "open", "trace", str(path), intended_s, 0, max(duration_s, 1e-3))


def check_load(options: LoadOptions) -> Load:
    """The load that the options describe.

    Raises:
        SetupUnusable: There is none.
    """
    try:
        if options.concurrency is not None:
            return closed_load(options.concurrency, options.duration_s)
        if options.trace is not None:
            return trace_load(options.trace)
        return open_load(options, options.rate, options.duration_s)
    except ArrivalsUnusable as error:
        raise SetupUnusable([str(error)]) from error


def check_run(options: LoadOptions) -> tuple[Setup, Load]:
    """Checks everything for one run; see `check_load` and `check_setup`.

    Raises:
        SetupUnusable: With every problem of the options; or, if they have none, with those of the server.
    """
    try:
        load = check_load(options)
    except SetupUnusable as error:
        check_setup(options, error.problems)
        raise
    return check_setup(options), load


def check_setup(options: LoadOptions, problems_so_far: Sequence[str] = ()) -> Setup:
    """Reads every file and asks the server what it serves; nothing else is sent.

    Raises:
        SetupUnusable: With every problem of the options, those so far first; or, if there are none, with those of the
            server.
    """
    problems = [*problems_so_far, *_unreachable(options.server)]
    sentences_path, sentences = _sentences(options, problems)
    objective = _objective(options, problems)
    golden = _golden(options, problems)
    problems += _unwritable(options)
    workload = _workload_sample(sentences, options, problems)
    if problems or workload is None:
        raise SetupUnusable(problems)
    info = _server_info(options)
    if found := check_limits(workload, info):
        raise SetupUnusable(found)
    metrics_url, remarks = _metrics(options)
    return Setup(
        options=options,
        sentences=sentences,
        sentences_path=sentences_path,
        objective=objective,
        golden=golden,
        info=info,
        metrics_url=metrics_url,
        remarks=remarks,
        pinning=_pinning(options),
        environment=describe(),
    )


def _sentences(options: LoadOptions, problems: list[str]) -> tuple[Path, Sequence[Sentence]]:
    path = options.sentences or Path()
    try:
        path = options.sentences or default_sentences()
        return path, read_sentences(path)
    except SentencesUnusable as error:
        problems.append(str(error))
        return path, ()


def _objective(options: LoadOptions, problems: list[str]) -> Objective | None:
    try:
        return None if options.slo is None else parse_slo(options.slo)
    except SloUnusable as error:
        problems.append(str(error))
        return None


def _golden(options: LoadOptions, problems: list[str]) -> GoldenFile | None:
    try:
        return None if options.golden is None else read_golden(options.golden)
    except GoldenUnusable as error:
        problems.append(str(error))
        return None


def _unreachable(server: str) -> Iterator[str]:
    try:
        endpoints(server)
    except AddressUnusable as error:
        yield f"--server: {error}"


def _unwritable(options: LoadOptions) -> Iterator[str]:
    """What would only be noticed after the run."""
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        yield f"{options.output} is a file: name a folder for the report"
    for path in options.written:
        if path.is_dir():
            yield f"{path} is a folder: name a file"
    for path in filter(None, (options.output, *options.written)):
        if not path.parent.is_dir():
            yield f"{path}: its folder {path.parent} does not exist: create it, or write elsewhere"
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            yield f"{path} cannot be written: change its permissions, or write elsewhere"


def _workload_sample(sentences: Sequence[Sentence], options: LoadOptions, problems: list[str]) -> Workload | None:
    if not sentences:
        return None
    try:
        return draw_workload(sentences, options.workload, CLOSED_LOOP_REQUESTS, options.seed)
    except (WorkloadUnusable, SentencesUnusable) as error:
        problems.append(str(error))
        return None


def _server_info(options: LoadOptions) -> ServerInfo:
    try:
        with Client(options.server) as client:
            return client.info(timeout_s=_ANSWER_WITHIN_S)
    except BeamlineError as error:
        raise SetupUnusable([advice(error, target=options.server, timeout_s=_ANSWER_WITHIN_S)]) from error


def _metrics(options: LoadOptions) -> tuple[str | None, tuple[str, ...]]:
    if options.metrics == "off":
        return None, ()
    url = options.metrics or scrape.default_url(options.server)
    if url is None:
        return None, ("the server's metrics were not read: name their address with --metrics",)
    try:
        scrape.fetch(url)
    except scrape.MetricsUnreachable as error:
        if options.metrics is not None:
            raise SetupUnusable([str(error)]) from error
        return None, (f"the server's metrics were not read: {error}",)
    return url, ()


def _pinning(options: LoadOptions) -> Pinning | None:
    if options.pin is None:
        return None
    try:
        return plan_pinning(options.server, options.pin or None, _usable_cores())
    except PinningUnusable as error:
        raise SetupUnusable([str(error)]) from error


def _usable_cores() -> frozenset[int]:
    if not hasattr(os, "sched_getaffinity"):  # plan_pinning says what that means
        return frozenset()
    return frozenset(os.sched_getaffinity(0))


def option_texts(options: WorkloadOptions) -> dict[str, str]:
    """The options of a workload as the user wrote them, for the report; those left out are missing."""
    texts = {each.name: getattr(options, each.name) for each in fields(options)}
    return {name: str(value) for name, value in texts.items() if value is not None}

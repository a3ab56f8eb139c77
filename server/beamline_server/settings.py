"""What the operator can set, and where it comes from: flags before `BEAMLINE_*` variables before a TOML file.

Everything is checked once, and every problem is reported, with its source and with what would be valid.
"""

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Never

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from beamline_server.engine.admission import DEFAULT_QUEUE_ROWS, DEFAULT_ROWS
from beamline_server.engine.request import MAX_BEAMS
from beamline_server.likeness import closest
from beamline_server.manifest import NAME_PATTERN

ENVIRONMENT_PREFIX = "BEAMLINE_"
CONFIG_VARIABLE = "BEAMLINE_CONFIG"

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Bytes = Annotated[int, Field(ge=1024, le=2**31 - 1)]


def _without_brackets(host: str) -> str:
    """An IPv6 address that is written as in URLs, [::1], without its brackets; anything else as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") and ":" in host else host


class SettingsError(Exception):
    """The settings cannot be used; `problems` has one line for each reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class Settings(BaseModel):
    """Everything that can be set. Units are in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    host: Annotated[str, AfterValidator(_without_brackets)] = Field(
        default="0.0.0.0", min_length=1, description="Address to listen on; 0.0.0.0 or :: for all."
    )
    grpc_port: Port = Field(default=8001, description="Port of the gRPC service; 0 takes a free one.")
    metrics_port: Port = Field(default=8002, description="Port of the metrics; 0 takes a free one.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; auto takes CUDA if it can."
    )
    workers: Count | Auto = Field(default="auto", description="Decode threads; auto fits the device.")
    threads_per_worker: Count | Auto = Field(
        default="auto", description="Threads inside each worker; auto shares the cores."
    )
    max_rows: Count = Field(default=DEFAULT_ROWS, description="Live hypotheses per worker, but for an eighth more.")
    max_queue_rows: Count = Field(
        default=DEFAULT_QUEUE_ROWS, description="Hypotheses of waiting requests, all workers together."
    )
    kv_slots: Count | Auto = Field(
        default="auto", description="Cache slots per worker, one per live hypothesis and token."
    )
    max_new_tokens: Count | Auto = Field(
        default="auto", description="Most tokens to generate; auto takes the model's limit."
    )
    max_beam_size: int = Field(
        default=MAX_BEAMS, ge=1, le=MAX_BEAMS, description="Widest beam that a request may ask for."
    )
    max_inputs: int = Field(default=64, ge=1, le=1024, description="Most inputs in one request.")
    max_request_cost: Count | Auto = Field(
        default="auto",
        description="Most that one request may cost: beams times most new tokens, summed over its inputs; auto is "
        "twice what all inputs cost by the model's defaults.",
    )
    max_text_bytes: Count = Field(default=65536, description="Most bytes of UTF-8 in one text.")
    max_message_bytes: Bytes = Field(default=1024 * 1024, description="Most bytes in one request message.")
    max_connections: Count | Auto = Field(
        default="auto", description="Most connections at a time; auto is 4096, or what there are descriptors for."
    )
    memory_limit: Annotated[int, Field(ge=1024 * 1024)] | Auto = Field(
        default="auto",
        description="Bytes of memory that there are: the server does not start with settings that may need more; auto "
        "takes the container's limit, and only warns.",
    )
    max_duration_s: float = Field(
        default=30,
        gt=0,
        le=86400,
        description="Longest time for one request in seconds; also the deadline where none is set.",
    )
    caller_metadata: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9_.-]+$",
        description="Metadata key whose value names the caller: callers share the engine fairly. Without it, a caller "
        "is a connection.",
    )
    warm_up_timeout_s: float = Field(
        default=240,
        gt=0,
        le=86400,
        description="Longest time to compute what shows at the start that the bundle is well, in seconds.",
    )
    lame_duck_s: float = Field(
        default=0, ge=0, le=3600, description="Time to go on accepting after SIGTERM, not ready, in seconds."
    )
    drain_timeout_s: float = Field(
        default=30, ge=0, le=86400, description="Time for accepted requests to finish at the end, in seconds."
    )
    reflection: bool = Field(default=True, description="Whether clients can ask for the service's description.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )
    model_name: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Name to serve the model by; the bundle's if unset.",
    )
    request_batch: Count | None = Field(
        default=None,
        description="For comparison with continuous batching, which is what happens if this is unset: so many requests "
        "start together on a worker, and nobody joins them until all have ended.",
    )
    request_batch_delay_ms: Annotated[float, Field(ge=0, le=60_000)] | None = Field(
        default=None,
        description="With request_batch: how long the first of a batch waits for the others, in milliseconds.",
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What contradicts itself although each value is valid: the settings involved, and why."""
        if self.grpc_port == self.metrics_port != 0:
            yield ("grpc_port", "metrics_port"), f"both are {self.grpc_port}; two services need two ports"
        if self.max_beam_size > self.max_rows:
            yield (
                ("max_beam_size", "max_rows"),
                f"a beam of {self.max_beam_size} does not fit into {self.max_rows} rows; widen one or narrow the other",
            )
        if (self.request_batch is None) != (self.request_batch_delay_ms is None):
            yield ("request_batch", "request_batch_delay_ms"), "one is nothing without the other; set both or neither"
        if self.request_batch is not None and self.request_batch > self.max_rows:
            yield (
                ("request_batch", "max_rows"),
                f"{self.request_batch} requests never fit into {self.max_rows} rows together; ask for fewer",
            )
        if self.max_text_bytes > self.max_message_bytes:
            yield (
                ("max_text_bytes", "max_message_bytes"),
                f"a text of {self.max_text_bytes} bytes does not fit into a message of {self.max_message_bytes} bytes",
            )


@dataclass(frozen=True)
class Command:
    """A command line, read and checked."""

    bundle: Path
    settings: Settings


@dataclass
class _Layer:
    """Values from one kind of source, and how each is called there."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    typed: bool = False
    """Whether values have types of their own, so that "8001" is not a number."""

    def put(self, name: str, source: str, value: object) -> None:
        if name in Settings.model_fields:
            self.values[name], self.sources[name] = value, source
        else:
            self.problems.append(f"{source}: unknown{_meant(name)}")

    def check(self) -> None:
        """Move what is not valid from values to problems."""
        try:
            Settings.model_validate(self.values, strict=self.typed)
        except ValidationError as error:
            for name in dict.fromkeys(str(found["loc"][0]) for found in error.errors()):
                value = self.values.pop(name)
                self.problems.append(f"{self.sources[name]}: {value!r} is not valid; expected {expected(name)}")


def read_command(argv: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Read the arguments of `beamline serve`, the environment, and the TOML file that either names.

    Raises:
        SettingsError: names every problem in all sources.
    """
    known, unknown = command_parser().parse_known_args(argv)
    arguments = vars(known)
    bundle, config = arguments.pop("bundle"), arguments.pop("config")
    flags = _Layer(problems=[f"{word}: unknown argument{_meant_flag(word)}" for word in unknown])
    if bundle is None:
        flags.problems.append("BUNDLE: missing; expected the folder that `beamline export` has written")
    for name, value in arguments.items():
        flags.put(name, flag_of(name), value)
    settings = merged([_file_layer(config or environment.get(CONFIG_VARIABLE)), _environment_layer(environment), flags])
    return Command(Path(bundle), settings)


def merged(layers: Sequence[_Layer]) -> Settings:
    """The settings of several layers; a later one wins.

    Raises:
        SettingsError: names every problem of every layer, also of values that another layer replaces.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        layer.check()
        values |= layer.values
        sources |= layer.sources
    problems = [problem for layer in layers for problem in layer.problems]
    settings = Settings.model_validate(values)
    for names, reason in settings.contradictions():
        problems.append(f"{', '.join(sources.get(name, f'{name} (default)') for name in names)}: {reason}")
    if problems:
        raise SettingsError(problems)
    return settings


def number_of(setting: int | str) -> int | None:
    """A setting that may be "auto", which is None."""
    return None if isinstance(setting, str) else setting


def flag_of(name: str) -> str:
    """The flag of a setting: `--grpc-port`."""
    return "--" + name.replace("_", "-")


def expected(name: str) -> str:
    """What is valid for a setting, in words."""
    return _in_words(Settings.model_json_schema()["properties"][name])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise SettingsError([message])


def command_parser() -> argparse.ArgumentParser:
    """The parser of `beamline serve`: one flag per setting, values as they were typed."""
    parser = _Parser(
        prog="beamline serve",
        usage="beamline serve BUNDLE [--config FILE] [--SETTING VALUE ...]",
        description="Serve a bundle over gRPC until SIGTERM or SIGINT.",
        epilog="Each flag is also a variable (--grpc-port: BEAMLINE_GRPC_PORT) and a key of the TOML file (grpc_port). "
        "Flags win over variables, variables over the file. Exit status: 0 after SIGTERM or SIGINT, 1 if the engine "
        "failed, 2 for settings that cannot be used, 3 for a bundle that cannot be served.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="folder that `beamline export` has written")
    parser.add_argument("--config", metavar="FILE", help=f"TOML file with settings; also {CONFIG_VARIABLE}")
    for name, info in Settings.model_fields.items():
        _add_flag(parser, name, info)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, info: FieldInfo) -> None:
    default = "unset" if info.default is None else str(info.default).lower()
    words = expected(name)
    text = f"{info.description} {words[0].upper()}{words[1:]}. Default: {default}.".replace("%", "%%")
    if info.annotation is bool:
        parser.add_argument(
            flag_of(name), dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    else:
        parser.add_argument(flag_of(name), dest=name, default=argparse.SUPPRESS, metavar="VALUE", help=text)


def _environment_layer(environment: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for variable in sorted(environment):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable != CONFIG_VARIABLE:
            name = variable.removeprefix(ENVIRONMENT_PREFIX)
            # BEAMLINE_host would be a second way to say BEAMLINE_HOST.
            layer.put(name.lower() if name == name.upper() else variable, variable, environment[variable])
    return layer


def _file_layer(path: str | None) -> _Layer:
    layer = _Layer(typed=True)
    if path is None:
        return layer
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        layer.problems.append(f"{path}: cannot be read ({error.strerror}); expected a TOML file")
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        layer.problems.append(f"{path}: is not TOML ({error})")
    else:
        for key, value in content.items():
            layer.put(key, f"{path}: {key}", value)
    return layer


def _meant(name: str) -> str:
    near = name.lower().removeprefix(ENVIRONMENT_PREFIX.lower()).replace("-", "_")
    close = closest(near, Settings.model_fields)
    return "" if close is None else f"; did you mean {close}?"


def _meant_flag(word: str) -> str:
    flags = ["--config", *map(flag_of, Settings.model_fields)]
    flag = word.partition("=")[0]
    close = closest(flag, flags) if flag.startswith("-") else None
    return "" if close is None else f"; did you mean {close}?"


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_in_words(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    kind = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    return kind[schema["type"]] + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    if "pattern" in schema:
        return f" that matches {schema['pattern']}"
    if "minLength" in schema:
        return ", not empty"
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']:g}, at most {schema['maximum']:g}"
    if "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    return f" of at least {schema['minimum']}" if "minimum" in schema else ""

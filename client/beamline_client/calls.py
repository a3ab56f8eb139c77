"""What one call sends and how long it may take, the same for both faces of the client."""

import difflib
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypedDict, TypeVar

import grpc

from beamline.v1 import generation_pb2 as pb
from beamline_client import converters
from beamline_client.errors import REQUEST_ID_KEY, FieldViolation, InvalidRequest, ProtocolError, from_rpc_error
from beamline_client.results import Input, Piece, Priority, Result, SearchOptions, Source

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_SEND_BYTES = 1024 * 1024

RequestT = TypeVar("RequestT", pb.GenerateRequest, pb.GenerateStreamRequest, pb.GetInfoRequest)


class CallOptions(TypedDict, total=False):
    """The keyword arguments that every generating method takes. All of them are optional."""

    search: SearchOptions | None
    """How to search; the same for all inputs. Default: the served model's defaults."""
    token_ids: bool
    """Return the generated token ids. Default: only if the model has no tokenizer, and so no text to return."""
    token_logprobs: bool
    """Return the log-probability of each generated token. Default: False."""
    truncate: bool
    """Cut a source that is too long instead of refusing it. Default: False."""
    priority: Priority
    """Who waits for whom. Default: normal."""
    source_language: str | None
    """Of the sources' texts, one of `ModelInfo.source_languages`. Default: the model's."""
    target_language: str | None
    """Of the targets, one of `ModelInfo.target_languages`. Default: the model's."""
    timeout_s: float | None
    """Time for the whole call, retries included, in seconds. Default: the client's."""
    request_id: str | None
    """Id under which the server logs the call: printable ASCII. Default: a new random one."""


@dataclass(frozen=True, slots=True)
class Call(Generic[RequestT]):
    """One call, ready to be sent."""

    request: RequestT
    target: str
    timeout_s: float
    request_id: str
    answered: threading.Event
    """Set once anything has come from the target, by this call or another of the client."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata to send with it."""
        return ((REQUEST_ID_KEY, self.request_id),)

    @contextmanager
    def errors_mapped(self) -> Iterator[None]:
        """Turns every gRPC error raised within into a `BeamlineError` that knows the request id."""
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(
                error, target=self.target, request_id=self.request_id, answered=self.answered.is_set()
            ) from error
        self.answered.set()


@dataclass(frozen=True, slots=True)
class CallBuilder:
    """Builds calls with a client's defaults; refuses what should not be sent.

    Every method raises `InvalidRequest` for values that do not fit the message, for a message of more than
    `max_send_bytes` bytes, and for an unprintable request id; `TypeError` for an unknown option.
    """

    target: str
    timeout_s: float
    max_send_bytes: int
    answered: threading.Event = field(default_factory=threading.Event, init=False)
    """Set once anything has come from the target."""

    def generate(self, inputs: Sequence[Source | Input], options: CallOptions) -> Call[pb.GenerateRequest]:
        """A call of GenerationService.Generate."""
        request = pb.GenerateRequest(
            inputs=converters.inputs_to_pb(inputs),
            search=converters.search_to_pb(options.get("search")),
            output=_output(options),
            truncate_source=options.get("truncate", False),
            priority=_priority(options),
            **_languages(options),
        )
        return self._call(request, options)

    def stream(self, source: Source | Input, options: CallOptions) -> Call[pb.GenerateStreamRequest]:
        """A call of GenerationService.GenerateStream."""
        request = pb.GenerateStreamRequest(
            input=converters.input_to_pb(source),
            search=converters.search_to_pb(options.get("search")),
            output=_output(options),
            truncate_source=options.get("truncate", False),
            priority=_priority(options),
            **_languages(options),
        )
        return self._call(request, options)

    def info(self, timeout_s: float | None = None) -> Call[pb.GetInfoRequest]:
        """A call of GenerationService.GetInfo."""
        return self._call(pb.GetInfoRequest(), {"timeout_s": timeout_s})

    def _call(self, request: RequestT, options: CallOptions) -> Call[RequestT]:
        if unknown := options.keys() - CallOptions.__annotations__.keys():
            raise TypeError(f"unknown options: {', '.join(map(_with_likeliest, sorted(unknown)))}")
        self._check_size(request.ByteSize())
        timeout_s = options.get("timeout_s")
        return Call(
            request=request,
            target=self.target,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            request_id=_checked_request_id(options.get("request_id") or uuid.uuid4().hex),
            answered=self.answered,
        )

    def _check_size(self, size: int) -> None:
        # gRPC's own limit fails with the status of a full server, so that it would be retried.
        if size > self.max_send_bytes:
            raise InvalidRequest(
                f"the request has {size} bytes and this client sends at most {self.max_send_bytes}: "
                "send fewer or shorter inputs at once, or raise max_send_bytes if the server accepts more"
            )


def require_result(last: Piece | Result | None) -> None:
    """Checks that a stream ended as it must, with a result.

    Raises:
        ProtocolError: It ended with a piece, or without having sent anything.
    """
    if not isinstance(last, Result):
        raise ProtocolError("the server ended a stream without a result")


def _priority(options: CallOptions) -> pb.Priority:
    return converters.PRIORITIES[options["priority"]] if "priority" in options else pb.PRIORITY_UNSPECIFIED


class _Languages(TypedDict):
    source_language: str | None
    target_language: str | None


def _languages(options: CallOptions) -> _Languages:
    source, target = options.get("source_language"), options.get("target_language")
    violations = []
    for name, language in (("source_language", source), ("target_language", target)):
        try:
            (language or "").encode()
        except UnicodeEncodeError as error:
            violations.append(FieldViolation(name, f"not valid Unicode at character {error.start}"))
    if violations:
        raise InvalidRequest("a language cannot be sent", violations=violations)
    return {"source_language": source, "target_language": target}


def _with_likeliest(unknown: str) -> str:
    meant = difflib.get_close_matches(unknown, CallOptions.__annotations__, n=1)
    return f"{unknown} (did you mean {meant[0]}?)" if meant else unknown


def _output(options: CallOptions) -> pb.OutputOptions:
    return pb.OutputOptions(token_ids=options.get("token_ids"), token_logprobs=options.get("token_logprobs", False))


def _checked_request_id(request_id: str) -> str:
    if not (request_id.isascii() and request_id.isprintable()):
        problem = FieldViolation("request_id", "must be printable ASCII")
        raise InvalidRequest("the request id cannot be sent", violations=[problem])
    return request_id

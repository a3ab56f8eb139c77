"""Between the caller's values and protobuf messages. Pure functions; what cannot be converted raises."""

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from beamline.v1 import generation_pb2 as pb
from beamline_client.errors import FieldViolation, InvalidRequest, ProtocolError
from beamline_client.results import (
    EarlyStopping,
    FinishReason,
    Hypothesis,
    Input,
    LengthPenaltyKind,
    Limits,
    ModelInfo,
    Piece,
    Priority,
    Result,
    SearchOptions,
    ServerInfo,
    Source,
    Timing,
)

_LENGTH_PENALTY_KINDS = {
    LengthPenaltyKind.POWER: pb.LENGTH_PENALTY_KIND_POWER,
    LengthPenaltyKind.GNMT: pb.LENGTH_PENALTY_KIND_GNMT,
}
PRIORITIES = {Priority.NORMAL: pb.PRIORITY_NORMAL, Priority.BATCH: pb.PRIORITY_BATCH}
_EARLY_STOPPINGS = {
    EarlyStopping.WHEN_FULL: pb.EARLY_STOPPING_WHEN_FULL,
    EarlyStopping.HEURISTIC: pb.EARLY_STOPPING_HEURISTIC,
    EarlyStopping.NEVER: pb.EARLY_STOPPING_NEVER,
}
_FINISH_REASONS = {
    pb.FINISH_REASON_END_OF_SEQUENCE: FinishReason.END_OF_SEQUENCE,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_PLAIN_SEARCH_FIELDS = ("beam_size", "n_best", "length_penalty", "min_new_tokens", "max_new_tokens")


def inputs_to_pb(inputs: Sequence[Source | Input]) -> list[pb.Input]:
    """Converts the inputs of one request.

    Raises:
        InvalidRequest: Some cannot be sent; names everything that cannot.
        TypeError: `inputs` is a single one, or a source or a target prefix is neither text nor a sequence of integers.
    """
    if isinstance(inputs, str | Input):
        raise TypeError("inputs is a single one; pass a list, or use generate_one")
    violations: list[FieldViolation] = []
    converted = [_input_to_pb(entry, f"inputs[{index}]", violations) for index, entry in enumerate(inputs)]
    if violations:
        raise InvalidRequest("some inputs cannot be sent", violations=violations)
    return converted


def input_to_pb(entry: Source | Input) -> pb.Input:
    """Converts the input of a stream.

    Raises:
        InvalidRequest: A text in it is not valid Unicode, or an id no 32-bit integer; names everything that cannot be
            sent.
        TypeError: The source or the target prefix is neither text nor a sequence of integers.
    """
    violations: list[FieldViolation] = []
    converted = _input_to_pb(entry, "input", violations)
    if violations:
        raise InvalidRequest("the input cannot be sent", violations=violations)
    return converted


def _input_to_pb(entry: Source | Input, path: str, violations: list[FieldViolation]) -> pb.Input:
    """Converts one input as far as it can be sent; notes what cannot."""
    source, prefix = (entry.source, entry.target_prefix) if isinstance(entry, Input) else (entry, None)
    message = pb.Input()
    _put_content(message, source, path, violations)
    if prefix is not None:
        message.target_prefix.SetInParent()  # an empty one is the server's to refuse
        _put_content(message.target_prefix, prefix, f"{path}.target_prefix", violations)
    return message


def _put_content(
    message: pb.Input | pb.TargetPrefix, content: str | Sequence[int], path: str, violations: list[FieldViolation]
) -> None:
    if isinstance(content, bytes | bytearray):
        raise TypeError("a source or a target prefix is text (str) or a sequence of token ids, not bytes")
    try:
        if isinstance(content, str):
            content.encode()
            message.text = content
        else:
            message.token_ids.CopyFrom(pb.TokenIds(ids=content))
    except UnicodeEncodeError as error:
        violations.append(FieldViolation(f"{path}.text", f"not valid Unicode at character {error.start}"))
    except ValueError as error:
        violations.append(FieldViolation(f"{path}.token_ids", str(error)))


def search_to_pb(search: SearchOptions | None) -> pb.SearchOptions | None:
    """Converts search options; what is None stays unset.

    Raises:
        InvalidRequest: A number does not fit its field, for example a negative beam size; names every such field.
    """
    if search is None:
        return None
    message = pb.SearchOptions()
    violations: list[FieldViolation] = []
    for name in _PLAIN_SEARCH_FIELDS:
        value = getattr(search, name)
        if value is None:
            continue
        try:
            setattr(message, name, value)
        except ValueError as error:
            violations.append(FieldViolation(f"search.{name}", str(error)))
    if search.length_penalty_kind is not None:
        message.length_penalty_kind = _LENGTH_PENALTY_KINDS[search.length_penalty_kind]
    if search.early_stopping is not None:
        message.early_stopping = _EARLY_STOPPINGS[search.early_stopping]
    if violations:
        raise InvalidRequest("some search options cannot be sent", violations=violations)
    return message


def search_from_pb(message: pb.SearchOptions) -> SearchOptions:
    """Converts search options; unset fields, and enum values that this client does not know, become None."""
    values = {name: getattr(message, name) for name in _PLAIN_SEARCH_FIELDS if message.HasField(name)}
    kinds = {number: kind for kind, number in _LENGTH_PENALTY_KINDS.items()}
    stoppings = {number: stopping for stopping, number in _EARLY_STOPPINGS.items()}
    return SearchOptions(
        **values,
        length_penalty_kind=kinds.get(message.length_penalty_kind),
        early_stopping=stoppings.get(message.early_stopping),
    )


def results_from_pb(response: pb.GenerateResponse, *, inputs: int) -> list[Result]:
    """Converts the results of a request with so many inputs.

    Raises:
        ProtocolError: There is not one result per input, or a result has no hypothesis.
    """
    if len(response.results) != inputs:
        raise ProtocolError(f"the server sent {len(response.results)} results for {inputs} inputs")
    return [result_from_pb(result) for result in response.results]


def result_from_pb(message: pb.Result) -> Result:
    """Converts the outcome for one input.

    Raises:
        ProtocolError: It has no hypothesis.
    """
    if not message.hypotheses:
        raise ProtocolError("the server sent a result without hypotheses")
    return Result(
        hypotheses=tuple(_hypothesis(hypothesis) for hypothesis in message.hypotheses),
        source_tokens=message.source_tokens,
        source_truncated=message.source_truncated,
        timing=Timing(
            queue_s=_seconds(message.timing.queue),
            encode_s=_seconds(message.timing.encode),
            decode_s=_seconds(message.timing.decode),
            steps=message.timing.steps,
        ),
    )


def event_from_pb(message: pb.GenerateStreamResponse) -> Piece | Result:
    """Converts one message of a stream.

    Raises:
        ProtocolError: It is neither a piece nor a result.
    """
    match message.WhichOneof("event"):
        case "piece":
            return Piece(text=message.piece.text, token_ids=tuple(message.piece.token_ids))
        case "result":
            return result_from_pb(message.result)
        case _:
            raise ProtocolError("the server sent a stream event that this client does not know")


def info_from_pb(message: pb.GetInfoResponse) -> ServerInfo:
    """Converts what a server tells about itself."""
    model, limits = message.model, message.limits
    return ServerInfo(
        model=ModelInfo(
            name=model.name,
            architecture=model.architecture,
            precision=model.precision,
            device=model.device,
            source_vocabulary_size=model.source_vocabulary_size,
            target_vocabulary_size=model.target_vocabulary_size,
            has_tokenizer=model.has_tokenizer,
            fingerprint=model.fingerprint,
            ignored_settings=dict(model.ignored_settings),
            source_languages=tuple(model.source_languages),
            target_languages=tuple(model.target_languages),
            default_source_language=model.default_source_language or None,
            default_target_language=model.default_target_language or None,
            decoder_only=model.decoder_only,
        ),
        limits=Limits(
            max_inputs=limits.max_inputs,
            max_text_bytes=limits.max_text_bytes,
            max_source_tokens=limits.max_source_tokens,
            max_new_tokens=limits.max_new_tokens,
            max_beam_size=limits.max_beam_size,
            max_message_bytes=limits.max_message_bytes,
            max_duration_s=_seconds(limits.max_duration),
            max_target_tokens=limits.max_target_tokens,
            max_request_cost=limits.max_request_cost,
        ),
        default_search=search_from_pb(message.default_search),
        versions=dict(message.versions),
    )


def _hypothesis(message: pb.Hypothesis) -> Hypothesis:
    # A hypothesis has at least one token, so an empty list means that none was asked for.
    return Hypothesis(
        text=message.text,
        score=message.score,
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        token_ids=tuple(message.token_ids) or None,
        token_logprobs=tuple(message.token_logprobs) or None,
    )


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()

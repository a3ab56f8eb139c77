"""Generate and GetInfo over the wire: answers, refusals, cancellation, deadlines."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import DeadlineExceeded, EngineStopped, QueueFull, RequestTooLarge, StepFailed
from beamline_server.engine.request import Failed
from beamline_server.settings import Settings
from doubles.service import EOS, RunningService, failure_of, make_completed, make_manifest, serving, silent

CODE = grpc.StatusCode


def text(*texts: str, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=[pb.Input(text=t) for t in texts], **fields)


def counted(service: RunningService, outcome: str) -> float | None:
    return service.metrics.registry.get_sample_value("beamline_requests_total", {"outcome": outcome})


async def test_results_come_in_the_order_of_the_inputs() -> None:
    async with serving() as service:
        response = await service.stub.Generate(text("one", "two", "three"))
    assert [result.hypotheses[0].text for result in response.results] == ["ONE", "TWO", "THREE"]
    assert [result.source_tokens for result in response.results] == [4, 4, 6]


async def test_a_result_tells_score_reason_and_timing() -> None:
    async with serving() as service:
        response = await service.stub.Generate(text("hi", search=pb.SearchOptions(n_best=2)))
    [result] = response.results
    assert [hypothesis.score for hypothesis in result.hypotheses] == [-0.5, -1.0]
    assert result.hypotheses[0].finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE
    assert not result.hypotheses[0].token_ids
    assert not result.hypotheses[0].token_logprobs
    assert not result.source_truncated
    timing = result.timing
    assert [timing.queue.ToMilliseconds(), timing.encode.ToMilliseconds(), timing.decode.ToMilliseconds()] == [
        1,
        2,
        250,
    ]
    assert timing.steps == 3


async def test_ids_and_logprobs_are_returned_if_asked_for() -> None:
    async with serving() as service:
        output = pb.OutputOptions(token_ids=True, token_logprobs=True)
        response = await service.stub.Generate(text("a", output=output))
    [hypothesis] = response.results[0].hypotheses
    assert list(hypothesis.token_ids) == [ord("A"), EOS]
    assert list(hypothesis.token_logprobs) == [-0.25, -0.25]


async def test_options_reach_the_engine_resolved() -> None:
    async with serving() as service:
        await service.stub.Generate(text("a", search=pb.SearchOptions(beam_size=2)), timeout=7)
        [request] = await service.engine.submitted()
    assert (request.options.beam_size, request.options.max_new_tokens, request.stream) == (2, 128, False)
    assert request.deadline is not None
    assert request.source == (ord("a"), EOS)


def prefixed(source: str, prefix: str, **fields: Any) -> pb.GenerateRequest:
    request = text(source, **fields)
    request.inputs[0].target_prefix.text = prefix
    return request


async def test_a_target_prefix_reaches_the_engine_and_is_in_the_text_alone() -> None:
    output = pb.OutputOptions(token_ids=True, token_logprobs=True)
    async with serving() as service:
        response = await service.stub.Generate(
            prefixed("hello", "He", output=output, search=pb.SearchOptions(n_best=2))
        )
        [request] = await service.engine.submitted()
    assert request.target_prefix == tuple(b"He")
    [result] = response.results
    assert [hypothesis.text for hypothesis in result.hypotheses] == ["HeLLO", "HeLLO"]
    assert list(result.hypotheses[0].token_ids) == [*b"LLO", EOS]
    assert len(result.hypotheses[0].token_logprobs) == 4
    assert result.source_tokens == 6


async def test_a_character_that_a_target_prefix_begins_is_decoded_whole() -> None:
    request = pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=[0, 0xA9, EOS]))])
    request.inputs[0].target_prefix.token_ids.ids.append(0xC3)
    async with serving() as service:
        response = await service.stub.Generate(request)
    assert response.results[0].hypotheses[0].text == "é"


async def test_a_target_prefix_leaves_less_room_for_its_own_input() -> None:
    request = prefixed("a", "x" * 200)
    request.inputs.add(text="b")
    async with serving() as service:
        await service.stub.Generate(request)
        first, second = await service.engine.submitted()
    assert (first.options.max_new_tokens, second.options.max_new_tokens) == (56, 128)


async def test_large_target_prefixes_give_the_same_answer() -> None:
    async with serving() as service:
        response = await service.stub.Generate(prefixed("a" * 300, "é" * 100, search=pb.SearchOptions(n_best=4)))
    assert {hypothesis.text for hypothesis in response.results[0].hypotheses} == {"é" * 100 + "A" * 100}


async def test_every_violation_of_target_prefixes_is_reported_at_once() -> None:
    request = pb.GenerateRequest(
        inputs=[
            pb.Input(text="a", target_prefix=pb.TargetPrefix()),
            pb.Input(text="b", target_prefix=pb.TargetPrefix(text="")),
            pb.Input(text="", target_prefix=pb.TargetPrefix(token_ids=pb.TokenIds(ids=[EOS]))),
            pb.Input(text="c", target_prefix=pb.TargetPrefix(text="x" * 100)),
        ],
        search=pb.SearchOptions(max_new_tokens=200, beam_size=0),
    )
    async with serving() as service:
        error = await failure_of(service.stub.Generate(request))
    assert error.code == CODE.INVALID_ARGUMENT
    found = error.detail(error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in found] == [
        "search.beam_size",
        "inputs[0].target_prefix",
        "inputs[1].target_prefix.text",
        "inputs[2].text",
        "inputs[2].target_prefix.token_ids",
        "inputs[3].target_prefix.text",
    ]
    assert found[-1].description == "has 100 tokens, and search.max_new_tokens is 200; expected at most 256 together"


async def test_large_texts_give_the_same_answer() -> None:
    long = "word " * 1000
    async with serving() as service:
        response = await service.stub.Generate(text(long, "short", truncate_source=True))
    assert [result.source_truncated for result in response.results] == [True, False]
    assert response.results[0].hypotheses[0].text == long[:511].upper()


async def test_a_model_without_tokenizer_takes_and_gives_ids() -> None:
    manifest = make_manifest(tokenizer={"kind": "none"})
    async with serving(manifest=manifest, tokenizer=None) as service:
        inputs = [pb.Input(token_ids=pb.TokenIds(ids=[97, EOS]))]
        response = await service.stub.Generate(pb.GenerateRequest(inputs=inputs))
        output = pb.OutputOptions(token_ids=False)
        without = await service.stub.Generate(pb.GenerateRequest(inputs=inputs, output=output))
        info = await service.stub.GetInfo(pb.GetInfoRequest())
    [hypothesis] = response.results[0].hypotheses
    assert (hypothesis.text, list(hypothesis.token_ids)) == ("", [65, EOS])
    assert not without.results[0].hypotheses[0].token_ids
    assert not info.model.has_tokenizer


async def test_settings_without_effect_and_the_default_number_of_answers_are_told() -> None:
    defaults = {"beam_size": 4, "n_best": 2, "max_new_tokens": 9, "not_supported": {"do_sample": "true"}}
    async with serving(manifest=make_manifest(generation_defaults=defaults)) as service:
        info = await service.stub.GetInfo(pb.GetInfoRequest())
        response = await service.stub.Generate(text("hi"))
    assert dict(info.model.ignored_settings) == {"do_sample": "true"}
    assert info.default_search.n_best == len(response.results[0].hypotheses) == 2


async def test_every_violation_is_reported_at_once() -> None:
    async with serving() as service:
        request = text("", "a" * 600, search=pb.SearchOptions(beam_size=0, n_best=0, length_penalty=float("nan")))
        error = await failure_of(service.stub.Generate(request))
        assert counted(service, "invalid") == 1
    assert error.code == CODE.INVALID_ARGUMENT
    assert {violation.field for violation in error.detail(error_details_pb2.BadRequest).field_violations} == {
        "inputs[0].text",
        "inputs[1].text",
        "search.beam_size",
        "search.n_best",
        "search.length_penalty",
    }


async def test_the_largest_refusal_reaches_the_caller() -> None:
    settings = Settings(max_inputs=1024)
    bad = pb.Input(token_ids=pb.TokenIds(ids=[0] * 500 + [99999]))
    async with serving(settings=settings) as service:
        error = await failure_of(service.stub.Generate(pb.GenerateRequest(inputs=[bad] * 1024)))
    assert error.code == CODE.INVALID_ARGUMENT
    assert "and 1021 more" in error.text


async def test_another_model_is_not_found() -> None:
    async with serving(settings=Settings(model_name="mine")) as service:
        assert (await failure_of(service.stub.Generate(text("a", model="test-model")))).code == CODE.NOT_FOUND
        await service.stub.Generate(text("a", model="mine"))
        assert (await service.stub.GetInfo(pb.GetInfoRequest())).model.name == "mine"


@pytest.mark.parametrize(
    ("refusal", "code", "outcome"),
    [
        (QueueFull(9, 8, 0.5), CODE.RESOURCE_EXHAUSTED, "queue_full"),
        (RequestTooLarge("rows", 9, 8), CODE.INVALID_ARGUMENT, "invalid"),
        (EngineStopped(), CODE.UNAVAILABLE, "unavailable"),
        (RuntimeError("secret"), CODE.INTERNAL, "error"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_the_engine_refuses(refusal: Exception, code: grpc.StatusCode, outcome: str) -> None:
    async with serving() as service:
        service.engine.refusal = refusal
        error = await failure_of(service.stub.Generate(text("a", "b")))
        assert error.code == code
        assert counted(service, outcome) == 1
        assert service.desk.in_flight == 0


async def test_a_full_queue_pushes_back() -> None:
    async with serving() as service:
        service.engine.refusal = QueueFull(9, 8, 0.5)
        error = await failure_of(service.stub.Generate(text("a")))
    assert 400 <= int(error.trailers["grpc-retry-pushback-ms"]) <= 600


@pytest.mark.parametrize(
    ("failed", "code"),
    [(StepFailed("abc"), CODE.INTERNAL), (DeadlineExceeded("decoding"), CODE.DEADLINE_EXCEEDED)],
    ids=["step", "deadline"],
)
async def test_one_failed_input_fails_the_request_and_cancels_the_others(
    failed: StepFailed | DeadlineExceeded, code: grpc.StatusCode
) -> None:
    async with serving(script=silent) as service:
        call = service.stub.Generate(text("a", "b", "c"))
        first, second, third = await service.engine.submitted()
        service.engine.tell(make_completed(first.id, first.source))
        service.engine.tell(Failed(second.id, failed))
        error = await failure_of(call)
        assert await service.engine.cancelled() == [third.id]
        assert error.code == code
        service.desk.close()
        await service.desk.drained()


async def test_cancelling_reaches_the_engine() -> None:
    async with serving(script=silent) as service:
        call = service.stub.Generate(text("a", "b"))
        requests = await service.engine.submitted()
        call.cancel()
        assert await service.engine.cancelled() == [request.id for request in requests]
        service.desk.close()
        await service.desk.drained()
        assert counted(service, "cancelled") == 1


async def test_the_callers_deadline_reaches_the_engine() -> None:
    async with serving(script=silent) as service:
        call = service.stub.Generate(text("a"), timeout=0.05)
        [request] = await service.engine.submitted()
        assert await service.engine.cancelled() == [request.id]
        assert (await failure_of(call)).code == CODE.DEADLINE_EXCEEDED
        service.desk.close()
        await service.desk.drained()
        assert counted(service, "deadline") == 1


@pytest.mark.parametrize("timeout_s", [None, 60.0])
async def test_the_servers_own_limit_holds_without_and_above_the_callers_deadline(timeout_s: float | None) -> None:
    async with serving(script=silent, settings=Settings(max_duration_s=0.05)) as service:
        error = await failure_of(service.stub.Generate(text("a"), timeout=timeout_s))
        [request] = await service.engine.submitted()
        assert await service.engine.cancelled() == [request.id]
        missing = service.metrics.registry.get_sample_value("beamline_client_deadline_missing_total")
    assert error.code == CODE.DEADLINE_EXCEEDED
    assert missing == (1 if timeout_s is None else 0)


async def test_a_message_over_the_limit_never_reaches_the_service() -> None:
    async with serving(settings=Settings(max_message_bytes=2048, max_text_bytes=2048)) as service:
        error = await failure_of(service.stub.Generate(text("a" * 3000)))
        assert counted(service, "ok") == 0
        assert service.desk.in_flight == 0
    assert error.code == CODE.RESOURCE_EXHAUSTED
    assert "larger than max" in error.text


async def test_before_the_model_is_loaded_calls_are_for_other_replicas() -> None:
    async with serving(ready=False) as service:
        error = await failure_of(service.stub.Generate(text("a")))
    assert error.code == CODE.UNAVAILABLE
    assert error.text == "the server is loading"


async def test_many_calls_at_once_get_their_own_answers() -> None:
    async with serving() as service:
        responses = await asyncio.gather(*(service.stub.Generate(text(f"n{i}")) for i in range(200)))
        assert counted(service, "ok") == 200
    assert [response.results[0].hypotheses[0].text for response in responses] == [f"N{i}" for i in range(200)]


async def test_compressed_requests_are_read() -> None:
    async with serving() as service:
        response = await service.stub.Generate(text("abc" * 100), compression=grpc.Compression.Gzip)
    assert response.results[0].hypotheses[0].text == "ABC" * 100


async def test_info_tells_limits_and_defaults() -> None:
    settings = Settings(max_beam_size=3, max_new_tokens=100, max_duration_s=12.5)
    async with serving(settings=settings) as service:
        info = await service.stub.GetInfo(pb.GetInfoRequest())
    assert info.model == pb.ModelInfo(
        name="test-model",
        architecture="marian",
        precision="fp32",
        device="cpu",
        source_vocabulary_size=258,
        target_vocabulary_size=258,
        has_tokenizer=True,
        fingerprint="f" * 64,
    )
    assert (info.limits.max_beam_size, info.limits.max_new_tokens, info.limits.max_source_tokens) == (3, 100, 512)
    assert info.limits.max_target_tokens == 256
    assert info.limits.max_duration.ToMilliseconds() == 12_500
    assert (info.default_search.beam_size, info.default_search.n_best) == (3, 1)
    assert info.default_search.max_new_tokens == 100
    assert info.default_search.early_stopping == pb.EARLY_STOPPING_HEURISTIC
    assert {"beamline", "python", "grpcio", "onnxruntime"} == set(info.versions)

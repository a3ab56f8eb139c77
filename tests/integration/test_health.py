"""The standard services: health, which says when to send requests, and reflection, which says what can be sent."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_server.process import ServerProcess

SERVICE = "beamline.v1.GenerationService"
Status = health_pb2.HealthCheckResponse


@pytest.fixture
def health(channel: Any) -> Any:
    return health_pb2_grpc.HealthStub(channel)


@pytest.fixture
def ask_reflection(channel: Any) -> Any:
    """Sends one reflection request and returns the answer."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(**request: Any) -> Any:
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=10)
        return answer

    return ask


def test_watchers_see_the_server_become_ready(slow_bundle: Path) -> None:
    with ServerProcess(slow_bundle) as starting, grpc.insecure_channel(starting.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60) for name in ("", SERVICE)]

        for watch in watches:
            assert next(watch).status == Status.NOT_SERVING
        for watch in watches:
            assert next(watch).status == Status.SERVING
            watch.cancel()


def test_before_the_model_is_ready_the_server_is_alive_and_refuses_calls(slow_bundle: Path) -> None:
    with ServerProcess(slow_bundle) as starting, grpc.insecure_channel(starting.target) as channel:
        stub: Any = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        alive = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="live"), timeout=10)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="Bonjour.")]), timeout=10)
        assert starting.samples()["beamline_ready"] == 0

        assert alive.status == Status.SERVING
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert refused.value.details() == "the server is loading"
        assert starting.log.records("serving") == [], "the model was ready before the calls: warm-up is too short"


@pytest.mark.parametrize("name", ["", SERVICE, "live"])
def test_a_ready_server_says_so_under_each_name(health: Any, name: str) -> None:
    assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status == Status.SERVING


def test_an_unknown_name_is_not_found_and_can_be_watched(health: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert next(watch).status == Status.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_lists_the_services_and_describes_ours(ask_reflection: Any) -> None:
    listed = ask_reflection(list_services="").list_services_response.service
    raw = ask_reflection(file_containing_symbol=SERVICE).file_descriptor_response.file_descriptor_proto
    files = {file.name: file for file in map(FileDescriptorProto.FromString, raw)}

    assert {service.name for service in listed} == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    methods = [method.name for method in files["beamline/v1/generation.proto"].service[0].method]
    assert methods == ["Generate", "GenerateStream", "GetInfo"]


def test_reflection_can_be_turned_off(serve: Any) -> None:
    with grpc.insecure_channel(serve("--no-reflection").target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            list(
                stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
            )

    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED

"""Reflection, asked without the client's library: in both versions, by name on the wire."""

from collections.abc import Sequence

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from beamline.v1 import generation_pb2 as pb
from beamline_server.settings import Settings
from doubles.service import RunningService, failure_of, serving

VERSIONS = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
SERVICES = {"beamline.v1.GenerationService", "grpc.health.v1.Health", *VERSIONS}


async def asked(service: RunningService, version: str, request: ServerReflectionRequest) -> ServerReflectionResponse:
    """The answer to a request, sent and received as bytes."""
    call = service.channel.stream_stream(f"/{version}/ServerReflectionInfo")(iter([request.SerializeToString()]))
    (answer,) = [ServerReflectionResponse.FromString(raw) async for raw in call]
    return answer


def files(answer: ServerReflectionResponse) -> Sequence[FileDescriptorProto]:
    return [FileDescriptorProto.FromString(raw) for raw in answer.file_descriptor_response.file_descriptor_proto]


@pytest.mark.parametrize("version", VERSIONS)
async def test_it_lists_the_services(version: str) -> None:
    async with serving() as service:
        answer = await asked(service, version, ServerReflectionRequest(list_services="*"))
    assert {found.name for found in answer.list_services_response.service} == SERVICES


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(SERVICES))
async def test_it_describes_every_service_that_it_lists(version: str, name: str) -> None:
    async with serving() as service:
        found = files(await asked(service, version, ServerReflectionRequest(file_containing_symbol=name)))
    assert name in [f"{file.package}.{service.name}" for file in found for service in file.service]
    imports = {imported for file in found for imported in file.dependency}
    assert imports <= {file.name for file in found}, "a client cannot build what it has only a part of"


async def test_version_1_describes_itself_without_the_other() -> None:
    async with serving() as service:
        (file,) = files(await asked(service, VERSIONS[0], ServerReflectionRequest(file_containing_symbol=VERSIONS[0])))
    assert (file.name, file.package) == ("grpc/reflection/v1/reflection.proto", "grpc.reflection.v1")
    assert "v1alpha" not in str(file)


async def test_our_description_is_the_one_that_the_server_was_built_with() -> None:
    request = ServerReflectionRequest(file_by_filename="beamline/v1/generation.proto")
    async with serving() as service:
        found = files(await asked(service, VERSIONS[0], request))
    assert FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb) in found


async def test_what_is_not_there_is_not_found() -> None:
    async with serving() as service:
        request = ServerReflectionRequest(file_containing_symbol="no.such.Service")
        answer = await asked(service, VERSIONS[0], request)
    assert answer.error_response.error_code == StatusCode.NOT_FOUND.value[0]


@pytest.mark.parametrize("version", VERSIONS)
async def test_it_can_be_switched_off(version: str) -> None:
    async with serving(settings=Settings(reflection=False)) as service:
        call = service.channel.stream_stream(f"/{version}/ServerReflectionInfo")(iter([b""]))
        assert (await failure_of(call.read())).code == StatusCode.UNIMPLEMENTED

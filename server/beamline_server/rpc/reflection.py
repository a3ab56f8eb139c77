"""Reflection: clients ask what services there are, and for their descriptions, in both versions of the protocol.

Version 1 has the messages and the method of v1alpha, under another name. Tools ask for it first, and some for it alone.
"""

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

SERVICE_V1ALPHA: str = reflection.SERVICE_NAME
SERVICE_V1 = SERVICE_V1ALPHA.replace("v1alpha", "v1")


def add_reflection(server: Any, described: Iterable[FileDescriptor]) -> None:
    """Let a server, not started yet, tell of the services in these files, and of reflection itself."""
    files = [*described, reflection_pb2.DESCRIPTOR]
    pool = DescriptorPool()
    for file in files:
        _add(pool, file)
    pool.Add(_version_1())
    names = [service.full_name for file in files for service in file.services_by_name.values()]
    servicer = reflection.aio.ReflectionServicer([*names, SERVICE_V1], pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(SERVICE_V1, {"ServerReflectionInfo": method})


def _add(pool: DescriptorPool, file: FileDescriptor) -> None:
    for dependency in file.dependencies:
        _add(pool, dependency)
    pool.AddSerializedFile(file.serialized_pb)


def _version_1() -> FileDescriptorProto:
    """The description of version 1, which the library lacks: v1alpha's, renamed."""
    alpha = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    alpha.name = "grpc/reflection/v1alpha/reflection.proto"  # where other languages have it
    return text_format.Parse(text_format.MessageToString(alpha).replace("v1alpha", "v1"), FileDescriptorProto())

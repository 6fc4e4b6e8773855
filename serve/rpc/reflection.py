"""Server reflection, by which generic clients learn the contract from the server itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

# grpcio has the older version only; the messages of both are the same on the wire, and some clients ask for v1 alone.
_VERSIONS = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)


def reflection_handlers(service_names: Iterable[str]) -> tuple[grpc.GenericRpcHandler, ...]:
    """Handlers of both versions, which tell of `service_names` and of the older version itself.

    The newer is not among the services told: its own file is not at hand, and a client that looks up each service of
    the list would fail for it.
    """
    servicer: Any = reflection.aio.ReflectionServicer((*service_names, reflection.SERVICE_NAME))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in _VERSIONS)

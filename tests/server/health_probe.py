"""grpc_health_probe, the program that people put into a pod, with its flags, time limits and exit codes.

    python -m tests.server.health_probe -addr=127.0.0.1:50051 -service=flan.v1.FlanService -tls -tls-ca-cert=ca.pem

The program itself is written in Go and comes with none of the package managers that the tests use; what a script or a
kubelet sees of it is its exit code: 0 serving, 1 bad arguments, 2 no connection, 3 the call failed, 4 any other status.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING, BAD_ARGUMENTS, NO_CONNECTION, CALL_FAILED, UNHEALTHY = range(5)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    made.add_argument("-addr", required=True)
    made.add_argument("-service", default="")
    made.add_argument("-connect-timeout", type=float, default=1.0)
    made.add_argument("-rpc-timeout", type=float, default=1.0)
    made.add_argument("-tls", action="store_true")
    for name in ("ca-cert", "client-cert", "client-key"):
        made.add_argument(f"-tls-{name}", type=Path)
    made.add_argument("-tls-server-name")
    return made


def channel_of(asked: argparse.Namespace) -> grpc.Channel:
    if not asked.tls:
        return grpc.insecure_channel(asked.addr)
    files = (asked.tls_ca_cert, asked.tls_client_key, asked.tls_client_cert)
    credentials = grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))
    name = asked.tls_server_name
    options = () if name is None else (("grpc.ssl_target_name_override", name),)
    return grpc.secure_channel(asked.addr, credentials, options)


def probe(*argv: str) -> int:
    """The exit code; what is wrong goes to standard error."""
    try:
        asked = parser().parse_args(argv)
    except argparse.ArgumentError as error:
        print(error, file=sys.stderr)
        return BAD_ARGUMENTS
    if not asked.tls and any((asked.tls_ca_cert, asked.tls_client_cert, asked.tls_client_key, asked.tls_server_name)):
        print("specified -tls-* without specifying -tls", file=sys.stderr)
        return BAD_ARGUMENTS
    with channel_of(asked) as channel:
        try:
            grpc.channel_ready_future(channel).result(asked.connect_timeout)
        except grpc.FutureTimeoutError:
            print(f"timeout: failed to connect service {asked.addr!r}", file=sys.stderr)
            return NO_CONNECTION
        try:
            request = health_pb2.HealthCheckRequest(service=asked.service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=asked.rpc_timeout)
        except grpc.RpcError as error:
            print(f"health rpc failed: {error}", file=sys.stderr)
            return CALL_FAILED
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"status: {status}", file=sys.stderr)
    return SERVING if status == "SERVING" else UNHEALTHY


if __name__ == "__main__":
    sys.exit(probe(*sys.argv[1:]))

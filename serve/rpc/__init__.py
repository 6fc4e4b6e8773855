"""gRPC, the twin of `serve.rest`: server, handlers, codec, errors (one table)."""

from serve.rpc.server import RpcServer

__all__ = ["RpcServer"]

"""FlanClient: one Python API for a flan-serve server, over REST or gRPC.

from serve.client import FlanClient

with FlanClient("http://127.0.0.1:8000") as client:
    print(client.generate("Translate to German.", input="Good morning.").outputs[0].text)

The package needs httpx, grpcio and protobuf; neither a model nor a server is imported.
"""

from serve.client.async_client import AsyncFlanClient
from serve.client.many import AsyncManyResults, ManyResult, ManyResults
from serve.client.streams import AsyncCompletionStream, CompletionStream
from serve.client.sync_client import FlanClient
from serve.client.transport import TlsFiles
from serve.client.wire import ModelInfo

__all__ = [
    "AsyncCompletionStream",
    "AsyncFlanClient",
    "AsyncManyResults",
    "CompletionStream",
    "FlanClient",
    "ManyResult",
    "ManyResults",
    "ModelInfo",
    "TlsFiles",
]

"""The gRPC reference's tables: methods, messages, enums and statuses, from the contract and its comments."""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

from docs.tables.markdown import code, table
from protos.generate import PROTO, PROTOS
from serve.rpc.errors import CODES

_MESSAGE, _ENUM, _SERVICE, _MEMBER = 4, 5, 6, 2  # field numbers in descriptor.proto, of which source paths are made
_SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items() if number != 0
}


def methods() -> str:
    """Every method of FlanService."""
    (service,) = _contract().service
    rows = []
    for index, method in enumerate(service.method):
        arguments = (method.client_streaming, method.input_type), (method.server_streaming, method.output_type)
        asked, answered = (f"{'stream ' if stream else ''}{_short(name)}" for stream, name in arguments)
        rows.append([code(method.name), code(asked), code(answered), _comment(_SERVICE, 0, _MEMBER, index)])
    return table(["method", "takes", "returns", "does"], rows)


def messages() -> str:
    """Every message and enum, a section each."""
    contract = _contract()
    parts = []
    for index, message in enumerate(contract.message_type):
        rows = [
            [code(field.name), str(field.number), _type(field, message), _comment(_MESSAGE, index, _MEMBER, place)]
            for place, field in enumerate(message.field)
        ]
        head = f"### {message.name}\n\n{_comment(_MESSAGE, index)}"
        parts.append(f"{head}\n\n{table(['field', 'number', 'type', 'meaning'], rows)}" if rows else head)
    for index, enum in enumerate(contract.enum_type):
        head = f"### {enum.name}\n\n{_comment(_ENUM, index)}"
        parts.append(f"{head}\n\n{table(['value', 'number', 'meaning'], _values(enum, index))}")
    return "\n\n".join(parts)


def statuses() -> str:
    """Every kind of error and its status."""
    rows = [[code(status.name), str(status.value[0]), code(kind)] for kind, status in CODES.items() if kind != "error"]
    return table(["status", "number", "`ErrorInfo.reason`"], rows)


def field_comments(message: str) -> dict[str, str]:
    """What the contract says of each field of a message."""
    found = {item.name: (index, item) for index, item in enumerate(_contract().message_type)}
    index, descriptor = found[message]
    return {field.name: _comment(_MESSAGE, index, _MEMBER, place) for place, field in enumerate(descriptor.field)}


def _values(enum: EnumDescriptorProto, index: int) -> Iterable[list[str]]:
    return (
        [code(value.name), str(value.number), _comment(_ENUM, index, _MEMBER, place)]
        for place, value in enumerate(enum.value)
    )


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    entry = maps.get(_short(field.type_name))
    if entry is not None:
        key, value = (_SCALARS[part.type] for part in entry.field)
        return code(f"map<{key}, {value}>")
    name = _short(field.type_name) or _SCALARS[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return code(f"repeated {name}")
    if field.HasField("oneof_index") and not field.proto3_optional:
        return f"{code(name)}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return code(f"optional {name}" if field.proto3_optional else name)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _comment(*path: int) -> str:
    return " ".join(_comments()[path].split())


@cache
def _comments() -> dict[tuple[int, ...], str]:
    """The comment above each declaration, by its path in the descriptor."""
    return {tuple(item.path): item.leading_comments for item in _contract().source_code_info.location}


@cache
def _contract() -> FileDescriptorProto:
    """The contract with its comments, which the generated modules do not hold."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "contract.binpb"
        arguments = [
            "protoc",
            f"--proto_path={PROTOS.parent}",
            f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
            "--include_source_info",
            f"--descriptor_set_out={image}",
            PROTO,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"{PROTO} does not compile")
        (contract,) = FileDescriptorSet.FromString(image.read_bytes()).file
        return contract

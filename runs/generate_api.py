"""Generate service/openapi.json and docs/api.md from the proto and its comments: python -m runs.generate_api

With --check, say whether they are fresh.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

from service.pb import likewise_pb2 as pb
from service.security import role_for
from service.transcode import HTTP_REASONS, HTTP_STATUS, METHODS, parameters

ROOT = Path(__file__).resolve().parent.parent
FILE = pb.DESCRIPTOR
PICTURES = "image/*", "application/octet-stream"
# Google's own messages, as protobuf's JSON mapping has them.
KNOWN: dict[str, dict[str, Any]] = {
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?\d+(\.\d+)?s$", "examples": ["0.012s"]},
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.Empty": {"type": "object"},
    "google.rpc.Status": {"$ref": "#/components/schemas/Status"},
}
INT64 = {"type": ["string", "integer"], "format": "int64"}
SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "format": "int64"},
    FieldDescriptor.TYPE_INT64: INT64,
    FieldDescriptor.TYPE_UINT64: INT64,
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
}
NAMES = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in vars(FieldDescriptor)
    if name.startswith("TYPE_")
}


class Comments:
    """What stands above each thing in the proto."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "set"
            arguments = [
                "protoc", f"-Iservice/pb={ROOT / 'proto/likewise/v1'}", f"-I{ROOT / 'proto/third_party'}",
                f"-I{resources.files('grpc_tools') / '_proto'}", "--include_source_info", f"--descriptor_set_out={out}",
                FILE.name,
            ]  # fmt: skip
            if protoc.main(arguments):
                raise SystemExit(1)
            (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
        self._of = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}
        self.file = _text(self._of.get((12,), ""))
        self._found: dict[str, str] = {}
        for i, message in enumerate(file.message_type):
            self._message(message, (4, i), FILE.package)
        for i, enum in enumerate(file.enum_type):
            self._enum(enum, (5, i), FILE.package)
        for i, service in enumerate(file.service):
            name = f"{FILE.package}.{service.name}"
            self._found[name] = _text(self._of.get((6, i), ""))
            for j, method in enumerate(service.method):
                self._found[f"{name}.{method.name}"] = _text(self._of.get((6, i, 2, j), ""))

    def of(self, descriptor: Any) -> str:
        """In paragraphs; '' where there is none."""
        return self._found.get(descriptor.full_name, "")

    def _message(self, message: Any, path: tuple[int, ...], parent: str) -> None:
        name = f"{parent}.{message.name}"
        self._found[name] = _text(self._of.get(path, ""))
        for i, field in enumerate(message.field):
            self._found[f"{name}.{field.name}"] = _text(self._of.get((*path, 2, i), ""))
        for i, nested in enumerate(message.nested_type):
            self._message(nested, (*path, 3, i), name)
        for i, enum in enumerate(message.enum_type):
            self._enum(enum, (*path, 4, i), name)

    def _enum(self, enum: Any, path: tuple[int, ...], parent: str) -> None:
        self._found[f"{parent}.{enum.name}"] = _text(self._of.get(path, ""))
        for i, value in enumerate(enum.value):
            self._found[f"{parent}.{enum.name}.{value.name}"] = _text(self._of.get((*path, 2, i), ""))


def _text(comment: str) -> str:
    paragraphs = re.split(r"\n\s*\n", comment.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _messages() -> list[Any]:
    """Every message, after the one that it is in; entries of maps are none."""
    found = []
    todo = list(FILE.message_types_by_name.values())
    while todo:
        message = todo.pop(0)
        if not message.GetOptions().map_entry:
            found.append(message)
            todo[:0] = message.nested_types
    return found


def _enums() -> list[Any]:
    return [*FILE.enum_types_by_name.values(), *(enum for message in _messages() for enum in message.enum_types)]


def _short(descriptor: Any) -> str:
    return str(descriptor.full_name.removeprefix(f"{FILE.package}."))


def _value_name(enum: Any, value: Any) -> str:
    return f"{enum.full_name}.{value.name}"


def _oneofs(message: Any) -> list[Any]:
    """Those that were written; `optional` makes one, too."""
    return [o for o in message.oneofs if not (len(o.fields) == 1 and o.name == f"_{o.fields[0].name}")]


# --- OpenAPI ----------------------------------------------------------------------------------------------------------


def openapi(comments: Comments) -> dict[str, Any]:
    """OpenAPI 3.1, as the HTTP port has it."""
    paths: dict[str, Any] = {}
    for service in FILE.services_by_name.values():
        for method in service.methods:
            paths[f"/{service.full_name}/{method.name}"] = {"post": _operation(service, method, comments)}
    paths["/v1/collections/{collection}:search"] = {"post": _picture_search(comments)}
    for path, says in (
        ("/healthz", "The process answers."),
        ("/readyz", "As grpc.health.v1 has it: answers are right."),
    ):
        answers = {"200": {"description": says}}
        if path == "/readyz":
            answers["503"] = {"description": "Not ready, or shutting down."}
        name = path.strip("/")
        paths[path] = {
            "get": {"operationId": name, "tags": ["Health"], "summary": says, "security": [], "responses": answers}
        }
    tags = [{"name": s.name, "description": comments.of(s)} for s in FILE.services_by_name.values()]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Likewise",
            "version": FILE.package.rpartition(".")[2],
            "summary": "Image embeddings and similarity search.",
            "description": f"{_HTTP}\n\n{comments.file}",
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [*tags, {"name": "Health", "description": "For those who watch over the server."}],
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "NAME.SECRET, where the server has --keys."}
            },
            "parameters": _PARAMETERS,
            "responses": {
                "Error": {
                    "description": "Refused, or failed.",
                    "headers": {
                        "Retry-After": {
                            "description": "Seconds, where it helps to try again.",
                            "schema": {"type": "integer"},
                        }
                    },
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
            "schemas": _schemas(comments),
        },
    }


_HTTP = (
    "Every RPC is a POST of JSON, as the Connect protocol has it: protobuf's JSON mapping (bytes in base64, 64-bit integers "
    "as strings, fields in camelCase or snake_case; fields with their default value are left out of answers). Streams are "
    'application/x-ndjson, one JSON object per line; a line of an answer is {"result": …}, the last may be {"error": …}.'
)
_PARAMETERS = {
    "timeout": {
        "name": "Connect-Timeout-Ms", "in": "header", "description": "Milliseconds after which the caller leaves.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 9999999999},
    },
    "id": {
        "name": "X-Request-Id", "in": "header", "description": "Comes back, and stands in the log; made where absent.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
}  # fmt: skip
_REFS = [{"$ref": "#/components/parameters/timeout"}, {"$ref": "#/components/parameters/id"}]


def _operation(service: Any, method: Any, comments: Comments) -> dict[str, Any]:
    said = comments.of(method)
    found = METHODS[f"{service.full_name}/{method.name}"]
    return {
        "operationId": f"{service.name}.{method.name}",
        "tags": [service.name],
        "summary": _sentence(said),
        "description": f"{said}\n\nNeeds the role {role_for(found.path)}.",
        "parameters": _REFS,
        "requestBody": {"required": True, "content": _content(method.input_type, found.streams_in)},
        "responses": {
            "200": {"description": "Done.", "content": _content(method.output_type, found.streams_out, answer=True)},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }


def _content(message: Any, streams: bool, answer: bool = False) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{_short(message)}"}
    if not streams:
        return {"application/json": {"schema": schema}}
    if answer:
        error = {"$ref": "#/components/schemas/Error"}
        schema = {"type": "object", "properties": {"result": schema, "error": error}, "maxProperties": 1}
    lines = {
        "type": "string",
        "description": f"Lines of JSON, each a {_short(message)}{' in `result`, or the error that ended it' * answer}.",
        "contentMediaType": "application/json",
        "contentSchema": schema,
    }
    return {"application/x-ndjson": {"schema": lines}}


def _picture_search(comments: Comments) -> dict[str, Any]:
    request = METHODS["likewise.v1.SearchService/Search"].request
    fields: list[dict[str, Any]] = [
        {"name": f.name, "in": "query", "description": comments.of(f), "schema": _field(f)} for f in parameters(request)
    ]
    name = {"name": "collection", "in": "path", "required": True, "description": "Name of the collection."}
    image = {"schema": {"type": "string", "contentMediaType": "image/*", "description": "An encoded picture."}}
    form = {
        "schema": {
            "type": "object",
            "required": ["image"],
            "properties": {
                "image": {"type": "string", "contentMediaType": "image/*", "description": "The picture."},
                **{f["name"]: {**f["schema"], "description": f["description"]} for f in fields},
            },
        }
    }
    return {
        "operationId": "searchWithPicture",
        "tags": ["SearchService"],
        "summary": "Search with a picture as it is.",
        "description": "Finds the most similar items of a collection, as SearchService.Search does.\n\nNeeds the role read.",
        "parameters": [{**name, "schema": {"type": "string"}}, *fields, *_REFS],
        "requestBody": {"required": True, "content": {**dict.fromkeys(PICTURES, image), "multipart/form-data": form}},
        "responses": {
            "200": {"description": "Done.", "content": _content(pb.SearchResponse.DESCRIPTOR, False)},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }


def _schemas(comments: Comments) -> dict[str, Any]:
    schemas = {_short(message): _schema(message, comments) for message in _messages()}
    for enum in _enums():
        lines = [comments.of(enum), *(f"- {v.name}: {comments._found[_value_name(enum, v)]}" for v in enum.values)]
        names = [v.name for v in enum.values]
        schemas[_short(enum)] = {"type": "string", "enum": names, "description": "\n".join(lines).strip()}
    codes = ["canceled" if name == "CANCELLED" else name.lower() for name in HTTP_STATUS]
    ours = {
        "Status": {
            "type": "object",
            "description": "google.rpc.Status: why one of many failed.",
            "properties": {
                "code": {"type": "integer", "description": "google.rpc.Code."},
                "message": {"type": "string", "description": "A sentence."},
                "details": {"type": "array", "items": {"type": "object", "properties": {"@type": {"type": "string"}}}},
            },
        },
        "Error": {
            "type": "object",
            "description": "Why a call failed, as the Connect protocol has it.",
            "required": ["code"],
            "properties": {
                "code": {"type": "string", "enum": codes},
                "message": {
                    "type": "string",
                    "description": "A sentence: what was found, what was expected, what to do.",
                },
                "details": {"type": "array", "items": {"$ref": "#/components/schemas/ErrorDetail"}},
            },
        },
        "ErrorDetail": {
            "type": "object",
            "description": "ErrorInfo always; BadRequest, ResourceInfo, PreconditionFailure, RetryInfo where they apply.",
            "required": ["type", "value"],
            "properties": {
                "type": {"type": "string", "examples": ["google.rpc.ErrorInfo"]},
                "value": {"type": "string", "contentEncoding": "base64", "description": "The message."},
                "debug": {
                    "type": "object",
                    "description": "Its fields.",
                    "examples": [{"reason": "BAD_TOP_K", "domain": "likewise", "metadata": {"limit": "1000"}}],
                },
            },
        },
    }
    if clash := ours.keys() & schemas.keys():
        raise SystemExit(f"the proto has messages called {', '.join(clash)}: rename ours in runs/generate_api.py")
    return schemas | ours


def _schema(message: Any, comments: Comments) -> dict[str, Any]:
    lines = [comments.of(message)]
    lines += [f"At most one of {', '.join(f.json_name for f in o.fields)}." for o in _oneofs(message)]
    found: dict[str, Any] = {"type": "object"}
    said = " ".join(line for line in lines if line)
    if said:
        found["description"] = said
    if message.fields:
        found["properties"] = {f.json_name: _described(f, comments) for f in message.fields}
    if [len(o.fields) for o in _oneofs(message)] == [len(message.fields)]:
        found["maxProperties"] = 1
    return found


def _described(field: Any, comments: Comments) -> dict[str, Any]:
    said = comments.of(field)
    return {**_field(field), **({"description": said} if said else {})}


def _field(field: Any) -> dict[str, Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _one(field.message_type.fields_by_name["value"])}
    return {"type": "array", "items": _one(field)} if field.is_repeated else _one(field)


def _one(field: Any) -> dict[str, Any]:
    target = field.message_type or field.enum_type
    if target is None:
        return SCALARS[field.type]
    return KNOWN.get(target.full_name) or {"$ref": f"#/components/schemas/{_short(target)}"}


def _sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(comments: Comments) -> str:
    """The reference."""
    lines = [
        "# API", "", "Made from [the proto](../proto/likewise/v1/likewise.proto) by `make proto`: write there.", "",
        f"Package `{FILE.package}`, over gRPC ([serving](serving.md)) and, with `--http-port`, over HTTP and JSON "
        "([http](http.md)).", "", comments.file, "", "| service | methods |", "|---|---|",
    ]  # fmt: skip
    services = FILE.services_by_name.values()
    for service in services:
        methods = ", ".join(f"[{m.name}](#{m.name.lower()})" for m in service.methods)
        lines.append(f"| [{service.name}](#{service.name.lower()}) | {methods} |")
    for service in services:
        lines += ["", f"## {service.name}", "", comments.of(service)]
        for method in service.methods:
            found = METHODS[f"{service.full_name}/{method.name}"]
            takes = f"{'stream of ' * found.streams_in}{_link(method.input_type)}"
            gives = f"{'stream of ' * found.streams_out}{_link(method.output_type)}"
            needs = f"Role: {role_for(found.path)}. HTTP: `POST /{found.path}`."
            lines += ["", f"### {method.name}", "", f"{takes} → {gives}", "", comments.of(method), "", needs]
    lines += ["", "## Messages"]
    for message in _messages():
        lines += ["", f"### {_short(message)}", *_paragraph(comments.of(message))]
        if not message.fields:
            lines += ["", "No fields."]
            continue
        lines += ["", "| field | type | |", "|---|---|---|"]
        for field in message.fields:
            said = comments.of(field).replace("\n\n", " ").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {_type(field)} | {said} |")
        for oneof in _oneofs(message):
            lines += ["", f"At most one of {', '.join(f'`{f.name}`' for f in oneof.fields)}."]
    lines += ["", "## Enumerations"]
    for enum in _enums():
        lines += [
            "",
            f"### {_short(enum)}",
            *_paragraph(comments.of(enum)),
            "",
            "| value | number | |",
            "|---|---|---|",
        ]
        lines += [f"| `{v.name}` | {v.number} | {comments._found[_value_name(enum, v)]} |" for v in enum.values]
    lines += ["", "## Errors", "", "As [serving](serving.md#errors) has them, with their status over HTTP.", ""]
    lines += ["| code | HTTP | reason |", "|---|---|---|"]
    for codes, reasons in _errors():
        statuses = [str(HTTP_STATUS[code.strip()]) for code in codes.split(",")]
        statuses += [f"{status} ({reason})" for reason, status in HTTP_REASONS.items() if reason in reasons]
        http = ", ".join(statuses)
        lines.append(f"| {codes} | {http} | {reasons} |")
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> list[str]:
    return ["", text] if text else []


def _link(message: Any) -> str:
    return f"[{_short(message)}](#{_short(message).lower().replace('.', '')})"


def _type(field: Any) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return f"map of {NAMES[key.type]} to {_type(value)}"
    target = field.message_type or field.enum_type
    if target is None:
        name = NAMES[field.type]
    else:
        name = _link(target) if target.file is FILE or target.file.name == FILE.name else f"`{target.full_name}`"
    if field.is_repeated:
        return f"list of {name}"
    return f"{name}, optional" if field.has_presence and target is None and not _in_oneof(field) else name


def _in_oneof(field: Any) -> bool:
    return any(field.name == f.name for o in _oneofs(field.containing_type) for f in o.fields)


def _errors() -> list[tuple[str, str]]:
    """Codes and reasons of the table in docs/serving.md, which is written by hand."""
    section = (ROOT / "docs/serving.md").read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|", 1) for line in section.splitlines() if line.startswith("| ")][1:]
    return [(codes.strip(), reasons.strip()) for codes, reasons in rows]


def generated() -> dict[Path, str]:
    """Text by path, from the root."""
    comments = Comments()
    document = json.dumps(openapi(comments), indent=1, ensure_ascii=False) + "\n"
    return {Path("service/openapi.json"): document, Path("docs/api.md"): markdown(comments)}


if __name__ == "__main__":
    made = generated()
    if "--check" in sys.argv:
        stale = [str(p) for p, text in made.items() if not (ROOT / p).exists() or (ROOT / p).read_text() != text]
        raise SystemExit(f"{' and '.join(stale)} are stale: run make proto" if stale else 0)
    for path, text in made.items():
        (ROOT / path).write_text(text)

"""The server's description (OpenAPI 3.1): requests as it reads them, responses as OpenAI's client does."""

from __future__ import annotations

import functools
from typing import Any

import pydantic
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

from middo_jax.inference.requests import ChatRequest, CompletionRequest, GenerationRequest
from middo_jax.version import __version__

Json = dict[str, Any]

_REFS = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE] at the end."}},
}
_REFUSALS = {
    "400": "A field is missing, out of its range or not offered; `param` names it.",
    "401": "The token is missing or wrong.",
    "403": "The Host or Origin header is foreign.",
    "404": "Another model is served.",
    "408": "The body has not come in time.",
    "413": "The body is over the limit.",
    "415": "The content is not JSON.",
    "429": "Too many answers are waiting.",
    "500": "The request failed in the engine.",
    "503": "The engine has ended; the server stops.",
}


@functools.lru_cache(maxsize=4)
def describe(model_name: str) -> Json:
    """The description of the server of one model."""
    schemas: Json = {"Error": _ERROR}
    ok = {"type": "object", "required": ["status"], "properties": {"status": {"enum": ["ok", "stopped"]}}}
    models = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": _schema(Model, schemas), "minItems": 1},
        },
    }
    health = _get("Whether requests are answered.", ok)
    health["get"]["responses"]["503"] = {"description": "The engine has ended.", "content": _json(ok)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "middo serve", "version": __version__},
        "paths": {
            "/v1/chat/completions": _post(
                "Answers a conversation.", _request(ChatRequest, model_name, schemas), ChatCompletion, schemas
            ),
            "/v1/completions": _post(
                "Continues a text, or scores it.",
                _request(CompletionRequest, model_name, schemas),
                Completion,
                schemas,
            ),
            "/v1/models": _get("The served model.", models),
            "/health": health,
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schema(model: type[pydantic.BaseModel], schemas: Json) -> Json:
    """A reference to a model's schema, which is added with those that it uses."""
    # Models of different responses have equal names.
    whole = model.model_json_schema(ref_template=f"{_REFS}{model.__name__}.{{model}}")
    schemas |= {f"{model.__name__}.{name}": each for name, each in whole.pop("$defs", {}).items()}
    schemas[model.__name__] = whole
    return {"$ref": f"{_REFS}{model.__name__}"}


def _request(model: type[GenerationRequest], model_name: str, schemas: Json) -> Json:
    """The schema of a request, with what is refused beyond the types."""
    reference = _schema(model, schemas)
    properties = schemas[model.__name__]["properties"]
    properties["model"]["anyOf"] = [{"const": model_name}, {"type": "null"}]
    for name, neutral in model.not_offered.items():
        properties[name] = {"enum": list(neutral), "description": "Not offered; these values change nothing."}
    return reference


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _responses(schema: Json, *, also: Json | None = None) -> Json:
    refusals = {
        status: {"description": text, "content": _json({"$ref": f"{_REFS}Error"})}
        for status, text in _REFUSALS.items()
    }
    return {"200": {"description": "The answer.", "content": _json(schema) | (also or {})}} | refusals


def _get(summary: str, schema: Json) -> Json:
    return {"get": {"summary": summary, "responses": _responses(schema)}}


def _post(summary: str, request: Json, answer: type[pydantic.BaseModel], schemas: Json) -> Json:
    # Before OpenAPI 3.2, the schema of a stream is that of each event.
    events = {"text/event-stream": {"schema": _EVENT}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(request)},
            "responses": _responses(_schema(answer, schemas), also=events),
        }
    }

"""What tools/serve.py answers, as OpenAPI describes it: addresses, bodies, answers and errors."""

from http import HTTPStatus
from typing import Any

PREDICT, PROCESS = "/api/predict", "/process_video"  # in the guides' words
WORDS = 4000  # characters of a question, and of what the person says


def description(max_bytes: int, max_seconds: float, token: bool) -> dict[str, Any]:
    """The API in OpenAPI's words; a clip's largest size and length, and whether a token is asked for."""

    def text(about: str) -> dict[str, Any]:
        return {"type": "string", "maxLength": WORDS, "description": about}

    clip = {
        "description": "a path below the folder that is served, or the clip itself as a data URL in base64, or an "
        "object with one of these in `data` or `path`, as gradio's clients send files; null for words alone",
        "oneOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}],
    }
    question = text("'[reason] ...' or any other question; without one the emotion is scored")
    said = text("what the person says")
    form = {
        "type": "object",
        "properties": {
            "file": {"type": "string", "format": "binary", "description": "the clip"},
            "video_path": text("or its path, as above"), "question": question, "text": said,
        },
    }  # fmt: skip
    names = {"probabilities": {"type": "object", "additionalProperties": {"type": "number"}}}
    answer = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "the answer in words, or the label"},
            "label": {"type": ["string", "null"]}, "confidence": {"type": "number"}, "score": {"type": "number"},
            "strategy": {"type": ["string", "null"]}, **names,
            "available_modalities": {"type": "array", "items": {"type": "string"}},
            "missing": {"type": "object", "additionalProperties": {"type": "string"}},
            "duration": {"type": "number", "description": "seconds that the answer took"},
        },
        "required": ["text", "label", "available_modalities", "missing", "duration"],
    }  # fmt: skip
    error = {
        "type": "object",
        "properties": {"error": {"type": "string"}, "code": {"type": "string"}, "details": {"type": "object"}},
        "required": ["error", "code", "details"],
    }
    problems = {
        400: "the body is not what is described here, or this checkpoint takes no such question",
        401: "the token is missing or wrong", 403: "the path is not below the folder that is served",
        404: "there is no such clip", 405: "another method is needed", 408: "the body came too slowly",
        411: "the body has no Content-Length",
        413: f"larger than {max_bytes / 2**20:g} MB, longer than {max_seconds:g} s, or huge frames",
        422: "the clip cannot be read, or has nothing that the model goes by", 500: "the server failed",
        503: "every place in the queue is taken, or the server is being stopped",
    }  # fmt: skip

    def operation(about: str, body: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
        found = {"allOf": [{"$ref": "#/components/schemas/Answer"}, {"type": "object", "properties": first}]}
        content = {"application/json": {"schema": body}, "multipart/form-data": {"schema": form}}
        refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        return {"post": {
            "summary": about, "requestBody": {"required": True, "content": content},
            "responses": {
                "200": {"description": "the answer", "content": {"application/json": {"schema": found}}},
                **{str(status): {"description": why, "content": refused} for status, why in problems.items()},
            },
        }}  # fmt: skip

    def told_to_all(about: str, *statuses: int) -> dict[str, Any]:
        responses = {str(status): {"description": HTTPStatus(status).phrase} for status in statuses}
        return {"get": {"summary": about, "responses": responses, "security": []}}

    data = {"type": "array", "minItems": 1, "maxItems": 3, "description": "clip, question, what the person says"}
    listed = {"type": "object", "properties": {"data": data | {"prefixItems": [clip, question, said]}}}
    called = {"type": "object", "properties": {"video_path": clip, "question": question, "text": said}}
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "emotorch", "version": "1", "description": "Emotion of a clip, in labels and in words."},
        "paths": {
            PREDICT: operation("Ask about a clip", listed, {"data": {"type": "array", "items": {"type": "string"}}}),
            PROCESS: operation("Ask about a clip", called, {"response": {"type": "string"}}),
            "/health": told_to_all("Whether the server runs", 200),
            "/ready": told_to_all("Whether a place in the queue is free", 200, 503),
            "/openapi.json": told_to_all("This description", 200),
        },
        "components": {"schemas": {"Answer": answer, "Error": error}, "securitySchemes": schemes},
        "security": [{name: []} for name in schemes] if token else [],
    }

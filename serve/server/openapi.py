"""The OpenAPI description, beyond what the routes' own signatures say."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_ERROR: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"error": {"type": "string"}},
                "required": ["error"],
            }
        }
    }
}
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_MEANINGS = {
    400: "The request is invalid.",
    401: "The API key is missing or wrong.",
    403: "The request comes from another site's page.",
    404: "There is no such model, version, sample or address.",
    413: "The request has more bytes, pixels or images than the limits allow.",
    415: "The body has a type that is not read here.",
    503: "The server is full, starting or stopping: try again after Retry-After seconds.",
    504: "The deadline passed before the answer was there.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, **_ERROR} for status, meaning in _MEANINGS.items()
}
"""Every refusal is {"error": "one line"}."""
_TENSORS = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"const": "images"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"const": "UINT8"},
                    "data": {"type": "array"},
                    "parameters": {"type": "object"},
                },
            },
        },
        "outputs": {"type": "array", "items": {"type": "object"}},
        "parameters": {"type": "object"},
    },
}
SEGMENT: dict[str, Any] = {
    "responses": {
        200: {
            "description": "A mask, an overlay, a zip of several, or JSON.",
            "content": {
                "image/png": _BYTES,
                "image/jpeg": _BYTES,
                "application/zip": _BYTES,
                "application/json": {"schema": {"type": "object"}},
            },
        },
        **ERRORS,
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "image/jpeg": _BYTES,
                "image/png": _BYTES,
                "application/octet-stream": _BYTES,
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "image": {
                                "type": "array",
                                "items": {"type": "string", "format": "binary"},
                            }
                        },
                    }
                },
            },
        }
    },
}
INFER: dict[str, Any] = {
    "responses": {
        200: {
            "description": "Labels, as JSON or as JSON followed by binary data.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "application/octet-stream": _BYTES,
            },
        },
        **ERRORS,
    },
    "openapi_extra": {
        "parameters": [
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "required": False,
                "schema": {"type": "integer"},
                "description": "Bytes of JSON before the binary data.",
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _TENSORS},
                "application/octet-stream": _BYTES,
            },
        },
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with our own error answers for every route."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        for operations in schema["paths"].values():
            for operation in operations.values():
                responses = operation["responses"]
                responses.pop("422", None)  # we answer 400, in the common form
                for status in (400, 401, 403):
                    responses.setdefault(str(status), ERRORS[status])
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema

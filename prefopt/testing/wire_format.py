"""The API's endpoints by name, and the form of its replies.

It knows neither what is asked nor what is answered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import httpx2

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_FIXED = {
    ("POST", "/v1/messages"): "messages.create",
    ("POST", "/v1/messages/count_tokens"): "messages.count_tokens",
    ("GET", "/v1/models"): "models.list",
    ("POST", "/v1/messages/batches"): "batches.create",
    ("GET", "/v1/messages/batches"): "batches.list",
}
_WITH_ID = (
    ("GET", re.compile(r"/v1/models/([^/]+)"), "models.retrieve"),
    ("GET", re.compile(r"/v1/messages/batches/([^/]+)"), "batches.retrieve"),
    ("DELETE", re.compile(r"/v1/messages/batches/([^/]+)"), "batches.delete"),
    ("GET", re.compile(r"/v1/messages/batches/([^/]+)/results"), "batches.results"),
    ("POST", re.compile(r"/v1/messages/batches/([^/]+)/cancel"), "batches.cancel"),
)
ENDPOINTS = (*_FIXED.values(), *(name for _, _, name in _WITH_ID))
"""The names of all endpoints."""


class Endpoint(NamedTuple):
    """An endpoint's name ("" where there is none), the id in its path, and what came before it."""

    name: str
    item_id: str
    prefix: str


def endpoint_of(method: str, path: str) -> Endpoint:
    """Which endpoint a request is for. Anything may come before "/v1/" in the path."""
    start = max(path.find("/v1/"), 0)
    prefix, path = path[:start], path[start:]
    if name := _FIXED.get((method, path)):
        return Endpoint(name, "", prefix)
    for wanted, pattern, name in _WITH_ID:
        if method == wanted and (match := pattern.fullmatch(path)):
            return Endpoint(name, match[1], prefix)
    return Endpoint("", "", prefix)


def json_response(content: bytes, headers: Mapping[str, str], status: int = 200) -> httpx2.Response:
    """A reply with a JSON body."""
    import httpx2

    return httpx2.Response(
        status, content=content, headers={"content-type": "application/json", **headers}
    )


def error_body(status: int, message: str, code: str | None, request_id: str) -> dict[str, Any]:
    """The body of an error, with `code` as its "error_code" where there is one."""
    error: dict[str, Any] = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
    if code:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": error, "request_id": request_id}

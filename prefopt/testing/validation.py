"""What the API would refuse: the checks of requests, with the wording of its complaints.

In: bodies of requests. Out: nothing, or a `Rejected` with status and message. It knows no transport
and sends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.testing.catalogue import EFFORTS, THINKING_TYPES, ModelSpec, find_model

_COUNTED_FIELDS = frozenset(
    (
        *("cache_control", "messages", "model", "output_config", "speed", "system", "thinking"),
        *("tool_choice", "tools"),
    )
)
_MESSAGE_FIELDS = _COUNTED_FIELDS | {
    *("container", "diagnostics", "inference_geo", "max_tokens", "metadata", "service_tier"),
    *("stop_sequences", "stream", "user_profile_id"),
}
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MIN_THINKING_BUDGET = 1_024
_MAX_CACHE_BREAKPOINTS = 4
# Constraints that a grammar of a structured reply cannot keep.
_UNSUPPORTED_IN_SCHEMAS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "maxItems", "uniqueItems"),
)


class Rejected(Exception):
    """A request the API answers with an error."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(f"{status}: {message}")


def check_message(params: Any, catalogue: Mapping[str, ModelSpec]) -> ModelSpec:
    """Refuse what `POST /v1/messages` would; returns the model's spec.

    Raises:
        Rejected: with status 400, or 404 for an unknown model.
    """
    _check_fields(params, _MESSAGE_FIELDS, ("model", "max_tokens", "messages"))
    max_tokens = params["max_tokens"]
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise Rejected(400, "max_tokens: Input should be a valid integer")
    if max_tokens < 1:
        raise Rejected(400, "max_tokens: Input should be greater than or equal to 1")
    _check_common(params)
    if params.get("stream"):
        raise Rejected(400, "stream: this stand-in for the API does not stream.")
    spec = _spec_of(params, catalogue)
    if max_tokens > spec.max_tokens:
        raise Rejected(
            400,
            f"max_tokens: {max_tokens} > {spec.max_tokens}, which is the maximum allowed number "
            f"of output tokens for {params['model']}",
        )
    thinking = params.get("thinking") or {}
    if thinking.get("type") == "enabled":
        budget = thinking.get("budget_tokens")
        if not isinstance(budget, int) or budget < _MIN_THINKING_BUDGET:
            raise Rejected(400, "thinking.enabled.budget_tokens: Input should be at least 1024")
        if budget >= max_tokens:
            raise Rejected(400, "`max_tokens` must be greater than `thinking.budget_tokens`.")
    return spec


def check_batch_params(params: Any, catalogue: Mapping[str, ModelSpec]) -> ModelSpec:
    """Refuse what the API finds wrong with one request of a batch, once it gets to it.

    Raises:
        Rejected: with the status the same request would have had alone.
    """
    for name in ("stream", "speed", "fallbacks"):
        if isinstance(params, dict) and params.get(name):
            raise Rejected(400, f"{name}: not supported in message batches.")
    spec = check_message(params, catalogue)
    if not spec.batch:
        raise Rejected(400, f"model: {params['model']} does not support message batches.")
    return spec


def check_count_tokens(params: Any, catalogue: Mapping[str, ModelSpec]) -> None:
    """Refuse what `POST /v1/messages/count_tokens` would.

    Raises:
        Rejected: with status 400, or 404 for an unknown model.
    """
    _check_fields(params, _COUNTED_FIELDS, ("model", "messages"))
    _check_common(params)
    _spec_of(params, catalogue)


def check_batch(body: Any, max_requests: int) -> list[dict[str, Any]]:
    """Refuse what creating a batch would, whose params are not looked at; returns its requests.

    Raises:
        Rejected: with status 400.
    """
    _check_fields(body, frozenset({"requests"}), ("requests",))
    requests = body["requests"]
    if not isinstance(requests, list):
        raise Rejected(400, "requests: Input should be a valid array")
    if len(requests) > max_requests:
        raise Rejected(
            400,
            f"requests: List should have at most {max_requests} items after validation, "
            f"not {len(requests)}",
        )
    seen: set[str] = set()
    for index, item in enumerate(requests):
        where = f"requests.{index}"
        if not isinstance(item, dict):
            raise Rejected(400, f"{where}: Input should be a valid dictionary")
        if unknown := sorted(set(item) - {"custom_id", "params"}):
            raise Rejected(400, f"{where}.{unknown[0]}: Extra inputs are not permitted")
        custom_id = item.get("custom_id")
        if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
            pattern = f"^{_CUSTOM_ID.pattern}$"
            raise Rejected(400, f"{where}.custom_id: String should match pattern '{pattern}'")
        if custom_id in seen:
            raise Rejected(400, f"{where}.custom_id: Duplicate custom_id {custom_id!r}")
        seen.add(custom_id)
        if not isinstance(item.get("params"), dict):
            raise Rejected(400, f"{where}.params: Field required")
    return requests


def _check_fields(body: Any, known: frozenset[str], required: tuple[str, ...]) -> None:
    if not isinstance(body, dict):
        raise Rejected(400, "The request body is not a JSON object.")
    if unknown := sorted(set(body) - known):
        raise Rejected(400, f"{unknown[0]}: Extra inputs are not permitted")
    for name in required:
        if not body.get(name):
            raise Rejected(400, f"{name}: Field required")


def _spec_of(params: dict[str, Any], catalogue: Mapping[str, ModelSpec]) -> ModelSpec:
    """Look the model up. Done last: the API complains of a request's shape first."""
    spec = find_model(params["model"], catalogue)
    if spec is None:
        raise Rejected(404, f"model: {params['model']}")
    _check_against_model(params, spec)
    return spec


def _check_common(params: dict[str, Any]) -> None:
    if not isinstance(params["model"], str):
        raise Rejected(400, "model: Input should be a valid string")
    if not isinstance(params["messages"], list):
        raise Rejected(400, "messages: Input should be a valid list")
    n_breakpoints = _check_blocks(params.get("system") or "", "system")
    for index, message in enumerate(params["messages"]):
        where = f"messages.{index}"
        if not isinstance(message, dict):
            raise Rejected(400, f"{where}: Input should be a valid dictionary")
        if message.get("role") not in ("user", "assistant"):
            raise Rejected(400, f"{where}.role: Input should be 'user' or 'assistant'")
        if unknown := sorted(set(message) - {"role", "content"}):
            raise Rejected(400, f"{where}.{unknown[0]}: Extra inputs are not permitted")
        if not message.get("content"):
            raise Rejected(400, f"{where}: user messages must have non-empty content")
        n_breakpoints += _check_blocks(message["content"], f"{where}.content")
    if params["messages"][-1]["role"] == "assistant":
        raise Rejected(400, "This model does not support assistant message prefill.")
    if n_breakpoints > _MAX_CACHE_BREAKPOINTS:
        raise Rejected(
            400,
            f"A maximum of {_MAX_CACHE_BREAKPOINTS} blocks with cache_control may be provided. "
            f"Found {n_breakpoints}.",
        )
    _check_output(params.get("output_config") or {})


def _check_blocks(content: Any, where: str) -> int:
    """Check a text or a list of blocks; returns how many of them end a cached part."""
    if isinstance(content, str):
        return 0
    if not isinstance(content, list):
        raise Rejected(400, f"{where}: Input should be a valid string or list")
    n_breakpoints = 0
    for index, block in enumerate(content):
        if not isinstance(block, dict) or "type" not in block:
            raise Rejected(400, f"{where}.{index}.type: Field required")
        if block["type"] == "text" and not block.get("text"):
            raise Rejected(400, f"{where}.{index}: text content blocks must be non-empty")
        if (control := block.get("cache_control")) is None:
            continue
        n_breakpoints += 1
        if not isinstance(control, dict) or control.get("type") != "ephemeral":
            raise Rejected(400, f"{where}.{index}.cache_control.type: Input should be 'ephemeral'")
        if control.get("ttl", "5m") not in ("5m", "1h"):
            raise Rejected(400, f"{where}.{index}.cache_control.ttl: Input should be '5m' or '1h'")
    return n_breakpoints


def _check_output(config: Any) -> None:
    if not isinstance(config, dict):
        raise Rejected(400, "output_config: Input should be a valid dictionary")
    if unknown := sorted(set(config) - {"effort", "format"}):
        raise Rejected(400, f"output_config.{unknown[0]}: Extra inputs are not permitted")
    if config.get("effort") not in (None, *EFFORTS):
        raise Rejected(400, f"output_config.effort: Input should be one of {', '.join(EFFORTS)}")
    if "format" in config:
        form = config["format"]
        schema = form.get("schema") if isinstance(form, dict) else None
        if not isinstance(schema, dict) or form.get("type") != "json_schema":
            raise Rejected(400, "output_config.format: a json_schema needs a schema")
        _check_schema(schema, "output_config.format.schema")


def _check_schema(schema: Any, where: str) -> None:
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        raise Rejected(400, f"{where}: additionalProperties must be false")
    for name in _UNSUPPORTED_IN_SCHEMAS:
        if name in schema:
            kind = schema.get("type")
            raise Rejected(400, f"{where}: For '{kind}' type, property '{name}' is not supported")
    named = {**(schema.get("properties") or {}), **(schema.get("$defs") or {})}
    for name, part in named.items():
        _check_schema(part, f"{where}.{name}")
    for part in (*(schema.get("anyOf") or ()), schema.get("items")):
        _check_schema(part, where)


def _check_against_model(params: dict[str, Any], spec: ModelSpec) -> None:
    thinking = params.get("thinking")
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if thinking is not None and kind not in THINKING_TYPES:
        raise Rejected(400, f"thinking.type: Input should be one of {', '.join(THINKING_TYPES)}")
    if kind is not None and kind not in spec.thinking:
        raise Rejected(400, f'"thinking.type.{kind}" is not supported for this model.')
    config = params.get("output_config") or {}
    effort = config.get("effort")
    if effort is not None and effort not in spec.efforts:
        raise Rejected(400, f"output_config.effort: {effort!r} is not supported for this model.")
    if kind in ("disabled", "between_tools") and effort in ("xhigh", "max"):
        raise Rejected(400, f'"thinking.type.{kind}" is not supported at effort {effort!r}.')
    if "format" in config and not spec.structured_outputs:
        raise Rejected(400, "output_config.format: not supported for this model.")
    forced = (params.get("tool_choice") or {}).get("type") in ("any", "tool")
    if forced and not spec.forced_tools:
        raise Rejected(400, 'tool_choice: type "tool" and "any" are not supported for this model.')

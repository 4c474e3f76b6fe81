"""Which models the fake API has, and what each of them accepts.

One table feeds both the answers of `/v1/models` and the rejections of `/v1/messages`, so that the
two cannot disagree. It knows no prices. Context and output limits are the fake's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

EFFORTS = ("low", "medium", "high", "xhigh", "max")
THINKING_TYPES = ("adaptive", "between_tools", "disabled", "enabled")
_UNKNOWN_DATE = "1970-01-01T00:00:00Z"  # what the API itself gives for an unknown date


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model accepts. The defaults are those of a model nothing is known about."""

    display_name: str = ""
    line: str | None = None
    lifecycle: str = "active"
    thinking: tuple[str, ...] = ("adaptive", "disabled")
    efforts: tuple[str, ...] = EFFORTS
    forced_tools: bool = True
    structured_outputs: bool = True
    batch: bool = True
    max_input_tokens: int = 200_000
    max_tokens: int = 64_000
    min_cacheable_tokens: int = 512


def _spec(line: str, version: str, **fields: Any) -> ModelSpec:
    return ModelSpec(display_name=f"Claude {line.title()} {version}", line=line, **fields)


_ADAPTIVE_ONLY: dict[str, Any] = {"thinking": ("adaptive",), "forced_tools": False}
_EXTENDED: dict[str, Any] = {"thinking": ("disabled", "enabled")}
_BOTH: dict[str, Any] = {"thinking": ("adaptive", "disabled", "enabled")}

CATALOGUE: dict[str, ModelSpec] = {
    "claude-fable-5-2": _spec("fable", "5.2", **_ADAPTIVE_ONLY),
    "claude-haiku-5-5": _spec("haiku", "5.5"),
    "claude-sonnet-5-5": _spec(
        "sonnet", "5.5", thinking=("adaptive", "between_tools"), forced_tools=False
    ),
    "claude-opus-5-5": _spec("opus", "5.5", **_ADAPTIVE_ONLY),
    "claude-fable-5-1": _spec("fable", "5.1", **_ADAPTIVE_ONLY),
    "claude-mythos-5-1": _spec("mythos", "5.1", **_ADAPTIVE_ONLY),
    "claude-opus-5": _spec("opus", "5"),
    "claude-sonnet-5": _spec("sonnet", "5", min_cacheable_tokens=1_024),
    "claude-fable-5": _spec("fable", "5", **_ADAPTIVE_ONLY),
    "claude-opus-4-8": _spec("opus", "4.8", min_cacheable_tokens=1_024, **_BOTH),
    "claude-opus-4-7": _spec("opus", "4.7", min_cacheable_tokens=2_048, **_BOTH),
    "claude-opus-4-6": _spec("opus", "4.6", min_cacheable_tokens=4_096, **_BOTH),
    "claude-sonnet-4-6": _spec("sonnet", "4.6", min_cacheable_tokens=1_024, **_BOTH),
    "claude-opus-4-5": _spec("opus", "4.5", min_cacheable_tokens=4_096, **_EXTENDED),
    "claude-haiku-4-5": _spec("haiku", "4.5", min_cacheable_tokens=4_096, efforts=(), **_EXTENDED),
    "claude-sonnet-4-5": _spec(
        "sonnet",
        "4.5",
        lifecycle="deprecated",
        min_cacheable_tokens=1_024,
        efforts=(),
        **_EXTENDED,
    ),
}
"""The models by id, newest first."""

_NO_SPEC = ModelSpec()
_DATE = re.compile(r"-\d{8}$")


def find_model(model: str, catalogue: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The spec of a model; a dated id is the model's without its date.

    An id that begins with "claude-" and is not in the table stands for a model that accepts
    everything usual. None for any other id.
    """
    spec = catalogue.get(model) or catalogue.get(_DATE.sub("", model))
    if spec is None and model.startswith("claude-"):
        return _NO_SPEC
    return spec


def model_info(model: str, spec: ModelSpec) -> dict[str, Any]:
    """The API's description of a model, as `GET /v1/models/{id}` gives it."""

    def support(there: bool) -> dict[str, bool]:
        return {"supported": there}

    return {
        "id": model,
        "type": "model",
        "display_name": spec.display_name or model,
        "created_at": _UNKNOWN_DATE,
        "deprecated_at": None if spec.lifecycle == "active" else _UNKNOWN_DATE,
        "retires_at": None,
        "lifecycle": spec.lifecycle,
        "line": spec.line,
        "max_input_tokens": spec.max_input_tokens,
        "max_tokens": spec.max_tokens,
        "capabilities": {
            "batch": support(spec.batch),
            "citations": support(True),
            "code_execution": support(False),
            "context_management": {
                **support(False),
                "clear_thinking_20251015": None,
                "clear_tool_uses_20250919": None,
                "compact_20260112": None,
            },
            "effort": {
                **support(bool(spec.efforts)),
                **{effort: support(effort in spec.efforts) for effort in EFFORTS},
            },
            "image_input": support(False),
            "pdf_input": support(False),
            "server_tools": {
                **support(False),
                "code_execution": support(False),
                "web_search": support(False),
            },
            "structured_outputs": support(spec.structured_outputs),
            "thinking": {
                **support(spec.thinking != ("disabled",)),
                "types": {kind: support(kind in spec.thinking) for kind in THINKING_TYPES},
            },
        },
    }

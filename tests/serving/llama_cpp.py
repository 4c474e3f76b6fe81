"""llama.cpp's own server on a local port: what it makes of a GGUF file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


def build() -> str:
    """Which llama.cpp this is."""
    return f"llama.cpp of xllamacpp {importlib.metadata.version('xllamacpp')}"


class LlamaServer:
    """A model, perhaps with LoRA files on it, in llama.cpp's server with one thread.

    Raises:
        RuntimeError: llama.cpp does not take a file.
    """

    def __init__(self, path: str | Path, *, lora: str | Path | None = None) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = 1024
        settings.n_parallel = 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.port = 0
        settings.warmup = False
        # The cache in full precision, so that what differs is the file and not the cache.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.verbosity = -1
        if lora is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(settings)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, without any that is put before or after it."""
        answer = self._ask("tokenize", {"content": text, "add_special": False})
        return [int(token) for token in answer["tokens"]]

    def prompt_of(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages in the file's chat template, ready for an answer."""
        return str(self._ask("apply-template", {"messages": list(messages)})["prompt"])

    def next_logps(self, tokens: Sequence[int], n: int) -> dict[int, float]:
        """The log-probabilities of the n most likely next tokens, before any sampling rule."""
        # Probabilities come with finished text: a byte of a character would be held back, so a
        # token of the prompt is made to follow. That is a sampling rule, and they are before it.
        follows = [[tokens[-1], 1e6]]
        answer = self._complete(tokens, n_predict=1, n_probs=n, logit_bias=follows)
        (first,) = answer["completion_probabilities"]
        return {int(top["id"]): _logp(top) for top in first["top_logprobs"]}

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The n tokens that are most likely one after the other."""
        return [int(token) for token in self._complete(tokens, n_predict=n)["tokens"]]

    def _complete(self, tokens: Sequence[int], **options: Any) -> Any:
        asked = {"prompt": list(tokens), "temperature": 0.0, "top_k": 1, "return_tokens": True,
                 "cache_prompt": True, "ignore_eos": True}  # fmt: skip
        return self._ask("completion", asked | options)

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


def _logp(top: dict[str, Any]) -> float:
    value = top["logprob"]
    return -math.inf if value is None else float(value)

"""A sampler that runs a model with vLLM in this process. The only file that imports vLLM.

Every answer is a request with a seed of its own; vLLM's prefix cache reads a prompt once for all K of
them, and its scheduler keeps the batch full. LoRA adapters are swapped between calls without loading
the model again. Written against vLLM's documented interface (`LLM`, `SamplingParams`, `LoRARequest`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from prefopt.chat import end_token_ids, tokenize_prompt
from prefopt.errors import DataError, ModelError
from prefopt.models import resolve_model_path
from prefopt.sampling.decoding import ScoredIds, TokenPrompt
from prefopt.sampling.partial import PartialAnswers
from prefopt.sampling.sampler import Told
from prefopt.sampling.settings import SamplingSettings
from prefopt.types import Candidate, Prompt, content_hash

# Answers asked for, and kept, at once: many times what a GPU has under way.
_ANSWERS_AT_ONCE = 8_192
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMSampler:
    """Samples with vLLM; needs a GPU and `pip install 'prefopt[vllm]'`.

    Args:
        model: "demo", a folder or a Hub id.
        adapter: a LoRA adapter's folder to begin with; `use_adapter` swaps it.
        max_lora_rank: the largest rank of any adapter that will be used; by default the rank of
            `adapter`. None without an adapter loads a model that takes none.
        **options: further arguments of `vllm.LLM`, such as tensor_parallel_size or
            gpu_memory_utilization.

    Raises:
        ModelError: vLLM is not installed, or the model or adapter cannot be used.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | Path | None = None,
        max_lora_rank: int | None = None,
        **options: Any,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ModelError(
                "vLLM is not installed. It needs a GPU: pip install 'prefopt[vllm]'. Without one, "
                "leave out 'vllm:' to sample with transformers."
            ) from error
        self._vllm = vllm
        self._base = model
        rank = max_lora_rank or (None if adapter is None else _rank(adapter))
        self._max_rank = None if rank is None else next((r for r in _RANKS if r >= rank), rank)
        if self._max_rank is not None:
            options = {"enable_lora": True, "max_lora_rank": self._max_rank, **options}
        # Nothing of the checkpoint's own generation settings: as when transformers samples.
        options = {"generation_config": "vllm", "enable_prefix_caching": True, **options}
        try:
            self._llm = vllm.LLM(model=resolve_model_path(model), **options)
        except (ValueError, OSError, RuntimeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"vLLM cannot load {model!r}: {first}") from error
        self._numbers: dict[str, int] = {}
        self._adapter: str | None = None
        self.use_adapter(adapter)

    @property
    def name(self) -> str:
        """The model's, as transformers' sampler would write it beside an answer."""
        return self._base if self._adapter is None else f"{self._base}+adapter"

    def use_adapter(self, adapter: str | Path | None) -> None:
        """Sample with this LoRA adapter from now on, or with None.

        A folder whose content has changed must be given another path: vLLM keeps what it has loaded.

        Raises:
            ModelError: the folder holds no adapter, or one of a larger rank than was allowed for.
        """
        if adapter is not None:
            rank = _rank(adapter)
            if self._max_rank is None or rank > self._max_rank:
                raise ModelError(
                    f"the adapter {str(adapter)!r} has rank {rank}, but the model was loaded for "
                    f"{self._max_rank or 'no adapters'}. Load it with max_lora_rank={rank}."
                )
        self._adapter = None if adapter is None else str(adapter)

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        k: int,
        settings: SamplingSettings,
        seed: int,
        partial: Path | None,
        told: Told,
    ) -> list[list[Candidate]]:
        """See `Sampler.answers`."""
        tokenizer = self._llm.get_tokenizer()
        tokens = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
        self._check_lengths(prompts, tokens, settings)
        stops = sorted(end_token_ids(tokenizer, self._generation_config()))
        kept = PartialAnswers(partial)
        found: list[list[Candidate]] = []
        width = max(1, _ANSWERS_AT_ONCE // k)
        for start in range(0, len(prompts), width):
            batch = range(start, min(start + width, len(prompts)))
            asked = [(prompts[i].prompt_id, tokens[i]) for i in batch]
            own = [self.name, self._adapter, msgspec.to_builtins(settings)]
            key = content_hash([seed, k, own, asked])
            answers = kept.get(key)
            if answers is None:
                outputs = self._llm.generate(
                    [{"prompt_token_ids": tokens[i]} for i in batch for _ in range(k)],
                    [
                        self._params(settings, stops, seed, prompts[i].prompt_id, number)
                        for i in batch
                        for number in range(k)
                    ],
                    use_tqdm=False,
                    lora_request=self._lora_request(),
                )
                answers = [
                    self._candidate(prompts[batch[place // k]], place % k, output.outputs[0])
                    for place, output in enumerate(outputs)
                ]
                kept.add(key, answers)
            told(len(answers))
            found += [answers[place : place + k] for place in range(0, len(answers), k)]
        return found

    def sampled_ids(
        self,
        prompts: Sequence[TokenPrompt],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> list[list[ScoredIds]]:
        """Answers to prompts as token ids, with their log-probabilities.

        Those are of the distribution that was drawn from, temperature and all, if the model was loaded
        with `logprobs_mode="processed_logprobs"`.

        Args:
            prompts: with a key for each answer that is wanted.
            max_new_tokens: an answer is cut off here.
            temperature: logits are divided by it; nothing else bends the distribution.
            stop_token_ids: what ends an answer, and nothing else does.
        """
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts for _ in prompt.keys],
            [
                self._vllm.SamplingParams(
                    n=1,
                    temperature=temperature,
                    max_tokens=max_new_tokens,
                    seed=key >> 96,  # 32 bits
                    stop_token_ids=list(stop_token_ids),
                    ignore_eos=True,  # the model's own end token counts where it is among these
                    logprobs=0,  # of sampled tokens only
                    detokenize=False,
                )
                for prompt in prompts
                for key in prompt.keys
            ],
            use_tqdm=False,
            lora_request=self._lora_request(),
        )
        answers = iter(output.outputs[0] for output in outputs)
        return [[_sampled(next(answers)) for _ in prompt.keys] for prompt in prompts]

    def _generation_config(self) -> Any:
        """What the checkpoint says of its end tokens; None where it says nothing."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(resolve_model_path(self._base))
        except OSError:
            return None

    def _params(
        self, settings: SamplingSettings, stops: list[int], seed: int, prompt_id: str, number: int
    ) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            max_tokens=settings.max_new_tokens,
            seed=int(content_hash([seed, prompt_id, number])[:8], 16),
            stop_token_ids=stops,
        )

    def _lora_request(self) -> Any:
        if self._adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(self._adapter, len(self._numbers) + 1)
        return LoRARequest(f"adapter-{number}", number, self._adapter)

    def _candidate(self, prompt: Prompt, number: int, output: Any) -> Candidate:
        stopped = output.finish_reason == "stop"
        return Candidate(
            prompt=prompt,
            text=output.text.strip(),
            model=self.name,
            sample_index=number,
            finish_reason="stop" if stopped else "length",
            # The end token is among them.
            n_tokens=len(output.token_ids) - stopped,
        )

    def _check_lengths(
        self, prompts: Sequence[Prompt], tokens: Sequence[list[int]], settings: SamplingSettings
    ) -> None:
        context = self._llm.llm_engine.model_config.max_model_len
        room = context - settings.max_new_tokens
        too_long = [
            f"prompt {index + 1} ({prompt.text[:50]!r}): {len(ids)} tokens"
            for index, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True))
            if len(ids) > room
        ]
        if too_long:
            raise DataError(
                f"{len(too_long)} prompt(s) do not fit: {self.name} reads {context} tokens, and "
                f"max_new_tokens={settings.max_new_tokens} leaves {room} for the prompt.",
                too_long,
            )


def _sampled(output: Any) -> ScoredIds:
    ids = tuple(output.token_ids)
    logps = (float(step[token].logprob) for token, step in zip(ids, output.logprobs, strict=True))
    return ScoredIds(ids, output.finish_reason == "stop", tuple(logps))


def _rank(adapter: str | Path) -> int:
    path = Path(adapter) / "adapter_config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{str(adapter)!r} is no folder of a LoRA adapter: {path} has no rank ({error})."
        ) from error

"""Prompts as token ids -> answers as token ids, from a transformers model in memory.

Each prompt is read once for its K answers; answers that have ended leave the batch at once, and the
answers of the next prompt take their places, longest prompts first. Keys and values lie in slots that
are written in place, each answer's own from the left, so nothing is padded, copied or repeated from
step to step. A model that this would not be the same for (attention windows, recurrent states, several
dimensions of position) is run by transformers' own `generate`, a padded batch at a time, and one with
PEFT's virtual tokens before each row without keeping anything from step to step.

An answer's tokens depend on the model, its prompt and its own key only: which others were generated
beside it does not matter, but for the rounding of the products. PPO's rollouts and `sample_candidates`
both come here. Knows nothing of texts, files or prompts' ids.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefopt.matrix_product import matrix_product
from prefopt.sampling.draws import draw_tokens
from prefopt.sampling.slots import Slots, fitting_slots
from prefopt.training.fused_model import (
    NOTHING_FUSED,
    FusedPlan,
    fused_layers,
    plan_fused_layers,
)
from prefopt.training.tree_model import base_model, has_virtual_tokens
from prefopt.types import content_hash

Ids = tuple[int, ...]

# Prompt tokens read in one forward pass.
_PREFILL_TOKENS = 2_048
# Uniform numbers made at a time.
_NUMBERS = 128


class SampledIds(NamedTuple):
    """One answer: its tokens, the end token included, and whether it ended by itself."""

    ids: Ids
    ended: bool


class ScoredIds(NamedTuple):
    """`SampledIds` with the log-probabilities that what sampled them gave the tokens."""

    ids: Ids
    ended: bool
    logps: tuple[float, ...]


class TokenPrompt(NamedTuple):
    """A prompt and a key for each answer that is wanted to it; a key (128 bits) decides all draws."""

    ids: Ids
    keys: tuple[int, ...]


def answer_key(seed: int, prompt: int | str, answer: int) -> int:
    """The key of an answer: 128 bits that differ for another seed, prompt or number."""
    return int(content_hash([seed, prompt, answer])[:32], 16)


@dataclass(frozen=True)
class DecodingSettings:
    """How tokens are drawn and how many answers are under way at once.

    Args:
        max_new_tokens: an answer is cut off here.
        stop_token_ids: an answer ends with the first of these.
        pad_token_id: what fills up shorter prompts; never told from a real token by its id.
        batch_size: answers generated at once.
        batch_tokens: tokens, of prompts and answers, kept in memory at once; at least one answer's.
        temperature: see `draw_tokens`.
        top_k: see `draw_tokens`.
        top_p: see `draw_tokens`.
        min_p: see `draw_tokens`.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int
    batch_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """The next token (B,) of rows with these logits (B, V)."""
        # Apple's GPUs have no float64.
        place = "cpu" if logits.device.type == "mps" else logits.device
        return draw_tokens(
            logits.to(place),
            uniforms.to(place),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        ).to(logits.device)

    def rows(self, longest_prompt: int) -> int:
        """How many answers are generated at once where the longest prompt has so many tokens."""
        most = self.batch_tokens // (longest_prompt + self.max_new_tokens)
        return max(1, min(self.batch_size, most))


class _Row:
    """One answer under way."""

    __slots__ = ("_numbers", "_rest", "answer", "ids", "prompt")

    def __init__(self, prompt: int, answer: int, key: int) -> None:
        import numpy as np

        self.prompt, self.answer = prompt, answer
        self.ids: list[int] = []
        self._numbers = np.random.Generator(np.random.Philox(key=key))
        self._rest: list[float] = []

    def uniform(self) -> float:
        """The next number of the row's own stream."""
        if not self._rest:
            self._rest = self._numbers.random(_NUMBERS).tolist()[::-1]
        return self._rest.pop()


class Decoder:
    """Generates answers with a model that is in memory, as it is at the moment of the call.

    Args:
        model: a causal language model, perhaps in a PEFT wrapper; its active adapter counts.
        settings: see `DecodingSettings`.
        autocast: makes the context in which the model computes.
    """

    def __init__(
        self,
        model: Any,
        settings: DecodingSettings,
        autocast: Callable[[], Any] = contextlib.nullcontext,
    ) -> None:
        self.model, self.settings, self._autocast = model, settings, autocast

    def answers(
        self, prompts: Sequence[TokenPrompt], told: Callable[[int], None] = lambda _: None
    ) -> list[list[SampledIds]]:
        """The answers to each prompt, one a key, of at least one token each.

        Args:
            prompts: of at least one token each.
            told: is called with how many answers have ended since the last call.

        Raises:
            ModelError: the model's logits are no numbers.
        """
        if not prompts:
            return []
        found: list[list[SampledIds | None]] = [[None] * len(p.keys) for p in prompts]
        with _ready_to_generate(self.model), self._autocast():
            slots = fitting_slots(self.model)
            if slots is not None:
                rows = self._in_slots(prompts, slots)
            elif has_virtual_tokens(self.model):
                rows = self._from_the_start(prompts)
            else:
                rows = self._by_generate(prompts)
            for row, ended in rows:
                found[row.prompt][row.answer] = SampledIds(tuple(row.ids), ended)
                told(1)
        return [[answer for answer in answers if answer is not None] for answers in found]

    def _in_slots(
        self, prompts: Sequence[TokenPrompt], slots: Slots
    ) -> Iterator[tuple[_Row, bool]]:
        said = self.settings
        n_rows = said.rows(max(len(p.ids) for p in prompts))
        waiting = deque(
            (i, range(first, min(first + n_rows, len(prompts[i].keys))))
            for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
            for first in range(0, len(prompts[i].keys), n_rows)
        )
        rows: list[_Row] = []
        stops = frozenset(said.stop_token_ids)
        device = slots.device
        tokens = torch.empty(0, dtype=torch.long, device=device)  # (B,) the last one of each row
        while rows or waiting:
            # New rows come a few prompts at a time, which are read together.
            room, entering = n_rows - len(rows), []
            if waiting and (room >= max(n_rows // 8, len(waiting[0][1])) or not rows):
                while waiting and len(waiting[0][1]) <= room:
                    entering.append(waiting.popleft())
                    room -= len(entering[-1][1])
            for group in _reading_order(entering, prompts):
                self._read(group, prompts, slots)
                rows += [_Row(i, a, prompts[i].keys[a]) for i, part in group for a in part]
                last = [prompts[i].ids[-1] for i, part in group for _ in part]
                tokens = torch.cat((tokens, torch.tensor(last, device=device)))
            logits = slots.step(tokens)  # (B, V)
            tokens = said.draw(logits, _uniforms(rows, said))
            over = []
            for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                row.ids.append(token)
                if token in stops or len(row.ids) == said.max_new_tokens:
                    over.append(place)
                    yield row, token in stops
            if over:
                stay = slots.leave(over)
                rows = [rows[i] for i in stay]
                tokens = tokens[stay]

    def _read(
        self, group: list[tuple[int, range]], prompts: Sequence[TokenPrompt], slots: Slots
    ) -> None:
        """Put the prompts' keys and values into new slots, all but those of their last tokens.

        The last token is read with the first step of each answer.
        """
        lengths = [len(prompts[i].ids) - 1 for i, _ in group]
        width = max(lengths)
        copies = [len(part) for _, part in group]
        cache = None
        if width:
            ids = torch.full((len(group), width), self.settings.pad_token_id)
            for row, (i, _) in enumerate(
                group
            ):  # padded on the right, which nothing before it sees
                ids[row, : lengths[row]] = torch.tensor(prompts[i].ids[:-1])
            cache = slots.read(ids)
        slots.enter(cache, lengths, copies)

    def _by_generate(self, prompts: Sequence[TokenPrompt]) -> Iterator[tuple[_Row, bool]]:
        """The same by `generate`: a batch is padded on the left and stays until all have ended."""
        from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

        said, device = self.settings, next(self.model.parameters()).device
        model = base_model(self.model)
        stops = frozenset(said.stop_token_ids)

        class Draws(LogitsProcessor):
            """Leaves the drawn token alone, so that the greedy choice is it."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                drawn = said.draw(scores, _uniforms(rows, said))
                return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

        for rows in self._batches(prompts):
            asked = [prompts[row.prompt].ids for row in rows]
            width = max(map(len, asked))
            ids = torch.full((len(rows), width), said.pad_token_id)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for place, prompt in enumerate(asked):
                ids[place, width - len(prompt) :] = torch.tensor(prompt)
                mask[place, width - len(prompt) :] = 1
            output: Tensor = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList([Draws()]),
                generation_config=GenerationConfig(
                    max_new_tokens=said.max_new_tokens,
                    do_sample=False,
                    pad_token_id=said.pad_token_id,
                    eos_token_id=list(said.stop_token_ids) or None,
                ),
            )
            for row, new in zip(rows, output[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(new) if token in stops), None)
                row.ids = new if end is None else new[: end + 1]
                yield row, end is not None

    def _from_the_start(self, prompts: Sequence[TokenPrompt]) -> Iterator[tuple[_Row, bool]]:
        """The same where PEFT puts virtual tokens before each row: whole rows for every token.

        PEFT's `generate` leaves them out with transformers 5.24, and this is what is trained: rows
        that begin right behind the virtual tokens, padded at their ends.
        """
        said, device = self.settings, next(self.model.parameters()).device
        stops = frozenset(said.stop_token_ids)
        for rows in self._batches(prompts):
            while rows:
                texts = [torch.tensor([*prompts[row.prompt].ids, *row.ids]) for row in rows]
                ids = pad_sequence(texts, batch_first=True, padding_value=said.pad_token_id)
                lengths = torch.tensor([len(text) for text in texts])
                width = ids.shape[1]
                mask = (torch.arange(width) < lengths[:, None]).long()
                with torch.no_grad():
                    logits: Tensor = self.model(
                        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                    ).logits
                # Prompt tuning gives logits of its virtual tokens too.
                last = logits[:, -width:][torch.arange(len(rows)), lengths - 1]  # (B, V)
                tokens = said.draw(last, _uniforms(rows, said)).tolist()
                on = []
                for row, token in zip(rows, tokens, strict=True):
                    row.ids.append(token)
                    if token in stops or len(row.ids) == said.max_new_tokens:
                        yield row, token in stops
                    else:
                        on.append(row)
                rows = on

    def _batches(self, prompts: Sequence[TokenPrompt]) -> Iterator[list[_Row]]:
        """Rows for all answers, as many at once as fit, those of the shortest prompts first."""
        n_rows = self.settings.rows(max(len(p.ids) for p in prompts))
        every = [
            _Row(i, answer, key)
            for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
            for answer, key in enumerate(prompts[i].keys)
        ]
        for start in range(0, len(every), n_rows):
            yield every[start : start + n_rows]


def _uniforms(rows: Sequence[_Row], said: DecodingSettings) -> Tensor:
    if said.temperature == 0:
        return torch.empty(0)
    return torch.tensor([row.uniform() for row in rows], dtype=torch.float64)


def _reading_order(
    entering: Sequence[tuple[int, range]], prompts: Sequence[TokenPrompt]
) -> Iterator[list[tuple[int, range]]]:
    """Those that enter in groups that are read in one forward pass; they are sorted by length."""
    group: list[tuple[int, range]] = []
    for item in entering:
        width = len(prompts[(group or [item])[0][0]].ids)
        if group and width * (len(group) + 1) > _PREFILL_TOKENS:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


_PLANS: weakref.WeakKeyDictionary[Any, FusedPlan] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Evaluation mode without gradient or generation settings of the model's own, fast on a CPU."""
    from transformers import GenerationConfig

    base = base_model(model)
    modes = [m for m in model.modules() if m.training]
    own, caching = base.generation_config, base.config.use_cache
    base.generation_config, base.config.use_cache = GenerationConfig(), True
    for module in modes:
        module.training = False
    try:
        if base not in _PLANS:
            # A GPU decodes a token in less time than the call of a compiled kernel takes to prepare.
            on_cpu = next(base.parameters()).device.type == "cpu"
            _PLANS[base] = plan_fused_layers(model) if on_cpu else NOTHING_FUSED
        with torch.no_grad(), fused_layers(model, _PLANS[base]), _fast_products(base):
            yield
    finally:
        base.generation_config, base.config.use_cache = own, caching
        for module in modes:
            module.training = True


@contextlib.contextmanager
def _fast_products(model: Any) -> Iterator[None]:
    """Within the block, plain linear layers take `matrix_product`."""

    def stand_in(layer: Any) -> Callable[[Tensor], Tensor]:
        own = layer.forward

        def forward(x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                result: Tensor = own(x)
                return result
            rows = matrix_product(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
            return rows.view(*x.shape[:-1], -1)

        return forward

    layers = [
        m
        for m in model.modules()
        if type(m) is torch.nn.Linear
        and "forward" not in vars(m)
        and m.weight.device.type == "cpu"
        and m.weight.dtype == torch.float32
    ]
    for layer in layers:
        layer.forward = stand_in(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

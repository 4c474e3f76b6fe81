"""A model's keys and values in slots, one an answer under way, and one step of all of them.

    slots.read(ids)      prompts through the model, their keys and values returned
    slots.enter(...)     new slots that begin with a prompt's keys and values
    slots.step(tokens)   every slot's next token through the model, logits out
    slots.leave(over)    slots given up; the last ones move into their places

A slot is filled from the left and its tokens have the positions 0, 1, 2, ...: what lies behind its end
is masked until it is written. Slots 0 to n - 1 are always in use. `fitting_slots` finds out by trying
whether a model run this way gives the logits it gives by itself. Knows nothing of sampling.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from prefopt.training.tree_model import base_model, cache_name, has_virtual_tokens

logger = logging.getLogger(__name__)

# Slots get longer by this many tokens at a time.
_MORE_TOKENS = 64


class Slots:
    """The slots of one model.

    Args:
        model: a causal language model without its PEFT wrapper, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.lengths: list[int] = []  # tokens in each slot in use
        self.at = torch.empty(
            0, dtype=torch.long, device=self.device
        )  # (n,) the same on the device
        self.width = 0
        n_layers = len(DynamicCache(config=model.config).layers)
        self._layers = [_SlotLayer(self) for _ in range(n_layers)]
        self._cache = Cache(layers=self._layers)

    def read(self, ids: Tensor) -> Any:
        """Keys and values of prompts (B, T), padded on the right."""
        cache = DynamicCache(config=self.model.config)
        # Without a mask: no token sees what is to the right of it.
        reader = self.model.base_model
        reader(input_ids=ids.to(self.device), use_cache=True, **{cache_name(reader): cache})
        return cache

    def enter(self, cache: Any, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Take new slots: `copies[i]` that begin with the first `lengths[i]` tokens of row i.

        `cache` is what `read` returned, or None where all lengths are 0.
        """
        first = len(self.lengths)
        self.lengths += [n for n, k in zip(lengths, copies, strict=True) for _ in range(k)]
        self.at = torch.tensor(self.lengths, device=self.device)
        if cache is None:
            return
        times = torch.tensor(copies, device=self.device)
        for layer, source in zip(self._layers, cache.layers, strict=True):
            layer.fill(first, source.keys, source.values, times)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (n, V) after one more token (n,) in every slot."""
        self.width = max(self.lengths) + 1
        seen = torch.arange(self.width, device=self.device) <= self.at[:, None]  # (n, W)
        mask = seen[:, None, None]
        if self.model.config._attn_implementation == "eager":  # which adds its mask to the scores
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.where(mask, 0.0, lowest).to(self.model.dtype)
        out = self.model(
            input_ids=tokens[:, None],
            position_ids=self.at[:, None],
            attention_mask=mask,
            use_cache=True,
            **{cache_name(self.model): self._cache},
        )
        self.lengths = [n + 1 for n in self.lengths]
        self.at = self.at + 1
        logits: Tensor = out.logits[:, -1]
        return logits

    def leave(self, over: Sequence[int]) -> list[int]:
        """Give up slots; returns which slot each of those left came from."""
        n_left = len(self.lengths) - len(over)
        gone = set(over)
        stay = list(range(n_left))
        holes = [i for i in over if i < n_left]
        moved = [i for i in range(n_left, len(self.lengths)) if i not in gone]
        for hole, last in zip(holes, moved, strict=True):
            stay[hole] = last
        if holes:
            width = max(self.lengths[i] for i in moved)
            targets, sources = (torch.tensor(x, device=self.device) for x in (holes, moved))
            for layer in self._layers:
                layer.move(sources, targets, width)
        self.lengths = [self.lengths[i] for i in stay]
        self.at = self.at[stay]
        return stay


class _SlotLayer(DynamicLayer):
    """One layer's keys and values (slots, H, tokens, D), written in place."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self._slots: Slots = weakref.proxy(slots)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token (n, H, 1, D) into each slot in use; all that they hold is returned."""
        slots = self._slots
        n, width = len(slots.lengths), slots.width
        self._make_room(n, width, key_states, value_states)
        rows = torch.arange(n, device=slots.device)
        # Under autocast the prompts' values may lie here in a wider type than new ones come in.
        self.keys[rows, :, slots.at] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, slots.at] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:n, :, :width], self.values[:n, :, :width]

    def fill(self, first: int, keys: Tensor, values: Tensor, times: Tensor) -> None:
        """Write whole prompts (B, H, T, D), each as often as `times` (B,) says, from slot `first`."""
        n, width = len(self._slots.lengths), keys.shape[2]
        self._make_room(n, width, keys, values)
        self.keys[first:n, :, :width] = keys.repeat_interleave(times, dim=0)
        self.values[first:n, :, :width] = values.repeat_interleave(times, dim=0)

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` tokens of some slots into others."""
        self.keys[targets, :, :width] = self.keys[sources, :, :width]
        self.values[targets, :, :width] = self.values[sources, :, :width]

    def _make_room(self, n: int, width: int, keys: Tensor, values: Tensor) -> None:
        have = (0, 0) if self.keys is None else (self.keys.shape[0], self.keys.shape[2])
        if n <= have[0] and width <= have[1]:
            return
        n, width = max(n, have[0]), max(have[1], width + _MORE_TOKENS)
        self.keys = _larger(self.keys, n, width, keys)
        self.values = _larger(self.values, n, width, values)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens before the one that is read."""
        return max(0, self._slots.width - 1)


def _larger(old: Tensor | None, n: int, width: int, like: Tensor) -> Tensor:
    # Zeros: what is masked has weight 0, and 0 times a stray NaN would be one.
    new = like.new_zeros(n, like.shape[1], width, like.shape[3])
    if old is not None:
        new[: old.shape[0], :, : old.shape[2]] = old
    return new


_REFUSED: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def fitting_slots(model: Any) -> Slots | None:
    """Slots for a model, or None where they would not give what the model gives by itself.

    Found out once a model, with a few made-up tokens; why not is written to the log.

    Args:
        model: a causal language model, perhaps in a PEFT wrapper, in evaluation mode.
    """
    base = base_model(model)
    if base not in _REFUSED:
        _REFUSED[base] = _why_not(model, base)
        if _REFUSED[base]:
            logger.warning("answers are generated a slower way: %s", _REFUSED[base])
    return None if _REFUSED[base] else Slots(base)


def _why_not(model: Any, base: Any) -> str:
    name = type(base).__name__
    if has_virtual_tokens(model):
        return "prompt tuning puts virtual tokens before each row"
    if getattr(base, "_is_stateful", False):
        return f"{name} carries a state from token to token"
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return f"{name} takes no position_ids"
    if base.config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {base.config._attn_implementation!r} takes no mask for each answer"
    try:
        if any(
            type(layer) is not DynamicLayer for layer in DynamicCache(config=base.config).layers
        ):
            return f"{name} does not keep keys and values of all tokens in all layers"
        # Rounding to bfloat16, where the caller asks for it, would hide what is looked for.
        with torch.autocast(base.device.type, enabled=False):
            worst = _worst_difference(base)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        message = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{name} does not run with keys and values in slots: {message[:150]}"
    allowed = {torch.float32: 3e-4, torch.float64: 1e-9}.get(base.dtype, 6e-2)
    if hasattr(
        base, "_original_forward"
    ):  # wrapped by accelerate, perhaps in an autocast of its own
        allowed = 6e-2
    return "" if worst <= allowed else f"{name} differs in slots from itself by {worst:.2g}"


def _worst_difference(base: Any) -> float:
    """How far logits in slots are from the model's own, over 1 + their size."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    texts = [torch.randint(vocabulary, (n,), generator=generator) for n in (7, 4)]
    slots = Slots(base)
    prompts = torch.zeros(2, 4, dtype=torch.long)
    prompts[0], prompts[1, :1] = texts[0][:4], texts[1][:1]
    slots.enter(slots.read(prompts), [4, 1], [1, 1])
    for place in range(3):
        tokens = torch.stack([texts[0][4 + place], texts[1][1 + place]])
        found = slots.step(tokens.to(slots.device))
    worst = 0.0
    for logits, ids in zip(found, texts, strict=True):
        alone = base(input_ids=ids[None].to(slots.device), use_cache=False).logits[0, -1]
        worst = max(worst, float(((logits - alone).abs() / (1 + alone.abs())).max()))
    return worst

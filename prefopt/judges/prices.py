"""What the tokens of paid models cost, and on which day that was read off the price list.

A model that is not here has no price until the user gives one: a money limit kept with a guessed
price would be no limit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from prefopt.errors import DataError


class ModelPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model costs, in US dollars per million tokens.

    Where a prompt (cached parts included) is longer than `long_prompt_tokens`, every price is
    multiplied by `long_prompt_factor`.
    """

    input_usd_per_mtok: float
    output_usd_per_mtok: float
    cache_read_usd_per_mtok: float
    cache_write_usd_per_mtok: float
    long_prompt_tokens: int | None = None
    long_prompt_factor: float = 1.0

    def __post_init__(self) -> None:
        for field in ("input", "output", "cache_read", "cache_write"):
            usd = getattr(self, f"{field}_usd_per_mtok")
            if not 0 <= usd < math.inf:
                raise ValueError(f"{field}_usd_per_mtok must be a price of 0 or more, got {usd}.")

    def cost_usd(
        self,
        *,
        input_tokens: float = 0,
        output_tokens: float = 0,
        cache_read_tokens: float = 0,
        cache_write_tokens: float = 0,
    ) -> float:
        """What one request costs; `input_tokens` are those neither read from nor put in a cache."""
        prompt = input_tokens + cache_read_tokens + cache_write_tokens
        is_long = self.long_prompt_tokens is not None and prompt > self.long_prompt_tokens
        usd_per_mtok = (
            input_tokens * self.input_usd_per_mtok
            + output_tokens * self.output_usd_per_mtok
            + cache_read_tokens * self.cache_read_usd_per_mtok
            + cache_write_tokens * self.cache_write_usd_per_mtok
        )
        return usd_per_mtok * (self.long_prompt_factor if is_long else 1.0) / 1e6


def _price(
    input_usd: float, output_usd: float, cache_read_share: float, **long_prompt: Any
) -> ModelPrice:
    return ModelPrice(
        input_usd_per_mtok=input_usd,
        output_usd_per_mtok=output_usd,
        cache_read_usd_per_mtok=input_usd * cache_read_share,
        cache_write_usd_per_mtok=input_usd * 1.25,  # the five-minute cache, the one used here
        **long_prompt,
    )


PRICES_AS_OF = "2026-11-23"
"""The day on which `PRICES` was read off the price list. Give `prices` where they have changed."""

PRICES = {
    "claude-haiku-5-5": _price(
        0.10, 0.50, 0.10, long_prompt_tokens=100_000, long_prompt_factor=5.0
    ),
    "claude-sonnet-5-5": _price(2, 10, 0.05),
    "claude-opus-5-5": _price(4, 20, 0.05),
    "claude-fable-5-2": _price(8, 40, 0.025),
    "claude-fable-5-1": _price(10, 50, 0.025),
    "claude-opus-5": _price(5, 25, 0.10),
    "claude-sonnet-5": _price(2, 10, 0.10),
    "claude-opus-4-8": _price(5, 25, 0.10),
    "claude-opus-4-7": _price(5, 25, 0.10),
    "claude-opus-4-6": _price(5, 25, 0.10),
    "claude-sonnet-4-6": _price(3, 15, 0.10),
}
"""List prices per model, for requests that are not batched."""


def load_prices(path: str | Path) -> dict[str, ModelPrice]:
    """Prices of a user's own, from a JSON file with the fields of `ModelPrice` for each model.

    Example: {"my-model": {"input_usd_per_mtok": 2, "output_usd_per_mtok": 8,
    "cache_read_usd_per_mtok": 0.5, "cache_write_usd_per_mtok": 2}}

    Raises:
        DataError: the file is not there or holds something else.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=dict[str, ModelPrice])
    except OSError as error:
        raise DataError(
            f"cannot read the file of prices {path}: {error.strerror or error}."
        ) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        fields = ", ".join(f.name for f in msgspec.structs.fields(ModelPrice) if f.required)
        raise DataError(
            f"{path} is no file of prices: {error}. Expected a JSON object that gives each model's "
            f"name an object with {fields}, in US dollars per million tokens."
        ) from error

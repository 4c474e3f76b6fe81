"""What a plan holds, and how it reads. Knows nothing of how it was found."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec


class MemoryPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of thing takes on each device, and a remark."""

    name: str
    n_bytes: float
    remark: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What another setting would do: the peak it leads to, and how much less that is."""

    setting: str
    peak_bytes: float
    saves_bytes: float
    fits: bool
    remark: str = ""


class TimePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How long it takes on all devices together, and what that is made of."""

    seconds: float
    optimizer_steps: int
    operations: float
    tokens_fed: float
    tokens_per_s: float
    source: str
    is_assumed: bool
    usd: float | None


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="prefopt.plan/1"):
    """What a configuration takes. Bytes are those of one device."""

    model: str
    family: str
    n_parameters: int
    n_trained: int
    method: str
    devices: str
    n_devices: int
    strategy: str
    micro_batch_tokens: int
    fullest_micro_batch: int
    memory: tuple[MemoryPart, ...]
    peak_bytes: float
    step_bytes: float
    capacity_bytes: float
    largest_micro_batch_tokens: int | None
    changes: tuple[Change, ...]
    time: TimePlan | None
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the peak is within a device's memory."""
        return self.peak_bytes <= self.capacity_bytes

    def to_text(self) -> str:
        """The plan for people."""
        return "\n".join(_text(self))

    def to_json(self) -> str:
        """All of it, for programs."""
        return msgspec.json.format(msgspec.json.encode(self)).decode()


def _text(found: Plan) -> Iterator[str]:
    count = f"{found.n_devices} x " if found.n_devices > 1 else ""
    shared = f", {found.strategy}" if found.n_devices > 1 else ""
    yield (
        f"{found.method} of {found.model} ({found.family}, {found.n_parameters / 1e9:.3g}B "
        f"parameters, {found.n_trained / 1e6:,.1f}M trained) on {count}{found.devices}{shared}"
    )
    yield ""
    whose = "each device" if found.n_devices > 1 else "memory"
    yield f"{whose:<34}      GB"
    for part in sorted(found.memory, key=lambda part: -part.n_bytes):
        yield f"  {part.name:<32}{part.n_bytes / 1e9:8.2f}  {part.remark}".rstrip()
    verdict = "fits" if found.fits else "DOES NOT FIT"
    yield (
        f"  {'at its fullest':<32}{found.peak_bytes / 1e9:8.2f}  of {found.capacity_bytes / 1e9:.1f}: "
        f"{verdict}"
    )
    yield ""
    yield (
        f"Micro-batches of {found.micro_batch_tokens:,} tokens; the fullest feeds "
        f"{found.fullest_micro_batch:,}. {_largest_said(found)}"
    ).rstrip()
    if found.changes:
        yield ""
        yield "What would help                                          peak, GB   less, GB"
        for change in found.changes:
            mark = "fits" if change.fits else ""
            yield (
                f"  {change.setting:<55}{change.peak_bytes / 1e9:8.2f}"
                f"{change.saves_bytes / 1e9:11.2f}  {mark:<5}{change.remark}"
            ).rstrip()
    elif not found.fits and found.largest_micro_batch_tokens is not None:
        yield "No single setting makes it fit: take a smaller model, shorter rows or more memory."
    if found.time is not None:
        yield ""
        yield from _time_said(found.time)
    for remark in found.remarks:
        yield f"Note: {remark}."


def _largest_said(found: Plan) -> str:
    most = found.largest_micro_batch_tokens
    if most is None:
        return ""
    if most == 0:
        return "Not even one row of the usual length fits."
    return f"Up to about {most:,} would fit."


def _time_said(time: TimePlan) -> Iterator[str]:
    usd = "" if time.usd is None else f", ${time.usd:,.2f}"
    yield (
        f"Time: {duration_said(time.seconds)}{usd} for {time.optimizer_steps:,} steps "
        f"({time.tokens_fed:,.0f} tokens, {time.tokens_per_s:,.0f} a second, "
        f"{time.operations:.2g} operations)"
    )
    yield f"  {time.source}"


def duration_said(s: float) -> str:
    """Seconds as people say them."""
    if s < 120:
        return f"{s:.0f} s"
    if s < 7200:
        return f"{s / 60:.0f} min"
    return f"{s / 3600:.1f} h"

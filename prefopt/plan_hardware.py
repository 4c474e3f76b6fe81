"""`8xH100-80GB` or `cpu` -> devices with their memory and what their vendor says of their speed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class GPU(NamedTuple):
    """What the vendor says of one kind of GPU."""

    memory_gb: float  # of 1e9 bytes, as sold
    tflops: float  # dense bfloat16 products with float32 sums; float16 where there is no bfloat16
    gb_per_s: float  # of its memory


KNOWN_GPUS = {
    "B200-180GB": GPU(180, 2250, 8000),
    "H200-141GB": GPU(141, 989, 4800),
    "H100-80GB": GPU(80, 989, 3350),
    "A100-80GB": GPU(80, 312, 2039),
    "A100-40GB": GPU(40, 312, 1555),
    "MI300X-192GB": GPU(192, 1307, 5300),
    "L40S-48GB": GPU(48, 362, 864),
    "A6000-48GB": GPU(48, 155, 768),
    "L4-24GB": GPU(24, 121, 300),
    "A10G-24GB": GPU(24, 70, 600),
    "RTX5090-32GB": GPU(32, 210, 1792),
    "RTX4090-24GB": GPU(24, 165, 1008),
    "RTX3090-24GB": GPU(24, 71, 936),
    "V100-32GB": GPU(32, 125, 900),
    "T4-16GB": GPU(16, 65, 320),
}
"""From the data sheets of NVIDIA and AMD, without sparsity."""


@dataclass(frozen=True)
class Devices:
    """What a configuration is planned for.

    Args:
        name: as it is shown.
        count: how many.
        is_gpu: whether they are GPUs.
        memory_bytes: of each.
        tflops: 1e12 operations a second of each at best, None where nobody says.
        gb_per_s: 1e9 bytes a second of its memory, None where nobody says.
        here: whether it is this machine's own device, so that it can be measured.
    """

    name: str
    count: int
    is_gpu: bool
    memory_bytes: float
    tflops: float | None = None
    gb_per_s: float | None = None
    here: bool = False


def parse_devices(text: str) -> Devices:
    """Read "cpu", "cpu-64GB", "auto" (this machine), "H100-80GB", "8xA100-40GB" or "4x80GB".

    Raises:
        ValueError: nothing of the kind; the message lists the known GPUs.
    """
    said = text.strip()
    if said.lower() in ("auto", "cpu"):
        return _this_machine(said.lower())
    found = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(.+)", said)
    count, name = (int(found[1] or 1), found[2].strip()) if found else (0, "")
    on_cpu = re.fullmatch(r"cpu-(\d+(?:\.\d+)?)GB", name, re.IGNORECASE)
    if on_cpu and count == 1:
        return Devices(f"CPU, {on_cpu[1]} GB", 1, False, float(on_cpu[1]) * 1e9)
    if count >= 1:
        bare = re.fullmatch(r"(\d+(?:\.\d+)?)GB", name, re.IGNORECASE)
        if bare and float(bare[1]) > 0:
            return Devices(f"a GPU of {bare[1]} GB", count, True, float(bare[1]) * 1e9)
        known = [k for k in KNOWN_GPUS if name.lower() in (k.lower(), k.split("-")[0].lower())]
        if known:
            gpu = KNOWN_GPUS[known[0]]
            return Devices(known[0], count, True, gpu.memory_gb * 1e9, gpu.tflops, gpu.gb_per_s)
    raise ValueError(
        f"gpus must be like 8xH100-80GB, 4x48GB (any GPU of that memory), cpu, cpu-64GB or auto, got "
        f"{text!r}. Known by name: {', '.join(KNOWN_GPUS)}."
    )


def _this_machine(asked: str) -> Devices:
    import torch

    if asked == "auto" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known = next((g for k, g in KNOWN_GPUS.items() if k.split("-")[0] in properties.name), None)
        return Devices(
            properties.name,
            torch.cuda.device_count(),
            True,
            float(properties.total_memory),
            known.tflops if known else None,
            known.gb_per_s if known else None,
            here=True,
        )
    return Devices("this machine's CPU", 1, False, _memory_here(), here=True)


def _memory_here() -> float:
    """What this process may use: the machine's memory, or less where a container limits it."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(float(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found)

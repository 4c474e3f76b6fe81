"""Prompts -> candidates in shards: `sample_candidates`, a shard at a time, on one machine or many.

An answer depends on the seed, its prompt and its number, so it does not matter where it is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefopt.data.prompts import stream_prompts
from prefopt.data.rows import Source
from prefopt.data.shards import Shards, cut_into_shards, kind_of, open_shards
from prefopt.models import Device, adapter_fingerprint, model_fingerprint
from prefopt.sampling.candidates import sample_candidates
from prefopt.sampling.sampler import is_remote, load_sampler
from prefopt.sampling.settings import SamplingSettings
from prefopt.scale.settings import ScaleSettings
from prefopt.scale.shard_map import Made, Output, map_shards, opened_engine
from prefopt.types import Candidate, Prompt


@dataclass(frozen=True)
class SampleWork:
    """Samples K answers to each prompt of a shard; the arguments are those of `sample_shards`."""

    model: str
    adapter: str | None
    k: int
    sampling: SamplingSettings
    seed: int
    device: Device

    def open(self) -> Callable[[list[Prompt]], Mapping[str, Made]]:
        """Load the model."""
        sampler = load_sampler(self.model, adapter=self.adapter, device=self.device)

        def sample(prompts: list[Prompt]) -> Mapping[str, Made]:
            answers = sample_candidates(
                prompts, sampler, k=self.k, settings=self.sampling, seed=self.seed, progress=False
            )
            return {"candidates": Made(answers)}

        return sample


def sample_shards(
    prompts: Source,
    out: str | Path,
    model: str,
    *,
    adapter: str | None = None,
    k: int = 4,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    device: Device = "auto",
    scale: ScaleSettings | None = None,
    progress: bool = True,
) -> Shards[Candidate]:
    """Sample K answers to each prompt into a folder of shards, resumable.

    The answers, shard after shard, are those of `sample_candidates` called with all prompts at once,
    but for rounding, since other prompts share their batches.

    Args:
        prompts: whatever `load_prompts` reads; files, folders of Parquet files and folders of shards
            are read piece by piece. What is no folder of shards is written as one to `<out>/prompts`.
        out: the folder.
        model: "demo", a folder or a Hub id; "vllm:<model>" for vLLM.
        adapter: a LoRA adapter to sample with.
        k: answers a prompt.
        sampling: how they are sampled.
        seed: of the answers.
        device: where transformers runs.
        scale: how the work is cut and where it is done.
        progress: show a bar with prompts a second and time left.

    Raises:
        ValueError: a model behind an API: a request that was under way when a worker died would be
            made, and paid for, again.
        DataError: prompts that cannot be used, or a damaged shard, by its name.
        RunError: the folder was made with other settings, or is in use.
        ModelError: the model, adapter, device or cluster cannot be used.
    """
    scale, sampling = scale or ScaleSettings(), sampling or SamplingSettings()
    out = Path(out)
    if is_remote(model):
        raise ValueError(
            f"{model} is behind an API, and shards are for models that run on the workers: a request "
            "under way when a worker dies would be paid for twice. Sample from it without --scale."
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    weights = model_fingerprint(model.removeprefix("vllm:"))
    made_from = {
        "model": [model, weights, None if adapter is None else adapter_fingerprint(adapter)],
        "k": k,
        "sampling": sampling,
        "seed": seed,
    }
    asked = prompt_shards(prompts, out / "prompts", scale.shard_size)
    with opened_engine(scale) as engine:
        map_shards(
            asked,
            {"candidates": Output(out, kind_of(Candidate), Candidate)},
            SampleWork(model, adapter, k, sampling, seed, device),
            made_from=made_from,
            engine=engine,
            unit="prompt",
            description="sampling",
            progress=progress,
        )
    return open_shards(out, Candidate)


def prompt_shards(prompts: Source, folder: Path, shard_size: int) -> Shards[Prompt]:
    """Prompts as shards in a folder; a folder of shards is opened as it is.

    Raises:
        DataError: prompts that cannot be used, all at once.
    """
    if isinstance(prompts, str | Path) and (Path(prompts) / "manifest.json").is_file():
        return open_shards(prompts, Prompt)
    return cut_into_shards(stream_prompts(prompts), folder, Prompt, shard_size=shard_size)

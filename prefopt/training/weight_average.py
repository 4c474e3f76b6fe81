"""The mean of the weights along the way takes the place of the last ones, in any Trainer.

    trainer = DPOTrainer(..., callbacks=[WeightAverage()])

Each step moves the weights towards less loss and by the noise of its batch. The noise of many steps
cancels in their mean, so a larger learning rate can be held to the end: use
`lr_scheduler_type="constant_with_warmup"`, since a rate that falls to 0 makes the last weights quiet
and the mean late. In preference tuning noise is paid for: it adds to the KL and brings no reward.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from prefopt.errors import TrainingError

WEIGHT_AVERAGE_FILE = "weight_average.safetensors"


class WeightAverage(transformers.TrainerCallback):
    """The mean of the trained weights after each of a run's last steps (Polyak and Juditsky 1992).

        mean = 1/n sum over the last n optimiser steps of theta,   n = share of all steps, rounded up

    Training goes on from its own weights; evaluations during training see those. When training ends
    the mean is put in their place, so `trainer.model` and what `trainer.save_model` writes have it,
    also where training was stopped early; checkpoints keep the weights to go on from, with the mean
    beside them in `weight_average.safetensors`. Of an adapter only the adapter is averaged: the cost
    is another copy of what trains, in float32. SWA (Izmailov et al. 2018, arXiv:1803.05407) averages
    like this; WARP (Ramé et al. 2024, arXiv:2406.16768) averages over the trajectory in RLHF.

    Args:
        share: of the run's steps, in (0, 1].

    Raises:
        ValueError: `share` is out of range; the best checkpoint is loaded at the end, which excludes
            a mean; weights are sharded (FSDP, ZeRO-3).
        TrainingError: a resumed checkpoint has no mean, or one of other weights.
    """

    def __init__(self, *, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ValueError(
                f"WeightAverage: share is the part of the run's steps that are averaged, in (0, 1]; "
                f"got {share!r}."
            )
        self.share = share
        self.n_averaged = 0
        self._mean: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Refuse what excludes a mean; in a resumed run, take up the one of its checkpoint."""
        if args.load_best_model_at_end:
            raise ValueError(
                "WeightAverage puts the mean of the last steps in place of the model, and "
                "load_best_model_at_end another checkpoint. Use one of them."
            )
        if is_deepspeed_zero3_enabled() or getattr(args, "fsdp", None):
            raise ValueError(
                "WeightAverage needs whole weights on every process, not sharded ones (FSDP, ZeRO-3)."
            )
        self.n_averaged, self._mean = 0, {}
        if state.global_step > self._skipped(state):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._read(folder / WEIGHT_AVERAGE_FILE, _trained(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take in the weights after this step, once the averaged steps have begun."""
        if state.global_step <= self._skipped(state):
            return
        self.n_averaged += 1
        with torch.no_grad():
            for name, weight in _trained(model).items():
                now = weight.detach().float()
                if name in self._mean:
                    self._mean[name].lerp_(now, 1 / self.n_averaged)
                else:
                    self._mean[name] = now.clone()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the mean so far beside the checkpoint."""
        if not self._mean or not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WEIGHT_AVERAGE_FILE
        partial = path.with_suffix(".partial")
        tensors = {name: mean.cpu().contiguous() for name, mean in self._mean.items()}
        safetensors.torch.save_file(tensors, partial, {"n_averaged": str(self.n_averaged)})
        partial.replace(path)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Put the mean in the model; a run that ended before the averaged steps keeps its weights."""
        with torch.no_grad():
            for name, weight in _trained(model).items():
                if name in self._mean:
                    weight.copy_(self._mean[name])

    def _skipped(self, state: Any) -> int:
        """Steps before the averaged ones."""
        return int(state.max_steps - math.ceil(self.share * state.max_steps))

    def _read(self, path: Path, trained: dict[str, Tensor]) -> None:
        try:
            with safetensors.safe_open(path, "pt") as file:
                self.n_averaged = int((file.metadata() or {})["n_averaged"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise TrainingError(
                f"WeightAverage goes on from the mean of the checkpoint, and {path} cannot be read "
                f"({error}). Put the file back, resume an earlier checkpoint, or leave the callback "
                "out."
            ) from error
        if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in trained.items()}:
            raise TrainingError(
                f"{path} is the mean of other weights than those that train now. Resume with the "
                "model and adapter of the checkpoint."
            )
        self._mean = {name: found[name].to(trained[name].device) for name in trained}


def _trained(model: Any) -> dict[str, Tensor]:
    """The weights that train, by name; the same with and without a wrapper of several processes."""
    return {
        name.removeprefix("module."): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }

"""Checkpoints that do not depend on how many processes wrote them, or on what each held.

A checkpoint of a sharded training is that of one process: one file of weights, one of optimiser
states, both whole. So any number of processes may go on from it, sharded or not.
`transformers.Trainer` would write shares, for as many processes in the same arrangement.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers

from prefopt.errors import TrainingError
from prefopt.training.checkpoints import checkpoint_written, seal_checkpoint
from prefopt.training.sharding import (
    Sharding,
    keep_outputs_whole,
    load_optimizer_state,
    read_whole,
    sharding_of,
    whole_optimizer_state,
    whole_weights,
)

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


class WholeCheckpoints(transformers.Trainer):
    """A trainer's saving and reading, for whatever arrangement its processes are in.

    Where nothing is sharded all is as in `transformers.Trainer`.
    """

    is_fsdp_enabled: Any
    _trained_groups: list[dict[str, Any]]

    def _set_up_sharding(self) -> Sharding:
        """What is shared between processes; call it once, when the trainer is made.

        Raises:
            ValueError: an arrangement that is not supported, or settings that need another one.
        """
        sharding = sharding_of(self.accelerator)
        keep_outputs_whole(self.accelerator)
        if sharding.gradients and self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would read weights into a model that is sharded. Leave it "
                "out, and load what trainer.state.best_model_checkpoint names afterwards."
            )
        self.sharding = sharding
        return sharding

    def create_optimizer(self, model: Any = None) -> Any:
        """As the base class's; what it trains is remembered before it is sharded."""
        optimizer = super().create_optimizer(model)
        if self.sharding.gradients:
            self._trained_groups = [
                {**group, "params": list(group["params"])} for group in optimizer.param_groups
            ]
        return optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if not self.sharding.gradients or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # While the weights are whole, they are read like those of one process.
        fsdp: bool = self.is_fsdp_enabled
        self.is_fsdp_enabled = False
        try:
            with read_whole():
                self._load_from_checkpoint(resume_from_checkpoint)
        finally:
            self.is_fsdp_enabled = fsdp
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        folder = Path(resume_from_checkpoint)
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        load_optimizer_state(self.optimizer, state, self._trained_groups)
        schedule = torch.load(folder / _SCHEDULER, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(self._schedule_of_groups(schedule, whole=False))
        return prepared

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the base class, and sealed: damage shows, and a power cut leaves a whole one or none.

        Raises:
            DataError: the disk is full, read-only or broken.
        """
        folder = Path(self._get_output_dir(trial=trial))
        with checkpoint_written(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its random numbers' state
            if self.args.should_save:
                seal_checkpoint(folder / f"checkpoint-{self.state.global_step}")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the base class; a gradient that is no number never reaches the weights.

        Raises:
            TrainingError: it is not finite. A loss scaler skips such steps by itself.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            step = self.state.global_step
            raise TrainingError(
                f"the gradient is not finite at step {step + 1} (its norm is {float(norm)}) though "
                f"the loss is; the weights are as they were after step {step}. Lower the learning "
                "rate, train in float32, or look at the rows of this step; with other settings the "
                "training begins anew."
            )
        return norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharding.gradients:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer, self._trained_groups)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            schedule = self._schedule_of_groups(self.lr_scheduler.state_dict(), whole=True)
            torch.save(schedule, Path(output_dir) / _SCHEDULER)

    def _schedule_of_groups(self, schedule: dict[str, Any], *, whole: bool) -> dict[str, Any]:
        """A scheduler's state with the groups of no parameters, which ZeRO leaves out, or without."""
        present = [bool(group["params"]) for group in self._trained_groups]
        if len(self.optimizer.param_groups) == len(present):
            return schedule
        found = dict(schedule)
        for name, value in schedule.items():
            if not isinstance(value, list):
                continue
            if whole and len(value) == sum(present):
                kept = iter(value)
                found[name] = [next(kept) if there else value[0] for there in present]
            elif not whole and len(value) == len(present):
                found[name] = [one for one, there in zip(value, present, strict=True) if there]
        return found

    @property
    def _rows_of_training(self) -> int | None:
        """How many rows an epoch has, where its last batches are filled up."""
        rows = self.train_dataset
        return (
            len(rows) if hasattr(rows, "__len__") and not self.args.dataloader_drop_last else None
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or its adapter, whole; all processes must call it."""
        if not self.sharding.gradients:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.whole_weights()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=weights)

    def whole_weights(self) -> dict[str, Any] | None:
        """What a save of the model takes, or None where it holds all of it; all must call it.

        Of a model with adapters that is the adapters.
        """
        if not self.sharding.gradients:
            return None
        return whole_weights(self.model, self._is_saved, keep=self.args.should_save)

    def _is_saved(self, name: str, parameter: Any) -> bool:
        """Whether a parameter is in what is saved: with adapters, those alone."""
        adapted = hasattr(self.model, "peft_config")
        return not adapted or parameter.requires_grad or "lora_" in name

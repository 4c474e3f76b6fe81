"""The progress bar of a training, as a callback of any Trainer.

Reads the trainer's state and logs; changes neither. The bar itself is `prefopt.progress`'s.
"""

from __future__ import annotations

import math
from typing import Any, Self

import transformers

from prefopt.progress import progress_bar


class ProgressBar(transformers.TrainerCallback):
    """Rows a second, loss, margin, held-out accuracy and time left, in prefopt's own bar.

    Shown by the main process only; a resumed run's bar starts where the run does. In
    `prefopt.DPOTrainer` it takes the place of the Trainer's own bar and printed logs; elsewhere
    `attach` does that.

    Args:
        description: the bar's label.
        unit: what a row of the data set is called.
        show: False counts silently.
    """

    def __init__(
        self, *, description: str = "training", unit: str = "pair", show: bool = True
    ) -> None:
        self.description, self.unit, self.show = description, unit, show
        self._bar: Any = None
        self._rows_a_step = 0.0
        self._notes: dict[str, str] = {}

    def attach(self, trainer: Any) -> Self:
        """Show this bar in `trainer` instead of its own bar and printed logs."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.ProgressCallback)
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Open the bar, filled up to the step that the run continues from."""
        self._close()
        self._notes.clear()
        self._rows_a_step = _rows_a_step(args, train_dataloader)
        self._bar = progress_bar(
            total=round(state.max_steps * self._rows_a_step),
            initial=round(state.global_step * self._rows_a_step),
            description=self.description,
            unit=self.unit,
            show=self.show and state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on by the rows of one optimiser step."""
        if self._bar is not None:
            self._bar.update(round(state.global_step * self._rows_a_step) - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest loss, margin and held-out accuracy."""
        if self._bar is None or not logs:
            return
        shown = {
            "loss": "loss {:.3f}",
            "rewards/margins": "margin {:.2f}",
            "objective/scores": "score {:.2f}",
            "objective/kl": "KL {:.1f}",
            "eval_rewards/accuracies": "held-out {:.0%}",
        }
        self._notes.update({k: text.format(logs[k]) for k, text in shown.items() if k in logs})
        self._bar.set_postfix_str(", ".join(self._notes[k] for k in shown if k in self._notes))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _rows_a_step(args: Any, dataloader: Any) -> float:
    """Rows of all processes that one optimiser step takes, on average over an epoch."""
    full = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    try:
        n_rows, n_batches = len(dataloader.dataset), len(dataloader)
    except (TypeError, AttributeError):  # a stream has no length, so its last batch is not known
        return float(full)
    steps = math.ceil(n_batches / args.gradient_accumulation_steps)
    return float(min(full, n_rows / max(1, steps)))

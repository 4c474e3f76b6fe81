"""SFT with a LoRA adapter: prefopt's step against TRL's, on the same token ids in one process.

    python benchmarks/speed_sft.py                      # the demo model, about 3 minutes on one core

Both run TRL's loop on the same rows in the same order; only the step differs. Reported is the CPU time
of a step (the median of all but the first) as a ratio, for TRL's micro-batches of 2, 4 and 8 rows, and
how far the losses are apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
import trl

from prefopt.data.demonstrations import Demonstration
from prefopt.data.prompts import load_prompts, plain_texts
from prefopt.models import LoRASettings, load_model, lora_config
from prefopt.training import sft
from prefopt.training.sft_trainer import token_columns

ROWS_A_STEP = 16


class StepTimes(transformers.TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start."""
        self._started = time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop."""
        self.seconds.append(time.process_time() - self._started)


def demonstrations(n: int) -> list[Demonstration]:
    """Everyday prompts, answered by pieces of prose of 8 to 60 words."""
    words = " ".join(plain_texts()).split()
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for prompt in load_prompts("everyday")[:n]:
        length = draw(8, 60)
        start = draw(0, len(words) - length)
        text = " ".join(words[start : start + length])
        rows.append(Demonstration(prompt=prompt, text=text, source="benchmark"))
    return rows


def measure(model: str, rows: list[Demonstration], micro_batch: int | None) -> tuple[float, float]:
    """Median CPU seconds of a step and the mean loss; `micro_batch` None is prefopt's step."""
    loaded = load_model(model, device="cpu")
    tokenized = sft._tokenized(rows, loaded.tokenizer, 1024)
    settings = sft.SFTSettings(batch_size=ROWS_A_STEP)
    with tempfile.TemporaryDirectory() as folder:
        if micro_batch is None:
            trainer = sft._make_trainer(
                loaded, tokenized, settings, LoRASettings(), Path(folder), False
            )
            trainer.args.save_strategy = "no"
        else:
            trainer = trl.SFTTrainer(
                model=loaded.model,
                args=trl.SFTConfig(
                    output_dir=folder, max_length=None, use_cpu=True, bf16=False,
                    gradient_checkpointing=False, report_to="none", disable_tqdm=True,
                    learning_rate=2e-4, num_train_epochs=1, logging_steps=1, save_strategy="no",
                    per_device_train_batch_size=micro_batch,
                    gradient_accumulation_steps=ROWS_A_STEP // micro_batch,
                    warmup_steps=0.1, lr_scheduler_type="cosine", seed=0,
                ),
                train_dataset=datasets.Dataset.from_list([token_columns(r) for r in tokenized]),
                processing_class=loaded.tokenizer,
                peft_config=lora_config(LoRASettings()),
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
        times = StepTimes()
        trainer.add_callback(times)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return statistics.median(times.seconds[1:]), statistics.mean(losses)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    rows = demonstrations(ROWS_A_STEP * options.steps)
    tokenized = sft._tokenized(rows, load_model(options.model).tokenizer, 1024)
    prompt = statistics.mean(len(row.prompt_ids) for row in tokenized)
    answer = statistics.mean(len(row.answer_ids) for row in tokenized)
    print(f"{len(rows)} rows, {prompt:.0f} tokens a prompt, {answer:.0f} an answer, ", end="")
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, trl {trl.__version__}")
    ours, our_loss = measure(options.model, rows, None)
    print(f"prefopt: {ours:.1f} CPU s a step, mean loss {our_loss:.4f}")
    for size in (2, 4, 8):
        theirs, loss = measure(options.model, rows, size)
        print(
            f"TRL, micro-batches of {size}: {theirs:.1f} CPU s a step, {theirs / ours:.2f} times "
            f"prefopt's; mean loss {loss:.4f}"
        )


if __name__ == "__main__":
    main()

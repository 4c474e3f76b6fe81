"""An adapter folder -> what PEFT, vLLM and llama.cpp would say to it, before any of them is started.

In: `adapter_config.json` and the names and shapes in `adapter_model.safetensors`. Out: `AdapterCheck`.
It loads no weights and imports none of the three; their rules are written down here with where they
come from.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from prefopt.errors import DataError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank (`MaxLoRARanks` in vllm/config/lora.py)."""

VLLM_DEFAULT_RANK = 16
"""What --max-lora-rank is where it is not given."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_LORA_WEIGHT = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_BASE_WEIGHT = re.compile(r"\.(embed_tokens|lm_head)\.base_layer\.weight$")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva")


class AdapterCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in an adapter folder, and for each reader what keeps it from being served.

    Fields:
        folder: of the adapter.
        base_model: the base model's name or folder as the adapter has it.
        rank: of the update; the largest one where layers differ.
        scale: what the update is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA.
        modules: the last names of the layers it changes ("q_proj").
        n_layers: how many layers it changes.
        peft, vllm, llama_cpp: problems, each with what to do; empty where it loads and computes what
            it was trained to.
        notes: what is worth knowing and stops nobody.
    """

    folder: str
    base_model: str
    rank: int
    scale: float
    modules: tuple[str, ...]
    n_layers: int
    peft: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    llama_cpp: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The least --max-lora-rank that vLLM has to be started with; None where none is enough."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    def to_text(self) -> str:
        """For the terminal: what it is, who takes it, and how vLLM is started with it."""
        lines = [
            f"{self.folder}: rank {self.rank}, scale {self.scale:g}, {self.n_layers} layers "
            f"({', '.join(self.modules)})",
            f"base model: {self.base_model}",
        ]
        readers = (("PEFT", self.peft), ("vLLM", self.vllm), ("llama.cpp", self.llama_cpp))
        for name, problems in readers:
            lines.append(f"{name}: {'takes it' if not problems else 'does not take it'}")
            lines += [f"  - {problem}" for problem in problems]
        lines += [f"note: {note}" for note in self.notes]
        if not self.vllm:
            lines.append(
                f"vllm serve {shlex.quote(self.base_model)} --enable-lora --max-lora-rank "
                f"{self.vllm_max_lora_rank} --lora-modules {shlex.quote('tuned=' + self.folder)}"
            )
        return "\n".join(lines)


def check_adapter(folder: str | Path) -> AdapterCheck:
    """Read an adapter folder and say who can serve it.

    The rules are PEFT 0.21's format; vLLM's `PEFTHelper` (vllm/lora/peft_helper.py: no DoRA, no
    `modules_to_save`, no bias, one scale for all layers, r at most --max-lora-rank) and
    `parse_fine_tuned_lora_name` (vllm/lora/utils.py: names that end in lora_A.weight or
    lora_B.weight); and llama.cpp's convert_lora_to_gguf.py (no other weights) and llama-adapter.h
    (scale alpha / r, with each layer's own r).

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        DataError: there is no adapter, or its files cannot be read; all of it at once.
    """
    path = Path(folder)
    config = _config(path)
    shapes = _shapes(path / _WEIGHTS)
    rank = int(config["r"])
    alpha = float(config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    other = []
    for name, shape in shapes.items():
        found = _LORA_WEIGHT.match(name)
        if found:
            sides.setdefault(found["module"], {})[found["side"]] = shape
        elif not _BASE_WEIGHT.search(name):
            other.append(name)
    peft = _peft_problems(sides, rank, config)
    ranks = {shape[0] for side in sides.values() for key, shape in side.items() if key == "A"}
    largest = max(ranks, default=rank)
    vllm, llama_cpp = _reader_problems(config, other, largest)
    notes = _notes(config, sides, largest, vllm)
    return AdapterCheck(
        folder=str(folder),
        base_model=str(config.get("base_model_name_or_path") or "not stated"),
        rank=largest,
        scale=scale,
        modules=tuple(sorted({module.rpartition(".")[2] for module in sides})),
        n_layers=len(sides),
        peft=tuple(peft),
        vllm=tuple(peft + vllm),
        llama_cpp=tuple(peft + llama_cpp),
        notes=tuple(notes),
    )


def _config(folder: Path) -> dict[str, Any]:
    problems = []
    config: Any = {}
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            problems.append(f"{_CONFIG} holds {type(config).__name__}, not settings by name")
    except FileNotFoundError:
        problems.append(f"there is no {_CONFIG}")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{_CONFIG} cannot be read: {error}")
    if not (folder / _WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        problems.append(
            f"there is no {_WEIGHTS}"
            + (", only adapter_model.bin, a pickle that is not opened here" if pickled else "")
        )
    if isinstance(config, dict) and (config or not problems):
        kind = config.get("peft_type")
        if kind != "LORA":
            problems.append(f"peft_type is {kind!r}, and only LORA is known here")
        for name in ("r", "lora_alpha"):
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                problems.append(f"{name} in {_CONFIG} must be a positive number, got {value!r}")
            elif not math.isfinite(value) or (name == "r" and value != int(value)):
                problems.append(f"{name} in {_CONFIG} cannot be {value!r}")
    if problems:
        raise DataError(
            f"{folder} is no adapter that can be checked. Give the folder that `prefopt train` or "
            "save_pretrained wrote.",
            problems,
        )
    assert isinstance(config, dict)
    return config


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. It may be cut short; copy or train it again."
        ) from error


def _peft_problems(
    sides: Mapping[str, Mapping[str, tuple[int, ...]]], rank: int, config: Mapping[str, Any]
) -> list[str]:
    problems = []
    if not sides:
        problems.append(
            "it holds no LoRA weights: no name has the form base_model.model.LAYER.lora_A.weight"
        )
    single = [module for module, side in sides.items() if set(side) != {"A", "B"}]
    if single:
        problems.append(f"{len(single)} layer(s) have only one of lora_A and lora_B: {single[0]}")
    patterned = bool(config.get("rank_pattern"))
    uneven = [
        module
        for module, side in sides.items()
        if set(side) == {"A", "B"}
        and (side["A"][0] != side["B"][1] or (side["A"][0] != rank and not patterned))
    ]
    if uneven:
        shapes = sides[uneven[0]]
        problems.append(
            f"{len(uneven)} layer(s) have shapes that do not fit r = {rank}: {uneven[0]} has A "
            f"{shapes['A']} and B {shapes['B']}"
        )
    return problems


def _reader_problems(
    config: Mapping[str, Any], other: list[str], rank: int
) -> tuple[list[str], list[str]]:
    """What vLLM and llama.cpp's converter refuse, or would take and compute wrongly."""
    merge = "merge it: prefopt merge"
    both = []
    if config.get("use_dora"):
        both.append(f"it is a DoRA adapter; {merge}")
    if config.get("modules_to_save"):
        saved = config["modules_to_save"]
        names = ", ".join(map(str, saved)) if isinstance(saved, list) else str(saved)
        both.append(f"whole layers are saved beside the update (modules_to_save: {names}); {merge}")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        both.append(f"biases were trained; {merge} (needs layers that have one)")
    if config.get("trainable_token_indices"):
        both.append(f"embeddings of single tokens were trained; {merge}")
    initial = str(config.get("init_lora_weights", "")).lower()
    if initial.startswith(_CHANGES_BASE):
        both.append(
            f"init_lora_weights={initial!r} changes the base model's weights, so on the plain base "
            "it is another model; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("alpha_pattern"):
        both.append(f"layers have scales of their own, and only one is read; {merge}")
    explained = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
    if other and not any(config.get(name) for name in explained):
        both.append(
            f"{len(other)} weight(s) are no part of a LoRA update, such as {other[0]}; {merge}"
        )
    vllm, llama_cpp = list(both), list(both)
    if config.get("rank_pattern"):
        vllm.append(
            "layers have ranks of their own; vLLM releases before rank_pattern was read give all of "
            f"them one scale, without a word; {merge}"
        )
        if config.get("use_rslora"):
            llama_cpp.append(f"layers have ranks of their own under rsLoRA's scale; {merge}")
    if rank > VLLM_RANKS[-1]:
        vllm.append(f"its rank is {rank}, and --max-lora-rank ends at {VLLM_RANKS[-1]}; {merge}")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        vllm.append(
            f"task_type is {config['task_type']}; only a language model's adapter answers requests"
        )
    return vllm, llama_cpp


def _notes(
    config: Mapping[str, Any], sides: Mapping[str, object], rank: int, vllm: list[str]
) -> list[str]:
    notes = []
    ends = {module.rpartition(".")[2] for module in sides} & {"lm_head", "embed_tokens"}
    if ends and not vllm:
        notes.append(
            f"{' and '.join(sorted(ends))} changed too: vLLM takes that for models only that name "
            "`embedding_modules`"
        )
    if rank > VLLM_DEFAULT_RANK and not vllm:
        notes.append(
            f"vLLM's --max-lora-rank is {VLLM_DEFAULT_RANK} by default, and this adapter has {rank}"
        )
    if config.get("use_rslora"):
        notes.append(
            "rsLoRA: llama.cpp reads alpha / r, so `prefopt gguf` writes an alpha that gives the "
            "same scale"
        )
    base = str(config.get("base_model_name_or_path") or "")
    if base.startswith(("/", ".", "~")):
        notes.append(
            f"the base model is a folder of this machine ({base}); `prefopt push` puts the Hub's "
            "name there"
        )
    return notes

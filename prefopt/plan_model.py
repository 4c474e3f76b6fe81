"""A model's configuration -> the model without its weights, and what can be counted on it.

Only `config.json` is ever read. The model is built on torch's meta device, where tensors have shapes
and no memory, so a count is the number that the real model has.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from prefopt.errors import ModelError
from prefopt.models import resolve_model_path

# Parameters (billions), layers, hidden size, heads, key-value heads, vocabulary of models that many
# people tune: what a size that comes without a configuration is taken to look like.
_TYPICAL = (
    (0.135, 30, 576, 9, 3, 49152),
    (0.5, 24, 896, 14, 2, 151936),
    (1.2, 16, 2048, 32, 8, 128256),
    (3.2, 28, 3072, 24, 8, 128256),
    (8.0, 32, 4096, 32, 8, 128256),
    (14.0, 40, 5120, 40, 8, 152064),
    (32.0, 64, 5120, 40, 8, 152064),
    (70.0, 80, 8192, 64, 8, 128256),
)


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like model that has no configuration file. What is left out is taken to be typical.

    Args:
        params: how many parameters, as "8B" or "350M".
        layers: decoder layers.
        hidden_size: width of the hidden states.
        heads: attention heads.
        kv_heads: key and value heads; as many as heads without grouped queries.
        vocab_size: entries of the vocabulary.
    """

    params: str
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if _number(self.params) is None:
            problems.append(f"params must be a number like 8B, 1.5B or 350M, got {self.params!r}")
        for name in ("layers", "hidden_size", "heads", "kv_heads", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        if problems:
            raise ValueError("model shape: " + "; ".join(problems) + ".")


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbBtT]?)\s*", text)
    if found is None:
        return None
    value = float(found[1]) * {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(found[2].lower(), 1.0)
    return value if value > 0 else None


def read_config(model: str | ModelShape) -> Any:
    """The transformers configuration of a model; of its files only `config.json` is read.

    Args:
        model: "demo", a folder, a Hub id, or a shape.

    Raises:
        ModelError: no such model, an unreadable file, or no causal language model.
    """
    if isinstance(model, ModelShape):
        return _shaped_config(model)
    from transformers import AutoConfig

    path = resolve_model_path(model)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"cannot read the configuration of {model!r}: {first}. Give a folder with a config.json, "
            "a Hub id that this machine can reach, 'demo', or a size as --params 8B."
        ) from error


def _shaped_config(shape: ModelShape) -> Any:
    """A Llama whose MLP is as wide as it takes to have that many parameters."""
    from transformers import LlamaConfig

    wanted = _number(shape.params)
    assert wanted is not None  # `ModelShape` has checked it
    near = min(_TYPICAL, key=lambda t: max(t[0] * 1e9 / wanted, wanted / (t[0] * 1e9)))
    layers, hidden = shape.layers or near[1], shape.hidden_size or near[2]
    heads = shape.heads or (near[3] if shape.hidden_size is None else max(1, hidden // 64))
    kv_heads = shape.kv_heads or (near[4] if shape.heads is None and heads == near[3] else heads)
    vocabulary = shape.vocab_size or near[5]
    tied = wanted < 2e9  # small models share input and output embeddings
    if hidden % heads or heads % kv_heads:
        raise ModelError(
            f"no such model: {heads} heads must divide the hidden size {hidden}, and {kv_heads} "
            "key-value heads must divide the heads. Give --shape.heads and --shape.kv_heads."
        )
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * kv_heads
    embeddings = vocabulary * hidden * (1 if tied else 2)
    left = (wanted - embeddings) / layers - attention - 2 * hidden
    width = round(left / (3 * hidden) / 8) * 8
    if width < 8:
        raise ModelError(
            f"{shape.params} parameters are too few for {layers} layers of width {hidden} and a "
            f"vocabulary of {vocabulary}: embeddings and attention alone have "
            f"{(embeddings + layers * attention) / 1e9:.2f}B. Give fewer or narrower layers."
        )
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )


def with_layers(config: Any, n: int) -> Any:
    """The same configuration with n layers; what it says layer by layer is cut to as many."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:n])
    text.num_hidden_layers = n
    return config


def meta_model(config: Any, dtype: Any) -> Any:
    """The causal language model of a configuration, its parameters without memory.

    Raises:
        ModelError: it is no causal language model, or transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"transformers builds no causal language model from this {config.model_type!r} "
            f"configuration: {first}."
        ) from error


@dataclass(frozen=True)
class ModelFacts:
    """What a model consists of, counted.

    Args:
        family: transformers' name for the architecture.
        n_layers: decoder layers.
        hidden_size: width of the hidden states.
        vocab_size: rows of the output head.
        n_parameters: all, each once where input and output share them.
        n_input: of the input embeddings.
        n_head: of an output head of its own; 0 where it is the input embeddings.
        n_matrices: weights of the layers that each token is multiplied with; of a mixture of experts
            those of the experts that a token visits.
        n_linear: weights of all linear layers but the output head: what 4-bit loading quantises.
        n_largest: parameters of the largest layer.
        n_heads: attention heads.
        head_dim: width of a head.
        n_kv_heads: key and value heads.
        max_positions: the longest context it is made for, None if the configuration does not say.
    """

    family: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    n_parameters: int
    n_input: int
    n_head: int
    n_matrices: int
    n_linear: int
    n_largest: int
    n_heads: int
    head_dim: int
    n_kv_heads: int
    max_positions: int | None


def count_model(config: Any) -> ModelFacts:
    """Count a model's parts.

    Raises:
        ModelError: see `meta_model`; or the model has no layers that could be told apart.
    """
    import torch

    model = meta_model(config, torch.float32)
    text = config.get_text_config()
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or inputs is None:
        raise ModelError(f"{type(model).__name__} has no output head, so it is no language model.")
    tied = head.weight is inputs.weight
    layers: dict[int, int] = {}
    matrices = linear = 0.0
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    visited = getattr(text, "num_experts_per_tok", None)
    outside = {id(p) for module in (head, inputs) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        place = layer_of(name)
        if place is None or id(parameter) in outside:
            continue
        layers[place] = layers.get(place, 0) + parameter.numel()
        if parameter.dim() < 2:
            continue
        if parameter.dim() == 2:  # experts are often three-dimensional, and stay as they are
            linear += parameter.numel()
        share = 1.0
        if experts and visited and ".experts." in name:
            share = visited / experts
        matrices += share * parameter.numel()
    if not layers:
        raise ModelError(
            f"{type(model).__name__} names no numbered layers, so it cannot be planned."
        )
    n_heads = int(getattr(text, "num_attention_heads", 0) or getattr(text, "n_head", 1))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // n_heads
    return ModelFacts(
        family=str(config.model_type),
        n_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        vocab_size=int(head.weight.shape[0]),
        n_parameters=sum(p.numel() for p in model.parameters()),
        n_input=inputs.weight.numel(),
        n_head=0 if tied else sum(p.numel() for p in head.parameters()),
        n_matrices=int(matrices),
        n_linear=int(linear),
        n_largest=max(layers.values()),
        n_heads=n_heads,
        head_dim=int(head_dim),
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def layer_of(name: str) -> int | None:
    """Which decoder layer a parameter belongs to, by its name; None for those outside of layers."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.", name)
    return None if found is None else int(found[1])

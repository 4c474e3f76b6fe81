"""Reward models <-> transformers' `AutoModelForSequenceClassification` with one label.

What other libraries load as a reward model. Transformers reads its score at the last token that is
not the padding token, so a padding token that can end an answer (in many tokenizers it is the end
token itself) moves the place by one. What is saved here has one that cannot; what is read here is
read where transformers reads it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.chat import end_token_ids
from prefopt.errors import DataError, ModelError
from prefopt.models import (
    Device,
    DType,
    attach_adapter,
    load_classification_adapter,
    load_sequence_classifier,
)
from prefopt.training.checkpoints import whole_folder
from prefopt.training.reward_model import (
    RewardModel,
    freeze_output_head,
    loaded_base,
    new_head,
)
from prefopt.types import Message, Prompt

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|prefopt_pad|>"


def save_sequence_classification(reward: RewardModel, folder: str | Path) -> Path:
    """Save a reward model as an `AutoModelForSequenceClassification` with one label.

        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        score = model(**ids).logits - model.config.score_bias

    The adapter is merged, so scores agree up to rounding. Three things make them the same:

    * transformers' head has no bias: what is subtracted from every score stays beside it, in the
      configuration as `score_bias`, and is no part of the logits. Differences do not need it.
    * The padding token is one that ends no answer; where the tokenizer has none, one is added.
    * The chat template of the folder ends an answer at its end token, where the score was learned,
      and not at what its model's writes after it.

    Raises:
        ModelError: the model has no tokenizer, or transformers no such class for it.
        DataError: the folder cannot be written.
    """
    import copy

    from transformers import AutoModelForSequenceClassification

    if reward.tokenizer is None:
        raise ModelError("a folder for other libraries needs a tokenizer; this model has none.")
    merged = reward.merge()
    model, tokenizer = merged.model, copy.deepcopy(reward.tokenizer)
    _set_padding(model, tokenizer)
    _end_at_end_token(tokenizer, reward)
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.score_bias = float(merged.bias) - float(merged.head.bias.detach())
    config.score_read_at = reward.reads_at
    try:
        # On the meta device: no weight is made that is replaced at once.
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classification model for {type(model).__name__}: {error}"
        ) from error
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.score = nn.Linear(merged.head.in_features, 1, bias=False)
    classifier.score.weight = nn.Parameter(merged.head.weight.detach().to(model.dtype))
    if not torch.equal(classifier.score.weight.float(), merged.head.weight):
        logger.warning("the head is rounded to %s, in which the model's weights are", model.dtype)
    folder = Path(folder)
    with whole_folder(folder) as temporary:
        classifier.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _set_padding(model: Any, tokenizer: Any) -> None:
    """A padding token that ends no answer, and a row of the embedding for it."""
    ends = end_token_ids(tokenizer, model.generation_config)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "right"


def _end_at_end_token(tokenizer: Any, reward: RewardModel) -> None:
    """Cut off what the chat template writes after an answer's end token."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or reward.reads_at != "end_token":
        return
    prompt = Prompt.from_text("What is the colour of the sky?")
    ours = sum(reward.tokenize(prompt, "Blue."), ())
    surplus = len(tokenizer.decode(_whole_ids(tokenizer, prompt, "Blue.")[len(ours) :]))
    if surplus:
        tokenizer.chat_template = (
            "{%- set whole -%}" + template + "{%- endset -%}"
            "{%- if messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}"
            f"{{{{- whole[:-{surplus}] -}}}}{{%- else -%}}{{{{- whole -}}}}{{%- endif -%}}"
        )
    theirs = _whole_ids(tokenizer, prompt, "Blue.")
    if theirs != ours:
        tokenizer.chat_template = template
        logger.warning(
            "the chat template ends an answer with %r, and the score is read at %r. Give other "
            "libraries token ids that end there.",
            tokenizer.decode(theirs[-5:]),
            tokenizer.decode(ours[-5:]),
        )


def load_sequence_classification(
    name: str,
    *,
    base: Any = None,
    adapter_name: str = "reward",
    device: Device = "auto",
    dtype: DType = "auto",
    trainable: bool = False,
) -> RewardModel:
    """Read a sequence classification model with one label, or an adapter for one, as `RewardModel`.

    Its scores are the logits that transformers gives for the whole conversation by its own chat
    template (a text and its end token where there is none), less the `score_bias` of its
    configuration where `save_sequence_classification` wrote one.

    Raises:
        ModelError: no such model, or more labels than one.
    """
    if (Path(name) / "adapter_config.json").is_file():
        saved = load_classification_adapter(name)
        model, tokenizer = loaded_base(base or saved.base, device, dtype)
        model = attach_adapter(model, name, name=adapter_name, trainable=trainable)
        head = new_head(model)
        _set_head(head, saved.head, name)
        head.weight.requires_grad_(trainable)
        return RewardModel(
            model, head, saved.tokenizer or tokenizer, adapter=adapter_name, base=saved.base,
            reads_at="template_end",
        )  # fmt: skip
    if base is not None:
        raise ModelError(f"{name} holds a whole model, which takes no base.")
    classifier, tokenizer = load_sequence_classifier(name, device=device, dtype=dtype)
    config = classifier.config
    model = _causal_model(classifier)
    model.requires_grad_(trainable)
    freeze_output_head(model)
    head = new_head(model)
    weights = {n: w for n, w in classifier.score.state_dict().items()}
    _set_head(head, weights, name)
    head.weight.requires_grad_(trainable)
    return RewardModel(
        model, head, tokenizer, base=name, bias=float(getattr(config, "score_bias", 0.0)),
        reads_at=getattr(config, "score_read_at", "template_end"),
    )  # fmt: skip


def _set_head(head: nn.Linear, weights: dict[str, torch.Tensor], name: str) -> None:
    weight = weights["weight"]
    if tuple(weight.shape) != tuple(head.weight.shape):
        raise ModelError(
            f"{name} has a head of shape {tuple(weight.shape)}; a reward model has one label, "
            f"{tuple(head.weight.shape)}."
        )
    with torch.no_grad():
        head.weight.copy_(weight.float())
        if "bias" in weights:
            head.bias.copy_(weights["bias"].float())


def _causal_model(classifier: Any) -> Any:
    """A causal language model around a classifier's body: what trees are scored with.

    Its output head is the embedding where they are tied and else made up: no score depends on it.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(classifier.config)
    setattr(model, model.base_model_prefix, classifier.base_model)
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        weight = classifier.get_input_embeddings().weight
        head.to_empty(device=weight.device).to(weight.dtype)
        nn.init.normal_(head.weight, std=0.02)
        if getattr(head, "bias", None) is not None:
            nn.init.zeros_(head.bias)
        model.tie_weights()
    model.eval()
    return model


def template_ids(
    tokenizer: Any, config: Any, prompt: Prompt, text: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and answer as transformers' sequence classification reads them, up to the place it reads.

    The answer's part is what lies behind the prompt's own ids; the last of them is the last that is
    not the configuration's padding token.

    Raises:
        DataError: nothing is left of the answer.
    """
    whole = _whole_ids(tokenizer, prompt, text)
    pad = config.get_text_config().pad_token_id
    end = len(whole)
    while end > 0 and whole[end - 1] == pad:
        end -= 1
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if getattr(tokenizer, "chat_template", None):
        alone = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        alone = alone["input_ids"]
    else:
        alone = tokenizer("\n".join(m.content for m in prompt.messages))["input_ids"]
    n = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    n = min(n, end - 1)
    if n < 1:
        raise DataError(f"prompt {prompt.prompt_id} and its answer leave no tokens to score.")
    return whole[:n], whole[n:end]


def _whole_ids(tokenizer: Any, prompt: Prompt, text: str) -> tuple[int, ...]:
    if getattr(tokenizer, "chat_template", None):
        turns = [
            {"role": m.role, "content": m.content}
            for m in (*prompt.messages, Message("assistant", text))
        ]
        return tuple(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"])
    plain = "\n".join(m.content for m in prompt.messages) + text
    return tuple(tokenizer(plain + (tokenizer.eos_token or ""))["input_ids"])

"""A causal language model with a linear head at the end of an answer: the reward model.

    score(x, y) = w . h(x, y)  - bias,      h: hidden state at the last token of y, after the last norm

(Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155). The head is float32
and lies beside the model, not inside its adapter, so that one base model can carry several roles.
Where an answer ends is known from its position and never looked for by token id, so answers may hold
the padding token and a batch may be padded or not.

Knows nothing of preferences, losses or training loops.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.chat import tokenize_answer
from prefopt.errors import DataError, ModelError
from prefopt.models import (
    SAFE,
    Device,
    DType,
    LanguageModel,
    attach_adapter,
    load_adapter_weights,
    load_model,
    wrap_with_adapter,
)
from prefopt.training.checkpoints import whole_folder
from prefopt.training.sharding import run_within
from prefopt.training.tree_model import (
    Scoring,
    answer_states,
    base_model,
    choose_scoring,
    tree_attention,
)
from prefopt.trees import AnswerTree, split_by_tokens
from prefopt.types import Prompt

logger = logging.getLogger(__name__)

ReadsAt = Literal["end_token", "template_end"]
"""Where a score is read: at the token that ends the answer, or where the chat template ends."""

TokenizedSides = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids of a prompt and of an answer to it."""

_FILE, _HEADS = "reward_model.json", "heads.safetensors"
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


class RewardModelFile(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.reward_model/1",
):
    """What `reward_model.json` says; the numbers of the head are in `heads.safetensors`.

    `base` is the name of the model under the adapter, None where the folder holds the whole model.
    """

    base: str | None
    bias: float
    reads_at: ReadsAt = "end_token"


class RewardModel(nn.Module):
    """Scores answers to prompts; higher is better.

    Args:
        model: a causal language model, perhaps in a PEFT wrapper.
        head: `nn.Linear(D, 1)` in float32.
        tokenizer: for texts; None where only token ids are scored.
        adapter: name of the adapter that is the reward's; None for a model without.
        bias: subtracted from every score, so that the mean is 0 where it was measured.
        base: the name under which the model below the adapter can be loaded again.
        reads_at: see `ReadsAt`.
        scoring: how the model takes trees; None finds it out at the first use.
    """

    def __init__(
        self,
        model: Any,
        head: nn.Linear,
        tokenizer: Any = None,
        *,
        adapter: str | None = None,
        bias: float = 0.0,
        base: str | None = None,
        reads_at: ReadsAt = "end_token",
        scoring: Scoring | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head, self.tokenizer = model, head, tokenizer
        self.adapter, self.bias, self.base, self.reads_at = adapter, bias, base, reads_at
        self._scoring = scoring

    @classmethod
    def new(
        cls,
        model: Any,
        tokenizer: Any = None,
        peft_config: Any = None,
        *,
        seed: int = 0,
    ) -> RewardModel:
        """A reward model that is yet to be trained: w ~ N(0, 1 / (D + 1)), bias 0.

        So scores have a variance near 1 where hidden states are normed (Ziegler et al. 2019,
        arXiv:1909.08593, and Huang et al. 2024, arXiv:2403.17031).

        Args:
            model: a causal language model, a `PeftModel` whose active adapter is trained, or a
                `LanguageModel`.
            tokenizer: taken from a `LanguageModel` where None.
            peft_config: adapter to train; None trains the model itself.
            seed: of the adapter's weights and the head's.

        Raises:
            ModelError: `peft_config` is none, or the model has an adapter already.
        """
        base = None
        if isinstance(model, LanguageModel):
            tokenizer, base, model = tokenizer or model.tokenizer, model.base, model.model
        if hasattr(model, "peft_config") and peft_config is not None:
            raise ModelError(
                "peft_config was given with a model that has an adapter already. Leave it out to "
                "train that adapter, or merge the adapter first."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if peft_config is not None:
                model = wrap_with_adapter(model, peft_config)
            elif not hasattr(model, "peft_config"):
                freeze_output_head(model)
            head = new_head(model)
            # Drawn on the CPU, so that a seed means the same start on every device.
            start = torch.randn(head.weight.shape) * (head.in_features + 1) ** -0.5
            head.weight.data.copy_(start)
        return cls(
            model,
            head,
            tokenizer,
            adapter=_active_adapter(model),
            base=base or base_model(model).config._name_or_path or None,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: Any = None,
        adapter_name: str = "reward",
        device: Device = "auto",
        dtype: DType = "auto",
        trainable: bool = False,
    ) -> RewardModel:
        """Read what `save` wrote; its scores are the same to the last bit.

        An `AutoModelForSequenceClassification` with one label is read too, and a sequence
        classification adapter as TRL's `RewardTrainer` saves it.

        Args:
            folder: of the reward model, or a name that transformers can load.
            base: the model to put the adapter on: one that is loaded already, perhaps with other
                adapters, which stay as they are; or a name. None takes the one it was trained on.
            adapter_name: of the adapter within the model.
            device: where to load a model that is not loaded yet.
            dtype: of its weights.
            trainable: whether the adapter, or the model without one, shall receive gradients.

        Raises:
            ModelError: files are missing or cannot be read, or do not fit the base.
        """
        path = Path(folder)
        if not (path / _FILE).is_file():
            from prefopt.training.sequence_classification import load_sequence_classification

            return load_sequence_classification(
                str(folder), base=base, adapter_name=adapter_name, device=device, dtype=dtype,
                trainable=trainable,
            )  # fmt: skip
        said, weights = _read(path)
        if said.base is None:
            if base is not None:
                raise ModelError(f"{folder} holds a whole model, which takes no base.")
            loaded = load_model(str(path.absolute()), device=device, dtype=dtype)
            model, tokenizer, adapter = loaded.model, loaded.tokenizer, None
            model.requires_grad_(trainable)
            freeze_output_head(model)
        else:
            model, tokenizer = loaded_base(said.base if base is None else base, device, dtype)
            model = attach_adapter(model, path, name=adapter_name, trainable=trainable)
            adapter = adapter_name
        head = new_head(model)
        try:
            head.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(
                f"the head in {folder} does not fit a model of width {head.in_features}: it was "
                "trained on another base model."
            ) from error
        head.weight.requires_grad_(trainable)
        return cls(
            model,
            head,
            _own_tokenizer(path) or tokenizer,
            adapter=adapter,
            bias=said.bias,
            base=said.base,
            reads_at=said.reads_at,
        )

    def save(self, folder: str | Path) -> Path:
        """Write adapter (or whole model), head and bias into a folder that is whole or not there.

        `adapter_model.safetensors` (`model.safetensors` without an adapter), `heads.safetensors`,
        `reward_model.json`, and the tokenizer's files. Nothing is pickled.

        Raises:
            DataError: the folder cannot be written.
        """
        folder = Path(folder)
        with whole_folder(folder) as temporary:
            self.write(temporary)
        return folder

    def write(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """The files of `save` into a folder that is there, such as a checkpoint's.

        Args:
            folder: where to.
            weights: to write instead of the model's own, by their names in it.
        """
        own = None
        if weights is not None:
            own = {
                n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")
            }
        if self.adapter is None:
            self.model.save_pretrained(folder, state_dict=own)
        else:
            self.model.save_pretrained(folder, selected_adapters=[self.adapter], state_dict=own)
            if self.adapter != "default":  # which PEFT puts into a folder of its own
                for file in (folder / self.adapter).iterdir():
                    file.replace(folder / file.name)
                (folder / self.adapter).rmdir()
        head = {
            f"reward.{n}": (w if weights is None else weights[f"head.{n}"]).detach().cpu()
            for n, w in self.head.state_dict().items()
        }
        save_file(head, folder / _HEADS)
        said = RewardModelFile(
            base=None if self.adapter is None else self.base or "unnamed",
            bias=self.bias,
            reads_at=self.reads_at,
        )
        (folder / _FILE).write_bytes(msgspec.json.format(msgspec.json.encode(said)) + b"\n")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def read_weights(self, folder: str | Path) -> None:
        """Take adapter (or model), head and bias from a folder of `save` for the same model.

        Raises:
            ModelError: they do not fit.
        """
        path = Path(folder)
        said, weights = _read(path)
        try:
            self.head.load_state_dict(weights)
            if self.adapter is not None:
                load_adapter_weights(self.model, path, self.adapter)
            else:
                from transformers import AutoModelForCausalLM

                dtype = next(self.model.parameters()).dtype
                saved = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **SAFE)
                self.model.load_state_dict(saved.state_dict())
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"the weights in {folder} do not fit this model: {error}") from error
        self.bias = said.bias

    # --- Scores ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.head.weight.device

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return base_model(self.model).config

    @property
    def scoring(self) -> Scoring:
        """How the model takes trees, found out by trying at the first use."""
        if self._scoring is None:
            scoring = choose_scoring(self.model)
            if self.adapter is None:
                # Norms that train are not fused, so none are: a model scores the same to the last bit
                # while it trains and once it is loaded.
                scoring = replace(scoring, fused=scoring.fused._replace(norms=()))
            self._scoring = scoring
        return self._scoring

    @scoring.setter
    def scoring(self, scoring: Scoring) -> None:
        self._scoring = scoring

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the language model's."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    @property
    def pad_token_id(self) -> int:
        """What fills a padded batch; no mask is made from it."""
        return int(getattr(self.tokenizer, "pad_token_id", None) or 0)

    def forward(self, **inputs: Any) -> Tensor:
        """Raw scores (A,), bias not subtracted, of what `answer_states` asks a model for."""
        states: Tensor = self.model(**inputs)
        # autocast, and some ways of sharding, would round the head's input to half precision.
        with torch.autocast(states.device.type, enabled=False):
            scores: Tensor = run_within(self.head, self._scored, states)
        return scores[:, 0]

    def _scored(self, states: Tensor) -> Tensor:
        head = self.head
        return nn.functional.linear(states.float(), head.weight.float(), head.bias.float())

    @property
    def _no_split_modules(self) -> Any:
        """The language model's layers, which FSDP gathers one by one."""
        return getattr(base_model(self.model), "_no_split_modules", None)

    def score_trees(
        self, trees: Sequence[AnswerTree], *, micro_batch_tokens: int | None = None
    ) -> Tensor:
        """Scores (A,) in float32 of all answers in order, without gradient, bias subtracted.

        The model is in eval mode for it with the reward's adapter active, and afterwards as it was.

        Args:
            trees: prompts with their answers; answers may repeat.
            micro_batch_tokens: tokens that go through the model at once; None takes 2,048 on a CPU
                and 32,768 on a GPU.
        """
        default = _MICRO_BATCH_TOKENS.get(self.device.type, _MICRO_BATCH_TOKENS["cuda"])
        sizes = [len(t.prompt_ids) + sum(map(len, t.answers)) for t in trees]
        starts = [0]
        for tree in trees:
            starts.append(starts[-1] + len(tree.answers))
        scores = torch.empty(starts[-1], device=self.device)
        with torch.no_grad(), self._as_reward():
            for members in split_by_tokens(sizes, micro_batch_tokens or default):
                found = self._micro_batch([trees[i] for i in members])
                at = [place for i in members for place in range(starts[i], starts[i + 1])]
                scores[torch.tensor(at, device=self.device)] = found
        return scores - self.bias

    def centre(self, trees: Sequence[AnswerTree], **how: Any) -> float:
        """Set the bias so that the mean score of these answers is 0; returns the new bias.

        Preferences leave the level of scores open. Ziegler et al. 2019, arXiv:1909.08593, and Huang et
        al. 2024, arXiv:2403.17031, set it so before PPO, whose KL penalty and value have a level.

        Args:
            trees: prompts with the answers that shall be worth 0 on average.
            how: as for `score_trees`.
        """
        self.bias += float(self.score_trees(trees, **how).double().mean())
        return self.bias

    def _micro_batch(self, trees: Sequence[AnswerTree]) -> Tensor:
        batch = self.scoring.batch(trees, self.pad_token_id, feed_last=True).to(self.device)
        with tree_attention(self.model, self.scoring):
            return answer_states(self, batch, self.scoring, batch.ends)

    @contextlib.contextmanager
    def _as_reward(self) -> Iterator[None]:
        """The model in eval mode with the reward's adapter; afterwards as it was.

        Switching adapters in PEFT makes the new one trainable and freezes all others, so what
        trained is put back too.
        """
        training, model = self.model.training, self.model
        before = _active_adapter(model)
        flags: list[tuple[nn.Parameter, bool]] = []
        if self.adapter is not None and before != self.adapter:
            flags = [(p, p.requires_grad) for p in model.parameters()]
            model.set_adapter(self.adapter, inference_mode=True)
        model.eval()
        try:
            yield
        finally:
            if flags:
                model.set_adapter(before)
                for parameter, trains in flags:
                    parameter.requires_grad_(trains)
            model.train(training)

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """The scores of each prompt's answers.

        Args:
            prompts: the conversations.
            answers: for each prompt its answers, one or more; all count as complete.

        Raises:
            ValueError: not one list of answers a prompt.
            DataError: an answer is longer than the model can read.
        """
        if len(prompts) != len(answers):
            raise ValueError(
                f"expected one list of answers for each of the {len(prompts)} prompts, got "
                f"{len(answers)}."
            )
        ids = [
            [self.tokenize(prompt, text) for text in texts]
            for prompt, texts in zip(prompts, answers, strict=True)
        ]
        return self.score_ids(ids)

    def score_ids(self, tokenized: Sequence[Sequence[TokenizedSides]]) -> list[list[float]]:
        """The scores of each prompt's answers, as `tokenize` returns them."""
        trees: list[AnswerTree] = []
        places: list[list[int]] = []  # of each answer, among all answers of all trees
        n = 0
        for answers in tokenized:
            # Answers whose prompt the tokenizer merged with them in another way have another prompt.
            prompts = list(dict.fromkeys(prompt_ids for prompt_ids, _ in answers))
            at: dict[int, int] = {}
            for prompt_ids in prompts:
                members = [i for i, (own, _) in enumerate(answers) if own == prompt_ids]
                trees.append(AnswerTree(prompt_ids, tuple(answers[i][1] for i in members)))
                at |= {i: n + place for place, i in enumerate(members)}
                n += len(members)
            places.append([at[i] for i in range(len(answers))])
        found = self.score_trees(trees).tolist()
        return [[found[place] for place in row] for row in places]

    def tokenize(self, prompt: Prompt, text: str, *, complete: bool = True) -> TokenizedSides:
        """The ids of prompt and answer, as this model is to read them.

        Raises:
            DataError: together they are longer than the model can read.
            ModelError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ModelError("texts need a tokenizer; this reward model was made without one.")
        if self.reads_at == "template_end":
            from prefopt.training.sequence_classification import template_ids

            prompt_ids, answer_ids = template_ids(self.tokenizer, self.config, prompt, text)
        else:
            ids = tokenize_answer(self.tokenizer, prompt, text, complete=complete)
            prompt_ids, answer_ids = ids.prompt_ids, ids.answer_ids
        room = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(prompt_ids) + len(answer_ids) > room:
            raise DataError(
                f"prompt {prompt.prompt_id} with its answer has {len(prompt_ids) + len(answer_ids)} "
                f"tokens, and the reward model reads {room}. Shorten it or leave it out."
            )
        return prompt_ids, answer_ids

    # --- Other forms -----------------------------------------------------------------------------

    def merge(self) -> RewardModel:
        """A copy with the adapter folded into the weights; scores agree up to rounding."""
        model = copy.deepcopy(self.model)
        if self.adapter is not None:
            model.set_adapter(self.adapter, inference_mode=True)
            model = model.merge_and_unload(adapter_names=[self.adapter])
        return RewardModel(
            model,
            copy.deepcopy(self.head),
            self.tokenizer,
            bias=self.bias,
            base=self.base,
            reads_at=self.reads_at,
        )

    def to_sequence_classification(self, folder: str | Path) -> Path:
        """Save as an `AutoModelForSequenceClassification` with one label, for other libraries.

        See `prefopt.training.sequence_classification.save_sequence_classification`.
        """
        from prefopt.training.sequence_classification import save_sequence_classification

        return save_sequence_classification(self, folder)


def _read(folder: Path) -> tuple[RewardModelFile, dict[str, Tensor]]:
    """What a folder says, and its head."""
    try:
        said = msgspec.json.decode((folder / _FILE).read_bytes(), type=RewardModelFile)
        weights = load_file(folder / _HEADS)
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        raise ModelError(
            f"cannot read the reward model in {folder}: {error}. Give a folder written by "
            "RewardModel.save or train_reward."
        ) from error
    prefix = "reward."
    return said, {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def freeze_output_head(model: Any) -> None:
    """No gradient for a language model's output head, which no score depends on, unless it is tied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        head.requires_grad_(False)


def loaded_base(base: Any, device: Device, dtype: DType) -> tuple[Any, Any]:
    """Model and tokenizer of a base that is loaded already, or named."""
    if isinstance(base, str):
        base = load_model(base, device=device, dtype=dtype)
    if isinstance(base, LanguageModel):
        return base.model, base.tokenizer
    return base, None


def new_head(model: Any) -> nn.Linear:
    """A head of zeros for a model's hidden states, in float32 and on the model's device."""
    width = base_model(model).config.get_text_config().hidden_size
    head = nn.Linear(width, 1, device=next(model.parameters()).device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.requires_grad_(False)  # preferences are about differences
    return head


def _active_adapter(model: Any) -> str | None:
    if not hasattr(model, "peft_config"):
        return None
    active = model.active_adapter
    return str(active if isinstance(active, str) else active[0])


def _own_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

"""Prompts and a reward -> a policy trained by PPO, on `transformers.Trainer`.

    rollout batch:  prompts ──sample──▶ answers ──score──▶ rewards ──▶ advantages
    then num_ppo_epochs x num_mini_batches optimiser steps on it, policy and value,
    the policy's with general rows beside them where there are some to replay

Policy, reference, value and reward are adapters of one base model where that is possible
(`rlhf_model`). Answers to the same prompt form a tree, so its prompt is computed once; the output head
sees answer tokens only. Every draw follows from the seed and the number of the rollout batch, so a run
that was stopped at a checkpoint and resumed equals one that was not.

Where to look: prompts `prompt_rows`, sampling `rollouts`, rewards `answer_rewards`, roles
`rlhf_model`, mathematics `prefopt.advantages` and `prefopt.ppo_losses`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from torch import Tensor

from prefopt.advantages import (
    adapted_kl_coef,
    generalised_advantages,
    kl_k1,
    leave_one_out_advantages,
    moments,
    normalised_group_advantages,
    token_rewards,
    whiten,
)
from prefopt.chat import end_token_ids
from prefopt.errors import DataError, TrainingError
from prefopt.judges import Judge
from prefopt.launched import shards
from prefopt.logprobs import by_answer, sum_by_answer
from prefopt.ppo_losses import (
    PolicyLosses,
    ValueLosses,
    clipped_policy_losses,
    clipped_value_losses,
)
from prefopt.training.answer_callback import AnswerCallback
from prefopt.training.answer_rewards import SampledBatch, Scores, reward_source
from prefopt.training.experience import (
    Experience,
    MicroBatch,
    PlannedStep,
    empty_experience,
    micro_batches,
)
from prefopt.training.fused_model import AS_IT_IS
from prefopt.training.policy_setup import (
    check_sharding,
    load_policy,
    neftune_problems,
    prepare_reference,
)
from prefopt.training.ppo_config import PPOConfig as PPOConfig
from prefopt.training.progress_bar import ProgressBar
from prefopt.training.prompt_rows import PromptRow, PromptSet, RolloutSampler
from prefopt.training.reference import Reference
from prefopt.training.replay import (
    ReplayBatch,
    ReplayStream,
    replay_batches,
    replay_rows,
    rows_per_step,
)
from prefopt.training.reward_model import RewardModel
from prefopt.training.rlhf_model import VALUE, TrainedRoles, build_roles
from prefopt.training.rollout_log import (
    CheckpointsBetweenRollouts,
    LoggedAnswer,
    append_answers,
)
from prefopt.training.rollouts import (
    RolloutEngine,
    RolloutSettings,
    TransformersEngine,
    VLLMEngine,
)
from prefopt.training.sharding import (
    WholeCopy,
    clipped_by_group,
    forget_gradients,
    holds_parts,
    most,
    pass_of_step,
    unsharded,
)
from prefopt.training.token_rows import TokenRow
from prefopt.training.tree_model import (
    answer_states,
    base_model,
    choose_scoring,
    is_wrapped,
    n_parameters,
    score_answers,
    tree_attention,
)
from prefopt.training.tree_trainer import Averages
from prefopt.training.whole_checkpoints import WholeCheckpoints
from prefopt.trees import (
    default_micro_batch_tokens,
)

logger = logging.getLogger(__name__)

_STATE_FILE = "ppo_state.json"
# How far a ratio may be from 1 before the first step: rounding, by the precision of the forward pass.
_RATIO_TOLERANCE, _LOW_PRECISION_RATIO_TOLERANCE = 1e-4, 5e-2


AnyBatch = MicroBatch | ReplayBatch
SomeBatch = TypeVar("SomeBatch", MicroBatch, AnyBatch)


class PPOTrainer(WholeCheckpoints):
    """Proximal policy optimization against a reward (Schulman et al. 2017, arXiv:1707.06347).

    Args:
        model: a name, a causal language model (all of it is trained), or a `PeftModel`.
        reward: a `RewardModel`, a function or a judge; see
            `prefopt.training.answer_rewards.reward_source`.
        args: a `PPOConfig`.
        train_dataset: rows with `prompt` or `prompt_ids`.
        ref_model: what the policy is held to, a model or its name; None takes the policy as it is
            before training.
        value_model: where the value starts from: a `RewardModel`, or a causal language model; None
            takes the reward model where there is one, else the policy with a head of zeros.
        eval_dataset: prompts that are answered and scored at each evaluation.
        processing_class: the tokenizer; None loads it where the model was given by name, and otherwise
            prompts must be token ids.
        peft_config: adapter to train; reference, value and, where possible, reward are then
            adapters of the same base.
        callbacks: as for `transformers.Trainer`.
        optimizers: as for `transformers.Trainer`.
        engine: what samples; None takes `TransformersEngine`.
        replay_dataset: general data against forgetting, as `prefopt.data.general.load_general` reads
            it: each step adds the mean NLL a token of `args.replay_share` rows of it, weighted. That
            is PPO-ptx (Ouyang et al. 2022, arXiv:2203.02155, eq. 2).

    Raises:
        ValueError: settings that exclude each other.
        DataError: no prompt can be used.
        TrainingError: the ratio is not 1 before the first step, a number is not finite, or no
            answer of a rollout batch got a score.
    """

    _tag_names = ("prefopt", "ppo")
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    control: Any

    def __init__(
        self,
        model: Any,
        reward: Any,
        args: PPOConfig,
        train_dataset: Any,
        ref_model: Any = None,
        value_model: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        engine: RolloutEngine | None = None,
        replay_dataset: Any = None,
    ) -> None:
        _check(model, ref_model, peft_config, reward, args)
        transformers.set_seed(args.seed)
        if isinstance(model, str):
            if processing_class is None:
                from prefopt.models import resolve_model_path

                processing_class = transformers.AutoTokenizer.from_pretrained(
                    resolve_model_path(model), trust_remote_code=False
                )
            model = load_policy(model, {"dtype": "float32"})
        if isinstance(ref_model, str):
            ref_model = load_policy(ref_model, {"dtype": "float32"})
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.roles, reward = build_roles(
            model,
            peft_config=peft_config,
            ref_model=ref_model,
            value_model=value_model,
            reward=reward,
            needs_value=args.needs_value,
            seed=args.seed,
        )
        policy = self.roles.policy
        self.reward = reward
        if args.learning_rate is None:
            args.learning_rate = 5e-5 if self.roles.one_base else 3e-6
        if args.gradient_checkpointing and self.roles.one_base:
            policy.enable_input_require_grads()
        stops = _stop_tokens(args, self._tokenizer, base_model(policy))
        config = base_model(policy).config.get_text_config()
        self._longest_prompt = _longest_prompt(args, config)
        self._context = getattr(config, "max_position_embeddings", None)
        train_set = self._prompt_set(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_set: Any = {n: self._prompt_set(d, n) for n, d in eval_dataset.items()}
        else:
            eval_set = None if eval_dataset is None else self._prompt_set(eval_dataset, "eval")
        self._replay = self._replay_stream(replay_dataset, len(train_set), args)
        super().__init__(
            model=TrainedRoles(self.roles) if shards() else policy,
            args=args,
            data_collator=list,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process, which nn.DataParallel would use. Start with "
                "accelerate launch or torchrun, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        self._shard()
        for callback in tuple(self.callback_handler.callbacks):
            if isinstance(callback, ProgressBar):
                callback.attach(self)
        self.add_callback(CheckpointsBetweenRollouts())
        self.loss_is_scaled_for_ga = True
        if hasattr(policy, "add_model_tags"):
            policy.add_model_tags(list(self._tag_names))
        self._place_models()
        make = {"transformers": self._transformers_engine, "vllm": self._vllm_engine}
        self.engine = engine or make[args.rollout_engine](stops)
        self._may_be_cut_off = bool(stops)
        self.kl_coef = args.kl_coef
        self.n_answers = 0
        self._experience: Experience | None = None
        self._averages = Averages()
        self._norms: list[Tensor] = []

    # --- Models in shares ------------------------------------------------------------------------

    def _shard(self) -> None:
        """What is shared between processes, and what that rules out."""
        sharding = self._set_up_sharding()
        if sharding.gradients and not isinstance(self.model, TrainedRoles):
            raise ValueError(
                "FSDP or DeepSpeed was asked for after the models were put together. Start with "
                "accelerate launch --config_file recipes/accelerate/fsdp2.yaml (or another of them)."
            )
        roles = self.roles
        if roles.reference.model is not roles.policy:
            check_sharding(self.args, sharding, base_model(roles.reference.model))
        check_sharding(self.args, sharding, base_model(roles.policy))
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage:
            offloaded = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer") or {}
            if roles.value is not None and offloaded.get("device", "none") != "none":
                raise ValueError(
                    "with its optimiser states on the CPU, DeepSpeed keeps the gradients of a step's "
                    "last backward pass only, and PPO has one for the policy and one for the value. "
                    "Set offload_optimizer_device: none, or take rloo or grpo, which train no value."
                )
        self._settled = not sharding.parameters
        self._whole = WholeCopy(roles.policy) if sharding.parameters else None

    def _place_models(self) -> None:
        """Put on the device, or shard, what is not a part of the policy's model."""
        roles, device = self.roles, self.args.device
        ref = roles.reference.model
        if not self.sharding.gradients:
            for module in (ref, roles.value, self.reward):
                if isinstance(module, torch.nn.Module):
                    module.to(device)
        else:
            if ref is not roles.policy:
                roles.reference = Reference(roles.reference.kind, prepare_reference(self, ref))
            if isinstance(self.reward, RewardModel):
                own = self.reward.model is not roles.policy
                (self.reward if own else self.reward.head).to(device)
        ledger = Path(self.args.output_dir) / "reward_judgements.sqlite"
        self._score = reward_source(self._scored_with(), self._tokenizer, ledger)

    def _scored_with(self) -> Any:
        """The reward; an adapter of a base in shares is read on the whole copy of it."""
        reward, whole = self.reward, self._whole
        if not isinstance(reward, RewardModel) or reward.model is not self.roles.policy:
            return reward
        reward.scoring = self.roles.scoring  # found out already
        if whole is None:
            return reward
        return RewardModel(
            whole.model,
            reward.head,
            reward.tokenizer,
            adapter=reward.adapter,
            bias=reward.bias,
            base=reward.base,
            reads_at=reward.reads_at,
        )

    def _rollout_settings(self, stops: Sequence[int]) -> RolloutSettings:
        args = self.args
        return RolloutSettings(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            stop_token_ids=tuple(stops),
            pad_token_id=self._pad_token_id,
            batch_size=args.generation_batch_size or 256,
        )

    def _transformers_engine(self, stops: Sequence[int]) -> RolloutEngine:
        return TransformersEngine(
            self.roles.policy if self._whole is None else self._whole.model,
            self._rollout_settings(stops),
            autocast=self.accelerator.autocast,
        )

    def _vllm_engine(self, stops: Sequence[int]) -> RolloutEngine:
        roles, base = self.roles, base_model(self.roles.policy)
        name = base.config._name_or_path
        problems = []
        if roles.adapter is None:
            problems.append("only adapters are swapped into vLLM: give a peft_config")
        elif roles.adapter != "default":
            problems.append(f"the adapter must be named 'default', got {roles.adapter!r}")
        if not name:
            problems.append("the base model has no name under which vLLM could load it")
        if self.accelerator.num_processes > 1:
            problems.append(
                f"vLLM samples for one process, and there are {self.accelerator.num_processes}"
            )
        if problems:
            raise ValueError(f"rollout_engine='vllm': {'; '.join(problems)}.")
        half = {"bf16": "bfloat16", "fp16": "float16"}.get(self.args.mixed_precision)
        return VLLMEngine(
            name,
            roles.save_policy,
            self._rollout_settings(stops),
            Path(self.args.output_dir) / "policy_of_rollouts",
            rank=roles.policy.peft_config[roles.adapter].r,
            dtype=half or str(base.dtype).removeprefix("torch."),
            gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
        )

    @contextlib.contextmanager
    def _whole_weights_at_hand(self) -> Iterator[None]:
        """Within the block answers can be sampled and scored; gathers what is in shares, once."""
        if self._whole is None:
            yield
            return
        if not holds_parts(self.model):
            raise ValueError("models in shares answer while they train, and not before.")
        self._settle()
        with self._whole.filled(self.roles.policy, self.accelerator):
            yield

    def _settle(self) -> None:
        """Find out how models in shares are scored, once they are where they will be."""
        if self._settled:
            return
        self._settled = True
        roles, low = self.roles, self._low_precision
        roles.scoring = choose_scoring(self.model, low_precision=low)
        roles.reference_scoring = roles.scoring
        if roles.reference.model is not roles.policy:
            roles.reference_scoring = choose_scoring(roles.reference.model, low_precision=low)
        if roles.value is not None:
            same = type(base_model(roles.value.model)) is type(base_model(roles.policy))
            of_value = replace(roles.value.scoring, fused=AS_IT_IS, parted=True)
            roles.value.scoring = roles.scoring if same else of_value

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.roles.look_again()
        return prepared

    def _called(self, role: str, model: Any = None) -> Any:
        """What is called for the policy or the value; `model` as the loop hands it to a step."""
        if self.sharding.gradients:
            return functools.partial(self.model if model is None else model, role=role)
        return self.roles.policy if role == "policy" else self.roles.value

    def _passes(
        self, batches: Sequence[SomeBatch], experience: Experience, *, together: bool
    ) -> list[tuple[SomeBatch | MicroBatch, bool]]:
        """Micro-batches, and what a process runs for nothing where others have more (False)."""
        passes: list[tuple[SomeBatch | MicroBatch, bool]] = [(batch, True) for batch in batches]
        if together:
            n = most(self.accelerator, max(1, len(passes)))
            spare = min(experience.whole, key=lambda m: m.batch.n_tokens)
            passes += [(spare, False)] * (n - len(passes))
        return passes

    def _replay_stream(self, source: Any, n_prompts: int, args: PPOConfig) -> ReplayStream | None:
        """The general rows of each step."""
        if source is None or args.replay_weight == 0:
            return None
        tokenized = isinstance(source, list) and all(isinstance(row, TokenRow) for row in source)
        if self._tokenizer is None and not tokenized:
            raise DataError("general data as texts needs a tokenizer as processing_class.")
        prompts = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        answers = prompts * args.num_generations / args.num_mini_batches
        per_step = rows_per_step(args.replay_share, answers)
        steps = args.max_steps
        if steps <= 0:
            rollouts = math.ceil(args.num_train_epochs * math.ceil(n_prompts / prompts))
            steps = rollouts * args.steps_per_rollout
        rows = replay_rows(
            source,
            self._tokenizer,
            max_length=self._context,
            most=steps * per_step,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        return ReplayStream(rows, per_step, args.seed if args.data_seed is None else args.data_seed)

    def _prompt_set(self, dataset: Any, name: str) -> PromptSet:
        return PromptSet(dataset, self._tokenizer, max_length=self._longest_prompt, name=name)

    @property
    def _pad_token_id(self) -> int:
        return int(getattr(self._tokenizer, "pad_token_id", None) or 0)

    @property
    def _budget(self) -> int:
        default = default_micro_batch_tokens(self.args.device.type)
        return int(self.args.micro_batch_tokens or default)

    # --- The loop's batches ----------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> RolloutSampler:
        args = self.args
        batch = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return RolloutSampler(len(self.train_dataset), batch, args.steps_per_rollout, seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[PlannedStep], None]:
        """One optimiser step of the rollout batch at hand; at its beginning, a new rollout batch."""
        batches = []
        for _ in range(num_batches):
            with contextlib.suppress(StopIteration):
                batches.append(next(epoch_iterator))
        if not batches:
            return [], None
        used = self.state.global_step % self.args.steps_per_rollout
        if used == 0 or self._experience is None:
            if used:
                logger.warning(
                    "the checkpoint was not written at the end of a rollout batch, so answers are "
                    "sampled anew for the %d steps that were left of it",
                    self.args.steps_per_rollout - used,
                )
            rows = self.train_dataset.rows([i for batch in batches for i in batch])
            self._experience = self._roll_out(rows)
        plan = self._mini_batch(self._experience, used)
        general = self._general_rows()
        n_tokens = float(sum(m.tokens.numel() for m in plan))
        n_fed = float(sum(m.batch.n_tokens for m in plan))
        n_fed += sum(tree.n_tokens for batch in general for tree in batch.trees)
        if self.accelerator.num_processes > 1:
            counts = torch.tensor([n_tokens, n_fed], dtype=torch.float64, device=device)
            n_tokens, n_fed = self.accelerator.reduce(counts, reduction="sum").tolist()
        n = len(batches)
        return [
            PlannedStep(
                micro_batches=plan[len(plan) * i // n : len(plan) * (i + 1) // n],
                general=general if i == 0 else (),
                n_tokens=n_tokens,
                n_fed=int(n_fed) if i == 0 else 0,
                is_first=i == 0,
                is_last=i == n - 1,
                policy_unchanged=used == 0,
            )
            for i in range(n)
        ], None

    def _general_rows(self) -> tuple[ReplayBatch, ...]:
        """This process's share of the general rows of the step at hand."""
        if self._replay is None:
            return ()
        # A process that has none of the rows reports the metric too: all add up the same ones.
        nothing = torch.zeros(0, device=self.args.device)
        self._averages.add("replay/nll", nothing, nothing)
        return tuple(
            replay_batches(
                self._replay.at(self.state.global_step),
                self._budget,
                process=self.accelerator.process_index,
                n_processes=self.accelerator.num_processes,
            )
        )

    def _mini_batch(self, experience: Experience, step: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of one of a rollout batch's optimiser steps."""
        parts: int = self.args.num_mini_batches
        epoch, place = divmod(step, parts)
        if parts == 1:
            return experience.whole
        if epoch not in experience.epochs:
            experience.epochs.clear()
            order = list(range(len(experience.answer_ids)))
            self._draw("order", epoch).shuffle(order)
            # Answers to a prompt stay together where there are prompts enough: they share it.
            prompts = list(dict.fromkeys(experience.prompt_of[i] for i in order))
            if len(prompts) >= parts:
                rank = {prompt: i for i, prompt in enumerate(prompts)}
                order.sort(key=lambda i: rank[experience.prompt_of[i]])
            n = len(order)
            experience.epochs[epoch] = [
                self._plan(experience, sorted(order[n * i // parts : n * (i + 1) // parts]))
                for i in range(parts)
            ]
        return experience.epochs[epoch][place]

    def _plan(self, experience: Experience, answers: Sequence[int]) -> tuple[MicroBatch, ...]:
        return micro_batches(
            experience,
            answers,
            self.roles.scoring,
            budget=self._budget,
            pad_token_id=self._pad_token_id,
            device=self.args.device,
        )

    def _draw(self, what: str, *more: int) -> random.Random:
        """A generator that depends on the seed, the rollout batch, and what it is for."""
        rollout = self.state.global_step // self.args.steps_per_rollout
        process = self.accelerator.process_index
        return random.Random(f"{self.args.seed}/{what}/{rollout}/{process}/{more}")

    # --- Rollouts --------------------------------------------------------------------------------

    def _roll_out(self, rows: Sequence[PromptRow]) -> Experience:
        """Sample, score, and work out what each token's advantage is."""
        started = time.perf_counter()
        args, device = self.args, self.args.device
        with self._whole_weights_at_hand():
            seed = self._draw("sampling").getrandbits(63)
            sampled = self._sample(rows, args.num_generations, seed)
            after_sampling = time.perf_counter()
            scores = self._score(sampled)
        kept = [i for i, score in enumerate(scores) if score is not None]
        self._tell_failures(len(kept), len(scores))
        experience = empty_experience(sampled, kept, device)
        experience.whole = self._plan(experience, range(len(kept)))
        reference, entropy = self._score_experience(experience)
        score = torch.tensor([float(scores[i] or 0.0) for i in kept], device=device)
        ended = torch.tensor([sampled.ended[i] for i in kept], device=device)
        kl = sum_by_answer(kl_k1(experience.logps, reference), experience.answer_of, len(kept))
        self._check_rollout(experience, score, kl)
        self._check_start(experience.logps, reference)
        self._measure_engine(sampled, kept, experience.logps)
        self._log_answers(sampled, scores, kept, kl)
        penalties = self.kl_coef * self.kl_penalties(experience.logps, reference)
        given = self._given(score, ended)
        rewards = token_rewards(penalties, given, experience.lengths)
        self._set_advantages(experience, rewards, given, kl)
        sums = {"objective/scores": score, "objective/kl": kl}
        for name, values in (("non_score_reward", -penalties), ("rlhf_reward", rewards)):
            sums[f"objective/{name}"] = sum_by_answer(values, experience.answer_of, len(kept))
        sums |= {"rollout/length": experience.lengths.double(), "rollout/ended": ended.double()}
        self._measure_rollout(experience, sums, entropy, len(scores))
        self._adapt_kl(kl, len(scores))
        one = torch.ones(1, device=device)
        self._averages.add("time/sampling", one * (after_sampling - started), one)
        self._averages.add("time/rollout", one * (time.perf_counter() - started), one)
        return experience

    def _given(self, score: Tensor, ended: Tensor) -> Tensor:
        """The scores (A,) as they are given to answers: clipped, less what it costs not to end."""
        args = self.args
        if args.score_clip is not None:
            score = score.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None and self._may_be_cut_off:
            score = score - args.missing_eos_penalty * (~ended).float()
        return score

    def _measure_rollout(
        self, experience: Experience, of_answers: dict[str, Tensor], entropy: Tensor, n_asked: int
    ) -> None:
        add, score = self._averages.add, of_answers["objective/scores"]
        ones = torch.ones_like(score)
        for name, values in of_answers.items():
            add(name, values, ones)
        add("kl_coef", ones * self.kl_coef, ones)
        add("_score_square", score.double().square(), ones)
        add("objective/entropy", entropy, torch.ones_like(entropy))
        asked = ones.new_full((1,), float(n_asked))
        add("rollout/failed", 1 - score.numel() / asked, asked)
        if self.args.needs_value:
            returns = experience.returns.double()
            for name, values in (("return", returns), ("error", returns - experience.values)):
                add(f"_{name}", values, torch.ones_like(values))
                add(f"_{name}_square", values.square(), torch.ones_like(values))
            add("value/mean", experience.values, torch.ones_like(experience.values))

    def _sample(self, rows: Sequence[PromptRow], k: int, seed: int) -> SampledBatch:
        answers = self.engine.sample([row.ids for row in rows], k, seed)
        flat = [(i, answer) for i, group in enumerate(answers) for answer in group]
        return SampledBatch(
            prompts=[row.prompt for row in rows],
            prompt_ids=[row.ids for row in rows],
            rows=[row.row for row in rows],
            prompt_of=[i for i, _ in flat],
            answer_ids=[answer.ids for _, answer in flat],
            ended=[answer.ended for _, answer in flat],
            tokenizer=self._tokenizer,
            logps=[getattr(answer, "logps", None) for _, answer in flat],
        )

    def _measure_engine(self, sampled: SampledBatch, kept: Sequence[int], logps: Tensor) -> None:
        """How far the probabilities of what sampled are from those that are trained with."""
        said = [sampled.logps[i] for i in kept]
        told = [of_answer for of_answer in said if of_answer is not None]
        if len(told) < len(said):
            return
        flat = [logp for of_answer in told for logp in of_answer]
        if len(flat) != logps.numel():
            raise TrainingError(
                f"the rollout engine gave {len(flat)} log-probabilities for {logps.numel()} tokens. "
                "It must give one for each, or None."
            )
        difference = torch.tensor(flat, dtype=torch.float64, device=logps.device) - logps
        ones = torch.ones_like(difference)
        self._averages.add("rollout/engine_gap", difference.abs(), ones)
        self._averages.add("rollout/engine_kl", difference, ones)

    def _tell_failures(self, n_scored: int, n: int) -> None:
        if n_scored == 0:
            raise TrainingError(
                f"none of {n} answers sampled before step {self.state.global_step + 1} got a score, "
                "so there is nothing to learn from. See why the reward returned None for all of them."
            )
        if n_scored < n:
            logger.warning(
                "%d of %d answers before step %d got no score and are left out",
                n - n_scored, n, self.state.global_step + 1,
            )  # fmt: skip

    def _score_experience(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Fill in log-probabilities and values; returns the reference's and the entropies (R,)."""
        reference, entropy = torch.empty_like(experience.logps), torch.empty_like(experience.logps)
        roles, temperature = self.roles, self.args.temperature
        autocast, policy = self.accelerator.autocast, self._called("policy")
        passes = self._passes(experience.whole, experience, together=self.sharding.parameters)
        with torch.no_grad(), autocast(), tree_attention(roles.policy, roles.scoring):
            for (batch, tokens, _), counts in passes:
                found = score_answers(policy, batch, roles.scoring, temperature=temperature)
                if counts:
                    experience.logps[tokens] = found.tokens.logprobs
                    entropy[tokens] = found.tokens.entropy
        with (
            roles.as_reference() as model,
            autocast(),
            tree_attention(model, roles.reference_scoring),
        ):
            called = policy if model is roles.policy else model
            for (batch, tokens, _), counts in passes:
                found = score_answers(
                    called,
                    batch,
                    roles.reference_scoring,
                    statistics=False,
                    temperature=temperature,
                )
                if counts:
                    reference[tokens] = found.tokens.logprobs
        if roles.value is not None:
            with (
                torch.no_grad(),
                roles.as_value() as value,
                autocast(),
                tree_attention(value.model, value.scoring),
            ):
                called = self._called("value")
                for (batch, tokens, _), counts in passes:
                    states = answer_states(called, batch, value.scoring, batch.predictor)
                    if counts:
                        experience.values[tokens] = states
        return reference, entropy

    def kl_penalties(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """What each token costs per unit of `kl_coef` (R,): k1, see `PPOConfig`.

        A subclass may return something else, to see what that does.
        """
        return kl_k1(logps, ref_logps)

    def _set_advantages(
        self, experience: Experience, rewards: Tensor, scores: Tensor, log_ratios: Tensor
    ) -> None:
        """Fill in advantages and returns.

        Args:
            experience: with log-probabilities and values.
            rewards: (R,) of tokens, KL penalties among them.
            scores: (A,) of answers, as given.
            log_ratios: (A,) log pi - log ref of whole answers, in nats.
        """
        args, lengths, answer_of = self.args, experience.lengths, experience.answer_of
        if args.needs_value:
            if args.whiten_rewards:
                rewards = whiten(rewards, self._moments(rewards), shift_mean=False)
            rows = generalised_advantages(
                by_answer(rewards, answer_of, lengths),
                by_answer(experience.values, answer_of, lengths),
                lengths,
                gamma=args.gamma,
                lam=args.lam,
            )
            place = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
            advantages = rows[place]
            experience.returns = advantages + experience.values
        else:
            groups = experience.groups()
            whole = sum_by_answer(rewards, answer_of, lengths.numel())
            rloo = args.advantage_estimator == "rloo"
            estimate = leave_one_out_advantages if rloo else normalised_group_advantages
            advantages = estimate(whole, groups)[answer_of]
        if args.whitens_advantages:
            advantages = whiten(advantages, self._moments(advantages))
        experience.advantages = advantages

    def _moments(self, values: Tensor) -> Tensor:
        """Of the values on all processes."""
        found = moments(values)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, reduction="sum")
        return found

    def _adapt_kl(self, kl: Tensor, n_sampled: int) -> None:
        total = torch.stack((kl.double().sum(), kl.new_tensor(float(kl.numel())).double()))
        count = torch.tensor(float(n_sampled), dtype=torch.float64, device=kl.device)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
            count = self.accelerator.reduce(count, reduction="sum")
        self.n_answers += int(count)
        if self.args.kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                float(total[0] / total[1]),
                target=self.args.kl_target,
                horizon=self.args.kl_horizon,
                n_answers=int(total[1]),
            )

    def _check_rollout(self, experience: Experience, score: Tensor, kl: Tensor) -> None:
        bad = ~(score.isfinite() & kl.isfinite())
        values = sum_by_answer(experience.values, experience.answer_of, score.numel())
        bad |= ~values.isfinite()
        if bool(bad.any()):
            self._stop_at(experience, bad, {"score": score, "KL": kl, "sum of values": values})

    def _stop_at(self, experience: Experience, bad: Tensor, numbers: dict[str, Tensor]) -> None:
        lines = []
        for i in bad.nonzero()[:5, 0].tolist():
            said = ", ".join(f"{name} {float(x[i]):g}" for name, x in numbers.items())
            prompt = self._shown(experience.prompt_ids[experience.prompt_of[i]])[-80:]
            answer = self._shown(experience.answer_ids[i])[:200]
            lines.append(f"\n  - prompt {prompt!r}, answer {answer!r}: {said}")
        raise TrainingError(
            f"a number is not finite at step {self.state.global_step + 1}; the weights are as they "
            f"were after step {self.state.global_step}. Lower the learning rate, or train in float32. "
            f"It is in:{''.join(lines)}"
        )

    def _shown(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        text: str = self._tokenizer.decode(list(ids))
        return text

    def _log_answers(
        self, sampled: SampledBatch, scores: Scores, kept: Sequence[int], kl: Tensor
    ) -> None:
        n = min(self.args.num_logged_answers, len(scores))
        if not n or not self.args.should_save:
            return
        nats = dict(zip(kept, kl.tolist(), strict=True))
        lines = [
            LoggedAnswer(
                step=self.state.global_step,
                prompt=self._shown(sampled.prompt_ids[sampled.prompt_of[i]]),
                answer=self._shown(sampled.answer_ids[i]),
                n_tokens=len(sampled.answer_ids[i]),
                ended=sampled.ended[i],
                score=scores[i],
                kl=nats.get(i),
            )
            for i in sorted(self._draw("logged").sample(range(len(scores)), n))
        ]
        append_answers(self.args.output_dir, lines)

    # --- Steps -----------------------------------------------------------------------------------

    def training_step(
        self, model: Any, inputs: PlannedStep, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of some micro-batches: all of the policy's, then all of the value's."""
        model.train()
        if self.roles.value is not None:
            self.roles.value.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if inputs.is_first:
            self.roles.zero_grad()
        together = self.sharding.gradients
        total = torch.zeros((), device=self.args.device)
        # Before the answers: those may be on every process, and the last pass is.
        batches: list[AnyBatch] = [*inputs.general, *inputs.micro_batches]
        if batches or together:
            passes = self._passes(batches, self._held(), together=together)
            total += self._policy_passes(model, inputs, passes)
        if self.roles.value is not None and (inputs.micro_batches or together):
            of_value = self._passes(inputs.micro_batches, self._held(), together=together)
            total += self._value_passes(model, inputs, of_value)
        if inputs.is_last and self.accelerator.num_processes > 1 and not together:
            self._sum_gradients()
        return total * self.accelerator.num_processes

    def _policy_passes(
        self, model: Any, step: PlannedStep, passes: Sequence[tuple[AnyBatch, bool]]
    ) -> Tensor:
        roles, called = self.roles, self._called("policy", model)
        found: list[PolicyLosses] = []
        total = torch.zeros((), device=self.args.device)
        with tree_attention(roles.policy, roles.scoring):
            for index, (batch, counts) in enumerate(passes):
                last = roles.value is None and index == len(passes) - 1
                with self._one_of_the_passes(model, step, counts, last=last) as backward:
                    if isinstance(batch, ReplayBatch):
                        loss = self._replay_loss(called, batch)
                    else:
                        losses = self._clipped_losses(called, batch)
                        loss = losses.losses.sum() / step.n_tokens
                        self._check_finite(loss, losses.losses, batch)
                    if index == 0 and step.is_first:
                        forget_gradients(self.accelerator)
                    backward(loss)
                if counts:
                    total += loss.detach()
                    if isinstance(batch, MicroBatch):
                        found.append(losses)
        if found:
            loss, ratio, clipped, approx_kl = (torch.cat(part) for part in zip(*found, strict=True))
            if step.policy_unchanged:
                self._check_ratio(ratio)
            ones = torch.ones_like(ratio)
            self._averages.add("loss/policy", loss.detach(), ones)
            self._averages.add("policy/ratio", ratio, ones)
            self._averages.add("policy/clipfrac", clipped.double(), ones)
            self._averages.add("policy/approxkl", approx_kl, ones)
        return total

    def _clipped_losses(self, called: Any, micro_batch: MicroBatch) -> PolicyLosses:
        batch, tokens, _ = micro_batch
        experience, scoring = self._held(), self.roles.scoring
        with self.accelerator.autocast():
            scores = score_answers(
                called, batch, scoring, statistics=False, temperature=self.args.temperature
            )
        return clipped_policy_losses(
            scores.tokens.logprobs,
            experience.logps[tokens],
            experience.advantages[tokens],
            clip=self.args.cliprange,
        )

    def _replay_loss(self, called: Any, general: ReplayBatch) -> Tensor:
        """The share of general rows in the step's weighted mean NLL a token, at temperature 1."""
        scoring, args = self.roles.scoring, self.args
        batch = scoring.batch(general.trees, self._pad_token_id).to(args.device)
        with self.accelerator.autocast():
            nll = -score_answers(called, batch, scoring, statistics=False).tokens.logprobs
        bad = batch.answer_of[~torch.isfinite(nll.detach())].unique().tolist()
        if bad:
            rows = ", ".join(repr(self._shown(general.trees[i].answers[0][:20])) for i in bad[:3])
            raise TrainingError(
                f"the loss of {len(bad)} general rows is not finite at step "
                f"{self.state.global_step + 1}; the weights are as they were after step "
                f"{self.state.global_step}. Lower the learning rate, or train in float32. The rows "
                f"begin with {rows}."
            )
        self._averages.add("replay/nll", nll.detach(), torch.ones_like(nll))
        return args.replay_weight * nll.sum() / general.n_learned

    def _value_passes(
        self, model: Any, step: PlannedStep, passes: Sequence[tuple[MicroBatch, bool]]
    ) -> Tensor:
        experience, called = self._held(), self._called("value", model)
        found: list[ValueLosses] = []
        with self.roles.as_value() as value, tree_attention(value.model, value.scoring):
            for index, (micro_batch, counts) in enumerate(passes):
                batch, tokens, _ = micro_batch
                last = index == len(passes) - 1
                with self._one_of_the_passes(model, step, counts, last=last) as backward:
                    with self.accelerator.autocast():
                        values = answer_states(called, batch, value.scoring, batch.predictor)
                    losses = clipped_value_losses(
                        values,
                        experience.values[tokens],
                        experience.returns[tokens],
                        clip=self.args.cliprange_value,
                    )
                    loss = losses.losses.sum() / step.n_tokens
                    self._check_finite(loss, losses.losses, micro_batch)
                    if index == 0 and step.is_first:
                        forget_gradients(self.accelerator)
                    backward(loss)
                if counts:
                    found.append(losses)
        if not found:
            return torch.zeros((), device=self.args.device)
        loss, clipped = (torch.cat(part).detach() for part in zip(*found, strict=True))
        ones = torch.ones_like(loss)
        self._averages.add("loss/value", loss, ones)
        self._averages.add("value/clipfrac", clipped.double(), ones)
        return loss.sum() / step.n_tokens

    @contextlib.contextmanager
    def _one_of_the_passes(
        self, model: Any, step: PlannedStep, counts: bool, *, last: bool
    ) -> Iterator[Callable[[Tensor], None]]:
        """A forward and backward pass of an optimiser step; yields what runs the backward pass.

        Args:
            model: as the loop hands it to a step.
            step: which.
            counts: False for a pass that only keeps step with other processes.
            last: whether it is the last one of this call.
        """
        accelerator = self.accelerator
        if not self.sharding.gradients:
            yield accelerator.backward
            return
        # Processes average their gradients; the step's mean is over the tokens of all of them.
        share = float(accelerator.num_processes) if counts else 0.0
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        with (
            pass_of_step(accelerator, model, self.sharding, last=last),
            clipped_by_group(accelerator, self._largest_norms()) as norms,
        ):
            yield lambda loss: accelerator.backward(loss * share, **options)
        if norms:
            self._norms = norms

    def _held(self) -> Experience:
        if self._experience is None:
            raise TrainingError("there is no rollout batch to learn from.")
        return self._experience

    def _check_finite(self, loss: Tensor, losses: Tensor, micro_batch: MicroBatch) -> None:
        if bool(torch.isfinite(loss)):
            return
        experience, (batch, _, answers) = self._held(), micro_batch
        of_answer = sum_by_answer(losses.detach(), batch.answer_of, batch.n_answers)
        sums = torch.zeros(len(experience.answer_ids), device=losses.device)
        sums[torch.tensor(answers, device=losses.device)] = of_answer
        self._stop_at(experience, ~sums.isfinite(), {"loss": sums})

    def _check_start(self, policy: Tensor, reference: Tensor) -> None:
        """Before the first step the policy is the reference, unless another one was given."""
        if self.state.global_step or not self.roles.reference.is_initial_policy:
            return
        allowed = (5e-2 if self._low_precision else 1e-3) * (1.0 + policy.abs())
        off = (policy - reference).abs()
        if bool((off > allowed).any()):
            raise TrainingError(
                f"before the first step policy and reference differ by up to {float(off.max()):.3g} "
                f"nats a token, so training would pull the policy towards another model. The "
                f"reference is {self.roles.reference}. Usual cause: adapter weights whose initial "
                "update is not 0 (PiSSA, OLoRA, gaussian B). Give ref_model to choose it yourself."
            )

    @property
    def _low_precision(self) -> bool:
        half = next(self.model.parameters()).dtype.itemsize < 4
        return bool(half or self.args.mixed_precision != "no")

    def _check_ratio(self, ratio: Tensor) -> None:
        """Before a step was taken on a rollout batch, the policy is the one that sampled."""
        low = self._low_precision
        allowed = _LOW_PRECISION_RATIO_TOLERANCE if low else _RATIO_TOLERANCE
        off = float((ratio - 1.0).abs().max())
        if off > allowed:
            raise TrainingError(
                f"before the first step on a rollout batch the ratio of new to old probabilities is "
                f"off 1 by up to {off:.3g}, so the policy that trains is not the one whose "
                "probabilities were taken. Usual causes: dropout that is on, layers that behave "
                "differently in training, or another adapter that was made active by a callback."
            )

    def _sum_gradients(self) -> None:
        """Add the gradients of all processes: each has its share of the step's mean."""
        parameters = [*self.roles.policy_parameters(), *self.roles.value_parameters()]
        flat = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten().float()
                for p in parameters
            ]
        )
        flat = self.accelerator.reduce(flat, reduction="sum")
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)

    def create_optimizer(self, model: Any = None) -> Any:
        """Policy and value in groups of their own, each with its learning rate."""
        if self.optimizer is None:
            args = self.args
            kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            groups = [
                {"params": self.roles.policy_parameters(), "lr": args.learning_rate},
                {
                    "params": self.roles.value_parameters(),
                    "lr": args.value_learning_rate or args.learning_rate,
                },
            ]
            decay = {"weight_decay": args.weight_decay}
            self.optimizer = kind([g | decay for g in groups if g["params"]], **options)
        return super().create_optimizer(model)

    def _largest_norms(self) -> list[float]:
        """To which the gradients of policy and value are clipped, each by itself."""
        args = self.args
        of_value = args.value_max_grad_norm or args.max_grad_norm
        return [args.max_grad_norm, *([of_value] if self.roles.value_parameters() else [])]

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip policy and value each by itself; returns the policy's norm before."""
        groups = [self.roles.policy_parameters(), self.roles.value_parameters()]
        if not self.is_deepspeed_enabled:  # which has stepped already
            clip = torch.nn.utils.clip_grad_norm_
            self._norms = [
                unsharded(clip(group, limit))
                for group, limit in zip(groups, self._largest_norms(), strict=False)
            ]
        policy, *value = self._norms
        for norm in value:
            self._averages.add("value/grad_norm", norm[None], torch.ones_like(norm)[None])
        return policy

    # --- Logs and evaluation ---------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last call to what the loop logs."""
        if "loss" in logs:
            logs.update(_with_spreads(self._averages.read(self.accelerator)))
            logs["episodes"] = float(self.n_answers)
            logs["num_tokens"] = float(self.state.num_input_tokens_seen)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AnswerCallback):  # what it measures must be there in time
                callback.before_log(self, logs)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer and score held-out prompts, one answer each; the same seed at every step."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ValueError("there is no eval_dataset.")
        if isinstance(given, datasets.Dataset):
            given = self._prompt_set(given, "eval")
        if isinstance(given, Mapping):
            found: dict[str, float] = {}
            for name, part in given.items():
                found |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        started = time.perf_counter()
        share = range(self.accelerator.process_index, len(given), self.accelerator.num_processes)
        averages = Averages()
        if len(share):
            self._evaluate_rows(given.rows(list(share)), averages)
        elif self.sharding.parameters:  # which every process must help to run
            self._evaluate_rows(given.rows([0]), Averages())
        metrics = {
            f"{metric_key_prefix}_{n}": v for n, v in averages.read(self.accelerator).items()
        }
        seconds = time.perf_counter() - started
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 4)
        metrics[f"{metric_key_prefix}_samples_per_second"] = round(len(given) / seconds, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluate_rows(self, rows: Sequence[PromptRow], averages: Averages) -> None:
        device = self.args.device
        with self._whole_weights_at_hand():
            sampled = self._sample(rows, 1, self.args.seed + 1)
            scores = self._score(sampled)
        kept = [i for i, score in enumerate(scores) if score is not None]
        asked = torch.tensor([float(len(scores))], device=device)
        averages.add("failed", 1 - len(kept) / asked, asked)
        experience = empty_experience(sampled, range(len(scores)), device)
        experience.whole = self._plan(experience, range(len(scores)))
        reference, _ = self._score_experience(experience)
        kl = sum_by_answer(experience.logps - reference, experience.answer_of, len(scores))[kept]
        score = torch.tensor([float(scores[i] or 0.0) for i in kept], device=device)
        ones = torch.ones_like(score)
        averages.add("scores", score, ones)
        averages.add("kl", kl, ones)
        averages.add("length", experience.lengths[kept].double(), ones)
        ended = torch.tensor([sampled.ended[i] for i in kept], device=device).double()
        averages.add("ended", ended, ones)

    # --- Checkpoints -----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder, state_dict if self.sharding.gradients else None)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        state = {"kl_coef": self.kl_coef, "n_answers": self.n_answers}
        (folder / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.roles.load(folder)
        try:
            state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            self.kl_coef, self.n_answers = float(state["kl_coef"]), int(state["n_answers"])
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(
                f"{folder} is no checkpoint of PPOTrainer: {_STATE_FILE} cannot be read ({error})."
            ) from error

    def _is_saved(self, name: str, parameter: Any) -> bool:
        trained = (f".{self.roles.adapter}.", f".{VALUE}.")
        return (
            not self.roles.one_base
            or name.startswith("value_head.")
            or any(mark in name for mark in trained)
        )

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _track_num_input_tokens(self, inputs: PlannedStep) -> None:
        self.state.num_input_tokens_seen += inputs.n_fed

    def floating_point_ops(self, inputs: PlannedStep) -> int:
        """Six a parameter and token fed, for the policy."""
        fed = sum(m.batch.n_tokens for m in inputs.micro_batches)
        fed += sum(tree.n_tokens for batch in inputs.general for tree in batch.trees)
        return 6 * fed * self._n_parameters

    @functools.cached_property
    def _n_parameters(self) -> int:
        return n_parameters(base_model(self.roles.policy))


def _with_spreads(means: dict[str, float]) -> dict[str, float]:
    """Means of squares -> spreads, which so are those of all processes' answers together.

    Explained variance is 1 - Var(returns - values) / Var(returns): 1 for a perfect value, 0 for a
    constant, below 0 for a worse one.
    """
    means = dict(means)

    def variance(name: str, mean: float) -> float:
        return max(means.pop(f"_{name}_square") - mean**2, 0.0)

    if "_score_square" in means:
        means["objective/score_std"] = variance("score", means["objective/scores"]) ** 0.5
    if "_error_square" in means:
        left = variance("error", means.pop("_error"))
        spread = variance("return", means.pop("_return"))
        if spread > 0:  # where all returns are the same there is nothing to explain
            means["value/explained_variance"] = 1.0 - left / spread
    return means


def _check(model: Any, ref_model: Any, peft_config: Any, reward: Any, args: Any) -> None:
    if not isinstance(args, PPOConfig):
        raise TypeError(f"args must be a PPOConfig, got {type(args).__name__}.")
    problems = []
    if ref_model is not None and ref_model is model:
        problems.append("model and ref_model must not be the same object; leave ref_model out")
    if peft_config is not None and is_wrapped(model):
        problems.append(
            "peft_config was given with a model that has an adapter already; merge that adapter "
            "first, or leave peft_config out to train it further"
        )
    if isinstance(reward, Judge) and args.num_generations < 2:
        problems.append(
            "a judge compares the answers to a prompt, so num_generations must be 2 or more, got "
            f"{args.num_generations}"
        )
    problems += neftune_problems(args)
    if args.torch_compile:
        problems.append("torch_compile is not supported: every rollout batch has other shapes")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    # Every process reads its own row numbers: they are no tensors to send around.
    args.accelerator_config.dispatch_batches = False
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False


def _stop_tokens(args: PPOConfig, tokenizer: Any, model: Any) -> tuple[int, ...]:
    if args.stop_token_ids is not None:
        return tuple(args.stop_token_ids)
    if tokenizer is not None:
        return tuple(sorted(end_token_ids(tokenizer, model.generation_config)))
    own = getattr(model.generation_config, "eos_token_id", None)
    if own is None:
        raise ValueError(
            "without a tokenizer it is not known which tokens end an answer. Give stop_token_ids; [] "
            "for answers of max_new_tokens each."
        )
    return tuple(own) if isinstance(own, list | tuple) else (int(own),)


def _longest_prompt(args: PPOConfig, config: Any) -> int | None:
    room = getattr(config, "max_position_embeddings", None)
    most = None if room is None else room - args.max_new_tokens
    if most is not None and most < 1:
        raise ValueError(
            f"max_new_tokens={args.max_new_tokens} leaves no room for a prompt in a context of {room}."
        )
    known = [n for n in (most, args.max_prompt_length) if n is not None]
    return min(known, default=None)

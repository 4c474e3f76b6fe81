"""The roles of RLHF on one base model: policy, reference, value and reward as adapters, or as models.

    LoRA              one frozen base;  policy = adapter "default", value = adapter "value", reward =
                      adapter "reward" where it was trained on the same base;  reference = adapters off
    full fine-tuning  policy = the model, reference = a frozen copy, value = a model of its own

Adapters of their own for policy and value do better than one that both share (Santacroce et al. 2023,
arXiv:2309.00754). PEFT decides by the active adapter what trains, silently: activating one freezes all
others, and a backward pass after a switch gives no gradients and no error. So roles change only inside
`as_value` and `as_reference`, whose blocks hold forward and backward passes together, and what
trains is let train at every change.

Knows nothing of losses, rewards or the training loop.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.errors import ModelError
from prefopt.models import load_adapter_weights
from prefopt.training.policy_setup import disable_dropout
from prefopt.training.reference import Reference, ReferenceKind, copy_adapter
from prefopt.training.reward_model import RewardModel, freeze_output_head, new_head
from prefopt.training.tree_model import Scoring, base_model, choose_scoring, is_wrapped

logger = logging.getLogger(__name__)

VALUE = "value"
REWARD = "reward"


class RLHFModel:
    """Policy, reference and value, ready to be run in their roles.

    Args:
        policy: a causal language model, or a `PeftModel` whose active adapter trains.
        reference: what the policy is held to.
        value: predicts the return before each token; a `RewardModel` that is read at every token. None
            for advantages that need no value.
    """

    def __init__(self, policy: Any, reference: Reference, value: RewardModel | None) -> None:
        self.policy, self.reference, self.value = policy, reference, value
        self.adapter = _active(policy)
        self.scoring: Scoring = choose_scoring(policy)
        if reference.model is policy:
            self.reference_scoring = self.scoring
        else:
            self.reference_scoring = choose_scoring(reference.model)
            if not self.scoring.fused.norms:  # the same arithmetic, so that both round alike
                fused = self.reference_scoring.fused._replace(norms=())
                self.reference_scoring = replace(self.reference_scoring, fused=fused)
        if value is not None:
            value.scoring = self.scoring if value.model is policy else choose_scoring(value.model)
        self._policy_names = [n for n, p in policy.named_parameters() if self._is_policys(n, p)]
        self._value_names = [] if value is None else self._names_of_value(value)
        self.look_again()

    def _is_policys(self, name: str, parameter: nn.Parameter) -> bool:
        # By name where there are adapters: which one PEFT lets train right now says nothing.
        if self.adapter is None:
            return bool(parameter.requires_grad)
        return f".{self.adapter}." in name

    def _names_of_value(self, value: RewardModel) -> list[str]:
        mark = None if value.adapter is None else f".{value.adapter}."
        return [
            n
            for n, p in value.model.named_parameters()
            if (p.requires_grad if mark is None else mark in n)
        ]

    def look_again(self) -> None:
        """Find out which parameters train now: who shards a model may put others in their place."""
        of_policy = dict(self.policy.named_parameters())
        self._policy_parameters = [of_policy[name] for name in self._policy_names]
        self._value_parameters: list[nn.Parameter] = []
        if self.value is not None:
            of_value = dict(self.value.model.named_parameters())
            self._value_parameters = [of_value[name] for name in self._value_names]
            self._value_parameters += self.value.head.parameters()
        self.restore()

    @property
    def one_base(self) -> bool:
        """Whether the roles are adapters of one model."""
        return self.adapter is not None

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's optimiser trains."""
        return list(self._policy_parameters)

    def value_parameters(self) -> list[nn.Parameter]:
        """What the value's optimiser trains; empty without a value."""
        return list(self._value_parameters)

    def restore(self) -> None:
        """The policy's adapter active, and exactly what trains requiring gradients."""
        if self.adapter is not None and _active(self.policy) != self.adapter:
            self.policy.set_adapter(self.adapter)
        self._let_train()

    def _let_train(self) -> None:
        for parameter in (*self._policy_parameters, *self._value_parameters):
            parameter.requires_grad_(True)

    @contextlib.contextmanager
    def as_value(self) -> Iterator[RewardModel]:
        """Within the block the value's adapter is active; end the backward passes inside it.

        Raises:
            ModelError: there is no value model.
        """
        if self.value is None:
            raise ModelError("there is no value model: these advantages need none.")
        if self.value.model is self.policy:
            self.policy.set_adapter(VALUE)
            # A weight that is gathered for the value may be the one that the policy goes on with.
            self._let_train()
        try:
            yield self.value
        finally:
            self.restore()

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """Within the block the reference's weights are in force, without gradient."""
        try:
            with self.reference.active() as model:
                yield model
        finally:
            self.restore()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in (*self._policy_parameters, *self._value_parameters):
            parameter.grad = None

    # --- Saving ----------------------------------------------------------------------------------

    def save(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """The policy as any adapter or model is saved, and the value in the folder `value`.

        Args:
            folder: where to.
            weights: to write instead of the models' own, by their names in `TrainedRoles`.
        """
        folder = Path(folder)
        own = None if weights is None else _under("policy.", weights)
        self.save_policy(folder, own)
        if self.value is None:
            return
        (folder / VALUE).mkdir(parents=True, exist_ok=True)
        of_value = None
        if weights is not None and own is not None:
            body = own if self.value.model is self.policy else _under("value_model.", weights)
            of_value = {f"model.{n}": w for n, w in body.items()}
            of_value |= {f"head.{n}": w for n, w in _under("value_head.", weights).items()}
        self.value.write(folder / VALUE, of_value)

    def save_policy(
        self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """The policy alone; `weights` are written instead of its own."""
        if self.adapter is None:
            self.policy.save_pretrained(folder, state_dict=weights)
        else:
            self.policy.save_pretrained(
                folder, selected_adapters=[self.adapter], state_dict=weights
            )

    def load(self, folder: str | Path) -> None:
        """The weights that `save` wrote, into this model.

        Raises:
            ModelError: they are not there or do not fit.
        """
        folder = Path(folder)
        try:
            if self.adapter is None:
                saved = type(self.policy).from_pretrained(
                    folder, dtype=self.policy.dtype, use_safetensors=True
                )
                self.policy.load_state_dict(saved.state_dict())
            else:
                of_policy = folder if self.adapter == "default" else folder / self.adapter
                load_adapter_weights(self.policy, of_policy, self.adapter)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"the policy in {folder} does not fit this model: {error}") from error
        if self.value is not None:
            self.value.read_weights(folder / VALUE)
        self.restore()


class TrainedRoles(nn.Module):
    """Policy and value as one module, for FSDP and DeepSpeed, which shard one.

    Args:
        roles: whose policy and value it calls.
    """

    def __init__(self, roles: RLHFModel) -> None:
        super().__init__()
        self.policy, self._roles = roles.policy, roles
        if roles.value is not None:
            self.value_head = roles.value.head
            if roles.value.model is not roles.policy:
                self.value_model = roles.value.model

    def forward(self, *, role: str = "policy", **inputs: Any) -> Any:
        """What the policy returns, or, for the role "value", the value."""
        value = self._roles.value
        return self.policy(**inputs) if role == "policy" or value is None else value(**inputs)

    def get_base_model(self) -> Any:
        """The policy's causal language model, without adapters."""
        return base_model(self.policy)

    @property
    def config(self) -> Any:
        """The policy's."""
        return base_model(self.policy).config

    @property
    def _no_split_modules(self) -> Any:
        """The policy's layers, which FSDP gathers one by one."""
        return getattr(base_model(self.policy), "_no_split_modules", None)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the models'."""
        self.policy.gradient_checkpointing_enable(*args, **kwargs)
        if hasattr(self, "value_model"):
            self.value_model.gradient_checkpointing_enable(*args, **kwargs)


def _under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def build_roles(
    model: Any,
    *,
    peft_config: Any = None,
    ref_model: Any = None,
    value_model: Any = None,
    reward: Any = None,
    needs_value: bool = True,
    seed: int = 0,
) -> tuple[RLHFModel, Any]:
    """Make the roles out of what a trainer is given.

    The value starts from `value_model`, else from the reward model with its head, so that it begins as
    an estimate of what the answer so far will score (Stiennon et al. 2020, arXiv:2009.01325), else
    from the policy with a head of zeros.

    Args:
        model: the policy to be: a causal language model, or a `PeftModel` to train further.
        peft_config: adapter to train on it.
        ref_model: the reference; None takes the policy as it is now.
        value_model: a `RewardModel`, or a causal language model that gets a head of zeros.
        reward: a `RewardModel`, or anything else, which then makes no difference.
        needs_value: False for group baselines.
        seed: of the adapters' weights.

    Returns:
        the roles, and the reward: on the policy's base where it was trained on the same one.

    Raises:
        ModelError: the arguments do not go together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy, kind, reward = _policy(model, peft_config, ref_model, reward)
        disable_dropout(policy)
        if kind == "given model":
            reference = Reference(kind, ref_model)
        elif kind == "model copy":
            reference = Reference(kind, copy.deepcopy(policy))
        else:
            reference = Reference(kind, policy)
        if reference.model is not policy:
            disable_dropout(reference.model)
            reference.model.requires_grad_(False)
        value = None
        if needs_value:
            value = _value(policy, value_model, reward)
            disable_dropout(value.model)
    if isinstance(reward, RewardModel):
        disable_dropout(reward.model)
    return RLHFModel(policy, reference, value), reward


def _policy(
    model: Any, peft_config: Any, ref_model: Any, reward: Any
) -> tuple[Any, ReferenceKind, Any]:
    from prefopt.models import wrap_with_adapter

    if peft_config is None:
        if ref_model is not None:
            return model, "given model", _on_same_base(reward, model)
        if is_wrapped(model):
            copy_adapter(model)
            return model, "adapter copy", _on_same_base(reward, model)
        return model, "model copy", reward
    kind: ReferenceKind = "adapter off" if ref_model is None else "given model"
    holds_reward = isinstance(reward, RewardModel) and reward.adapter not in (None, "default")
    if holds_reward and base_model(reward.model) is base_model(model):
        # Loaded onto this very base: its wrapper takes the policy's adapter too.
        policy = reward.model
        policy.add_adapter("default", peft_config)
        policy.set_adapter("default")
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(".default." in name)
        return policy, kind, reward
    policy = wrap_with_adapter(model, peft_config)
    return policy, kind, _on_same_base(reward, policy)


def _on_same_base(reward: Any, policy: Any) -> Any:
    """The reward model as one more adapter of the policy's base, if its own base is the same."""
    if not isinstance(reward, RewardModel) or reward.adapter is None:
        return reward
    if not is_wrapped(policy) or reward.model is policy:
        return reward
    if REWARD in policy.peft_config or not _same_weights(
        base_model(reward.model), base_model(policy)
    ):
        return reward
    _copy_adapter_from(reward, policy, REWARD)
    logger.info("the reward model's base is the policy's: its adapter was put beside the policy's")
    return RewardModel(
        policy,
        reward.head,
        reward.tokenizer,
        adapter=REWARD,
        bias=reward.bias,
        base=reward.base,
        reads_at=reward.reads_at,
    )


def _copy_adapter_from(source: RewardModel, policy: Any, name: str) -> None:
    """A copy of a reward model's adapter on the policy's base, active nowhere and frozen."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    active = _active(policy)
    flags = {n: p.requires_grad for n, p in policy.named_parameters()}
    weights = get_peft_model_state_dict(source.model, adapter_name=source.adapter)
    weights = {n: w.detach().clone() for n, w in weights.items()}
    config = copy.deepcopy(source.model.peft_config[source.adapter])
    config.inference_mode, config.task_type, config.modules_to_save = False, "CAUSAL_LM", None
    policy.add_adapter(name, config)
    set_peft_model_state_dict(policy, weights, adapter_name=name)
    policy.set_adapter(active)
    for parameter_name, parameter in policy.named_parameters():
        parameter.requires_grad_(flags.get(parameter_name, False))


def _value(policy: Any, given: Any, reward: Any) -> RewardModel:
    if given is not None and not isinstance(given, RewardModel):
        if base_model(given) is base_model(policy):
            raise ModelError("value_model must be a model of its own, not the policy.")
        freeze_output_head(given)
        return RewardModel(given, _trained(new_head(given)), base=_name(given))
    start = given if given is not None else reward if isinstance(reward, RewardModel) else None
    own = given is not None and given.adapter is None
    if is_wrapped(policy) and not own:
        return _value_adapter(policy, start)
    if start is None:
        model = copy.deepcopy(policy)
        freeze_output_head(model)
        return RewardModel(model, _trained(new_head(model)), base=_name(policy))
    twin = start if start is given else start.merge()
    twin.model.requires_grad_(True)
    freeze_output_head(twin.model)
    return _centred(twin, twin.model, twin.adapter, twin.base)


def _value_adapter(policy: Any, start: RewardModel | None) -> RewardModel:
    """The adapter "value" on the policy's base: a copy of the reward's, or one without effect yet."""
    active = _active(policy)
    base = base_model(policy)
    if start is not None and start.adapter is not None:
        if start.model is policy or _same_weights(base_model(start.model), base):
            _copy_adapter_from(start, policy, VALUE)
            return _centred(start, policy, VALUE, _name(policy))
        logger.warning(
            "the reward model was trained on another base than the policy, so the value starts from "
            "zeros; it learns more slowly."
        )
    elif start is not None:
        logger.warning(
            "the reward model is a whole model and the policy an adapter, so the value starts from "
            "zeros; it learns more slowly. A reward model with an adapter on the policy's base would "
            "be its start."
        )
    policy.add_adapter(VALUE, copy.deepcopy(policy.peft_config[active]))
    policy.set_adapter(active)
    return RewardModel(policy, _trained(new_head(policy)), adapter=VALUE, base=_name(policy))


def _centred(start: RewardModel, model: Any, adapter: str | None, base: str | None) -> RewardModel:
    """A value that predicts the reward model's centred scores."""
    head = copy.deepcopy(start.head)
    with torch.no_grad():
        head.bias -= start.bias
    return RewardModel(model, _trained(head), adapter=adapter, base=base)


def _trained(head: nn.Linear) -> nn.Linear:
    head.requires_grad_(True)  # the bias too: returns have a level of their own
    return head


def _same_weights(one: Any, other: Any) -> bool:
    """Whether two base models, perhaps with adapters inside, have the same weights."""
    if one is other:
        return True
    first, second = (
        {n.replace(".base_layer.", "."): p for n, p in m.named_parameters() if ".lora_" not in n}
        for m in (one, other)
    )
    return first.keys() == second.keys() and all(
        p.shape == second[n].shape
        and p.dtype == second[n].dtype
        and bool(torch.equal(p.detach(), second[n].detach().to(p.device)))
        for n, p in first.items()
    )


def _name(model: Any) -> str | None:
    return base_model(model).config._name_or_path or None


def _active(model: Any) -> str | None:
    if not is_wrapped(model):
        return None
    active = model.active_adapter
    return str(active if isinstance(active, str) else active[0])

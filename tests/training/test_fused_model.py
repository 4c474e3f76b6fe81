"""Which layers of which models run as fused operations, that they are the same, and what is put back.

The models are those of `test_tree_model`, whose norms and biases are random too.
"""

import contextlib
import gc
import math
import sys
import types
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import nn

from prefopt import DPOTrainer
from prefopt.training import fused_model as module
from prefopt.training.fused_model import (
    NOTHING_FUSED,
    FusedPlan,
    fused_layers,
    plan_fused_layers,
)
from prefopt.training.tree_model import choose_scoring, tree_attention
from tests.training.dpo_cases import make_trainer, pair_rows, perturbed, tiny_policy
from tests.training.test_tree_model import assert_same_gradients, family, gradients, scored

# Norms, MLPs, and rotations a forward pass; two layers each.
FUSED = {
    "Llama": (5, 2, 4),
    "Qwen2": (5, 2, 4),
    "Qwen3": (9, 2, 4),  # norms of queries and keys
    "Gemma": (0, 0, 4),  # times 1 + w; GELU
    "Mistral": (5, 2, 4),
    "GPT2": (0, 0, 0),
    "NeoX": (0, 0, 0),  # turns a quarter of each head
    "Olmo2": (9, 2, 4),
    "Phi3": (5, 0, 4),  # gate and up are one matrix
    "Mixtral": (5, 0, 4),  # experts
}
IDS = torch.tensor([[5, 9, 40, 3, 77, 12]])


def frozen_norms(name):
    """A model that trains but for its norms."""
    model = family(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in parameter_name)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the fused operations, by name."""
    made = Counter()

    def counted(name):
        function = getattr(module, name)

        def call(*args):
            made[name] += 1
            return function(*args)

        return call

    for name in ("rms_norm", "swiglu", "rotate"):
        monkeypatch.setattr(module, name, counted(name))
    return made


def taken(calls):
    return calls["rms_norm"], calls["swiglu"], calls["rotate"]


def state(model):
    """All that a block may replace."""
    homes = {sys.modules[type(m).__module__] for m in model.modules()}
    return (
        [vars(m).get("forward") for m in model.modules()],
        {home.__name__: getattr(home, "apply_rotary_pos_emb", None) for home in homes},
    )


# --- Models of transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
def test_which_layers_of_a_family_are_fused(name, calls):
    model = frozen_norms(name)
    plan = plan_fused_layers(model)
    assert (len(plan.norms), len(plan.mlps)) == FUSED[name][:2]
    calls.clear()
    with torch.no_grad():
        expected = model(IDS).logits
        assert not calls
        with fused_layers(model, plan):
            found = model(IDS).logits
        assert taken(calls) == FUSED[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(IDS).logits, expected)
    assert taken(calls) == FUSED[name]


@pytest.mark.parametrize("name", FUSED)
def test_scores_and_gradients_are_those_without(name):
    model = frozen_norms(name)
    scoring = choose_scoring(model)
    assert scoring.way == "tree"
    results = []
    for each in (scoring, replace(scoring, fused=NOTHING_FUSED)):
        with tree_attention(model, each):
            logprobs = scored(model, each).logprobs
            results.append((logprobs.detach(), gradients(model, logprobs)))
    (found, found_gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found_gradients, expected_gradients)


def test_the_compiler_finds_the_layers_as_they_were():
    model = frozen_norms("Llama")
    assert choose_scoring(model).fused.mlps
    assert choose_scoring(model, compiled=True).fused == NOTHING_FUSED


def test_finding_out_changes_nothing():
    model = frozen_norms("Llama").eval()
    model.model.layers[1].train()
    before, modes = state(model), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert plan_fused_layers(model).mlps
    assert torch.equal(torch.rand(3), expected)
    assert state(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


# --- Norms that train ---------------------------------------------------------------------------


def test_a_norm_that_trains_leaves_all_of_them():
    """Else a reference, whose norms are frozen, would round otherwise than the policy."""
    model = frozen_norms("Llama")
    model.model.norm.weight.requires_grad_(True)
    plan = plan_fused_layers(model)
    assert plan.norms == ()
    assert len(plan.mlps) == 2


def test_a_norm_that_is_made_to_train_later_gets_its_gradient():
    model = frozen_norms("Llama")
    plan = plan_fused_layers(model)
    assert len(plan.norms) == 5
    model.model.norm.weight.requires_grad_(True)
    model(IDS).logits.square().sum().backward()
    expected = model.model.norm.weight.grad
    model.zero_grad()
    with fused_layers(model, plan):
        model(IDS).logits.square().sum().backward()
    torch.testing.assert_close(model.model.norm.weight.grad, expected)


# --- Other precisions ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_only_float32_is_fused(dtype):
    assert plan_fused_layers(frozen_norms("Llama").to(dtype)) == NOTHING_FUSED


@pytest.mark.parametrize("outside", [True, False], ids=["around the block", "within it"])
def test_nothing_is_fused_under_autocast(outside, calls):
    """Accelerate's autocast begins within the block, in the model's forward."""
    model = frozen_norms("Qwen3")
    plan = plan_fused_layers(model)
    calls.clear()
    contexts = [torch.autocast("cpu", dtype=torch.bfloat16), fused_layers(model, plan)]
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(IDS).logits
        with contextlib.ExitStack() as stack:
            for context in contexts if outside else reversed(contexts):
                stack.enter_context(context)
            assert torch.equal(model(IDS).logits, expected)
    assert not calls


def test_nothing_is_fused_in_a_training_in_mixed_precision(calls, tmp_path):
    trainer = make_trainer(tmp_path, pair_rows(4), bf16=True, max_steps=1)
    calls.clear()
    trainer.train()
    assert not calls


# --- Putting back -------------------------------------------------------------------------------


def test_all_is_put_back_also_after_an_error():
    model = frozen_norms("Llama")
    plan, before = plan_fused_layers(model), state(model)
    with fused_layers(model, plan):
        forwards, functions = state(model)
        assert sum(f is not None for f in forwards) == 7
        assert functions != before[1]
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), fused_layers(model, plan):
        raise KeyboardInterrupt
    assert state(model) == before


def test_a_block_within_a_block_ends_nothing(calls):
    """The reference runs within the policy's block, on the same model or on one of its kind."""
    model, other = frozen_norms("Llama"), frozen_norms("Llama")
    plans = plan_fused_layers(model), plan_fused_layers(other)
    before, other_before = state(model), state(other)
    calls.clear()
    with torch.no_grad(), fused_layers(model, plans[0]):
        for inner, plan in zip((model, other), plans, strict=True):
            with fused_layers(inner, plan):
                inner(IDS)
            assert taken(calls) == FUSED["Llama"]
            with pytest.raises(KeyError), fused_layers(inner, plan):
                raise KeyError
            model(IDS)
            assert taken(calls) == tuple(2 * n for n in FUSED["Llama"])
            calls.clear()
        assert state(other)[0] == other_before[0]
    assert state(model) == before
    assert state(other) == other_before


def test_layers_that_somebody_else_has_replaced_are_left():
    model = frozen_norms("Llama")
    plan = plan_fused_layers(model)
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    own = mlp.forward, norm.forward
    mlp.forward, norm.forward = (lambda x, f=f: f(x) + 1.0 for f in own)
    hooked = mlp.forward, norm.forward
    later = plan_fused_layers(model)
    assert (len(later.norms), len(later.mlps)) == (4, 1)
    with torch.no_grad():
        expected = model(IDS).logits
        for each in (plan, later):  # replaced after and before the plan was made
            with fused_layers(model, each):
                torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
            assert (mlp.forward, norm.forward) == hooked


# --- Modules that only look the part ------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(16, generator=draw), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(16), requires_grad=False)
        self.eps = eps

    def scaled(self, x, eps=None):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.eps if eps is None else eps))


class Model(nn.Module):
    """Some modules beside a float32 parameter that trains."""

    def __init__(self, *parts):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.parts = nn.ModuleList(parts)


def foo_norm(forward, **kwargs):
    return type("FooRMSNorm", (Norm,), {"forward": forward})(**kwargs)


def fails(self, *args):
    raise KeyError("no such key")


NORMS = {
    "1 + w": lambda self, x: self.scaled(x) * (1.0 + self.weight),
    "mean taken off": lambda self, x: self.scaled(x - x.mean(-1, keepdim=True)) * self.weight,
    "eps outside the root": lambda self, x: (
        x / (x.pow(2).mean(-1, keepdim=True).add(1e-30).sqrt() + self.eps) * self.weight
    ),
    "another eps": lambda self, x: self.scaled(x, 10 * self.eps) * self.weight,
    "no weight": lambda self, x: self.scaled(x),
    "halves apart": lambda self, x: self.scaled(x.view(*x.shape[:-1], 2, 8)).flatten(-2) * self.weight,
    "scale without gradient": lambda self, x: (
        x * (self.scaled(x) / x.where(x != 0, 1.0)).detach() * self.weight
    ),
    "rounded": lambda self, x: (self.scaled(x) * self.weight).bfloat16().float(),
    "a tuple": lambda self, x: (self.scaled(x) * self.weight, None),
    "two arguments": lambda self, x, gate: self.scaled(x) * self.weight * gate,
    "an error": fails,
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_what_is_called_a_norm_but_is_another_is_left(name):
    right = foo_norm(lambda self, x: self.scaled(x) * self.weight)
    plan = plan_fused_layers(Model(right, foo_norm(NORMS[name])))
    assert plan.norms == ((right, 1e-6),)


def test_a_norm_with_something_else_that_trains_is_left():
    """At first it may do nothing, so trying would not find it."""
    norm = foo_norm(lambda self, x: self.scaled(x) * self.weight + self.bias)
    assert len(plan_fused_layers(Model(norm)).norms) == 1
    norm.bias.requires_grad_(True)
    assert plan_fused_layers(Model(norm)).norms == ()


def test_calls_that_were_not_tried_go_to_the_norm_itself(calls):
    norm = foo_norm(lambda self, x, gate=1.0: self.scaled(x) * self.weight.to(x.dtype) * gate)
    model = Model(norm)
    plan = plan_fused_layers(model)
    calls.clear()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = norm(x, 2.0), norm(x, gate=3.0), norm(x.bfloat16())
    with fused_layers(model, plan):
        assert torch.equal(norm(x, 2.0), expected[0])
        assert torch.equal(norm(x, gate=3.0), expected[1])
        assert torch.equal(norm(x.bfloat16()), expected[2])
        assert not calls
        torch.testing.assert_close(norm(x), norm(x, 1.0))
    assert calls["rms_norm"] == 1


class MLP(nn.Module):
    def __init__(self, act_fn=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = act_fn or nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def foo_mlp(forward):
    return type("FooMLP", (MLP,), {"forward": forward})()


MLPS = {
    "GELU": MLP(nn.GELU()),
    "dropout": MLP(dropout=0.1),
    "gate and up change places": foo_mlp(
        lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
    ),
    "clamped": foo_mlp(
        lambda self, x: self.down_proj(
            self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x)
        )
    ),
    "with what came in": foo_mlp(lambda self, x: MLP.forward(self, x) + x),
    "an error": foo_mlp(fails),
}


@pytest.mark.parametrize("name", MLPS)
def test_what_looks_like_an_mlp_but_is_another_is_left(name):
    """Each is tried: modules of one class may differ in their activation."""
    right = MLP()
    other = MLPS[name].eval()  # dropout must be seen all the same
    for order in ((right, other), (other, right)):
        assert plan_fused_layers(Model(*order)).mlps == (right,)


def test_an_mlp_whose_projections_have_dropout_is_fused():
    """LoRA's is such a one; both draw the same."""
    mlp = MLP()
    mlp.up_proj = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 12))
    mlp.gate_proj = type("Dropped", (nn.Linear,), {})(8, 12)
    mlp.gate_proj.register_forward_pre_hook(
        lambda layer, args: nn.functional.dropout(args[0], 0.5, layer.training)
    )
    assert plan_fused_layers(Model(mlp)).mlps == (mlp,)


def half_turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def usual(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin


def interleaved(q, k, cos, sin):
    def turned(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


ROTATIONS = {
    "interleaved": interleaved,
    "backwards": lambda q, k, cos, sin: usual(q, k, cos, -sin),
    "one half of the angles": lambda q, k, cos, sin: usual(
        q, k, cos[..., :4].repeat(1, 1, 2), sin[..., :4].repeat(1, 1, 2)
    ),
    "queries only": lambda q, k, cos, sin: (usual(q, k, cos, sin)[0], k),
    "heads elsewhere": lambda q, k, cos, sin: usual(q, k, cos, sin, 2),
    "one at a time": lambda x, cos, sin, unsqueeze_dim=1: usual(x, x, cos, sin)[0],
}


@pytest.fixture
def rotary_model(monkeypatch):
    """Makes a model whose attention lives in a Python module with a given rotation."""

    def make(function):
        home = types.ModuleType("foo_attention")
        home.apply_rotary_pos_emb = function
        monkeypatch.setitem(sys.modules, "foo_attention", home)
        kind = type("FooAttention", (nn.Module,), {"__module__": "foo_attention"})
        return Model(kind()), home

    return make


@pytest.mark.parametrize("name", ROTATIONS)
def test_another_rotation_is_left(name, rotary_model):
    model, home = rotary_model(usual)
    assert plan_fused_layers(model).rotaries == (home,)
    model, _ = rotary_model(ROTATIONS[name])
    assert plan_fused_layers(model) == NOTHING_FUSED


def test_rotations_that_were_not_tried_go_to_the_function_itself(rotary_model, calls):
    model, home = rotary_model(usual)
    plan = FusedPlan((), (), (home,))
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=draw) for _ in range(2))
    cos, sin = (torch.randn(2, 5, 8, generator=draw) for _ in range(2))
    odd = {
        "heads elsewhere": ((q.transpose(1, 2), k.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}),
        "five arguments": ((q, k, cos, sin, 1), {}),
        "another precision": ((q.bfloat16(), k.bfloat16(), cos, sin), {}),
        "another width": ((q, k, cos[..., :1], sin[..., :1]), {}),
    }
    expected = {name: usual(*args, **kwargs) for name, (args, kwargs) in odd.items()}
    with fused_layers(model, plan):
        for name, (args, kwargs) in odd.items():
            found = home.apply_rotary_pos_emb(*args, **kwargs)
            assert all(map(torch.equal, found, expected[name])), name
        assert not calls
        found = home.apply_rotary_pos_emb(q, k, cos, sin)
    assert calls["rotate"] == 2
    for own, other in zip(found, usual(q, k, cos, sin), strict=True):
        torch.testing.assert_close(own, other)


# --- In the trainer -----------------------------------------------------------------------------


def partly_frozen():
    model = tiny_policy()
    model.model.layers[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("options", "norms"),
    [
        ({}, 5),
        ({"peft_config": None}, 0),
        ({"peft_config": None, "model": partly_frozen}, 0),
        (
            {
                "peft_config": LoraConfig(
                    r=2,
                    target_modules="all-linear",
                    modules_to_save=["input_layernorm"],
                    task_type="CAUSAL_LM",
                )
            },
            0,
        ),
    ],
    ids=["LoRA", "all weights", "some weights", "LoRA and norms"],
)
def test_before_the_first_step_the_margin_is_exactly_zero(
    options, norms, calls, tmp_path, monkeypatch
):
    """Policy and reference round alike, whatever is fused."""
    seen = []
    check = DPOTrainer._check_step_zero

    def recorded(self, policy, reference, mode):
        seen.append((policy.detach() - reference).abs().max().item())
        check(self, policy, reference, mode)

    monkeypatch.setattr(DPOTrainer, "_check_step_zero", recorded)
    options = {**options, "model": options.get("model", tiny_policy)()}
    trainer = make_trainer(tmp_path, pair_rows(), max_steps=1, **options)
    assert (len(trainer.scoring.fused.norms), len(trainer.scoring.fused.mlps)) == (norms, 2)
    calls.clear()
    trainer.train()
    assert seen == [0.0]
    assert calls["swiglu"] >= 4  # policy and reference
    assert (calls["rms_norm"] > 0) == (norms > 0)
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2))


def test_a_reference_that_is_let_go_is_not_kept_by_the_plan(tmp_path):
    trainer = make_trainer(
        tmp_path,
        pair_rows(4),
        peft_config=None,
        ref_model=perturbed(tiny_policy()),
        precompute_ref_log_probs=True,
        reference_cache=str(tmp_path / "cache"),
        max_steps=1,
    )
    mlp = weakref.ref(trainer.ref_model.model.layers[0].mlp)
    assert mlp() is not None
    trainer.train()
    gc.collect()
    assert mlp() is None


def test_a_plan_for_a_gpu_takes_low_precision_too_and_only_of_one_dtype(calls):
    model = frozen_norms("Llama")
    plan = plan_fused_layers(model)._replace(any_dtype=True)
    model = model.to(torch.bfloat16)
    calls.clear()
    with torch.no_grad():
        expected = model(IDS).logits
        with fused_layers(model, plan):
            found = model(IDS).logits
            assert taken(calls) == FUSED["Llama"]
            assert (found - expected).norm() <= 3e-2 * expected.norm()
            calls.clear()
            model.model.norm(
                torch.randn(2, model.config.hidden_size)
            )  # float32 under a bfloat16 weight
    assert not calls

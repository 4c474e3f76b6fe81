"""What trees need on a GPU, proven without one: block masks, whole blocks, one graph, autocast."""

import importlib
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

import prefopt.logprobs
from prefopt.logprobs import OutputHead, score_tokens
from prefopt.models import fused_lora
from prefopt.training import tree_model
from prefopt.training.tree_model import Scoring, choose_scoring, score_answers, tree_attention
from prefopt.tree_attention import FLEX_BLOCK, flex_block_mask
from prefopt.trees import AnswerTree, TreeSpan, pack_trees, tree_mask

pytestmark = [
    # Compiled it is on GPUs only; and torch looks at the gradient of what is no leaf.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, sliding_window=400, query_pre_attn_scalar=16),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def tiny(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def some_trees(seed, n=3, prompt=40, answer=30):
    draw = random.Random(seed)

    def ids(longest):
        return tuple(draw.randrange(97) for _ in range(draw.randint(1, longest)))

    return [
        AnswerTree(ids(prompt), tuple(ids(answer) for _ in range(draw.randint(1, 4))))
        for _ in range(n)
    ]


def listed(numbers, indices):
    return [row[:n].tolist() for n, row in zip(numbers[0, 0], indices[0, 0], strict=True)]


@pytest.mark.parametrize("seed", range(12))
def test_the_block_mask_is_the_one_torch_works_out_from_the_whole_mask(seed):
    longest = [4, 60, 300, 700][seed % 4]
    spans = pack_trees(some_trees(seed, 1 + seed % 5, longest, longest)).spans
    if seed % 3 == 0:
        spans = (*spans, TreeSpan(spans[-1].end, 1 + seed * 20, ()))
    length = spans[-1].end
    found = flex_block_mask(spans, "cpu")
    dense = create_mask(found.mask_mod, 1, 1, length, length, device="cpu")
    assert torch.equal(dense, tree_mask(spans))
    expected = create_block_mask(found.mask_mod, None, None, length, length, device="cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        own, other = (
            listed(getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices"))
            for mask in (found, expected)
        )
        assert own == other, kind


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flex_gives_the_models_own_log_probabilities_and_gradients(family, monkeypatch):
    # torch refuses to differentiate on a CPU for want of a fast kernel; the slow one is right.
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    model = tiny(family)
    choose_scoring(model)
    trees = some_trees(1)
    assert pack_trees(trees).n_tokens % FLEX_BLOCK  # so there is a tail
    results = []
    for scoring in (Scoring("tree", "flex"), Scoring("tree", "dense"), Scoring("logits")):
        model.zero_grad()
        with tree_attention(model, scoring):
            batch = scoring.batch(trees, 0)
            logprobs = score_answers(model, batch, scoring).tokens.logprobs
            (logprobs * torch.linspace(-1, 1, logprobs.numel())).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((logprobs.detach(), gradients))
    for found, gradients in results[:2]:
        torch.testing.assert_close(found, results[-1][0], rtol=1e-4, atol=1e-4)
        for own, other in zip(gradients, results[-1][1], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-5)


def test_the_tail_is_no_part_of_the_balancing_loss():
    model = tiny("mixtral")
    choose_scoring(model)
    losses = []
    for backend in ("flex", "dense", "segments"):
        scoring = Scoring("tree", backend)
        with tree_attention(model, scoring), torch.no_grad():
            batch = scoring.batch(some_trees(2), 0)
            losses.append(score_answers(model, batch, scoring, aux_loss=True).aux_loss)
    assert losses[0] > 0
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[1])


def test_rows_of_any_length_have_two_whole_blocks_or_more():
    for n in (1, 127, 128, 129, 255, 256, 257, 300, 384):
        batch = pack_trees([AnswerTree((1,) * n, ((2,),))])
        inputs = tree_model._whole_blocks(batch)
        length = inputs["input_ids"].shape[1]
        assert inputs["position_ids"].shape == (1, length)
        assert length % FLEX_BLOCK == 0
        assert length == max(2 * FLEX_BLOCK, -(-n // FLEX_BLOCK) * FLEX_BLOCK)
        assert inputs["tree_route"].spans[-1].end == length
        assert torch.equal(inputs["input_ids"][:, :n], batch.input_ids)


@pytest.mark.slow
def test_batches_of_other_lengths_use_the_graphs_that_are_there():
    """Counted by dynamo itself; which backend compiles the graph makes no difference to it."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounter()
    attend = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    counts = []
    for seed in range(10):
        inputs = tree_model._whole_blocks(pack_trees(some_trees(seed, 1 + seed, 60, 60)))
        length = inputs["input_ids"].shape[1]
        query = torch.randn(1, length, 4, 16).transpose(1, 2)
        key, value = (torch.randn(1, length, 2, 16).transpose(1, 2) for _ in range(2))
        with torch.no_grad():
            mask = inputs["tree_route"].block_mask
            attend(query, key, value, block_mask=mask, scale=0.25, enable_gqa=True)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[-1] == counts[3] <= 3  # the second length tells the compiler that lengths vary


def test_no_mask_is_made_for_a_tree_batch(monkeypatch):
    """transformers would see packed rows in the positions and write out a (T, T) mask for them."""
    from transformers import masking_utils

    made = []
    original = masking_utils.sdpa_mask
    monkeypatch.setattr(
        masking_utils, "sdpa_mask", lambda *a, **k: made.append(1) or original(*a, **k)
    )
    model = tiny("llama")
    scoring = choose_scoring(model)
    tree_model.register_attention()  # with the counting function
    made.clear()
    try:
        with torch.no_grad(), tree_attention(model, scoring):
            score_answers(model, scoring.batch(some_trees(3), 0), scoring)
            assert made == []
            padded = Scoring("tree", window=1).batch(some_trees(3), 0)
            score_answers(model, padded, scoring)
            assert made
    finally:
        monkeypatch.undo()
        tree_model.register_attention()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flex_runs_under_autocast_where_q_and_k_may_differ_from_v_in_dtype(family):
    model = tiny(family)
    choose_scoring(model)
    found = {}
    for backend in ("flex", "segments"):
        scoring = Scoring("tree", backend)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), tree_attention(model, scoring):
            batch = scoring.batch(some_trees(4), 0)
            found[backend] = score_answers(model, batch, scoring).tokens.logprobs
    torch.testing.assert_close(found["flex"], found["segments"], rtol=0.01, atol=0.02)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_lora_is_fused_and_as_exact_as_pefts_own(base):
    """Both are compared with the same layers in float64; neither may be the worse one by much."""
    model = tiny("llama", dtype=base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]

    def outcome():
        loss = model(input_ids=ids).logits.float().log_softmax(-1)[..., 3].sum()
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    with torch.autocast("cpu", torch.bfloat16):
        by_peft = outcome()
        with fused_lora(model) as n:
            fused = outcome()
    assert n == 14
    assert all(g.dtype == torch.float32 for g in fused[1:])
    model.double()
    exact = outcome()

    def error(found):
        return sum(float((a.double() - b.double()).norm() / b.double().norm())
                   for a, b in zip(found, exact, strict=True)) / len(exact)  # fmt: skip

    assert error(fused) < 0.05
    assert error(fused) < 1.2 * error(by_peft)


def test_under_autocast_fused_lora_keeps_fewer_bytes_for_the_backward_pass():
    model = get_peft_model(
        tiny("llama", dtype=torch.bfloat16), LoraConfig(r=4, target_modules="all-linear")
    )
    model.enable_input_require_grads()
    ids = torch.randint(97, (1, 200))

    def kept():
        seen = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if not isinstance(tensor, torch.nn.Parameter):
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(input_ids=ids).logits
        del out
        return sum(seen.values())

    with torch.autocast("cpu", torch.bfloat16):
        by_peft = kept()
        with fused_lora(model):
            fused = kept()
    assert fused < 0.9 * by_peft


def test_a_chunk_of_logits_is_as_large_as_a_gpu_needs_and_no_larger(monkeypatch):
    rows = prefopt.logprobs.head_chunk_rows
    assert rows("cpu", 128256) == 128
    assert 1000 < rows("cuda", 128256) < 1100
    assert rows("cuda", 2**30) == 128
    hidden, weight = torch.randn(300, 8), torch.randn(50, 8)
    targets = torch.randint(50, (300,))
    expected = score_tokens(hidden, OutputHead(weight), targets)
    monkeypatch.setattr(prefopt.logprobs, "_CHUNK", 300)
    for own, other in zip(score_tokens(hidden, OutputHead(weight), targets), expected, strict=True):
        torch.testing.assert_close(own, other)

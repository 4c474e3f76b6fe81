"""The DPO engine on a GPU: `pytest -m gpu`. PREFOPT_TEST_DEVICE=cpu runs what a CPU can of it."""

import copy
import os

import pytest
import torch
from datasets import Dataset

from benchmarks import gpu
from prefopt.logprobs import OutputHead, score_tokens
from prefopt.training.dpo_trainer import DPOConfig, DPOTrainer
from prefopt.training.tree_model import Scoring, choose_scoring, score_answers, tree_attention
from prefopt.tree_attention import flex_attention, flex_block_mask
from prefopt.trees import AnswerTree, pack_trees
from tests.tiny_models import tiny_tokenizer

DEVICE = os.environ.get("PREFOPT_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device"
    ),
    # The libraries' own, about themselves; a GPU adds more of them.
    pytest.mark.filterwarnings("ignore"),
]
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU's kernels or memory show it")


@pytest.fixture(scope="module")
def scores():
    return gpu.check_families(DEVICE, 200)


@pytest.mark.parametrize("way", list(gpu.WAYS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_and_gradients_are_those_of_the_models_own_logits(scores, way, dtype):
    rows = [r for r in scores if r["way"] == way and r["dtype"] == dtype]
    assert rows
    assert [r for r in rows if not r["right"]] == []


@on_cuda
def test_trees_through_flex_attention_are_what_is_chosen(scores):
    assert {r["family"]: r["chosen"] for r in scores} == dict.fromkeys(gpu.families(), "tree/flex")


def batches(n, seed=0):
    """Trees of another total length each time."""
    draw = torch.Generator().manual_seed(seed)

    def ids(size):
        return tuple(torch.randint(211, (size,), generator=draw).tolist())

    return [
        [AnswerTree(ids(20 + 37 * i), (ids(10 + 5 * i), ids(3 + 61 * i))) for _ in range(1 + i % 3)]
        for i in range(n)
    ]


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_of_other_lengths_are_not_compiled_anew(dtype):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config = copy.deepcopy(gpu.families()["llama (grouped heads)"])
    model = gpu.transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE)
    choose_scoring(model)
    scoring, graphs = Scoring("tree", "flex"), []
    for trees in batches(12):
        batch = scoring.batch(trees, 0).to(DEVICE)
        with tree_attention(model, scoring):
            with torch.no_grad():
                reference = score_answers(model, batch, scoring).tokens.logprobs
            policy = score_answers(model, batch, scoring).tokens.logprobs
            policy.sum().backward()
        torch.testing.assert_close(policy.detach(), reference)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3]  # by then the compiler knows that lengths vary
    assert graphs[-1] <= 16  # with those that tried which layers can be fused


def rows(n=8):
    return Dataset.from_list(
        [
            {
                "prompt": f"What is the colour of thing {i % 3}?",
                "chosen": f" The thing is green, {'very ' * (i * 7)}much so.",
                "rejected": f" I do not know {i}.",
            }
            for i in range(n)
        ]
    )


def trained(device, model, folder):
    """Losses and weights after full training with plain gradient descent, in float32."""
    args = DPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        copy.deepcopy(model).to(device),
        args=args,
        train_dataset=rows(),
        processing_class=copy.deepcopy(tiny_tokenizer("chatml")),
    )
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return losses, [p.detach().cpu() for p in trainer.model.parameters()]


def test_training_is_what_it_is_on_a_cpu(tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(gpu.families()["llama (grouped heads)"])
    config.vocab_size = len(tiny_tokenizer("chatml"))
    model = gpu.transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    expected, weights = trained("cpu", model, tmp_path / "cpu")
    found, own = trained(DEVICE, model, tmp_path / "gpu")
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, abs=2e-4)
    moved = sum(float((a - b).norm() ** 2) for a, b in zip(weights, before, strict=True)) ** 0.5
    apart = sum(float((a - b).norm() ** 2) for a, b in zip(weights, own, strict=True)) ** 0.5
    assert apart < 1e-2 * moved


def test_losses_are_those_of_trl():
    assert [r for r in gpu.check_training(DEVICE) if not r["right"]] == []


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    base = gpu.make_model("tiny", DEVICE)
    base.requires_grad_(False)
    drawn = tuple(gpu.draw_rows("hh", 16, seed=2))
    losses = {}
    for checkpointing in (False, True):
        job = gpu.Job(drawn, 8, 2, checkpointing, DEVICE, learning_rate=5e-3, logging=True)
        losses[checkpointing] = gpu.train("prefopt", base, job, 2048, 1)["losses"]
    assert losses[True] == pytest.approx(losses[False], abs=2e-3)


def peak_bytes(work):
    """What the device's memory holds at most during a call, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@on_cuda
@pytest.mark.parametrize("trains", [False, True])
def test_the_logits_of_all_answer_tokens_are_never_there_at_once(trains):
    n, vocabulary, width = 8192, 128256, 64
    head = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16)
    head.requires_grad_(trains)
    hidden = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (n,), device=DEVICE)

    def work():
        found = score_tokens(hidden, OutputHead(head), targets)
        found.logprobs.sum().backward()
        return found

    assert peak_bytes(work) < 0.8 * n * vocabulary * 2  # in bfloat16; float32 would be twice that


@on_cuda
def test_attention_over_16_384_tokens_never_holds_a_mask_of_all_pairs():
    trees = [AnswerTree((0,) * 100, ((0,) * 60, (0,) * 70)) for _ in range(72)]
    spans = pack_trees(trees).spans
    length = spans[-1].end
    query, key, value = (
        torch.randn(1, length, heads, 32, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    for x in (query, key, value):
        x.requires_grad_()

    def work():
        mask = flex_block_mask(spans, DEVICE)
        flex_attention(query, key, value, mask, scale=None).float().sum().backward()

    work()  # compiles
    assert length > 16_000
    assert peak_bytes(work) < length * length


@on_cuda
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("heads", [(9, 3), (8, 2), (4, 4)])
def test_gradients_at_ragged_lengths_are_those_of_the_dense_mask(heads, softcap):
    """A ragged last block and a soft cap together have given NaN in a kernel of torch."""
    from prefopt.tree_attention import segment_attention

    spans = pack_trees([AnswerTree((0,) * 302, ((0,) * 77, (0,) * 1, (0,) * 200))] * 2).spans
    length = spans[-1].end
    assert length % 128
    draw = torch.Generator(DEVICE).manual_seed(0)
    inputs = [
        torch.randn(1, h, length, 64, device=DEVICE, generator=draw, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    ]
    weights = torch.randn(1, heads[0], length, 64, device=DEVICE, generator=draw)
    mask = flex_block_mask(spans, DEVICE)
    results = []
    for out in (
        flex_attention(*inputs, mask, scale=0.2, softcap=softcap),
        segment_attention(*inputs, spans, scale=0.2, softcap=softcap),
    ):
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for name, found, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_layers_run_as_one_kernel_each(dtype):
    """Values and gradients against the model's own layers, and less is kept for the backward pass."""
    from prefopt.training.fused_model import NOTHING_FUSED, fused_layers, plan_fused_layers

    torch.manual_seed(0)
    model = gpu.transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(gpu.families()["qwen3 (norms of q and k)"]), dtype=dtype
    ).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    plan = plan_fused_layers(model)
    assert (len(plan.norms), len(plan.mlps), len(plan.rotaries)) == (9, 2, 1)
    exact = copy.deepcopy(model).double()
    errors, kept = {}, {}

    def gradients(of, logits):
        layers = [p for p in of.model.layers.parameters() if p.requires_grad]
        found = torch.autograd.grad(logits.float().square().mean(), layers)
        return torch.cat([g.double().flatten() for g in found])

    for name, each in (("fused", plan), ("own", NOTHING_FUSED)):
        for length in (40, 77, 300):  # compiled for one, then for any
            draw = torch.Generator().manual_seed(length)
            ids = torch.randint(211, (1, length), generator=draw).to(DEVICE)
            expected = exact(ids).logits
            wanted = gradients(exact, expected)
            expected = expected.detach()
            before = torch.cuda.memory_allocated()
            with fused_layers(model, each):
                found = model(ids).logits
                kept[name] = torch.cuda.memory_allocated() - before
                given = gradients(model, found)
            errors.setdefault(name, []).append(
                (gpu.relative(found.detach().double(), expected), gpu.relative(given, wanted))
            )
            del found
    for fused, own in zip(errors["fused"], errors["own"], strict=True):
        assert fused[0] <= 2 * own[0] + 1e-6
        assert fused[1] <= 2 * own[1] + 1e-6
    # In float32 a norm keeps no copy of its input in a wider dtype.
    assert kept["fused"] < (0.8 if dtype == torch.bfloat16 else 1.0) * kept["own"]


@on_cuda
def test_every_trainer_does_what_it_does_on_a_cpu():
    assert [r for r in gpu.gpu_trainers.check(DEVICE, gpu.make_tokenizer()) if not r["right"]] == []

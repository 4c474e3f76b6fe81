"""Many families of models, tiny and random: which way they are scored, and that it is right.

The yardstick is always the model's own logits for each answer alone in its row.
"""

import copy
import logging

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.errors import ModelError
from prefopt.logprobs import OutputHead
from prefopt.training import tree_model as module
from prefopt.training.tree_model import (
    Scoring,
    add_answer_scoring,
    answer_states,
    choose_scoring,
    output_head,
    score_answers,
    tree_attention,
)
from prefopt.trees import AnswerTree, PaddedAnswers, TreeBatch

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHER = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name: (configuration, its settings)
FAMILIES = {
    "Llama": ("LlamaConfig", COMMON),
    "Llama tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Config", COMMON),
    "Qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8}),
    "Gemma": ("GemmaConfig", {**COMMON, "head_dim": 8}),
    "Gemma2": (
        "Gemma2Config",
        {**COMMON, "head_dim": 8, "sliding_window": 32, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 4},
    ),
    "Gemma3": ("Gemma3TextConfig", {**COMMON, "head_dim": 8, "sliding_window": 32}),
    "Mistral": ("MistralConfig", {**COMMON, "sliding_window": 32}),
    "Phi": ("PhiConfig", {**COMMON, "num_key_value_heads": 4}),
    "Phi3": ("Phi3Config", COMMON),
    "GPT2": (
        "GPT2Config",
        {**OTHER, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "Mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4}),
    "Olmo2": ("Olmo2Config", COMMON),
    "Cohere": ("CohereConfig", {**COMMON, "logit_scale": 0.25}),
    "Granite": (
        "GraniteConfig",
        {**COMMON, "logits_scaling": 4.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    ),
    "NeoX": (
        "GPTNeoXConfig",
        {k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
    ),
    "SmolLM3": ("SmolLM3Config", COMMON),
    "OPT": (
        "OPTConfig",
        {**OTHER, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "Bloom": ("BloomConfig", {**OTHER, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Mamba": ("MambaConfig", {**OTHER, "hidden_size": 32, "num_hidden_layers": 2}),
    "GptOss": (
        "GptOssConfig",
        {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "sliding_window": 32},
    ),
}  # fmt: skip

# Those that are not scored as trees: the way instead, and words of the reason.
SLOWER = {
    "Bloom": ("padded", "takes no position_ids"),
    "Mamba": ("padded", "carries a state from token to token"),
    "GptOss": ("tree", "attention sinks"),  # by a dense mask
}
WINDOWS = {"Gemma2": 32, "Gemma3": 32, "Mistral": 32, "GptOss": 32}


def family(name, families=FAMILIES, **changes):
    kind, settings = families[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, or they would do nothing
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_trees(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(3, 96, (n,), generator=draw).tolist())

    return [
        AnswerTree(ids(6), (ids(4), ids(1), ids(3))),
        AnswerTree(ids(1), (ids(5),)),
        AnswerTree(ids(4), (ids(2), ids(6))),
    ]


TREES = make_trees()


def alone(model, trees=TREES):
    """Every answer's token log-probabilities from the model's own logits, each in its own row."""
    parts = []
    for prompt, answers in trees:
        for answer in answers:
            ids = torch.tensor([prompt + answer])
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
            log_p = logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
            parts.append(log_p.gather(-1, ids[0, -len(answer) :, None])[:, 0])
    return torch.cat(parts)


def scored(model, scoring, trees=TREES, **options):
    batch = scoring.batch(trees, 0)
    return score_answers(model, batch, scoring, **options).tokens


def gradients(model, logprobs):
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logprobs))
    (logprobs * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-5):
    largest = max(g.norm() for g in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        allowed = tolerance * max(gradient.norm(), 1e-2 * largest)
        assert (found[name] - gradient).norm() <= allowed, name


def assert_right(model, scoring, trees=TREES, tolerance=1e-5):
    expected = alone(model, trees)
    expected_gradients = gradients(model, expected)
    with tree_attention(model, scoring):
        found = scored(model, scoring, trees)
        found_gradients = gradients(model, found.logprobs)
    assert ((found.logprobs - expected).abs() <= tolerance * (1 + expected.abs())).all()
    assert_same_gradients(found_gradients, expected_gradients, tolerance)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scored_as_its_own_logits_say(name, caplog):
    model = family(name)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        scoring = choose_scoring(model)
    way, words = SLOWER.get(name, ("tree", ""))
    assert scoring.way == way
    assert words in scoring.reason
    assert bool(scoring.reason) == (name in SLOWER)
    said = [r.getMessage() for r in caplog.records if "answers are scored" in r.getMessage()]
    assert len(said) == (name in SLOWER)
    if way == "tree":
        assert scoring.backend == ("dense" if name in SLOWER else "segments")
        assert scoring.window == WINDOWS.get(name)
        assert isinstance(scoring.batch(TREES, 0), TreeBatch)
    assert_right(model, scoring)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "Cohere"])
def test_all_ways_agree(name):
    model = family(name)
    chosen = choose_scoring(model)
    for scoring in (Scoring("tree", "dense", chosen.window), Scoring("padded"), Scoring("logits")):
        assert_right(model, scoring)


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "chosen") for name in FAMILIES), ("Llama", "padded")]
)
def test_hidden_states_at_chosen_tokens_are_the_models_own(name, way):
    model = family(name)
    chosen = choose_scoring(model)
    scoring = chosen if way == "chosen" else Scoring("padded")
    batch = scoring.batch(TREES, 0, feed_last=True)
    with torch.no_grad(), tree_attention(model, scoring):
        ends = answer_states(model, batch, scoring, batch.ends)
        before = answer_states(model, batch, scoring, batch.predictor)
    first = 0
    for i, (prompt, answer) in enumerate((t.prompt_ids, a) for t in TREES for a in t.answers):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            out = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        alone = out.last_hidden_state[0]
        torch.testing.assert_close(ends[i], alone[-1], rtol=1e-4, atol=1e-4)
        mine = before[first : first + len(answer)]
        torch.testing.assert_close(mine, alone[-len(answer) - 1 : -1], rtol=1e-4, atol=1e-4)
        first += len(answer)


def test_many_short_answers_are_padded_and_a_few_or_long_ones_are_not():
    scoring = choose_scoring(family("Llama"))
    assert scoring.segment_cost > 1
    short = [AnswerTree((3,), ((4, 5),))]
    assert isinstance(scoring.batch(short * 40, 0), PaddedAnswers)
    assert isinstance(scoring.batch(short * 10, 0), TreeBatch)
    long = [AnswerTree((3,) * 4000, ((4, 5), (6,)))]
    assert isinstance(scoring.batch(long * 40, 0), TreeBatch)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_statistics_are_those_of_the_own_logits(name):
    model = family(name)
    scoring = choose_scoring(model)
    for each in (scoring, Scoring("padded"), Scoring("logits")):
        with torch.no_grad(), tree_attention(model, each):
            found = scored(model, each, log_sum_sq=True)
        rows = []
        for prompt, answers in TREES:
            for answer in answers:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([prompt + answer])).logits
                rows.append(logits[0, -len(answer) - 1 : -1])
        logits = torch.cat(rows)
        targets = torch.tensor([t for tree in TREES for a in tree.answers for t in a])
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(
            found.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(found.mean_logit, logits.mean(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.log_sum_sq, torch.logsumexp(2 * log_p, -1), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(found.is_top1, logits.argmax(-1) == targets)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere"])
def test_a_temperature_divides_the_own_logits(name):
    """Through scales and a soft cap (Gemma2's) as well."""
    model = family(name)
    choose_scoring(model)
    rows, ids = [], []
    for prompt, answers in TREES:
        for answer in answers:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits
            rows.append(logits[0, -len(answer) - 1 : -1] / 0.7)
            ids += answer
    log_p = torch.cat(rows).log_softmax(-1)
    expected = log_p.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    by_logits = gradients(model, expected)
    for each in (choose_scoring(model), Scoring("padded"), Scoring("logits")):
        with tree_attention(model, each):
            found = scored(model, each, temperature=0.7)
            torch.testing.assert_close(found.logprobs, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5
            )
            assert_same_gradients(gradients(model, found.logprobs), by_logits, 1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_tokens_that_the_head_rules_out_make_no_nan(frozen):
    """A bias of -inf, also on tokens by which the way is chosen."""
    model = family("Llama")
    bias = torch.zeros(96)
    bias[:2] = bias[50:] = -torch.inf
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    model.requires_grad_(not frozen)
    model.model.layers[0].requires_grad_(True)
    scoring = choose_scoring(model)
    assert scoring.way == "tree"
    trees = [AnswerTree((60, 3), ((4, 5, 49), (7,)))]
    for each in (scoring, Scoring("padded"), Scoring("logits")):
        with tree_attention(model, each):
            found = scored(model, each, trees)
            grads = gradients(model, found.logprobs)
        torch.testing.assert_close(found.logprobs, alone(model, trees))
        assert found.entropy.isfinite().all()
        assert all(g.isfinite().all() for g in grads.values())


# --- Attention windows --------------------------------------------------------------------------


def test_a_batch_with_a_row_beyond_the_window_is_padded_and_still_right():
    model = family("Mistral", sliding_window=12)
    scoring = choose_scoring(model)
    assert (scoring.way, scoring.window) == ("tree", 12)
    fits = AnswerTree(tuple(range(3, 10)), ((20, 21, 22, 23, 24), (30,)))  # 7 + 5 = 12
    too_long = AnswerTree(tuple(range(3, 11)), ((20, 21, 22, 23, 24), (30,)))
    assert isinstance(scoring.batch([fits], 0), TreeBatch)
    assert isinstance(scoring.batch([too_long], 0), PaddedAnswers)
    assert isinstance(scoring.batch([fits, too_long], 0), PaddedAnswers)
    longest = AnswerTree(tuple(range(3, 25)), ((20, 21, 22, 23, 24), (30,)))
    for trees in ([fits], [fits, too_long], [longest]):
        assert_right(model, scoring, trees)
    packed = Scoring("tree", "segments", window=None)
    with torch.no_grad(), tree_attention(model, packed):  # what would have gone wrong
        wrong = scored(model, packed, [longest]).logprobs
        assert (wrong - alone(model, [longest])).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"sliding_window": 9}, 9),
        ({"sliding_window": None}, None),
        ({"sliding_window": 9, "use_sliding_window": False}, None),
        ({"sliding_window": 9, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]}, 9),
        ({"attention_chunk_size": 7}, 7),
        ({"sliding_window": 9, "attention_chunk_size": 7}, 7),
        ({}, None),
    ],
    ids=str,
)
def test_the_window_is_read_off_the_configuration(settings, window):
    class Config:
        pass

    config = Config()
    for name, value in settings.items():
        setattr(config, name, value)
    assert module._attention_window(config) == window


# --- Training modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_gradient_checkpointing_changes_no_gradient(lora, reentrant):
    model = family("Llama")
    if lora:
        model = with_lora(model)
        model.enable_input_require_grads()
    scoring = choose_scoring(model)
    model.train()
    with tree_attention(model, scoring):
        expected = gradients(model, scored(model, scoring).logprobs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    layer = base_layers(model)[0]
    hook = layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    with tree_attention(model, scoring):
        found = gradients(model, scored(model, scoring).logprobs)
    hook.remove()
    assert len(runs) == 2  # the forward pass ran again
    assert_same_gradients(found, expected)


def base_layers(model):
    return module.base_model(model).model.layers


def with_lora(model, **settings):
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def test_lora_is_scored_as_trees_and_only_its_weights_get_gradients():
    model = with_lora(family("Qwen2"))
    scoring = choose_scoring(model)
    assert scoring.way == "tree"
    assert_right(model, scoring)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_adapter_can_be_switched_off_inside_the_block():
    model = with_lora(family("Llama"))
    scoring = choose_scoring(model)
    with torch.no_grad(), model.disable_adapter():
        expected = alone(model)
        with tree_attention(model, scoring):
            assert (scored(model, scoring).logprobs - expected).abs().max() < 1e-5
    with torch.no_grad():
        assert (alone(model) - expected).abs().max() > 1e-2


def test_bf16_autocast_is_close_and_its_gradients_point_the_same_way():
    model = family("Llama")
    scoring = choose_scoring(model)
    expected = alone(model)
    exact = torch.cat([g.flatten() for g in gradients(model, expected).values()])
    with tree_attention(model, scoring):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = scored(model, scoring).logprobs
        rough = torch.cat([g.flatten() for g in gradients(model, found).values()])
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=0) > 0.99


def test_a_model_in_bf16_is_scored_as_trees():
    model = family("Llama").bfloat16()
    scoring = choose_scoring(model)
    assert scoring.way == "tree"
    with torch.no_grad(), tree_attention(model, scoring):
        found = scored(model, scoring).logprobs
        assert (found - alone(model)).abs().max() < 0.1


def test_a_model_that_was_trained_under_autocast_is_scored_as_trees_again(caplog):
    """Accelerate leaves its wrapper on it, so its own logits are rounded too."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = family("Llama")
    AcceleratorState._reset_state()
    try:
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    again = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        assert choose_scoring(again).way == "tree"
    assert not caplog.text


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**COMMON, attention_dropout=0.5)
    )
    scoring = choose_scoring(model)
    assert model.training  # left as it was found
    with torch.no_grad(), tree_attention(model, scoring):
        assert not torch.equal(scored(model, scoring).logprobs, scored(model, scoring).logprobs)
        model.eval()
        assert torch.equal(scored(model, scoring).logprobs, scored(model, scoring).logprobs)


@pytest.mark.slow
def test_a_compiled_model_is_scored_with_one_dense_mask():
    model = family("Llama")
    scoring = choose_scoring(model, compiled=True)
    assert (scoring.way, scoring.backend) == ("tree", "dense")
    expected = alone(model)
    expected_gradients = gradients(model, expected)
    compiled = torch.compile(model, backend="aot_eager")
    with tree_attention(model, scoring):
        found = scored(compiled, scoring).logprobs
        found_gradients = gradients(model, found)
    assert (found - expected).abs().max() < 1e-5
    assert_same_gradients(found_gradients, expected_gradients)


# --- Adapters that change the head or the input -------------------------------------------------


def test_lora_on_the_output_head_is_scored_from_logits_and_trained():
    model = with_lora(family("Llama"), target_modules=["q_proj", "lm_head"])
    scoring = choose_scoring(model)
    assert scoring.way == "logits"
    assert "the output head carries an adapter" in scoring.reason
    assert_right(model, scoring)
    head = [n for n, p in model.named_parameters() if "lm_head" in n and p.grad is not None]
    assert len(head) == 2


def test_a_head_that_is_saved_whole_is_scored_from_logits_and_trained():
    model = with_lora(family("Llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    scoring = choose_scoring(model)
    assert scoring.way == "logits"
    assert_right(model, scoring)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.grad is not None)


def prompt_tuned(kind):
    torch.manual_seed(0)
    return get_peft_model(family("Llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))


def test_prefix_tuning_is_padded():
    model = prompt_tuned(PrefixTuningConfig)
    scoring = choose_scoring(model)
    assert scoring.way == "padded"
    assert "prompt tuning puts virtual tokens before each row" in scoring.reason
    assert_right(model, scoring)
    assert any("prompt_encoder" in n for n, p in model.named_parameters() if p.grad is not None)


def test_prompt_tuning_shifts_every_position_and_is_refused():
    words = (
        r"LlamaForCausalLM's own logits: prompt tuning puts virtual tokens before each row; padded"
    )
    with pytest.raises(ModelError, match=words):
        choose_scoring(prompt_tuned(PromptTuningConfig))


# --- What is refused, and what stays as it was --------------------------------------------------


def test_a_model_whose_logits_are_not_its_heads_is_scored_from_logits():
    model = family("Llama")
    model.lm_head.register_forward_hook(lambda _module, _args, out: out * 1.5)
    scoring = choose_scoring(model)
    assert scoring.way == "logits"
    assert "tree differs from the model's own logits by" in scoring.reason
    assert "padded differs" in scoring.reason
    assert_right(model, scoring)


def test_a_model_that_is_not_the_same_twice_is_refused():
    model = family("Llama")
    model.lm_head.register_forward_hook(lambda _m, _a, out: out + torch.randn_like(out))
    with pytest.raises(ModelError, match=r"no way of scoring answers agrees .* logits differs"):
        choose_scoring(model)


def test_the_head_is_read_with_what_the_configuration_does_to_logits():
    cohere, granite, gemma = (output_head(family(n)) for n in ("Cohere", "Granite", "Gemma2"))
    assert (cohere.scale, granite.scale, gemma.scale) == (0.25, 0.25, 1.0)
    assert (cohere.softcap, gemma.softcap) == (None, 1.5)
    phi = family("Phi")
    head = output_head(phi)
    assert isinstance(head, OutputHead)
    assert head.bias is phi.lm_head.bias is not None


def test_a_model_without_an_output_head_is_refused():
    model = transformers.LlamaModel(transformers.LlamaConfig(**COMMON))
    with pytest.raises(ModelError, match="LlamaModel has no output head"):
        output_head(model)


def test_the_models_own_forward_stays_as_it_was():
    model = family("Llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    implementation = model.config._attn_implementation
    scoring = choose_scoring(model)
    add_answer_scoring(model)  # a second time changes nothing
    with tree_attention(model, scoring):
        assert model.config._attn_implementation != implementation
    assert model.config._attn_implementation == implementation
    with pytest.raises(RuntimeError, match="stop"), tree_attention(model, scoring):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
    assert model(input_ids=ids, labels=ids).loss is not None


def test_a_copied_model_scores_with_its_own_weights():
    """The reference is a deep copy of the policy; its forward must not call back to the original."""
    model = family("Llama")
    scoring = choose_scoring(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter *= 1.5
        choose_scoring(twin)
        with tree_attention(twin, scoring):
            found = scored(twin, scoring).logprobs
        assert (found - alone(twin)).abs().max() < 1e-5
        assert (alone(twin) - alone(model)).abs().max() > 1e-2


def test_a_mixture_of_experts_gives_its_balancing_loss():
    """Over the answers alone, padded, it is what the model itself returns."""
    model = family("Mixtral")
    choose_scoring(model)
    scoring = Scoring("padded")
    batch = scoring.batch(TREES, 0)
    with torch.no_grad():
        found = score_answers(model, batch, scoring, aux_loss=True).aux_loss
        expected = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask,
            output_router_logits=True,
        ).aux_loss  # fmt: skip
        assert score_answers(model, batch, scoring).aux_loss is None
    torch.testing.assert_close(found, expected)
    tree = choose_scoring(model)
    with tree_attention(model, tree):
        loss = score_answers(model, tree.batch(TREES, 0), tree, aux_loss=True).aux_loss
    model.zero_grad()
    loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if p.grad is not None and "gate" in n]
    assert routers
    assert all(g.abs().max() > 0 for g in routers)

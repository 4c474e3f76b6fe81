"""Decoding: the model's own distribution, whatever is generated beside an answer, for every family."""

import itertools

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from prefopt.sampling import slots
from prefopt.sampling.decoding import Decoder, DecodingSettings, TokenPrompt, answer_key

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
END = 1


def small(config=LlamaConfig, seed=0, **more):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(**{**SMALL, **more})).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def decoder(model, **settings):
    how = {
        "max_new_tokens": 8, "stop_token_ids": (END,), "pad_token_id": 0, "batch_size": 6,
        "batch_tokens": 10_000, **settings,
    }  # fmt: skip
    return Decoder(model, DecodingSettings(**how))


def asked(prompts, k=3, seed=0):
    return [
        TokenPrompt(tuple(ids), tuple(answer_key(seed, number, a) for a in range(k)))
        for number, ids in enumerate(prompts)
    ]


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [3, 4], [16] * 12]

FAMILIES = {
    "llama": small,
    "eager": lambda: small(attn_implementation="eager"),
    "qwen3": lambda: small(Qwen3Config, head_dim=8),
    "phi3": lambda: small(Phi3Config),
    "mixtral": lambda: small(MixtralConfig, num_local_experts=4),
    "gpt2": gpt2,
    "opt": lambda: small(OPTConfig, ffn_dim=32, word_embed_proj_dim=16),
    "mistral, local": lambda: small(MistralConfig, sliding_window=5),
    "gemma2, local": lambda: small(Gemma2Config, head_dim=4, sliding_window=5),
}
IN_SLOTS = {"llama", "eager", "qwen3", "phi3", "mixtral", "gpt2", "opt"}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate_for_every_family(family):
    model = FAMILIES[family]()
    found = decoder(model, temperature=0).answers(asked(PROMPTS))
    assert (slots.fitting_slots(model) is not None) is (family in IN_SLOTS)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
        )
        expected = out[0, len(prompt) :].tolist()
        assert [list(a.ids) for a in answers] == [expected] * 3
        assert all(a.ended == (expected[-1] == END) for a in answers)


@pytest.mark.parametrize("how", [{}, {"top_p": 0.8}, {"top_k": 4, "temperature": 0.7}])
def test_slots_and_generate_draw_the_same(how, monkeypatch):
    model = small()
    found = decoder(model, **how).answers(asked(PROMPTS))
    assert len({a.ids for answers in found for a in answers}) > 10
    monkeypatch.setitem(slots._REFUSED, model, "for the test")
    assert decoder(model, **how).answers(asked(PROMPTS)) == found


def test_whole_answers_have_the_model_s_probabilities():
    """All answers of up to two tokens from a model of few tokens, against the exact product."""
    model = small(vocab_size=6, initializer_range=0.8)
    n = 6_000
    (found,) = decoder(model, max_new_tokens=2, batch_size=n).answers(asked([[5, 2]], k=n))

    def probabilities(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    first = probabilities([5, 2])
    expected = {(END,): float(first[END])}
    for a, b in itertools.product(range(6), repeat=2):
        if a != END:
            expected[a, b] = float(first[a] * probabilities([5, 2, a])[b])
    counts = dict.fromkeys(expected, 0)
    for answer in found:
        counts[answer.ids] += 1
    # Rare ones are put together, for the test's sake.
    common = [ids for ids, p in expected.items() if p * n >= 8]
    observed = [counts[ids] for ids in common] + [n - sum(counts[ids] for ids in common)]
    shares = [expected[ids] for ids in common] + [1 - sum(expected[ids] for ids in common)]
    assert len(common) > 10
    assert chisquare(observed, [n * p for p in shares]).pvalue > 1e-3


def test_answers_are_the_same_whatever_is_generated_beside_them():
    model = small()
    together = decoder(model, batch_size=100).answers(asked(PROMPTS, k=5))
    for batch_size, batch_tokens in ((1, 10_000), (2, 10_000), (7, 10_000), (100, 45)):
        some = decoder(model, batch_size=batch_size, batch_tokens=batch_tokens)
        assert some.answers(asked(PROMPTS, k=5)) == together
    for number, prompt in enumerate(asked(PROMPTS, k=5)):
        assert decoder(model).answers([prompt]) == together[number : number + 1]


def test_ended_answers_leave_and_others_enter():
    model, fed = small(), []
    decoder(model).answers(asked(PROMPTS, k=1))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    found = decoder(model, batch_size=4).answers(asked(PROMPTS * 3, k=2))
    lengths = [len(a.ids) for answers in found for a in answers]
    assert len(set(lengths)) > 3
    assert sum(fed) == sum(lengths)  # nobody waits for the others
    assert max(fed) == 4
    assert len(fed) < sum(lengths) / 3


def test_each_prompt_is_read_once_and_its_end_comes_with_the_first_step():
    model, read = small(), []
    decoder(model).answers(asked([[5]], k=1))
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decoder(model, max_new_tokens=1).answers(asked([[5, 6, 7, 8]], k=6))
    assert read == [(1, 3), (6, 1)]
    read.clear()
    # More answers than places: the prompt is read again for the rest.
    (found,) = decoder(model, max_new_tokens=1).answers(asked([[5, 6, 7, 8]], k=8))
    assert read == [(1, 3), (6, 1), (1, 3), (2, 1)]
    assert len(found) == 8


def test_prompts_of_one_token_long_prompts_and_none():
    model = small()
    assert decoder(model).answers([]) == []
    assert decoder(model).answers([TokenPrompt((5,), ())]) == [[]]
    prompts = [[5], [6]]
    assert decoder(model).answers(asked(prompts, k=1)) == [
        decoder(model).answers(asked(prompts, k=1))[0],
        decoder(model).answers([asked(prompts, k=1)[1]])[0],
    ]
    (found,) = decoder(model, batch_tokens=1).answers(asked([[7] * 50], k=2))
    assert [1 <= len(a.ids) <= 8 for a in found] == [True, True]


def test_an_answer_ends_with_its_first_stop_token_or_is_cut_off():
    model = small()
    stops = tuple(range(0, 24, 2))
    found = decoder(model, stop_token_ids=stops, max_new_tokens=3).answers(asked(PROMPTS, k=20))
    answers = [a for group in found for a in group]
    assert {len(a.ids) for a in answers} == {1, 2, 3}
    for ids, ended in answers:
        assert (ids[-1] in stops) is ended
        assert not set(ids[:-1]) & set(stops)
        assert ended or len(ids) == 3
    free = decoder(model, stop_token_ids=(), max_new_tokens=3).answers(asked(PROMPTS))
    assert all(len(a.ids) == 3 and not a.ended for group in free for a in group)


def test_adapters_count_and_the_model_is_left_as_it_was():
    plain = decoder(small(), temperature=0).answers(asked(PROMPTS, k=1))
    model = get_peft_model(small(), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1.0)
    model.train()
    adapted = decoder(model, temperature=0).answers(asked(PROMPTS, k=1))
    assert adapted != plain
    assert all(m.training for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    with model.disable_adapter():
        assert decoder(model, temperature=0).answers(asked(PROMPTS, k=1)) == plain


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_count_at_every_step(kind):
    plain = decoder(small(), temperature=0).answers(asked(PROMPTS, k=1))
    model = get_peft_model(small(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_(std=3.0)
    found = decoder(model, temperature=0).answers(asked(PROMPTS, k=1))
    assert found != plain
    model.eval()
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([[*prompt, *answer.ids]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        likeliest = logits[0, -len(answer.ids) - 1 : -1].argmax(-1).tolist()
        assert list(answer.ids) == likeliest
        assert answer.ended == (likeliest[-1] == END)
        assert answer.ended or len(likeliest) == 8


def test_under_autocast_too_answers_are_made_in_slots():
    model = small()
    found = Decoder(
        model, decoder(model).settings, lambda: torch.autocast("cpu", torch.bfloat16)
    ).answers(asked(PROMPTS))
    assert slots._REFUSED[model] == ""
    assert sum(map(len, found)) == 15


def test_told_of_every_answer():
    told = []
    decoder(small()).answers(asked(PROMPTS, k=3), told.append)
    assert sum(told) == 15

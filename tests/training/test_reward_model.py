"""Reward models: what is saved is what is loaded, and a score is read at the answer's last token."""

import copy
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefopt import RewardModel
from prefopt.errors import DataError, ModelError
from prefopt.models import load_model
from prefopt.training.tree_model import Scoring
from prefopt.trees import AnswerTree
from prefopt.types import Prompt
from tests.tiny_models import save_tiny_model
from tests.training.dpo_cases import LORA, tiny_policy

PROMPTS = [Prompt.from_text("What is blue?"), Prompt.from_text("Hello!")]
ANSWERS = [["The sky.", "The sea is green.", "The sky.", ""], ["I am fine.\n\nThank you."]]


def perturb(reward, seed=0):
    """Weights in all that is trained, so that nothing is the same by being 0."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reward.named_parameters():
            if "lora_" in name or name.startswith("head"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    reward.bias = 0.1234
    return reward


def reward_model(folder, **options):
    return perturb(RewardModel.new(load_model(folder), peft_config=copy.deepcopy(LORA), **options))


def trees(n=6, seed=0):
    draw = random.Random(seed)

    def ids(most):
        return tuple(draw.randrange(10, 300) for _ in range(draw.randint(1, most)))

    return [AnswerTree(ids(9), tuple(ids(12) for _ in range(draw.randint(1, 4)))) for _ in range(n)]


def alone(reward, tree):
    """Every answer in a batch of its own, by the model's own forward pass."""
    found = []
    for answer in tree.answers:
        ids = torch.tensor([tree.prompt_ids + answer])
        with torch.no_grad():
            out = reward.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            found.append(reward.head(out.hidden_states[-1][0, -1].float()) - reward.bias)
    return torch.cat(found)


def test_a_new_head_has_the_spread_that_makes_scores_of_order_1():
    policy = tiny_policy()
    weights = torch.cat(
        [RewardModel.new(policy, seed=seed).head.weight.detach() for seed in range(200)]
    )
    assert weights.std().item() == pytest.approx(17**-0.5, rel=0.05)
    again = RewardModel.new(policy, seed=3).head.weight
    assert torch.equal(again, weights[3:4])
    assert not RewardModel.new(policy).head.bias.any()


def test_full_fine_tuning_leaves_the_output_head_alone():
    reward = RewardModel.new(tiny_policy())
    assert not reward.model.lm_head.weight.requires_grad
    assert reward.model.model.embed_tokens.weight.requires_grad


def test_scores_survive_saving_to_the_last_bit(tiny_model, tmp_path):
    reward = reward_model(tiny_model)
    before = reward.score(PROMPTS, ANSWERS)
    reward.save(tmp_path / "reward")
    loaded = RewardModel.load(tmp_path / "reward")
    assert loaded.score(PROMPTS, ANSWERS) == before
    assert loaded.bias == reward.bias
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save(tmp_path / "again")
    assert RewardModel.load(tmp_path / "again").score(PROMPTS, ANSWERS) == before
    names = {path.name for path in (tmp_path / "reward").iterdir()}
    assert {"adapter_model.safetensors", "heads.safetensors", "reward_model.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_model_without_an_adapter_survives_too(tiny_model, tmp_path):
    reward = perturb(RewardModel.new(load_model(tiny_model)))
    with torch.no_grad():
        reward.model.model.layers[0].mlp.up_proj.weight += 0.05
    before = reward.score(PROMPTS, ANSWERS)
    reward.save(tmp_path / "reward")
    assert RewardModel.load(tmp_path / "reward").score(PROMPTS, ANSWERS) == before
    with pytest.raises(ModelError, match="takes no base"):
        RewardModel.load(tmp_path / "reward", base=tiny_model)


def test_the_adapter_joins_others_on_a_base_and_leaves_them_as_they_were(tiny_model, tmp_path):
    reward = reward_model(tiny_model)
    before = reward.score(PROMPTS, ANSWERS)
    reward.save(tmp_path / "reward")
    base = get_peft_model(load_model(tiny_model).model, LoraConfig(r=3, target_modules="all-linear"),
                          adapter_name="policy")  # fmt: skip
    base.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    trains = {n for n, p in base.named_parameters() if p.requires_grad}
    logits = base(input_ids=ids).logits
    joined = RewardModel.load(tmp_path / "reward", base=base)
    assert joined.adapter == "reward"
    assert joined.score(PROMPTS, ANSWERS) == before
    assert base.active_adapter == "policy"
    assert base.training
    assert {n for n, p in base.named_parameters() if p.requires_grad} == trains
    assert torch.equal(base(input_ids=ids).logits, logits)
    joined.save(tmp_path / "alone")  # PEFT would put "reward" into a folder of its own
    assert RewardModel.load(tmp_path / "alone").score(PROMPTS, ANSWERS) == before


def test_a_trainable_one_can_be_trained_further(tiny_model, tmp_path):
    reward_model(tiny_model).save(tmp_path / "reward")
    loaded = RewardModel.load(tmp_path / "reward", trainable=True)
    trains = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert trains
    assert all("lora_" in n or n == "head.weight" for n in trains)


@given(st.integers(0, 10_000), st.integers(1, 200))
@settings(max_examples=5, deadline=None)
def test_no_batching_or_padding_changes_a_score(seed, budget):
    reward = perturb(RewardModel.new(tiny_policy(), peft_config=copy.deepcopy(LORA)))
    batch = trees(seed=seed)
    expected = torch.cat([alone(reward, tree) for tree in batch])
    for scoring in (None, Scoring("padded"), Scoring("tree", "dense")):
        if scoring is not None:
            reward.scoring = scoring
        found = reward.score_trees(batch, micro_batch_tokens=budget)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_padding_token_in_an_answer_is_a_token_like_any_other():
    """Masks come from positions: the id that pads may end an answer, as it does where pad is EOS."""
    reward = perturb(RewardModel.new(tiny_policy()))
    tree = AnswerTree((5, 6), ((7, 0, 0), (7, 0), (0,)))  # without a tokenizer 0 pads
    assert reward.pad_token_id == 0
    assert reward.scoring.way == "tree"
    for scoring in (Scoring("padded"), Scoring("tree", "segments")):
        reward.scoring = scoring
        torch.testing.assert_close(reward.score_trees([tree]), alone(reward, tree))


def test_merging_changes_scores_by_rounding_only(tiny_model):
    reward = reward_model(tiny_model)
    before = reward.score(PROMPTS, ANSWERS)
    merged = reward.merge()
    assert merged.adapter is None
    for one, two in zip(before, merged.score(PROMPTS, ANSWERS), strict=True):
        assert two == pytest.approx(one, abs=1e-4)
    assert reward.score(PROMPTS, ANSWERS) == before


def test_centring_sets_the_mean_to_0_and_nothing_else():
    reward = perturb(RewardModel.new(tiny_policy()))
    batch = trees(12)
    before = reward.score_trees(batch)
    bias = reward.centre(batch)
    after = reward.score_trees(batch)
    assert abs(after.mean().item()) < 1e-6
    torch.testing.assert_close(after - before, (0.1234 - bias) * torch.ones_like(before))


def test_scores_come_in_the_order_of_prompts_and_answers(tiny_model):
    reward = reward_model(tiny_model)
    together = reward.score(PROMPTS, ANSWERS)
    for prompt, texts, scores in zip(PROMPTS, ANSWERS, together, strict=True):
        for text, score in zip(texts, scores, strict=True):
            assert reward.score([prompt], [[text]])[0][0] == pytest.approx(score, abs=1e-5)
    assert together[0][0] == together[0][2]
    assert reward.score([], []) == []
    assert reward.score(PROMPTS, [[], ["a"]])[0] == []


def test_a_score_needs_a_tokenizer_and_room(tiny_model):
    reward = reward_model(tiny_model)
    with pytest.raises(DataError, match="reads 256"):
        reward.score(PROMPTS[:1], [["word " * 300]])
    with pytest.raises(ValueError, match="one list of answers"):
        reward.score(PROMPTS, [["a"]])
    reward.tokenizer = None
    with pytest.raises(ModelError, match="tokenizer"):
        reward.score(PROMPTS[:1], [["a"]])


def test_a_folder_that_is_none_is_refused(tiny_model, tmp_path):
    reward = reward_model(tiny_model)
    reward.save(tmp_path / "reward")
    (tmp_path / "reward" / "heads.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot read the reward model"):
        RewardModel.load(tmp_path / "reward")
    with pytest.raises(ModelError, match="cannot load reward model"):
        RewardModel.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="has an adapter already"):
        RewardModel.new(reward.model, peft_config=LORA)


def test_a_head_for_another_base_is_refused(tiny_model, tmp_path):
    reward_model(tiny_model).save(tmp_path / "reward")
    with pytest.raises(ModelError, match="base"):
        RewardModel.load(tmp_path / "reward", base=tiny_policy())


# --- As transformers' sequence classification model ---------------------------------------------


def conversations(prompt, texts):
    return [
        [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": text}]
        for text in texts
    ]


@pytest.mark.parametrize("template", ["chatml", "llama", "two_ends", "gpt2"])
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_transformers_gives_the_same_scores(template, pad_is_eos, tmp_path):
    language_model = load_model(save_tiny_model(tmp_path / "base", template))
    if pad_is_eos:
        language_model.tokenizer.pad_token = language_model.tokenizer.eos_token
    reward = perturb(RewardModel.new(language_model, peft_config=copy.deepcopy(LORA)))
    texts = ["The sky.", "The sea is green.", "I"]
    ours = reward.score(PROMPTS[:1], [texts])[0]
    folder = reward.to_sequence_classification(tmp_path / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side in ("right", "left"):
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                conversations(PROMPTS[0], texts), padding=True, return_tensors="pt",
                return_dict=True, padding_side=side,
            )  # fmt: skip
        else:
            inputs = tokenizer(
                [PROMPTS[0].text + text + tokenizer.eos_token for text in texts],
                padding=True, return_tensors="pt", padding_side=side,
            )  # fmt: skip
        with torch.no_grad():
            theirs = model(**inputs).logits[:, 0] - model.config.score_bias
        assert theirs.tolist() == pytest.approx(ours, abs=2e-4)
    back = RewardModel.load(folder)
    assert back.score(PROMPTS[:1], [texts])[0] == pytest.approx(ours, abs=2e-4)
    assert reward.score(PROMPTS[:1], [texts])[0] == ours  # and the model itself is as it was


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_a_reward_model_of_the_hub_is_read_as_transformers_reads_it(pad, tiny_model, tmp_path):
    """Whole template, line break included, and one token early where its padding token ends that."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = pad
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    texts = ["The sky.", "The sea is green."]
    inputs = tokenizer.apply_chat_template(
        conversations(PROMPTS[0], texts), padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        theirs = model(**inputs).logits[:, 0].tolist()
    reward = RewardModel.load(tmp_path / "hub")
    assert reward.score(PROMPTS[:1], [texts])[0] == pytest.approx(theirs, abs=1e-5)
    before = reward.score(PROMPTS, [*ANSWERS[:1], ["x"]])
    reward.save(tmp_path / "saved")
    assert RewardModel.load(tmp_path / "saved").score(PROMPTS, [*ANSWERS[:1], ["x"]]) == before


def test_an_adapter_that_peft_saved_for_sequence_classification_keeps_its_head(
    tiny_model, tmp_path
):
    """As TRL's RewardTrainer leaves it: the head is inside the adapter's file, and PEFT drops it."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.config.pad_token_id = 0
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = tokenizer.apply_chat_template(
        conversations(PROMPTS[0], ["The sky."]), return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        theirs = wrapped.eval()(**ids).logits[0, 0].item()
    reward = RewardModel.load(tmp_path / "adapter")
    assert reward.score(PROMPTS[:1], [["The sky."]])[0][0] == pytest.approx(theirs, abs=1e-5)


def test_a_classifier_with_several_labels_is_no_reward_model(tiny_model, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match="3 labels"):
        RewardModel.load(tmp_path / "classifier")


def test_a_model_with_norms_that_have_a_bias_and_another_body_works(tmp_path):
    """GPT-2: no rotary positions, layer norms, tied embeddings, a body named `transformer`."""
    from tests.tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64
    )
    reward = RewardModel.new(transformers.GPT2LMHeadModel(config), copy.deepcopy(tokenizer))
    ours = reward.score(PROMPTS, [["The sky."], ["Fine."]])
    folder = reward.to_sequence_classification(tmp_path / "classifier")
    theirs = RewardModel.load(folder).score(PROMPTS, [["The sky."], ["Fine."]])
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, abs=1e-4)

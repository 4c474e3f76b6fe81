"""The GPU benchmark on a CPU: it runs to its end, and a CPU's figures go nowhere by themselves."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


ON_A_CPU = ["--device", "cpu", "--shape", "tiny"]


@pytest.fixture
def kept_figures():
    """What the repository holds of a GPU's figures is not touched."""
    kept = {p: p.read_bytes() for p in gpu.RESULTS.glob("gpu.*")}
    yield
    assert {p: p.read_bytes() for p in gpu.RESULTS.glob("gpu.*")} == kept


def results_in(folder, printed):
    """The results that were written, once the page and each comparison in it are looked at."""
    page = (folder / "gpu.md").read_text(encoding="utf-8")
    assert page in printed
    assert "they say nothing about a GPU" in page
    assert "no GPU, no answer" in page
    results = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    for compared in results["speed"].values():
        assert compared["ratio"] > 0
        assert compared["environment"]["device"].startswith("CPU")
        assert compared["pairs_a_step"] == 6
    (profile,) = results["profile"].values()
    assert sum(profile["kinds"].values()) == pytest.approx(1.0)
    return results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("kept_figures")
def test_one_comparison_and_a_profile_run_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "quiet", lambda: None)  # it would quieten the tests that follow
    arguments = ["--only", "speed", "profile", "--lengths", "k4", "--out", str(tmp_path)]
    assert gpu.main([*ON_A_CPU, *arguments]) == 0
    assert list(results_in(tmp_path, capsys.readouterr().out)["speed"]) == [
        "tiny/k4/checkpointing off"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("kept_figures")
def test_the_script_as_it_is_started_runs_on_a_cpu(tmp_path):
    ran = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *ON_A_CPU, "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    results = results_in(tmp_path, ran.stdout)
    assert all(r["right"] for r in results["correctness"]["scores"])
    assert all(r["right"] for r in results["correctness"]["training"])
    assert len(results["speed"]) == len(gpu.LENGTH_NAMES)


def test_without_out_a_cpu_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "quiet", lambda: None)
    monkeypatch.setattr(gpu, "correctness", lambda args: {"scores": [], "training": []})
    gpu.main([*ON_A_CPU, "--only", "correctness"])
    assert "# On one device" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_parts_are_merged_and_each_keeps_its_machine(tmp_path):
    path = tmp_path / "gpu.json"
    first, second = {"device": "one"}, {"device": "two"}
    gpu.save(tmp_path, {})
    for section, found, machine in (
        ("correctness", {"scores": [], "training": []}, first),
        ("speed", {"a": {"x": 1}}, first),
        ("speed", {"b": {"x": 2}}, second),
        ("speed", {"a": {"x": 3}}, second),
    ):
        results = gpu.merged(path, section, found, machine)
        path.write_text(json.dumps(results), encoding="utf-8")
    assert results["correctness"]["environment"] == first
    assert results["speed"] == {
        "a": {"environment": second, "x": 3},
        "b": {"environment": second, "x": 2},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.LENGTH_NAMES)
def test_lengths_have_the_means_that_are_named(name):
    rows = gpu.draw_rows(name, 1500)
    lengths = gpu.LENGTHS[name]
    prompts = [len(r.prompt) for r in rows]
    answers = [len(a) + 1 for r in rows for a in r.answers]
    assert statistics.fmean(prompts) == pytest.approx(lengths.prompt_mean, rel=0.02)
    # Clipping an answer to what its prompt leaves takes a little off.
    assert 0.95 * lengths.answer_mean < statistics.fmean(answers) < 1.02 * lengths.answer_mean
    assert max(answers) <= lengths.longest_answer
    assert max(len(r.prompt) + max(map(len, r.answers)) + 1 for r in rows) <= lengths.longest
    assert {len(r.answers) for r in rows} == {lengths.k}
    assert rows == gpu.draw_rows(name, 1500)
    if name == "hh":
        assert statistics.median(prompts) == pytest.approx(123, rel=0.06)


def test_the_tokenizer_gives_back_the_lengths_that_were_drawn():
    rows, tokenizer = gpu.draw_rows("k4", 2), gpu.make_tokenizer()
    pairs = gpu.pair_dataset(rows)
    assert len(pairs) == 12
    first = pairs[0]
    assert len(tokenizer(first["prompt"])["input_ids"]) == len(rows[0].prompt)
    whole = tokenizer(first["prompt"] + first["chosen"])["input_ids"]
    assert len(whole) == len(rows[0].prompt) + len(rows[0].answers[0]) + 1
    assert whole[-1] == tokenizer.eos_token_id


def test_tokens_and_flops_by_hand():
    row = gpu.Row((1, 2, 3), ((1,), (1, 2), (1, 2, 3)))  # answers of 2, 3 and 4 tokens with the end
    assert gpu.tokens_of([row]) == {
        "prefopt_fed": 3 + 1 + 2 + 3,
        "prefopt_scored": 9,
        "trl_fed": 6 * 3 + 2 * (2 + 3 + 4),
        "trl_scored": 2 * (2 + 3 + 4),
    }
    base = gpu.make_model("tiny", "cpu")
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128  # q and o, k and v, the three of the MLP
    assert gpu.matrix_weights(base) == (2 * layer, 512 * 64)
    assert gpu.flops_of(base, 10, 3) == 6 * (2 * layer * 10 + 512 * 64 * 3)


@pytest.mark.parametrize(("shape", "billions"), [("smol", 0.1345), ("1b", 1.236), ("8b", 8.03)])
def test_shapes_have_the_size_of_the_models_they_are_named_after(shape, billions):
    config = gpu.transformers.LlamaConfig(**gpu.SHAPES[shape])
    with gpu.torch.device("meta"):
        model = gpu.transformers.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.005)


def test_targets_are_judged_by_their_bounds():
    entry = {"lengths": "hh", "ratio": 1.5, "prefopt": {"mfu": 0.4}, "memory_ratio": 0.7}
    assert [met for *_, met in gpu.verdicts(entry)] == [True, False, True]


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--only", "speed"])
    assert "--device cpu --shape tiny" in capsys.readouterr().err


def test_a_base_model_is_left_as_it_was():
    base = gpu.make_model("tiny", "cpu")
    base.requires_grad_(False)
    names, keys = [n for n, _ in base.named_parameters()], set(vars(base))
    job = gpu.Job(tuple(gpu.draw_rows("hh", 2, shorter=8)), 2, 2, True, "cpu")
    for which, size in (("prefopt", 512), ("trl", 2)):
        found = gpu.train(which, base, job, size, 0)
        assert len(found["steps_s"]) == 1
        assert [n for n, _ in base.named_parameters()] == names
        assert set(vars(base)) == keys
        assert not any(p.requires_grad for p in base.parameters())
        assert not base.is_gradient_checkpointing

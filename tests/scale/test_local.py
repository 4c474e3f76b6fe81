"""Jobs over shards in this process: the results of jobs without, whenever they were stopped."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from prefopt.cli import main
from prefopt.data.export import export_preferences
from prefopt.data.preference_data import load_preferences
from prefopt.data.prompts import load_prompts
from prefopt.data.records import read_records, write_records
from prefopt.data.shards import cut_into_shards, open_shards, read_manifest
from prefopt.errors import DataError, RunError
from prefopt.judges import shortest_wins
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.label_job import LabelConfig, label_candidates
from prefopt.preferences import fit_judges, infer, pair_candidates
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.scale import labels as sharded
from prefopt.scale.candidates import sample_shards
from prefopt.scale.labels import BuildWork, JudgeWork, label_shards
from prefopt.scale.settings import ScaleSettings
from prefopt.testing import FakeAnthropic
from prefopt.types import Candidate, Comparison, JudgedComparison, LeftOut, Prompt

THREE = ScaleSettings(shard_size=3)
SHORT = SamplingSettings(max_new_tokens=5, batch_size=8)


def answers(n_prompts=10, k=3):
    """Of uneven lengths, some equal, so that some pairs are ties; one is empty."""
    return [
        Candidate(prompt=p, text="word " * ((i * 7 + j * 5) % 6), model="m", sample_index=j)
        for i in range(n_prompts)
        for p in [Prompt.from_text(f"How do I do task {i}?")]
        for j in range(k)
    ]


@pytest.fixture
def config(tmp_path):
    write_records(tmp_path / "candidates.jsonl", answers())
    return LabelConfig(
        candidates=str(tmp_path / "candidates.jsonl"),
        out=str(tmp_path / "labels"),
        judge="scripted:shortest",
    )


def label(config, scale=THREE, **more):
    return label_shards(config, scale=scale, progress=False, **more)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "labels.json"  # which names its folder
    }


def test_labels_are_those_of_a_job_without_shards(config, tmp_path):
    found = label(config)
    plain = label_candidates(replace(config, out=str(tmp_path / "plain")), progress=False)
    out = Path(config.out)
    judged = open_shards(out / "judged", JudgedComparison)
    assert len(judged.shards) == 4
    assert list(judged) == read_records(tmp_path / "plain" / "judged.jsonl", JudgedComparison)
    left_out = list(open_shards(out / "left_out", LeftOut))
    assert sorted(left_out, key=lambda x: x.comparison_id) == sorted(
        plain.preferences.left_out, key=lambda x: x.comparison_id
    )
    groups = load_preferences(out / "preferences")
    plain_groups = load_preferences(tmp_path / "plain" / "preferences.jsonl")
    for ours, theirs in zip(groups, plain_groups, strict=True):
        assert (ours.prompt, ours.answers) == (theirs.prompt, theirs.answers)
        for x, y in zip(ours.preferences, theirs.preferences, strict=True):
            assert x.p_chosen == pytest.approx(y.p_chosen, abs=1e-3)
            assert msgspec.structs.replace(x, p_chosen=y.p_chosen) == y
    assert found.n_preferences == plain.preferences.n_preferences > 0
    assert found.left_out == plain.preferences.reasons()
    assert {(c.kind, c.n_fooled) for c in found.canaries} == {
        (c.kind, c.n_fooled) for c in plain.report.canaries
    }
    assert (found.n_comparisons, found.n_prompts) == (30, 10)
    (fitted,) = plain.preferences.judges.values()
    assert found.judges.model.judges == (fitted,)
    assert "30 comparisons over 10 prompts by scripted:shortest" in str(found)


def test_comparisons_in_shards_are_judged_as_they_are(config, tmp_path):
    comparisons = pair_candidates(answers())[::2]
    cut_into_shards(comparisons, tmp_path / "comparisons", Comparison, shard_size=4)
    found = label(replace(config, candidates=str(tmp_path / "comparisons"), plan="one_order"))
    judged = list(open_shards(Path(config.out) / "judged", JudgedComparison))
    assert [item.comparison for item in judged] == comparisons
    assert {item.backward for item in judged} == {None}
    assert found.n_comparisons == len(comparisons)


def test_answers_are_those_of_sampling_all_at_once(tiny_model, tmp_path):
    prompts = load_prompts("everyday")[:7]
    made = sample_shards(
        prompts, tmp_path, tiny_model, k=2, sampling=SHORT, seed=3, scale=THREE, progress=False
    )
    assert len(made.shards) == 3
    assert list(made) == sample_candidates(
        prompts, tiny_model, k=2, settings=SHORT, seed=3, progress=False
    )
    assert list(open_shards(tmp_path / "prompts", Prompt)) == prompts


@pytest.mark.parametrize("work", [JudgeWork, pytest.param(BuildWork, marks=pytest.mark.slow)])
def test_a_job_that_stops_goes_on_and_does_only_what_is_left(work, config, tmp_path, monkeypatch):
    label(replace(config, out=str(tmp_path / "whole")))
    real, done = work.open, []

    def stopping(self):
        inner = real(self)

        def one(records):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(records[0])
            return inner(records)

        return one

    with monkeypatch.context() as patched:
        patched.setattr(work, "open", stopping)
        with pytest.raises(KeyboardInterrupt):
            label(config)
    stage = Path(config.out) / ("judged" if work is JudgeWork else "preferences")
    with pytest.raises(DataError, match="not a complete folder"):
        load_preferences(stage)
    first = read_manifest(stage).shards
    times = {shard.name: (stage / shard.name).stat().st_mtime_ns for shard in first}
    assert 0 < len(first) < 4
    label(config)
    assert {name: (stage / name).stat().st_mtime_ns for name in times} == times
    assert files(config.out) == files(tmp_path / "whole")


def test_finished_shards_that_are_damaged_are_named_and_removed_ones_made_again(config):
    before = label(config)
    folder = Path(config.out) / "preferences"
    path = folder / "part-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"(?s)1 finished shard.*part-00002.*Remove it"):
        label(config)
    path.unlink()
    assert label(config) == before
    assert path.read_bytes() == content
    (folder / ".part-00001.parquet.x1.tmp").touch()  # of a worker that was killed
    label(config)
    assert [p.name for p in folder.glob(".part*")] == []


def test_another_job_and_another_process_are_refused(config):
    import filelock

    label(config)
    with pytest.raises(RunError, match="judged was made from something else: judge changed"):
        label(replace(config, judge="scripted:longest", canaries=0))
    with pytest.raises(RunError, match="preferences was made from something else: min_margin"):
        label(replace(config, min_margin=2.0))
    with pytest.raises(RunError, match="source changed"):
        label(config, ScaleSettings(shard_size=2))
    with (
        filelock.FileLock(Path(config.out) / "judged" / ".lock"),
        pytest.raises(RunError, match="another process is working in"),
    ):
        label(config)


def test_what_costs_money_or_needs_all_prompts_is_refused_before_any_work(config, tmp_path):
    bad = replace(
        config, judge="anthropic:claude-sonnet-5-5", second_judge="scripted:longest",
        plan="adaptive", rule="inferred", max_usd=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"paid for twice.*second judge.*adaptive"):
        label(bad)
    fake = FakeAnthropic(lambda params: pytest.fail("was asked"))
    paid = AnthropicJudge("claude-sonnet-5-5", max_usd=1.0, client=fake.client())
    with pytest.raises(ValueError, match="paid for twice"):
        label(config, judge=paid)
    for model in ("anthropic:claude-haiku-5-5", "openai:m@http://localhost:1/v1"):
        with pytest.raises(ValueError, match="paid for twice"):
            sample_shards("everyday", tmp_path / "answers", model, progress=False)
    assert not Path(config.out).exists()
    assert not (tmp_path / "answers").exists()


def test_a_judge_of_ones_own_is_asked(config):
    judge = shortest_wins()
    judge.name = "mine"
    assert label(config, judge=judge).judge == "mine"


def test_settings_that_cannot_be_are_told_at_once():
    with pytest.raises(ValueError, match=r"shard_size.*engine.*workers.*cpus"):
        ScaleSettings(shard_size=0, engine="spark", workers=0, cpus=0)
    with pytest.raises(ValueError, match="for engine ray"):
        ScaleSettings(address="auto")


def test_judges_fitted_in_portions_are_those_fitted_at_once(config):
    label(replace(config, canaries=0))
    judged = open_shards(Path(config.out) / "judged", JudgedComparison)
    fitted = fit_judges(judged.read(shard) for shard in judged.shards)
    at_once = infer(list(judged))
    assert (fitted.names, fitted.model) == (at_once.judges, at_once.model)
    assert fitted.n_verdicts == 60
    with pytest.raises(DataError, match="fitted without: other"):
        infer(list(judged), fitted=type(fitted)(names=("other",), model=fitted.model, n_verdicts=1))


@pytest.mark.slow
def test_of_many_prompts_some_are_drawn_whatever_the_shards(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "FIT_ON", 15)
    found = [
        label(
            replace(config, out=str(tmp_path / f"{size}"), canaries=0), ScaleSettings(size)
        ).judges
        for size in (2, 5)
    ]
    assert found[0] == found[1]
    assert 0 < found[0].n_verdicts < 60


def test_the_commands_make_a_data_set_of_shards(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(5)))
    scale = ["--scale.shard_size", "2"]
    sample = [
        "sample",
        "--prompts",
        "p.jsonl",
        "--model",
        tiny_model,
        "--k",
        "2",
        "--out",
        "answers",
    ]
    assert main([*sample, "--sampling.max_new_tokens", "4", *scale]) == 0
    judge = ["judge", "label", "--judge", "scripted:longest", "--candidates", "answers"]
    assert main([*judge, "--out", "labels", "--canaries", "0", *scale]) == 0
    assert "10 answers in 3 shards in answers" in capsys.readouterr().out
    assert main([*sample, *scale, "--model", "other"]) == 1
    assert "give one model" in capsys.readouterr().err
    assert len(read_manifest("labels/preferences").shards) == 3
    found = [
        export_preferences(data, "export.jsonl", format="trl")
        for data in ("labels", "labels/preferences")
    ]
    left_out = sum(shard.rows for shard in read_manifest("labels/left_out").shards)
    assert [export.rows + left_out for export in found] == [5, 5]
    assert [sum(export.left_out_before.values()) for export in found] == [left_out, 0]


def test_an_absent_ray_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Exception, match=r"pip install 'prefopt\[ray\]'"):
        label(config, ScaleSettings(engine="ray"))


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_shard_loses_only_that(config, tmp_path):
    label(replace(config, out=str(tmp_path / "whole")))
    inside = tmp_path / "inside"
    code = f"""
from pathlib import Path
from prefopt.scale import labels, settings
from prefopt.label_job import LabelConfig
from tests.scale.stumbling_work import StumblingWork
real = labels.map_shards
def stumbling(source, outputs, work, **more):
    return real(source, outputs, StumblingWork(work, Path({str(inside)!r}), False), **more)
labels.map_shards = stumbling
labels.label_shards(LabelConfig(candidates={config.candidates!r}, out={config.out!r},
    judge="scripted:shortest"), scale=settings.ScaleSettings(shard_size=3), progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert len(read_manifest(Path(config.out) / "judged").shards) == 1
    label(config)
    assert files(config.out) == files(tmp_path / "whole")

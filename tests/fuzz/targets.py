"""What is fuzzed: each parser as a function of bytes, with inputs to begin from and what it may raise.

A parser may take an input or refuse it with one of the errors its documentation names. Anything else
that comes out (KeyError, UnicodeDecodeError, RecursionError, MemoryError, a killed process, more than
the time limit) is a fault of the parser.
"""

from __future__ import annotations

import functools
import gzip
import os
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.errors import PrefoptError

Run = Callable[[bytes], Any]


class Target(NamedTuple):
    """One parser.

    Fields:
        run: takes an input; raises nothing but `allowed`.
        seeds: inputs to begin from.
        allowed: the errors that its documentation names.
        weight: its share of the inputs; slow ones have less.
    """

    run: Run
    seeds: tuple[bytes, ...]
    allowed: tuple[type[BaseException], ...] = (PrefoptError,)
    weight: float = 1.0


FOLDER = "PREFOPT_FUZZ_FOLDER"
"""Where a process that cannot clean up after itself shall write; in the environment."""

TIME_LIMIT_S = 5.0
"""Processor time for one input."""


def is_fault(target: Target, error: BaseException) -> bool:
    """Whether the parser may not raise it; a UnicodeError does not pass for a ValueError."""
    if isinstance(error, UnicodeError):
        return True
    return not isinstance(error, target.allowed)


@functools.cache
def _folder() -> Path:
    place = os.environ.get(FOLDER) or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
    return Path(tempfile.mkdtemp(prefix="prefopt-fuzz-", dir=place))


def clean_up() -> None:
    """Remove the files that inputs were written to."""
    shutil.rmtree(_folder(), ignore_errors=True)


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _text(data: bytes) -> str:
    # Half surrogate pairs too: JSON has them, and files with broken encodings read as text.
    return data.decode("utf-8", "surrogatepass" if b"\xed" in data[:64] else "replace")


def _safe_text(data: bytes) -> str:
    try:
        return _text(data)
    except UnicodeDecodeError:
        return data.decode("latin-1")


# --- Verdicts and what services send ----------------------------------------------------------------

_VERDICTS = (
    b'{"rationale": "It cites \\"blue\\".", "verdict": "first_much"}',
    b'{"rationale": "", "verdict": "TIE"}',
    b'{"verdict": "second", "rationale": "x", "verdict": "first"}',
    b'```json\n{"rationale": "x", "verdict": "first"}\n```',
    b'{"rationale": "\\ud83d", "verdict": "second"}',
    b'{"rationale": 1e400, "verdict": NaN}',
    b"[" * 2000,
    b"9" * 5000,
    b'{"rationale": null, "verdict": ["first"]}',
)


def _verdict(data: bytes) -> None:
    from prefopt.judges.wording import GRADES, parse_verdict

    preferred, strength, rationale = parse_verdict(_safe_text(data))
    assert (preferred, strength) in GRADES.values()
    rationale.encode()


_MESSAGE = (
    b'{"id": "m", "type": "message", "role": "assistant", "model": "x", "content": [{"type": "text", '
    b'"text": "{}"}], "stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 4}}'
)
_COMPLETION = (
    b'{"id": "c", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", '
    b'"content": "{}"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}'
)


class _Service:
    """A judge behind a transport that answers each request with the input."""

    def __init__(self, kind: str) -> None:
        import httpx2

        from prefopt.types import Candidate, Comparison, Prompt

        self.body = b""
        transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=self.body))
        http_client = httpx2.AsyncClient(transport=transport)
        prompt = Prompt.from_text("Why?")
        self.asked = Comparison(
            a=Candidate(prompt=prompt, text="Because.", model="m"),
            b=Candidate(prompt=prompt, text="No.", model="m"),
        )
        self.judge: Any
        if kind == "anthropic":
            from anthropic import AsyncAnthropic

            from prefopt.judges.anthropic import Abilities, AnthropicJudge

            self.judge = AnthropicJudge(
                "claude-sonnet-5-5", max_usd=1e9, max_attempts=1, transport="sync",
                client=AsyncAnthropic(api_key="sk-ant-of-the-fuzzer-000", http_client=http_client),
            )  # fmt: skip
            self.judge._known_abilities = Abilities()
        else:
            from openai import AsyncOpenAI

            from prefopt.judges.openai import OpenAIJudge

            client = AsyncOpenAI(
                api_key="sk-of-the-fuzzer-000",
                base_url="http://localhost/v1",
                http_client=http_client,
            )
            self.judge = OpenAIJudge("m", client=client, max_attempts=1)

    def ask(self, body: bytes) -> None:
        """A verdict, or a failure with its reason, whatever the service sends."""
        import msgspec

        self.body = body
        ((_, verdict),) = self.judge.verdicts([self.asked])
        msgspec.json.encode(verdict)


@functools.cache
def _service(kind: str) -> _Service:
    return _Service(kind)


def _api(data: bytes) -> None:
    _service("anthropic" if zlib.crc32(data) % 2 else "openai").ask(data)


_REPLIES = (
    *(
        body.replace(b'"{}"', reply)
        for body in (_MESSAGE, _COMPLETION)
        for reply in (
            b'"{\\"rationale\\": \\"x\\", \\"verdict\\": \\"first\\"}"',
            b'"\\ud800"',
            b"null",
            b"[]",
        )
    ),
    b'{"\\ud800": 1}',
    b'{"error": {"message": "\\ud800", "code": 429}}',
)


def _retry_after(data: bytes) -> None:
    from prefopt.judges.api_errors import retry_after_s

    name = "retry-after-ms" if data[:1] == b"m" else "retry-after"
    seconds = retry_after_s({name: _safe_text(data[1:])}, 1.7e9)
    assert seconds is None or seconds >= 0


# --- Data sets --------------------------------------------------------------------------------------

_ROWS = (
    b'{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}\n',
    b'{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", '
    b'"content": "b"}], "rejected": [{"role": "assistant", "content": "c"}], "p_chosen": 0.7, '
    b'"margin": 1}\n',
    b'{"chosen": "Human: a\\n\\nAssistant: b", "rejected": "Human: a\\n\\nAssistant: c"}\n',
    b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": '
    b'"assistant", "content": "a"}]}\n',
    b'{"instruction": "x", "response_a": "1", "response_b": "2", "label": "A", '
    b'"annotators": [1, "b"]}\n',
    b'{"prompt": "p", "completion": "c", "category": "k"}\n{"text": "plain"}\nnull\n7\n"t"\n',
    b'\xef\xbb\xbf[{"prompt": "p"}, {"prompt": "\\ud800"}]',
    b'{"schema": "prefopt.prompt/1", "prompt_id": "0", "messages": []}\n',
    b'{"schema": "prefopt.preference_group/1", "prompt": {}, "answers": [], "preferences": []}\n',
    b'{"prompt": "p", "x": ' + b"[" * 2000,
    b'[{"prompt": ' + b"9" * 4400 + b"}]",
    b"\xff\xfep\x00",
    b'{"prompt": "caf\xe9"}\n',
    b'{"question": "q", "answers": ["a", [{"role": "assistant", "content": "b"}]], "models": ["x", '
    b'"y"]}\n',
    b'prompt,answer,model\n"a, ""b""","c\nd",\nx;y,1,m\n',
    b"prompt\tchosen\trejected\r\np\tc\tr\r\n",
)


def _loaders() -> list[Callable[[Path], Any]]:
    from prefopt.data.candidates import load_candidates
    from prefopt.data.demonstrations import load_demonstrations
    from prefopt.data.labelled import load_labelled
    from prefopt.data.preference_data import load_preferences
    from prefopt.data.prompts import load_prompts

    return [load_prompts, load_preferences, load_demonstrations, load_labelled, load_candidates]


def _rows(suffix: str) -> Run:
    def run(data: bytes) -> None:
        loaders = _loaders()
        loaders[len(data) % len(loaders)](_file(f"rows{suffix}", data))

    return run


def _packed(data: bytes) -> bytes:
    """Well-formed gzip of most inputs, so that what is inside is reached too."""
    return gzip.compress(data, compresslevel=1) if zlib.crc32(data) % 4 else data


def _gzip(data: bytes) -> None:
    _rows(".jsonl.gz")(_packed(data))


@functools.cache
def _parquet_seeds() -> tuple[bytes, ...]:
    import io

    import pyarrow
    import pyarrow.parquet

    found = []
    for rows in (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        [{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}] * 3,
        [{"prompt": None}, {"prompt": "a"}],
    ):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        found.append(buffer.getvalue())
    return tuple(found)


def _records(data: bytes) -> None:
    from prefopt.data.records import read_records
    from prefopt.types import Candidate, JudgedComparison, LeftOut, PreferenceGroup, Prompt, Verdict

    kinds = (Candidate, JudgedComparison, LeftOut, PreferenceGroup, Prompt, Verdict)
    read_records(_file("records.jsonl", data), kinds[len(data) % len(kinds)])


@functools.cache
def _record_seeds() -> tuple[bytes, ...]:
    import msgspec

    from prefopt.types import (
        Candidate,
        Comparison,
        JudgedComparison,
        LeftOut,
        Preference,
        PreferenceGroup,
        Prompt,
        Verdict,
    )  # fmt: skip

    prompt = Prompt.from_text("Why?")
    a, b = (Candidate(prompt=prompt, text=t, model="m") for t in ("Because.", "No."))
    verdict = Verdict(judge="j", preferred="a", strength=1)
    items = (
        prompt, a, verdict, LeftOut(prompt_id="p", comparison_id="c", reason="tie"),
        JudgedComparison(comparison=Comparison(a=a, b=b), forward=verdict),
        PreferenceGroup(prompt=prompt, answers=(a, b),
                        preferences=(Preference(chosen=0, rejected=1, p_chosen=1.0),)),
    )  # fmt: skip
    return tuple(msgspec.json.encode(item) + b"\n" for item in items)


def _export(data: bytes) -> None:
    from prefopt.data.export import check_export
    from prefopt.data.export_formats import FORMATS, row_problems

    forms = list(FORMATS.values())
    form = forms[zlib.crc32(data) % len(forms)]
    row_problems(form, data)
    check_export(_file("export.jsonl", data), format=form)


@functools.cache
def _export_seeds() -> tuple[bytes, ...]:
    from prefopt.data.export_formats import FORMATS, encode_row
    from prefopt.types import Message

    turns = (Message("user", "Why?"),)
    return tuple(encode_row(form.make(turns, "Yes.", "No.")) for form in FORMATS.values())


# --- Conversations ----------------------------------------------------------------------------------


def _chat(data: bytes) -> None:
    """Boundaries: prompt and answer together are the conversation, and a whole answer ends once."""
    from prefopt.chat import tokenize_answer, tokenize_prompt
    from prefopt.types import Message, Prompt
    from tests.tiny_models import TEMPLATES, tiny_tokenizer

    if not data:
        return
    tokenizer = tiny_tokenizer(TEMPLATES[data[0] % len(TEMPLATES)])
    parts = _safe_text(data[1:]).encode("utf-8", "replace").decode().split("\x1f")
    roles = ("user", "system", "assistant", "tool")
    turns = [Message(roles[len(p) % 4 if i else 0], p) for i, p in enumerate(parts[:-1])]
    try:
        prompt = Prompt.from_messages(turns or [Message("user", "x")])
    except ValueError:
        return
    tokenize_prompt(tokenizer, prompt)
    made = tokenize_answer(tokenizer, prompt, parts[-1], complete=bool(data[0] & 64))
    assert not data[0] & 64 or made.answer_ids


def _chat_template(data: bytes) -> None:
    """A template that came with somebody's model."""
    import copy

    from prefopt.chat import end_token_ids, tokenize_answer
    from prefopt.types import Prompt
    from tests.tiny_models import tiny_tokenizer

    tokenizer = copy.copy(tiny_tokenizer("chatml"))
    tokenizer.chat_template = _safe_text(data).encode("utf-8", "replace").decode()[:2000]
    # Loops without end are jinja's: a model's template is trusted as much as the model.
    if "range" in tokenizer.chat_template or tokenizer.chat_template.count("*") > 1:
        return
    tokenize_answer(tokenizer, Prompt.from_text("Hello"), "Hi.", complete=True)
    end_token_ids(tokenizer)


# --- Settings and what a run left behind ------------------------------------------------------------


def _config(data: bytes) -> None:
    from prefopt.config_file import check_config_file

    check_config_file(_file("options.yaml", data))


def _command(data: bytes) -> None:
    import contextlib
    import io

    from prefopt.cli import build_parser

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        build_parser().parse_args(["run", "--config", str(_file("options.yaml", data))])


def _run_folder(data: bytes) -> None:
    from prefopt.runs import Run as RunFolder

    folder = _folder() / "run"
    folder.mkdir(exist_ok=True)
    name = "manifest.json" if zlib.crc32(data) % 2 else "run.json"
    for other in ("manifest.json", "run.json"):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    with RunFolder(folder, {"seed": 1}, on_change="redo"):
        pass


def _journals(data: bytes) -> None:
    from prefopt.label_job import read_job
    from prefopt.sampling.partial import PartialAnswers
    from prefopt.training.checkpoints import last_whole_checkpoint

    which = zlib.crc32(data) % 3
    if which == 0:
        PartialAnswers(_file("answers.partial", data)).get("k")
    elif which == 1:
        read_job(str(_file("job.json", data).parent))
    else:
        checkpoint = _folder() / "training" / "checkpoint-1"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "trainer_state.json").write_bytes(data)
        last_whole_checkpoint(checkpoint.parent)


def _small_files(data: bytes) -> None:
    from prefopt.judges.calibration import load_calibration
    from prefopt.judges.prices import load_prices
    from prefopt.judges.rubric import load_rubric

    loaders: list[Callable[[str], Any]] = [load_calibration, load_prices, load_rubric]
    loaders[zlib.crc32(data) % 3](str(_file("small.json", data)))


def _ledger(data: bytes) -> None:
    from prefopt.judges.ledger import Ledger

    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (_folder() / name).unlink(missing_ok=True)
    with Ledger(_file("ledger.sqlite", data)) as book:
        book.money()


def _history(data: bytes) -> None:
    from prefopt.evaluation.history import History

    for name in ("history.sqlite", "history.sqlite-wal", "history.sqlite-shm"):
        (_folder() / name).unlink(missing_ok=True)
    with History(_file("history.sqlite", data)) as history:
        for name in history.series():
            history.evaluations(name)


@functools.cache
def _database_seeds() -> tuple[bytes, ...]:
    from prefopt.evaluation.history import History
    from prefopt.judges.ledger import Ledger

    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other.sqlite"
        with sqlite3.connect(other) as db:
            db.execute("CREATE TABLE x (y)")
        db.close()
        found = [other.read_bytes(), b"SQLite format 3\x00", b""]
        with History(Path(folder) / "h.sqlite"):
            pass
        with Ledger(Path(folder) / "l.sqlite"):
            pass
        found += [(Path(folder) / name).read_bytes() for name in ("h.sqlite", "l.sqlite")]
    return tuple(found)


def _provenance(data: bytes) -> None:
    from prefopt.serving.model_card import model_card, read_provenance

    folder = _folder() / "finished"
    (folder / "report").mkdir(parents=True, exist_ok=True)
    files = {"run.json": b'{"model": "demo", "dpo": {"loss": "sigmoid"}}', "manifest.json": b"{}"}
    files[("run.json", "manifest.json")[zlib.crc32(data) % 2]] = data
    for name, content in files.items():
        (folder / name).write_bytes(content)
    model_card(read_provenance(folder), "o/n", kind="model", base_model=None)


def _report(data: bytes) -> None:
    from prefopt.serving.model_card import read_provenance

    read_provenance(report=_file("report.json", data))


@functools.cache
def _report_seeds() -> tuple[bytes, ...]:
    import msgspec

    kept = Path(__file__).parents[1] / "evaluation" / "data" / "eval_report_0.1.json"
    report = msgspec.json.decode(kept.read_bytes())
    report["answers"] = report["answers"][:1]
    return (msgspec.json.encode(report), *_STATES, *_VERDICTS)


def _adapter(data: bytes) -> None:
    """The settings of an adapter, or its weights' header."""
    import struct

    from prefopt.serving.adapter_check import check_adapter

    folder = _folder() / "adapter"
    folder.mkdir(exist_ok=True)
    config, header = _ADAPTER, _SHAPES
    if zlib.crc32(data) % 2:
        config = data
    else:
        header = data
    (folder / "adapter_config.json").write_bytes(config)
    weights = struct.pack("<Q", len(header)) + header + bytes(64)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    check_adapter(folder).to_text()


_ADAPTER = (
    b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": true, "modules_to_save": null, '
    b'"base_model_name_or_path": "o/n", "bias": "none", "rank_pattern": {}, "task_type": "CAUSAL_LM"}'
)
_SHAPES = (
    b'{"base_model.model.l.lora_A.weight":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},'
    b'"base_model.model.l.lora_B.weight":{"dtype":"F32","shape":[4,2],"data_offsets":[32,64]}}'
)


def _gguf(data: bytes) -> None:
    from prefopt.serving.gguf_file import _architecture, _count_updates

    path = _file("x.gguf", data)
    _architecture(path)
    _count_updates(path, 1, 2.0)


@functools.cache
def _gguf_seeds() -> tuple[bytes, ...]:
    try:
        import numpy
        from gguf import GGUFWriter
    except ImportError:
        return (b"GGUF",)
    path = _folder() / "seed.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_float32("adapter.lora.alpha", 2.0)
    writer.add_string("general.name", "n")
    for name in ("blk.0.x.weight.lora_a", "blk.0.x.weight.lora_b"):
        writer.add_tensor(name, numpy.zeros((2, 4), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path.read_bytes(), b"GGUF", b"")


def _labels(data: bytes) -> None:
    """A file that people filled in, against an evaluation."""
    import msgspec

    from prefopt.evaluation.human_labels import check_against_people
    from prefopt.types import JudgedComparison

    judged = msgspec.json.decode(_record_seeds()[4], type=JudgedComparison)
    check_against_people([judged], _file("labels.jsonl", data))


def _answer_check(data: bytes) -> None:
    """A model's answer against the checks of the built-in tasks."""
    from prefopt.evaluation.capability_tasks.checks import CHECKS, follows

    arguments = {"contains": '["sky"]', "json_object": '["a"]'}
    numbers = ("bullets", "numbered", "comma_list", "at_most_words")
    name = sorted(CHECKS)[zlib.crc32(data) % len(CHECKS)]
    follows(name, "3" if name in numbers else arguments.get(name, "sky"), _safe_text(data))


def _markdown(data: bytes) -> None:
    """What a model wrote stays in its block, or on its line without any HTML."""
    from prefopt.evaluation.eval_report import _markdown_fenced, _markdown_inline

    text = _safe_text(data)
    fenced = _markdown_fenced(text)
    fence = fenced[: len(fenced) - len(fenced.lstrip("`"))]
    inside = fenced[len(fence) + len("text\n") : -len(fence)]
    assert fence not in inside
    inline = _markdown_inline(text)
    assert "\n" not in inline
    assert not any(c == "<" and inline[i - 1 : i] != "\\" for i, c in enumerate(inline))


def _judge_name(data: bytes) -> None:
    from prefopt.judges.openai import split_address

    split_address(_safe_text(data))


_OPTIONS = (
    b"out: runs/x\nheld_out: 4\nlora: {r: 8}\n",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    b"out: !!python/object/apply:os.system ['true']\n",
    b"seed: 1e400\nout: 2020-01-01\n<<: {a: 1}\n? [k]\n: v\n",
    b"out: !!binary aGk=\nlora:\n  class_path: os.path\n---\nx: 1\n",
    b"{" * 100,
)
_STATES = (
    b'{"seed": 1, "model": "demo"}', b'{"seed": [1, {"a": NaN}], "x": ' + b"[" * 1500,
    b'{"versions": {}, "platform": "p", "seed": 1, "stages": {"candidates": {"depends_on": {}, '
    b'"sha256": "0", "seconds": 1.0}}}',
    b'{"global_step": "7", "log_history": []}', b'{"candidates": "a.jsonl", "out": "x"}',
    b'{"key": "k", "candidates": []}\n{"key": 1', b'{"m": {"input_usd_per_mtok": 2}}', b"null",
    b"\xff",
    b'{"model": {"a": 1}, "dpo": [1], "lora": {"r": null}, "preferences": 7}',
    b'{"versions": [1], "model": "../../x|<b>"}',
)  # fmt: skip
_VALUES = (PrefoptError, ValueError)
_PRICE = (
    b'{"m": {"input_usd_per_mtok": 2, "output_usd_per_mtok": 8, "cache_read_usd_per_mtok": 0.5, '
    b'"cache_write_usd_per_mtok": 2}}'
)

TARGETS: dict[str, Target] = {
    "verdict": Target(_verdict, _VERDICTS, (ValueError,), weight=12),
    "services": Target(_api, (_MESSAGE, _COMPLETION, *_REPLIES), weight=0.02),
    "retry after": Target(
        _retry_after, (b"s12", b"mNaN", b"sFri, 31 Dec 1999 23:59:59 GMT"), (), weight=10
    ),
    "rows .jsonl": Target(_rows(".jsonl"), _ROWS, weight=2),
    "rows .json": Target(_rows(".json"), _ROWS, weight=2),
    "rows .txt": Target(_rows(".txt"), _ROWS, weight=0.5),
    "rows .jsonl.gz": Target(_gzip, (*_ROWS, gzip.compress(_ROWS[0])), weight=1),
    "rows .parquet": Target(_rows(".parquet"), (), weight=0.1),
    "rows .csv": Target(_rows(".csv"), _ROWS),
    "records": Target(_records, (), weight=6),
    "export": Target(_export, (), weight=6),
    "chat boundaries": Target(
        _chat,
        (
            b"\x40Why?\x1fBecause.",
            b"\x01a\x1f<|im_end|>\n",
            b"\x44x\x1fyyyy\x1fz",
            b"\x48\xf0\x9f\x98",
        ),
        weight=0.2,
    ),
    "chat template": Target(
        _chat_template,
        (
            b"{% for m in messages %}{{ m.role + m['content'] }}{% endfor %}",
            b"{{ messages[9].x }}{{ 1 / 0 }}{{ bos_token | upper }}{{ raise_exception('no') }}",
            b"{{ messages | tojson }}{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            b"{{ ''.__class__.__mro__ }}{{ messages + 1 }}{{ namespace(a=1).b.c }}",
        ),
        weight=0.1,
    ),
    "options file": Target(_config, _OPTIONS, weight=1),
    "command line": Target(_command, _OPTIONS, (SystemExit,), weight=0.005),
    "run folder": Target(_run_folder, _STATES, weight=0.05),
    "journals": Target(_journals, _STATES, weight=3),
    "small files": Target(_small_files, (*_STATES, _PRICE, b"Prefer the shorter."), weight=6),
    "ledger": Target(_ledger, (), weight=0.02),
    "history": Target(_history, (), weight=0.02),
    "model card": Target(_provenance, _STATES, _VALUES, weight=0.1),
    "report": Target(_report, (), weight=1),
    "adapter": Target(_adapter, (_ADAPTER, _SHAPES), weight=3),
    "gguf": Target(_gguf, (), weight=0.05),
    "labels": Target(_labels, _ROWS, weight=0.3),
    "answer checks": Target(
        _answer_check, (b'{"a": 1}', b"The sky.", b"- a\n- b\n- c", b"[" * 3000), (), weight=12
    ),
    "markdown": Target(_markdown, (b"a ``` b\n# <b>", b"1. <script>", b"~~~~\n````"), (), weight=8),
    "judge names": Target(
        _judge_name, (b"m@http://h:1/v1", b"m@localhost:80"), (ValueError,), weight=8
    ),
}
"""The parsers by name."""

_MADE_SEEDS: dict[str, Callable[[], tuple[bytes, ...]]] = {
    "rows .parquet": _parquet_seeds, "records": _record_seeds, "export": _export_seeds,
    "report": _report_seeds, "ledger": _database_seeds, "history": _database_seeds,
    "gguf": _gguf_seeds,
}  # fmt: skip


def target_named(name: str) -> Target:
    """A target with its seeds, those that other libraries have to write included."""
    target = TARGETS[name]
    make = _MADE_SEEDS.get(name)
    return target._replace(seeds=make()) if make else target

"""The house rules that a machine can check: who may import what, and how fast the door opens."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prefopt"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEXT_SIDE = {
    "types", "errors", "config_file", "preferences", "label_model", "labelling", "judging_plan",
    "runs",
    "progress", "chat", "label_job",
    "data", "judges.base", "judges.ledger", "judges.rubric", "judges.rules", "judges.scripted",
    "judges.anthropic", "judges.anthropic_batches", "judges.api_judge", "judges.api_errors",
    "judges.openai",
    "judges.asking", "judges.waves", "judges.canaries", "judges.drift",
    "judges.label_report", "judges.label_page",
    "judges.agreement", "judges.calibration", "judges.calibrate",
    "judges.concurrency", "judges.prices", "judges.wording", "evaluation.win_rate",
    "evaluation.sequential", "evaluation.logistic", "evaluation.length_control", "evaluation.style",
    "evaluation.ranking", "evaluation.human_correction", "evaluation.human_labels",
    "evaluation.style_control", "evaluation.model_figures", "evaluation.report_tables",
    "evaluation.gate", "evaluation.history", "evaluation.history_changes",
    "evaluation.history_trends", "evaluation.dashboard", "evaluation.trained_beta",
    "evaluation.eval_report", "evaluation.figure", "evaluation.capability_report",
    "evaluation.capability_tasks",
    "evaluation.advice", "evaluation.tuning_advice", "training.health",
    "training.reward_report", "training.ppo_health", "sampling.best_of_n",
    "scale", "sampling.settings", "sampling.partial", "sampling.sampler", "sampling.api_sampler",
    "hosted",
    "serving.adapter_check", "serving.model_card", "serving.hub_push",
}  # fmt: skip
MATH_SIDE = {
    "losses", "logprobs", "lora_linear", "fused_layers", "matrix_product", "trees", "tree_attention",
    "advantages", "ppo_losses", "reward_losses",
}  # fmt: skip


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Every imported module of a file, lazily imported ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_text_code_never_imports_torch(path):
    name = name_of(path)
    if name in TEXT_SIDE or name.split(".")[0] in TEXT_SIDE:
        assert not [m for m in imports(path) if m.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) in MATH_SIDE], ids=name_of)
def test_mathematics_needs_torch_only(path):
    """No other library, and of prefopt nothing but mathematics."""
    for module in imports(path):
        top = module.split(".")[0]
        if top == "prefopt":
            assert module.split(".")[1] in MATH_SIDE, module
        else:
            assert top in {"torch", *sys.stdlib_module_names}, module


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_dependencies_point_one_way(path):
    """types <- text side <- models and sampling <- training and evaluation <- flow <- cli."""
    ranks = {"types": 0, "errors": 0, "out_of_memory": 0, "progress": 0, "launched": 0,
             "cache_folder": 0, "exit_status": 1, "demo_model": 1, "folder_lock": 1,
             "page_template": 0,
             "scale.settings": 0,
             "data": 1, "chat": 1, "label_model": 1,
             "labelling": 1, "judging_plan": 1, "preferences": 1,
             "runs": 2, "models": 2, "hosted": 2,
             "judges": 3, "sampling": 3, "training": 3, "testing": 3,
             "evaluation": 4, "label_job": 4, "scale": 4, "flow_stages": 4, "flow": 5,
             "online_flow": 6, "quickstart": 6, "serving": 5,
             "classic_flow": 5, "forgetting_flow": 5, "cli": 7, "__main__": 8}  # fmt: skip
    ranks |= {
        "config_file": 1,
        "plan": 4,
        "plan_config": 4,
        "plan_hardware": 0,
        "plan_model": 3,
        "plan_memory": 4,
        "plan_result": 0,
        "plan_rows": 4,
        "plan_time": 4,
    }
    ranks |= dict.fromkeys(MATH_SIDE, 0)
    # Counting wins needs the types only, so that training may report a win rate too.
    ranks["evaluation.win_rate"] = 1
    own = name_of(path)
    own = own if own in ranks else own.split(".")[0]
    if own in ("", "__init__"):
        return
    for module in imports(path):
        if module.startswith("prefopt."):
            other = module.removeprefix("prefopt.")
            other = other if other in ranks else other.split(".")[0]
            assert ranks[other] <= ranks[own], f"{own} must not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_every_public_name_can_be_loaded():
    import prefopt

    for name in prefopt.__all__:
        assert getattr(prefopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prefopt.nothing
    assert set(prefopt.__all__) <= set(dir(prefopt))


def test_importing_prefopt_is_fast_and_loads_nothing_heavy():
    code = (
        # Of the processor: what else the machine does is no fault of ours.
        "import sys, time; t = time.process_time(); import prefopt;"
        "print(time.process_time() - t, 'torch' in sys.modules, 'msgspec' in sys.modules)"
    )
    seconds, torch_there, _ = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.3
    assert torch_there == "False"


def test_the_lazy_names_and_the_typed_names_agree():
    import prefopt

    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prefopt.")
        for alias in node.names
    }
    assert typed == {name: f"prefopt.{home}" for name, home in prefopt._HOMES.items()}
    for name, module in typed.items():
        assert hasattr(importlib.import_module(module), name)


def test_a_checkout_on_the_path_needs_no_installation(monkeypatch):
    """As on a machine where nothing can be installed."""
    from importlib import metadata

    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    fresh = importlib.util.module_from_spec(importlib.util.find_spec("prefopt"))
    fresh.__spec__.loader.exec_module(fresh)
    assert fresh.__version__ == "0+checkout"


def test_the_way_from_the_command_to_an_adapter_is_told_and_short():
    """Each file that CONTRIBUTING.md names holds what it says, and calls or imports the next one."""
    told = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| `prefopt/(\S+)` \| `(\w+)` \|", told, flags=re.MULTILINE)
    assert 5 < len(steps) < 10
    texts = [(PACKAGE / file).read_text(encoding="utf-8") for file, _ in steps]
    for (file, name), text in zip(steps, texts, strict=True):
        assert re.search(rf"^(def|class) {name}\b", text, flags=re.MULTILINE), file
    for i, (file, name) in enumerate(steps[1:], start=1):
        assert any(re.search(rf"\b{name}\b", text) for text in texts[:i]), file

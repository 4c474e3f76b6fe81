"""What no code here may do: open pickles, run text or a repository's code, trust any certificate."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [*(ROOT / "prefopt").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    + [p for p in (ROOT / "benchmarks").glob("*.py")]
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib"}
CALLS = {"eval", "exec", "compile", "__import__"}
DOTTED = {
    "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.jit.load", "torch.hub.load",
    "tarfile.open", "shutil.unpack_archive", "pandas.read_pickle", "ssl._create_unverified_context",
    "xml.etree.ElementTree.parse",
}  # fmt: skip
LOADERS = {
    "AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
    "AutoProcessor", "AutoModel",
}  # fmt: skip


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def truth(node):
    return node.value if isinstance(node, ast.Constant) else ...


def faults(source):
    """What is banned in a file, each with its line."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (f"{line}: import {n}" for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in CALLS or name in DOTTED:
            yield f"{line}: {name}"
        if name.endswith("torch.load") and truth(given.get("weights_only")) is not True:
            yield f"{line}: torch.load without weights_only=True"
        if truth(given.get("allow_pickle", ast.Constant(False))) is not False:
            yield f"{line}: allow_pickle"
        for option, harmless in (("shell", False), ("verify", True), ("autoescape", True)):
            if option == "autoescape" and not name.endswith("Environment"):
                continue  # our own argument: Markdown has its own escaping
            value = truth(given[option]) if option in given else harmless
            if value is not harmless and value is not ...:
                yield f"{line}: {option}={value}"
        if truth(given.get("trust_remote_code", ast.Constant(False))) is True:
            yield f"{line}: trust_remote_code=True"
        parts = name.split(".")
        if parts[-1] == "from_pretrained" and len(parts) > 1 and parts[-2] in LOADERS:
            # Left out, transformers asks on the terminal, and `yes | command` says yes.
            spread = any(keyword.arg is None for keyword in node.keywords)
            if "trust_remote_code" not in given and "gguf_file" not in given and not spread:
                yield f"{line}: {name} without trust_remote_code=False"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_does_what_is_banned(path):
    found = list(faults(path.read_text(encoding="utf-8")))
    if path.parent.name == "benchmarks":
        found = [f for f in found if "without trust_remote_code" not in f]
    if path.name == "ray_engine.py":  # between this program's own processes, as all of Ray is
        found = [f for f in found if "import pickle" not in f]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "eval('1')", "torch.load(p)", "os.system('x')",
        "torch.load(p, weights_only=False)", "subprocess.run('x', shell=True)", "yaml.load(x)",
        "httpx2.get(u, verify=False)", "AutoTokenizer.from_pretrained(p)",
        "numpy.load(p, allow_pickle=True)",
        "f(trust_remote_code=True)", "transformers.AutoConfig.from_pretrained(p, revision='x')",
        "jinja2.Environment(autoescape=False)", "exec(compile(x, '', 'exec'))",
    ],
)  # fmt: skip
def test_the_ban_sees_it(source):
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()", "re.compile('x')", "torch.load(p, weights_only=True)", "yaml.safe_load(x)",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=False)", "f(trust_remote_code=x.trust)",
        "AutoModelForCausalLM.from_pretrained(p, **SAFE)", "subprocess.run(['x'], shell=False)",
    ],
)  # fmt: skip
def test_the_ban_lets_the_rest_be(source):
    assert not list(faults(source))

"""A YAML file with options -> checked to be plain data, before the options are read from it.

A file from somebody else must be able to do no more than set options. The parser behind the command
line takes no tags that make objects, but it would import whatever module a `class_path` names, expand
aliases of aliases without end, and give up in the middle of a number of 5,000 digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.errors import DataError

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
"""With every alias written out."""
MOST_LEVELS = 50


def check_config_file(path: str | Path) -> None:
    """Refuse a file that is no mapping of plain values.

    Raises:
        DataError: it cannot be read, is no YAML, is too large with its aliases written out or nested
            too deeply, gives an option twice, names a class, or names another file of options.
    """
    import yaml

    path = Path(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than {MOST_BYTES:,} bytes, too large for options.")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=loader)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply for options.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        raise DataError(f"{path} is empty: expected options, each `name: value`.")
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"{path} is no list of options: expected `name: value` in each line.")
    problems: list[str] = []
    if any(key.value == "config" for key, _ in root.value):
        problems.append("a file of options cannot name another one (config)")
    _count(root, {}, (), problems)
    if problems:
        raise DataError(f"{path} cannot be used for options.", problems)


def _count(node: Any, known: dict[int, int], above: tuple[int, ...], problems: list[str]) -> int:
    """How many values a node has with aliases written out; each node is looked at once."""
    import yaml

    line = f"line {node.start_mark.line + 1}"
    if id(node) in above:
        problems.append(f"{line}: a value that holds itself")
        return MOST_VALUES
    if id(node) in known:
        return known[id(node)]
    if len(above) > MOST_LEVELS:
        problems.append(f"{line}: nested more than {MOST_LEVELS} deep")
        return 1
    above = (*above, id(node))
    size = 1
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        problems.append(f"{line}: {node.tag!r} makes an object; options are plain values")
        return 1
    if isinstance(node, yaml.ScalarNode):
        problem = _scalar_problem(node)
        if problem:
            problems.append(f"{line}: {problem}")
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_count(item, known, above, problems) for item in node.value)
    else:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1 and name != "<<"})
        problems += [f"{line}: `{name}` is given twice" for name in twice]
        if "class_path" in names:
            problems.append(f"{line}: options are values; a class cannot be named (class_path)")
        for key, value in node.value:
            if getattr(key, "value", None) == "<<":
                key.tag = "tag:yaml.org,2002:str"  # a merge; what it merges is looked at
            size += _count(key, known, above, problems) + _count(value, known, above, problems)
    if size > MOST_VALUES and not any("aliases" in problem for problem in problems):
        problems.append(f"{line}: more than {MOST_VALUES:,} values with its aliases written out")
    known[id(node)] = min(size, MOST_VALUES + 1)
    return known[id(node)]


def _scalar_problem(node: Any) -> str:
    import yaml

    try:
        yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{node.value[:40]!r} is no value: {said}"
    return ""

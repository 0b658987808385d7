"""The tree's rules that no other tool checks: which way imports point, and what is imported only where it is used."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "common": {"common"},
    "model": {"model", "common"},
    "data": {"data", "common"},
    "evals": {"evals", "data", "model", "common"},
    "scripts": {"evals", "data", "model", "common", "predict", "tools"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ALLOWED["bench"] = ALLOWED["scripts"] | SCRIPTS | {"bench"}  # it measures the very loops that train
LOCAL = {"common", "model", "data", "evals", "bench", "tools", "tests"} | SCRIPTS
SLOW = {
    "av", "fastapi", "gradio", "matplotlib", "tokenizers", "torchaudio", "torchvision", "torch._dynamo",
    "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch.utils.tensorboard", "tensorboard", "uvicorn",
}  # fmt: skip
REFERENCES = {"transformers", "peft", "sklearn", "timm", "pandas", "scipy"}
FOLDERS = ("common", "model", "data", "evals", "bench", "tools")
CODE = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parsed(source):
    return ast.parse(source)


def imports(tree):
    """(line, full module name) of each import in a syntax tree, at any depth; "." for a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else node.module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def at_start(tree):
    """The parts of a module that run when it is imported: not function bodies, not `if TYPE_CHECKING`."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from at_start(node)


def wrong_way(source, part):
    """Imports of `source`, a file of `part`, that point the wrong way."""
    found = [(line, module.split(".")[0] or ".") for line, module in imports(parsed(source))]
    return [f"line {line}: {top}" for line, top in found if top == "." or top in LOCAL - ALLOWED[part]]


def late(source):
    """Imports of SLOW packages that importing `source` would run."""
    found = [each for node in at_start(parsed(source)) for each in imports(node)]
    return [f"line {line}: {module}" for line, module in found if within(module, SLOW)]


def edits_path(source):
    """Lines of `source` that mention sys.path."""
    if not re.search(r"\bsys\s*\.\s*path\b|\bfrom\s+sys\s+import\b", source):  # most sources need no parsing
        return []
    tree = parsed(source)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "path"]
    used = [node.lineno for node in attributes if ast.unparse(node) == "sys.path"]
    return used + [line for line, module in imports(tree) if module == "sys.path"]


def within(module, names):
    return any(module == each or module.startswith(f"{each}.") for each in names)


def offenders(paths, rule):
    """What `rule` finds in each file that breaks it."""
    return {name(path): found for path in paths if (found := rule(path.read_text()))}


def test_there_is_something_to_check():
    assert {"common/config.py", "model/llm.py", "data/manifest.py", "train_llm.py"} <= {name(path) for path in CODE}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    inside = [path for path in CODE if path.relative_to(ROOT).parts[0] == part]
    scripts = [path for path in CODE if path.relative_to(ROOT).parts[0] not in ALLOWED]
    assert offenders(inside or scripts, lambda source: wrong_way(source, part)) == {}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("common", "from data.manifest import Clip"),
        ("common", "import model.llm"),
        ("model", "def f():\n    import data"),
        ("data", "from model import llm as l"),
        ("model", "from . import llm"),
        ("evals", "import train_llm"),
        ("scripts", "from train_llm import Config"),
    ],
)
def test_a_wrong_import_is_seen(part, source):
    assert wrong_way(source, part)


def test_slow_packages_are_imported_where_used():
    assert late("import torchvision.io") == ["line 1: torchvision.io"]
    assert late("from torch.utils import tensorboard") == ["line 1: torch.utils.tensorboard"]
    assert late("def f():\n    import av") == []
    assert offenders(CODE, late) == {}


def test_references_of_the_tests_stay_out_of_the_product():
    product = [path for path in CODE if path.relative_to(ROOT).parts[0] != "bench"]
    found = {name(path): [m for _, m in imports(parsed(path.read_text())) if within(m, REFERENCES)] for path in product}
    assert not any(found.values()), found


def test_nobody_edits_the_import_path():
    assert edits_path("import sys\nsys.path.insert(0, '')") == [2]
    assert edits_path("from sys import path") == [1]
    assert offenders(CODE + TESTS, edits_path) == {}

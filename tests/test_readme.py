"""README.md keeps its word: commands parse, what it shows loads, what it names exists."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import train_llm
from common import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = README.splitlines()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INDENTED = "\n".join(line[4:] for line in LINES if line.startswith("    "))
COMMANDS = [
    (module or script, argv)
    for line in INDENTED.replace("\\\n", " ").splitlines()
    for module, script, argv in re.findall(r"(?:python -m ([\w.]+)|(\w+)\.py)([^;&|]*)", line)
]
FIRST = [
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python train_llm.py --fast",
    "pip install -r requirements-dev.txt && python -m pytest",
]


@pytest.fixture
def _place(tmp_path, monkeypatch):
    """A folder with configs/ and the YAML files that README.md shows, each under the name in its first line."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for kind, text in FENCED:
        if kind == "yaml":
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)


def test_the_first_two_commands_come_first():
    assert INDENTED.splitlines()[:2] == FIRST


def test_the_first_screen_is_one_screen():
    assert next(i for i, line in enumerate(LINES) if line.startswith("## ")) <= 40


def test_commands_are_found():
    assert len(COMMANDS) >= 25
    assert {"train_llm", "eval", "predict", "extract", "data.mock", "data.emobox"} <= {name for name, _ in COMMANDS}


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize(("module", "argv"), [each for each in COMMANDS if each[0] != "pytest"])
def test_a_command_parses(module, argv):
    config.load(importlib.import_module(module).Config, shlex.split(argv))


@pytest.mark.parametrize("mistake", re.findall(r"^\$ python train_llm.py (.*)\n(.*)", README, re.MULTILINE))
def test_a_mistake_is_answered_as_shown(mistake, monkeypatch, capsys):
    argv, answer = mistake
    monkeypatch.setattr("sys.argv", ["train_llm.py", *shlex.split(argv)])
    with pytest.raises(SystemExit):
        config.run(train_llm.Config, train_llm.main)
    assert capsys.readouterr().err == f"{answer}\n"


def test_flags_in_the_text_are_options():
    """`--flag` or `--flag VALUE` between backticks belongs to one of the scripts."""
    known = {"help", "cfg", "cfg_path"}
    names = ["train_llm", "train_mosei", "train_clap", "train_slm", "meld_train", "eval", "predict", "extract", "demo"]
    for name in [*names, "tools.download_mosei", "tools.export", "data.gottalent"]:
        known |= set(config.Schema(importlib.import_module(name).Config).names)
    others = "hf |pip |tensorboard |torchrun |--nnodes"
    spans = [span for span in re.findall(r"`([^`\n]+)`", README) if not re.match(others, span)]
    quoted = [flag for span in spans for flag in re.findall(r"(?<![\w-])--([\w.-]+)", span)]
    assert len(quoted) > 30
    assert {flag for flag in quoted if flag.replace("-", "_").removeprefix("no_") not in known} == set()


def test_python_and_yaml_in_it_are_python_and_yaml():
    for kind, text in FENCED:
        if kind == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and (ROOT / node.module.split(".")[0]).exists():
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
        elif kind == "yaml":
            assert yaml.safe_load(text)


def test_what_it_names_exists():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    named = re.findall(r"`((?:common|configs|data|evals|model|tests)/[\w./]*|[\w]+\.py)`", README)
    assert links
    assert named
    # the guides' own files have no place here
    theirs = {"first_face.py", "eval_emotion_EMER.py", "clap_train.py", "export_projectors.py", "meld_train_slm.py"}
    theirs |= {"app.py", "app_EmotionLlamaClient.py"}
    theirs |= {f"eval_stage{n}.py" for n in (2, 3, 4)}
    assert [path for path in {*links, *named} - theirs if not (ROOT / path).exists()] == []


def test_the_tests_of_the_promises_exist():
    """`tests/file.py::test`, and `test` alone of the same line's file."""
    lines = [line for line in LINES if "::" in line]
    assert len(lines) > 15
    for line in lines:
        file, name = re.search(r"`(tests/[\w/]+\.py)::(\w+)`", line).groups()
        text = (ROOT / file).read_text()
        assert all(f"def {test}(" in text for test in [name, *re.findall(r"`(test_\w+)`", line)]), line


def test_the_tree_is_the_tree():
    tree = next(text for kind, text in FENCED if kind == "" and text.startswith("train_llm.py"))
    rows = {line.split()[0]: line for line in tree.splitlines()}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == {name for name in rows if name.endswith(".py")}
    for folder in ("common", "data", "evals", "model"):
        files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert files <= set(re.findall(r"\w+", rows[f"{folder}/"])), folder
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} <= set(re.findall(r"[\w.]+", rows["configs/"]))

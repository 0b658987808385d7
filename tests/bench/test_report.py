"""What the benchmarks share, and that each of them can be run by its path."""

import mmap
import os
import re
import runpy
import sys
from importlib.metadata import version

import pytest
import torch

from bench import report

SCRIPTS = sorted(
    path.stem for path in report.RESULTS.parent.glob("*.py") if path.stem not in ("__init__", "loops", "report")
)


def test_spread():
    assert report.spread([3.0, 1.0, 1234.5]) == "3 (1 to 1.23e+03)"
    assert report.spread([0.5, 0.25]) == "0.375 (0.25 to 0.5)"
    assert report.spread([]) == ""


def test_the_first_lines(monkeypatch):
    monkeypatch.setattr(report.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(report.os, "getloadavg", lambda: (0.04, 1.0, 12.0))
    title, *between, line, end = report.header("bench/x.py", torch.device("cpu"), 2, "4 rounds", ["numpy"])
    assert re.fullmatch(r"## bench/x\.py, \d{4}-\d\d-\d\d", title)
    versions = f"torch {torch.__version__}, numpy {version('numpy')}"
    assert line == f"CPU, 3 cores, 2 threads, load 0.0 1.0 12.0 at the start, {versions}; 4 rounds"
    assert [*between, end] == ["", ""]


def test_turns_go_back_every_second_round():
    assert list(report.turns({"a": 1, "b": 2, "c": 3}, 3, "")) == [*"abc", *"cba", *"abc"]


def test_a_report_is_printed_and_appended(tmp_path, monkeypatch, capsys):
    results = tmp_path / "RESULTS.md"
    monkeypatch.setattr(report, "RESULTS", results)
    results.write_text("# Before\n")
    report.publish(["## now", "", *report.table("what", [("é", "1"), ("b", "2")])], True)
    text = "## now\n\n| what | |\n|---|---|\n| é | 1 |\n| b | 2 |\n"
    assert capsys.readouterr().out == f"{text}\n"
    assert results.read_text(encoding="utf-8") == f"# Before\n\n{text}"
    report.publish(["## again"], False)
    assert capsys.readouterr().out == "## again\n"
    assert "again" not in results.read_text(encoding="utf-8")


def test_apart_is_another_process():
    assert report.apart(int, "7") == 7
    assert report.apart(os.getpid) != os.getpid()


def test_memory_is_that_of_the_process():
    before = report.memory("VmRSS")
    with mmap.mmap(-1, 2**27) as held:  # nothing that a heap may have already
        for page in range(0, 2**27, 4096):
            held[page] = 1
        assert report.memory("VmRSS") - before == pytest.approx(128, abs=16)
    assert report.memory("VmHWM") > before + 100


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_run_by_path_starts_again_as_a_module(name, monkeypatch):
    class StartedError(Exception):
        pass

    def start(program, argv, environment):
        raise StartedError(program, argv, environment["PYTHONPATH"])

    path = report.RESULTS.with_name(f"{name}.py")
    monkeypatch.setattr(os, "execve", start)
    monkeypatch.setattr(sys, "argv", [str(path), "--no-write"])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    with pytest.raises(StartedError) as started:
        runpy.run_path(str(path), run_name="__main__")
    argv = [sys.executable, "-P", "-m", f"bench.{name}", "--no-write"]
    assert started.value.args == (sys.executable, argv, f"{path.parents[1]}{os.pathsep}elsewhere")

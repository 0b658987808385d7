"""Training scripts run as a user runs them, stopped, killed; small synthetic speech for them to train on."""

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import checkpoint, config
from data import mock_speech
from data.features import FeatureStore, StoreWriter
from data.manifest import read_manifest, write_manifest
from tests.conftest import FORK, handlers


def run(script, argv):
    """A script's module with this command line, in this process; its exit code."""
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, argv)]
    try:
        with handlers():
            config.run(script.Config, script.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def error(script, argv, capsys):
    """The one line with which a command line ends in exit code 2."""
    capsys.readouterr()
    assert run(script, argv) == 2
    lines, start = capsys.readouterr().err.splitlines(), f"{script.__name__}.py: error: "
    assert len(lines) == 1, lines
    assert lines[0].startswith(start)
    return lines[0].removeprefix(start)


def talking(function, *args):
    """(what function(*args) returns, what it printed)"""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = function(*args)
    return result, said.getvalue()


def stopped_inside(script, argv, step):
    """A run that gets SIGTERM as its optimiser takes this step; for a process of its own."""
    taken = itertools.count(1)

    def counted(*args):
        if next(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_pre_hook(counted)
    return run(script, argv)


def killed_saving(script, argv, function, call):
    """A run, in a process of its own, that is killed as it enters this call of a function of common/checkpoint.py."""

    def child():
        calls, whole = itertools.count(1), getattr(checkpoint, function)

        def counted(*args):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args)

        setattr(checkpoint, function, counted)
        run(script, argv)

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def weights(out, name="last"):
    return (Path(out) / "checkpoints" / name / checkpoint.MODEL).read_bytes()


def make_lines(folder, train=98, others=24, dim=32, emotions=mock_speech.EMOTIONS):
    """data/mock_speech.py's acted lines, fewer and narrower."""
    sizes = {"lines": {"train": train, "valid": others, "test": others}}
    with mock.patch.multiple(mock_speech, SIZES=sizes, DIM=dim, EMOTIONS=tuple(emotions)):
        return mock_speech.make_mock(folder, "lines")


def make_meld(folder, train=60, others=24, dim=32, stores=True):
    """data/mock_speech.py's series, shorter and narrower; without its stores it is words alone."""
    sizes = {"meld": {"train": train, "valid": others, "test": others}}
    with mock.patch.multiple(mock_speech, SIZES=sizes, DIM=dim):
        mock_speech.make_mock(folder, "meld")
    if not stores:
        for m in ("audio", "text"):
            shutil.rmtree(folder / m)
    return folder


def changed_lines(source, folder, features=lambda m, id, x: x, **fields):
    """A copy of a data root: features(modality, id, x) in place of x, None for none; fields by name -> f(clip)."""
    folder.mkdir()
    clips = read_manifest(source / "manifest.csv")
    write_manifest(folder / "manifest.csv", [replace(c, **{n: f(c) for n, f in fields.items()}) for c in clips])
    for m in ("audio", "text"):
        store = FeatureStore(source / m)
        new = {id: x for id in store.ids if (x := features(m, id, store[id])) is not None}
        if new:
            writer = StoreWriter(folder / m, store.info | {"dim": len(next(iter(new.values())))})
            for id, x in new.items():
                writer.add(id, x)
            writer.finish()
    return folder

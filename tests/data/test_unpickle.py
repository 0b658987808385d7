import collections
import io
import pickle

import numpy as np
import pytest

from common.config import UserError
from data import unpickle

PLAIN = {
    "float": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "other byte order": np.arange(3, dtype=">f4"),
    "empty": np.zeros((0, 5)),
    "large": np.arange(100_000),
    "bool": np.array([True, False]),
    "text": np.array(["é", "bc"]),
    "bytes": np.array([b"vid", b"1"]),
    "objects": np.array([["a", None], [b"c", 1.5]], dtype=object),
    "scalars": [np.float32(1.5), np.int64(3), np.bool_(True), np.str_("xy"), np.str_(""), np.bytes_(b"k")],
    "builtin": [1, 2.5, None, "é", b"\xff", b"", (1, [2]), {3}, frozenset({4}), 1 + 2j, collections.OrderedDict(a=1)],
}


class Attack:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def message(path):
    with pytest.raises(UserError) as error:
        unpickle.load(path)
    return str(error.value).replace(f"{path.parent}/", "")


def write(folder, content):
    path = folder / "data.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_reads_as_pickle_reads_it(tmp_path, protocol):
    content = pickle.dumps(PLAIN, protocol)
    found, wanted = unpickle.load(write(tmp_path, content)), pickle.loads(content)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert found[name].flags.f_contiguous == value.flags.f_contiguous
            assert np.array_equal(found[name], value)
        else:
            assert found[name] == value
            assert list(map(type, found[name])) == list(map(type, value))


def test_the_old_module_paths_of_numpy(tmp_path):
    content = pickle.dumps(PLAIN["float"], 2)
    assert b"numpy._core.multiarray" in content
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert np.array_equal(unpickle.load(write(tmp_path, old)), PLAIN["float"])
    content = pickle.dumps({"x": PLAIN["float"]}, 5)
    old = content.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
    old = old[:2] + old[11:]  # without the frame, whose length has changed
    assert np.array_equal(unpickle.load(write(tmp_path, old))["x"], PLAIN["float"])


def test_a_pickle_of_python_2(tmp_path):
    # {'id': ['vid[1]'], 'x': np.array([1.0, 2.0])} by Python 2: its str is bytes, read as Latin-1
    content = (
        b"\x80\x02}q\x00(U\x02idq\x01]q\x02U\x06vid[1]q\x03aU\x01xq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
        b"cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01bq\x08\x87q\tRq\n(K\x01K\x02\x85q\x0bcnumpy\ndtype\nq\x0cU\x02f8"
        b"q\rK\x00K\x01\x87q\x0eRq\x0f(K\x03U\x01<q\x10NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x11b\x89U\x10"
        + np.array([1.0, 2.0]).tobytes()
        + b"q\x12tq\x13bu."
    )
    found = unpickle.load(write(tmp_path, content))
    assert found["id"] == ["vid[1]"]
    assert found["x"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "numpy.load"])
def test_nothing_is_executed(tmp_path, name, protocol):
    import builtins
    import os

    made = tmp_path / "made"
    calls = {
        "os.system": Attack(os.system, f"touch {made}"),
        "builtins.eval": Attack(builtins.eval, f"open({str(made)!r}, 'w')"),
        "builtins.exec": Attack(builtins.exec, f"open({str(made)!r}, 'w')"),
        "numpy.load": Attack(np.load, str(made), "r", True),
    }
    path = write(tmp_path, pickle.dumps({"train": [1, calls[name]]}, protocol))
    module, _, function = name.rpartition(".")
    module = {"os": "posix"}.get(module, module)
    if name == "builtins.eval":  # the payload is a real one
        pickle.loads(path.read_bytes())
        assert made.exists()
        made.unlink()
    said = message(path)
    assert said == f"data.pkl: refused to load {module}.{function} (only plain Python and NumPy data are read)"
    assert not made.exists()


def test_other_classes_are_refused_by_name(tmp_path):
    import torch

    said = message(write(tmp_path, pickle.dumps({"x": torch.ones(2)})))
    assert said.startswith("data.pkl: refused to load torch._utils._rebuild_tensor_v2 ")
    said = message(write(tmp_path, pickle.dumps(collections.Counter("ab"))))
    assert said.startswith("data.pkl: refused to load collections.Counter ")
    # a name with dots reaches into what is allowed
    said = message(write(tmp_path, b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."))
    assert said.startswith("data.pkl: refused to load numpy.ndarray.tofile ")


def test_forged_states_are_refused(tmp_path):
    reconstruct, _, _ = np.zeros(1).__reduce__()

    class Forged:
        def __init__(self, state):
            self.state = state

        def __reduce__(self):
            return reconstruct, (np.ndarray, (0,), b"b"), self.state

    objects, bytes_ = np.dtype(object), np.dtype("f8")
    # fewer objects than the shape says: NumPy itself would read beyond the list
    said = message(write(tmp_path, pickle.dumps(Forged((1, (5,), objects, False, ["a"])))))
    assert said == "data.pkl: not a readable pickle (1 objects for shape (5,))"
    assert "not a readable pickle" in message(write(tmp_path, pickle.dumps(Forged((1, (5,), bytes_, False, b"short")))))
    structured = np.zeros(2, dtype=[("a", "f8"), ("b", object)])
    assert "not a readable pickle" in message(write(tmp_path, pickle.dumps(structured, 2)))


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x05", b"\x89HDF\r\n\x1a\n", b"\x80\x04]\x94(K\x01"])
def test_files_that_are_no_pickle(tmp_path, content):
    assert message(write(tmp_path, content)).startswith("data.pkl: not a readable pickle (")


def test_every_truncation_is_a_user_error(tmp_path):
    content = pickle.dumps({"train": {"x": np.arange(4.0), "id": ["a", "b"]}}, 4)
    for size in range(len(content)):
        assert message(write(tmp_path, content[:size])).startswith("data.pkl: not a readable pickle (")


def test_missing_file_and_an_open_one(tmp_path):
    assert message(tmp_path / "none.pkl") == "none.pkl: cannot be read (No such file or directory)"
    file = io.BytesIO(pickle.dumps([1, "a"]) + b"rest")
    assert unpickle.load("x.npz", file) == [1, "a"]
    assert file.read() == b"rest"

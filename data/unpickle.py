"""Pickles of arrays without running their code: only builtin containers, scalars and NumPy arrays are made."""

import collections
import math
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.config import UserError

# what a damaged or hostile stream makes the reader raise
BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    MemoryError,
    ArithmeticError,
)


def load(path: str | Path, file: IO[bytes] | None = None) -> Any:
    """The object pickled in `path`, or in the open `file` of that name; of Python 2, str becomes str by Latin-1.

    A global other than those of plain data is a UserError that names it; nothing of the stream is executed.
    """
    try:
        if file is None:
            with open(path, "rb") as opened:
                return load(path, opened)
        return _Reader(file, path).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except BROKEN as error:
        raise UserError(f"{path}: not a readable pickle ({str(error) or type(error).__name__})") from None


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: str | Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module).replace("numpy.core.", "numpy._core.")
        if (module, name) not in GLOBALS:
            problem = f"refused to load {module}.{name} (only plain Python and NumPy data are read)"
            raise UserError(f"{self.path}: {problem}")
        return GLOBALS[module, name]


class _Type:
    """A dtype as pickled, before its byte order is known: the real one would take any state and trust it."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        # a structured type has a list here or names in its state; both are refused
        self.dtype = np.dtype(object) if code.startswith("O") else np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if any(part is not None for part in state[2:5]) or len(state) != 8:
            raise ValueError("a structured dtype")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state is checked before NumPy takes it."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, type, fortran, values = state
        if type.dtype.hasobject and len(values) != math.prod(shape):
            raise ValueError(f"{len(values)} objects for shape {shape}")
        super().__setstate__((version, shape, type.dtype, fortran, values))


def _reconstruct(kind: type, shape: tuple, code: object) -> np.ndarray:
    if kind is not _Array:
        raise TypeError("an array of an unknown class")
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(type: _Type, value: Any = None) -> Any:
    if type.dtype.hasobject:
        return value
    content = value.encode("latin1") if isinstance(value, str) else value
    # the dtype of an empty string has no size
    return np.frombuffer(content, type.dtype, 1)[0] if type.dtype.itemsize else type.dtype.type()


def _frombuffer(values: Any, type: _Type, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(values, type.dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes as {encoding}")
    return text.encode("latin1")


GLOBALS: dict[tuple[str, str], Any] = {
    ("builtins", "bytes"): bytes,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
}

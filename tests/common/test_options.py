"""The leaves of a config tree and the values they take."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from common.options import Option, options, read, text


@dataclass
class Inner:
    width: int = 8


@dataclass
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(16))
    name: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    mode: Literal["a", "b"] = "a"


def option(kind: Any, item: Any = None, **more: Any) -> Option:
    return Option("x", kind, item, more.pop("optional", False), None, **more)


def test_leaves_of_nested_dataclasses() -> None:
    width, name, weights, mode = options(Outer())
    assert (width.path, width.section, width.leaf) == ("inner.width", "inner", "width")
    assert (width.type, width.default) == (int, 16)
    assert (name.path, name.section, name.type, name.optional) == ("name", "", str, True)
    assert (weights.type, weights.item, weights.optional) == (dict, float, False)
    assert (mode.type, mode.choices) == (str, ("a", "b"))


def test_a_type_no_option_can_hold() -> None:
    @dataclass
    class Odd:
        shape: tuple = (1, 2)

    with pytest.raises(TypeError, match="shape: no option can hold"):
        list(options(Odd()))


@pytest.mark.parametrize(
    ("raw", "into", "value"),
    [
        ("1e-4", option(float), 1e-4),
        (3, option(float), 3.0),
        ("1e3", option(int), 1000),
        (2.0, option(int), 2),
        (True, option(bool), True),
        ("OFF", option(bool), False),
        (5, option(str), "5"),
        ("none", option(str), "none"),
        ("none", option(str, optional=True), None),
        ("none", option(str, optional=True, choices=("none", "all")), "none"),
        (None, option(int, optional=True), None),
        (True, option(str, optional=True, bare="last"), "last"),
        (False, option(str, optional=True, bare="last"), None),
        ("a, b,", option(list, str), ["a", "b"]),
        ("[1, 2e0]", option(list, float), [1.0, 2.0]),
        (7, option(list, int), [7]),
        ({"a": 1, "b": "2e0"}, option(dict, float), {"a": 1.0, "b": 2.0}),
        ("a,a,b=3", option(dict, int), {"a": 2, "b": 3}),
        ("1", option(float, share=True), 1.0),
        ("none", option(float, optional=True, share=True), None),
    ],
)
def test_read(raw: Any, into: Option, value: Any) -> None:
    got = read(raw, into)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("raw", "into", "message"),
    [
        (True, option(int), "True is not an int"),
        (False, option(float), "False is not a float"),
        ("nan", option(int), "'nan' is not an int"),
        (2, option(bool), "2 is not a bool"),
        (None, option(str), "None is not a str"),
        (["a"], option(str), "['a'] is not a str"),
        (["a", "c"], option(list, str, choices=("a", "b")), "'c' is not one of a, b"),
        ("a=1,c=2", option(dict, float, choices=("a", "b")), "'c' is not one of a, b"),
        ("1.5", option(float, share=True), "1.5 is not from 0 to 1"),
        (-0.1, option(float, share=True), "-0.1 is not from 0 to 1"),
        ("nan", option(float, share=True), "nan is not from 0 to 1"),
    ],
)
def test_read_errors(raw: Any, into: Option, message: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        read(raw, into)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "into"),
    [
        (1e-5, option(float)),
        (None, option(str, optional=True)),
        (True, option(bool)),
        ([1.0, 0.5], option(list, float)),
        ({"a": "b", "c": "d"}, option(dict, str)),
    ],
)
def test_text_is_read_back(value: Any, into: Option) -> None:
    assert read(text(value), into) == value

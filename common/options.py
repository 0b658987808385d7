"""The leaves of a config tree: what each may hold, and reading it from text or YAML."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

import yaml

BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Option:
    """One leaf of a config tree."""

    path: str
    type: Any  # int, float, str, bool, list or dict
    item: Any  # what a list holds, or a dict's values
    optional: bool
    default: Any
    help: str = ""
    flags: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    span: tuple[float, float] | None = None
    bare: str | None = None
    share: bool = False  # from 0 to 1

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def options(config: Any, prefix: str = "") -> Iterator[Option]:
    """The leaves of nested dataclasses, with the values of `config` as defaults."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{field.name}.")
            continue
        held = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        optional = isinstance(hint, types.UnionType) and len(held) == 1
        hint = held[0] if optional else hint
        kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
        meta = dict(field.metadata)
        if kind is typing.Literal:
            kind, args, meta["choices"] = str, (), args
        if kind not in (int, float, str, bool, list, dict):
            raise TypeError(f"{prefix}{field.name}: no option can hold {hint}")
        yield Option(f"{prefix}{field.name}", kind, args[-1] if args else None, optional, value, **meta)


def read(raw: Any, option: Option) -> Any:
    """`raw`, text or what YAML made of it, as the option's type; ValueError says what is wrong."""
    if option.bare is not None and isinstance(raw, bool):
        raw = option.bare if raw else None
    if option.optional and raw not in option.choices and (raw is None or str(raw).lower() in ("none", "null")):
        return None
    if option.type is list:
        value = parts = [scalar(part, option.item) for part in _parts(raw)]
    elif option.type is dict:
        value = parts = _mapping(raw, option.item)
    else:
        value = scalar(raw, option.type)
        parts = [value]
    if wrong := [part for part in parts if option.choices and part not in option.choices]:
        raise ValueError(f"{wrong[0]!r} is not one of {', '.join(map(str, option.choices))}")
    if beyond := [part for part in parts if option.share and not 0 <= float(part) <= 1]:
        raise ValueError(f"{beyond[0]} is not from 0 to 1")
    return value


def text(value: Any) -> str:
    """A value as a flag would take it."""
    if isinstance(value, dict):
        return ",".join(f"{key}={text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ",".join(map(text, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def scalar(raw: Any, kind: Any) -> Any:
    """`raw` as a bool, int, float or str; PyYAML reads 1e-4 as text, so the field's type decides."""
    wrong = ValueError(f"{raw!r} is not {'an' if kind is int else 'a'} {kind.__name__}")
    if kind is bool:
        if str(raw).lower() not in BOOLS:
            raise wrong
        return BOOLS[str(raw).lower()]
    if raw is None or isinstance(raw, bool | list | dict):
        raise wrong
    if kind is str:
        return str(raw)
    try:
        number = float(str(raw))
    except ValueError:
        raise wrong from None
    if kind is float:
        return number
    if not number.is_integer():
        raise wrong
    return int(raw) if str(raw).strip("+- ").isdigit() else int(number)


def _parts(raw: Any) -> list[Any]:
    """The elements of a list: a YAML list, its text form, or comma separated text."""
    if isinstance(raw, str) and raw.startswith(("[", "{")):
        try:
            raw = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise ValueError(f"{raw!r} is not a list or a mapping") from None
    if isinstance(raw, str):
        return [part.strip() for part in raw.split(",") if part.strip()]
    return raw if isinstance(raw, list) else [raw]


def _mapping(raw: Any, item: Any) -> dict[str, Any]:
    """A dict: a YAML mapping, its text form, a=1,b=2, or, where values are numbers, names that count 1 each time."""
    result: dict[str, Any] = {}
    for part in _parts(raw):
        if isinstance(part, dict):
            result |= {str(key): scalar(value, item) for key, value in part.items()}
            continue
        key, equals, value = str(part).partition("=")
        if equals:
            result[key.strip()] = scalar(value.strip(), item)
        elif item in (int, float):
            result[key] = result.get(key, item(0)) + item(1)
        else:
            raise ValueError(f"{part!r} is not name=value")
    return result

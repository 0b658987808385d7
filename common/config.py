"""Configuration: dataclass defaults, a YAML file over them, command-line flags over both."""

import copy
import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from common.options import BOOLS, options, read, scalar, text

T = TypeVar("T")
Setting = tuple[str, str, Any]  # name as the user wrote it, name as the schema knows it, raw value

# other names of a field, as published recipes and trainers spell it -> ours; a field's own name always wins
ALIASES: dict[str, str] = {
    "init_lr": "lr",
    "learning_rate": "lr",
    "max_epoch": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "save_dir": "out",
    "data_path": "data_root",
    "data_dir": "data_root",
    "cfg_path": "cfg",
    "checkpoint": "ckpt",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "accum",
    "dataloader_num_workers": "num_workers",
    "tune_adapter_llm": "full",
    "accum_grad_iters": "accum",
    "max_grad_norm": "grad_clip",
    "lr_scheduler_type": "schedule",
    "lr_sched": "schedule",
    "save_total_limit": "keep",
    "logging_steps": "log_every",
    "log_freq": "log_every",
    "resume_ckpt_path": "resume",
    "eval_epoch_interval": "eval_every",
    "save_epoch_interval": "save_every",
    "gradient_checkpointing": "grad_checkpoint",
    "use_grad_checkpoint": "grad_checkpoint",
    "llama_model": "llm",
    "model_path": "llm",
    "ann_path": "annotation_file",
    "vid_folder": "image_path",
    "model_max_length": "max_len",
}
# other spellings of a value, where the field has no such choice itself
VALUES: dict[str, dict[Any, str]] = {
    "schedule": {"linear_warmup_cosine_lr": "linear_warmup_cosine"},
    "model_type": {"pretrain": "auto"},
    "save_strategy": {False: "no"},  # what YAML makes of no
}
# switches of published recipes over the field `precision`: what each leaves open, the preferred value first
PRECISION: dict[tuple[str, bool], list[str]] = {
    ("bf16", True): ["bf16"],
    ("bf16", False): ["fp32", "fp16"],
    ("fp16", True): ["fp16"],
    ("fp16", False): ["fp32", "bf16"],
    ("amp", True): ["bf16", "fp16"],
    ("amp", False): ["fp32"],
}
# settings of published recipes that leave no choice here: the one accepted value, None accepts any
FIXED: dict[str, Any] = {
    "arch": "minigpt_v2",
    "model_type": "pretrain",
    "task": "image_text_pretrain",
    "end_sym": "</s>",
    "distributed": True,
    "dist_url": "env://",
    "train_splits": ["train"],
    "wandb_log": False,
    "low_resource": False,
    "sample_ratio": None,
    "world_size": None,
    "name": None,
    "report_to": "tensorboard",
    "run_name": None,
}
FIXED_FLAGS = ("report_to", "run_name")  # of these, what MultiMood's command line gives as flags
# sections of those YAMLs whose keys are read as if they stood at the top, and those whose entries are named freely
SECTIONS = {"model", "datasets", "evaluation_datasets", "run", "build_info", "vis_processor", "text_processor", "train"}
DATASETS = {"datasets", "evaluation_datasets"}
# fields that say what this command does, not what its run is: a saved config has no say in them
COMMAND = ("resume", "overwrite")


class UserError(Exception):
    """A user's mistake; printed as one line, exit code 2."""


def opt(
    default: Any,
    help: str,
    *flags: str,
    choices: Sequence[Any] | None = None,
    span: tuple[float, float] | None = None,
    bare: str | None = None,
    share: bool = False,
) -> Any:
    """A config field: default, one line of meaning, short flags, choices, a published range, value of the bare flag.

    `span` only warns; a `share` beyond 0 and 1 is refused.
    """
    metadata = {
        "help": help, "flags": flags, "choices": tuple(choices or ()), "span": span, "bare": bare, "share": share
    }  # fmt: skip
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


@dataclasses.dataclass
class Given:
    """What a command said itself: its flags, {path that its YAML or its flags set: by which name}, the YAML's name."""

    flags: list[Setting] = dataclasses.field(default_factory=list)
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    file: str | None = None


class Schema:
    """The options of a config class and the names each of them answers to."""

    def __init__(self, cls: Callable[[], Any]):
        self.options = {option.path: option for option in options(cls())}
        self.sections = {option.section for option in self.options.values()} - {""}
        self.names = {path: path for path in self.options}
        leaves: dict[str, list[str]] = {}
        for option in self.options.values():
            self.names |= {_key(flag): option.path for flag in option.flags}
            leaves.setdefault(option.leaf, []).append(option.path)
        self.names |= {leaf: paths[0] for leaf, paths in leaves.items() if len(paths) == 1 and leaf not in self.names}
        self.ambiguous = {leaf: paths for leaf, paths in leaves.items() if leaf not in self.names}
        self.aliases = {a: to for a, to in ALIASES.items() if a not in self.names and to in [*self.names, "cfg"]}
        self.names |= {alias: self.names[to] for alias, to in self.aliases.items() if to != "cfg"}
        self.switches = {name for name, _ in PRECISION if "precision" in self.names and name not in self.names}
        self.names |= {name: self.names["precision"] for name in self.switches}

    def kind(self, name: str) -> Any:
        """The type of the values that `name` takes."""
        return bool if name in self.switches else self.options[self.names[name]].type

    def read(self, name: str, raw: Any) -> list[Any]:
        """The values that `name` given as `raw` leaves open for its option; ValueError says what is wrong."""
        option = self.options[self.names[name]]
        if name in self.switches:
            left = [value for value in PRECISION[name, scalar(raw, bool)] if value in option.choices]
            if not left:
                raise ValueError(f"not offered here, only {', '.join(option.choices)}")
            return left
        if isinstance(raw, str | bool) and raw not in option.choices:
            raw = VALUES.get(option.leaf, {}).get(raw, raw)
        return [read(raw, option)]

    def unknown(self, written: str, where: str = "") -> NoReturn:
        """Raise for a name that no option answers to, with the nearest one that is known."""
        name, dashes = _key(written), written.startswith("--")
        if name in self.ambiguous:
            raise UserError(f"{where}{written} is ambiguous: {' or '.join(self.ambiguous[name])}")
        near = difflib.get_close_matches(name, self.names, 1, 0.8)
        near = near or difflib.get_close_matches(name.rpartition(".")[2], self.names, 1, 0.5)
        hint = f"nearest: {_flag(near[0]) if dashes else near[0]}" if near else "--help lists them all"
        raise UserError(f"{where}unknown {f'option {written}' if dashes else f'key {written!r}'} ({hint})")


def load(cls: type[T], argv: list[str] | None = None) -> T:
    """The config of a command line: defaults of `cls`, the YAML file of --cfg over them, flags over both."""
    argv = sys.argv[1:] if argv is None else argv
    schema = _schema(cls)
    if {"--help", "-h"} & set(argv):
        print(_help(cls, schema))
        raise SystemExit(0)
    flags, cfg = _read_flags(schema, argv)
    values = {path: option.default for path, option in schema.options.items()}
    names = _assign(schema, values, _read_yaml(schema, cfg), f"{cfg}: ") if cfg is not None else {}
    names |= _assign(schema, values, flags)
    made = _build(cls, values, Given(flags, names, cfg))
    guided = getattr(made, "guided", lambda: True)()  # a config may say that the guide's ranges are not about it
    for path, name in names.items() if guided else ():
        span, value = schema.options[path].span, values[path]
        if span and value is not None and not span[0] <= value <= span[1] and os.environ.get("RANK", "0") == "0":
            problem = f"{value:g} is outside the guide's range {span[0]:g} to {span[1]:g}"
            print(f"warning: {name} {problem}", file=sys.stderr)
    return made


def run(cls: type[T], main: Callable[[T], object]) -> None:
    """Call main(load(cls)); a UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    cfg = None
    try:
        cfg = load(cls)
        main(cfg)
    except UserError as error:
        # every rank reads the same command line and one reports it; what goes wrong later may be one rank's own
        if cfg is not None or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config as nested dicts of builtins."""
    return dataclasses.asdict(cfg)


def from_dict(cls: type[T], saved: dict[str, Any]) -> T:
    """The config that to_dict wrote; an unknown key or a wrong type is a UserError, an absent key takes the default."""
    return _build(cls, _saved(_schema(cls), saved), Given())


def resume(cfg: T, saved: dict[str, Any]) -> tuple[T, list[str]]:
    """The config of a resumed run: the saved one under this command's flags (not its YAML), and what they change."""
    schema, given = _schema(type(cfg)), _given(cfg)
    old = _saved(schema, saved)
    values = old | {path: value for path, value in _flat(schema, to_dict(cfg)) if path in COMMAND}
    _assign(schema, values, given.flags)
    changed = [path for path in values if values[path] != old[path] and path not in COMMAND]
    return _build(type(cfg), values, given), [f"{path}: {text(old[path])} -> {text(values[path])}" for path in changed]


def preset(cfg: T, values: dict[str, Any]) -> T:
    """`cfg` with other defaults, {dotted path: value}, for the fields that neither its YAML nor its flags set."""
    schema, given = _schema(type(cfg)), _given(cfg)
    fresh = {path: value for path, value in values.items() if path not in given.paths}
    return _build(type(cfg), dict(_flat(schema, to_dict(cfg))) | fresh, given)


def add(cfg: T, settings: list[Setting], by: str) -> T:
    """`cfg` under the settings of another file, which its command named in the field at `by`, as if it had said them.

    UserError: it says otherwise itself.
    """
    schema, given = _schema(type(cfg)), _given(cfg)
    values = dict(_flat(schema, to_dict(cfg)))
    own = [(f"{name} {text(values[path])}", path, values[path]) for path, name in given.paths.items()]
    names = _assign(schema, values, [*own, *settings])
    flags = [*given.flags, *settings] if flagged(cfg, by) else given.flags  # a resumed run hears flags, not its YAML
    return _build(type(cfg), values, Given(flags, names, given.file))


def source(cfg: Any) -> str | None:
    """The YAML file of the command that made `cfg`."""
    return _given(cfg).file


def only(cfg: Any, read: Collection[str], by: str) -> None:
    """UserError if the command set what is not among the fields and sections in `read`; `by`: who reads these alone."""
    for path, name in _given(cfg).paths.items():
        if path.partition(".")[0] not in read:
            raise UserError(f"{name}: not read by {by}")


def without(cfg: Any, unread: Collection[str], by: str) -> None:
    """UserError if the command changed one of the fields `unread`, or of a section of that name; `by`: who reads none.

    Their defaults may be said: a run's config.yaml, which a command may name, says all of them.
    """
    schema = _schema(type(cfg))
    values = dict(_flat(schema, to_dict(cfg)))
    for path, name in _given(cfg).paths.items():
        asked = any(f"{path}.".startswith(f"{field}.") for field in unread)
        if asked and values[path] != schema.options[path].default:
            raise UserError(f"{name}: not read by {by}")


def flagged(cfg: Any, path: str) -> bool:
    """Whether the command line itself, not its YAML, set the field at `path`."""
    names = _schema(type(cfg)).names
    return any(names.get(name) == path for _, name, _ in _given(cfg).flags)


@functools.cache
def _schema(cls: Callable[[], Any]) -> Schema:
    return Schema(cls)


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_flags(schema: Schema, argv: list[str]) -> tuple[list[Setting], str | None]:
    """The settings of a command line, and the YAML file it names."""
    flags: list[Setting] = []
    cfg = None
    tokens = argv[::-1]  # a stack: the next token is the last
    while tokens:
        written, equals, value = tokens.pop().partition("=")
        name = _key(written)
        positive = name.removeprefix("no_")
        if not written.startswith("--") or not name:
            raise UserError(f"unexpected argument {written + equals + value!r} (options start with --)")
        if schema.aliases.get(name, name) == "cfg":
            cfg = value if equals else _take(tokens, written, str)
        elif name in schema.names:
            bare = schema.options[schema.names[name]].bare
            flags.append((written, name, value if equals else _take(tokens, written, schema.kind(name), bare)))
        elif positive in schema.names and schema.kind(positive) is bool and not equals:
            flags.append((_flag(positive), positive, False))
        elif name in FIXED_FLAGS:
            _check_fixed(name, value if equals else _take(tokens, written, str), written)
        else:
            schema.unknown(written)
    return flags, cfg


def _take(tokens: list[str], written: str, kind: Any, bare: str | None = None) -> Any:
    """Pop the value of the flag `written` off the stack of tokens."""
    if kind is bool:
        return tokens.pop() if tokens and tokens[-1].lower() in BOOLS else True
    parts = []
    while tokens and not tokens[-1].startswith("--") and (not parts or kind in (list, dict)):
        parts.append(tokens.pop())
    if not parts and bare is None:
        raise UserError(f"{written}: needs a value")
    return parts if len(parts) > 1 else parts[0] if parts else bare


def _read_yaml(schema: Schema, path: str) -> list[Setting]:
    """The settings of a YAML file."""
    try:
        tree = yaml.safe_load(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"--cfg: {path} not found") from None
    except OSError as error:
        raise UserError(f"--cfg: {path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not settings")
    return list(_walk(schema, tree or {}, [], f"{path}: "))


def _walk(schema: Schema, node: dict[Any, Any], above: list[str], where: str) -> Iterator[Setting]:
    """The settings of a YAML tree; a key below published sections only may go by any of its option's names."""
    published = all(part in SECTIONS or (i and above[i - 1] in DATASETS) for i, part in enumerate(above))
    for key, value in node.items():
        path = [*above, str(key)]
        leaf, dotted = path[-1], ".".join(path)
        name = dotted if dotted in schema.options else leaf if published and leaf in schema.names else None
        section = dotted in schema.sections or (published and (leaf in SECTIONS or DATASETS & {*above[-1:]}))
        if section and isinstance(value, dict) and not (name and schema.kind(name) is dict):
            yield from _walk(schema, value, path, where)
        elif name:
            yield dotted, name, value
        elif not published or leaf not in FIXED:
            schema.unknown(dotted, where)
        else:
            _check_fixed(leaf, value, where + leaf)


def _check_fixed(name: str, value: Any, written: str) -> None:
    """UserError unless `value` is the one that is accepted of a setting that leaves no choice."""
    if value is not None and FIXED[name] not in (None, value):
        allowed = "is not offered here" if FIXED[name] is False else f"(only {FIXED[name]} here)"
        raise UserError(f"{written}: {value!r} {allowed}")


def _assign(schema: Schema, values: dict[str, Any], source: Iterable[Setting], where: str = "") -> dict[str, str]:
    """Lay one source over `values`; returns {path it set: the name it was set by}."""
    said: dict[str, dict[str, list[Any]]] = {}
    for written, name, raw in source:
        try:
            said.setdefault(schema.names[name], {})[written] = schema.read(name, raw)
        except ValueError as error:
            raise UserError(f"{where}{written}: {error}") from None
    for path, by_name in said.items():
        first, *others = by_name.values()
        left = [value for value in first if all(value in other for other in others)]
        if not left:
            raise UserError(f"{where}{' and '.join(by_name)} give {path} different values")
        values[path] = values[path] if values[path] in left else left[0]
    return {path: where + [*by_name][-1] for path, by_name in said.items()}


def _flat(schema: Schema, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of each leaf of nested dicts."""
    for key, value in tree.items():
        if prefix + key in schema.sections and isinstance(value, dict):
            yield from _flat(schema, value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _saved(schema: Schema, saved: dict[str, Any]) -> dict[str, Any]:
    """{path: value} of a saved config."""
    values = {path: option.default for path, option in schema.options.items()}
    leaves = dict(_flat(schema, saved))
    for path in leaves.keys() - values.keys():
        schema.unknown(path, "saved config: ")
    _assign(schema, values, [(path, path, value) for path, value in leaves.items()], "saved config: ")
    return values


def _build(cls: type[T], values: dict[str, Any], given: Given) -> T:
    """The config with these {path: value}, which remembers what was given."""
    cfg = cls()
    for path, value in values.items():
        *sections, leaf = path.split(".")
        setattr(functools.reduce(getattr, sections, cfg), leaf, copy.deepcopy(value))
    setattr(cfg, "_given", given)  # noqa: B010 (not a field: neither saved nor compared)
    return cfg


def _given(cfg: Any) -> Given:
    return getattr(cfg, "_given", Given())


def _help(cls: type, schema: Schema) -> str:
    """The text of --help: options by section with type, default and meaning, then other names."""
    groups = {"": [("--cfg FILE", "str", "none", "YAML file laid over the defaults; flags are laid over it")]}
    for option in schema.options.values():
        names = ", ".join(dict.fromkeys([*option.flags, _flag(option.path)]))
        held = f"[{'str, ' * (option.type is dict)}{option.item.__name__}]" if option.item else ""
        notes = [f"one of {', '.join(map(str, option.choices))}"] if option.choices else []
        notes += [f"guide: {option.span[0]:g} to {option.span[1]:g}"] if option.span else []
        notes += [f"alone: {option.bare}"] if option.bare else []
        default = text(option.default)
        if len(default) > 24:  # a wide column would push every meaning off the screen
            notes, default = [f"default: {default}", *notes], "..."
        meaning = option.help + (f" ({'; '.join(notes)})" if notes else "")
        groups.setdefault(option.section, []).append((names, option.type.__name__ + held, default, meaning))
    widths = [max(len(row[i]) for group in groups.values() for row in group) for i in range(3)]
    lines = [f"usage: {Path(sys.argv[0]).name} [--cfg FILE.yaml] [--option value ...]", ""]
    lines += [(sys.modules[cls.__module__].__doc__ or "").strip(), ""]
    lines += ["Options with type, default and meaning. Dashes and underscores are alike; the last part of a dotted"]
    lines += ["name will do where it is unique. A bool takes --x, --no-x or --x true|false, a list A,B or A B, a dict"]
    lines += ["a=1,b=2."]
    for section, group in groups.items():
        lines += ["", f"{section or 'general'}:"]
        for *cells, meaning in group:
            lines.append("  ".join(["", *(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)), meaning]))
    pairs = [f"  {_flag(alias)} = {_flag(to)}" for alias, to in schema.aliases.items()]
    pairs += [f"  {_flag(name)} sets --precision" for name in sorted(schema.switches)]
    return "\n".join([*lines, "", "other names:", *pairs])

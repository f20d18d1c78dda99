"""Reads an experiment's command line: which config file, what changes, which run directory.

    settings = config.read(
        ["--config=configs/glue_lora.py:sst2", "--config.peft.lora.rank=4"],
        default="configs/glue_lora.py", groups=groups)
    settings.config.peft.lora.rank        # 4

A config file has `get_config(variant=...)`, starts from `configs/base.py` and may add to the groups
`model`, `task` and `peft.<method>`; `groups(config)` says which further keys those take for the
names chosen. Keys are written with dots. On the command line a tuple is separated by commas, and
`none` empties a key that may be empty. Whatever is not known, or not of its key's type, is a
`Mistake` that names the nearest key, whether a file or the command line says it.
"""

import ast
import difflib
import functools
import importlib.util
import inspect
import io
import itertools
import json
import os
import pathlib
import tokenize
import traceback
import typing

from ml_collections.config_dict import ConfigDict, FrozenConfigDict

from bmft import check
from bmft.errors import Mistake, nearest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "base.py"
FLAGS = ("--config", "--workdir", "--help")
USAGE = "--config=FILE.py[:VARIANT] --workdir=DIR --config.KEY=VALUE ... --help"

# What a config file says in a group besides the common keys belongs to a name chosen there. Where
# the command line chooses another name, the new one's group may lack those keys.
CHOSEN_BY = {"peft": "peft.methods", "task": "task.name", "model": "model.name"}


class Config(typing.NamedTuple):
    """What a command line says."""

    config: FrozenConfigDict  # every key, resolved and checked
    file: str  # the config file, as found
    variant: str | None
    overrides: dict  # {key: value} of the keys given on the command line
    workdir: str | None


class Key(typing.NamedTuple):
    """What is known of a key; the kinds of values are those of bmft/check.py."""

    kind: typing.Any
    default: typing.Any


def read(argv, default, groups=None):
    """The `Config` of the arguments `argv`; `default` is the config file when they name none.

    `groups(config) -> {group: {key: (type, default)}}` gets the config of the common keys and says
    which further keys it allows: `{"peft.lora": {"rank": (int, 8)}}`. It may raise `Mistake`.
    `--help` prints every key and raises SystemExit(0). Raises Mistake.
    """
    common = _common_keys()
    flags = _split_flags(argv, common)
    wants_help = flags.pop("--help", None) is not None
    workdir = flags.pop("--workdir", None)
    file, variant = _find(flags.pop("--config", default))
    given = {flag.removeprefix("--config."): text for flag, text in flags.items()}
    module, written = _load(file, variant)

    def place(key):
        return "on the command line" if key in given else f"in {file}"

    keys, values = common, _resolve(common, written, given, file)
    if groups is not None:
        keys = common | _group_keys(groups(_freeze(values)))
        written = _drop_unchosen(written, given, keys, values)
        values = _resolve(keys, written, given, file)
    for key in [*given, *written]:
        if key not in keys:
            raise Mistake(_unknown(key, place(key), keys, values["peft.methods"]))
    if wants_help:
        print(_help(file, variant, module, keys, values))
        raise SystemExit(0)
    check.check(values, place)
    overrides = {key: values[key] for key in given}
    return Config(_freeze(values), str(file), variant, overrides, workdir)


def signature(function):
    """{name: (type, default)} of the keyword-only arguments of a `make`, for `groups`."""
    kinds = typing.get_type_hints(function)
    arguments = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is not argument.KEYWORD_ONLY:
            continue
        if argument.default is argument.empty or argument.name not in kinds:
            where = f"{function.__module__}.{function.__qualname__}"
            raise TypeError(f"{where}: argument {argument.name} needs a type and a default")
        arguments[argument.name] = (kinds[argument.name], argument.default)
    return arguments


def to_json(config):
    """The config as nested plain dicts, with lists for tuples: what JSON gives back."""
    return json.loads(json.dumps(config.to_dict()))


def difference(old, new, may_differ=()):
    """["key: old != new", ...] of two `to_json` dicts; `may_differ` names keys or whole groups."""
    old, new = _flatten(old), _flatten(new)
    return [
        f"{key}: {old.get(key, 'absent')!r} != {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if not any(f"{key}.".startswith(f"{name}.") for name in may_differ)
        and (key not in old or key not in new or old[key] != new[key])
    ]


# The command line and the file


def _split_flags(argv, common):
    """{flag: text} of arguments `--flag=text`."""
    flags = {}
    for argument, following in itertools.pairwise([*argv, "--"]):
        flag, equals, text = argument.partition("=")
        if argument in ("--help", "-h"):
            flags["--help"] = ""
            continue
        if not argument.startswith("--"):
            raise Mistake(f"unexpected argument {argument!r}; flags: {USAGE}")
        if flag not in FLAGS and not flag.startswith("--config."):
            known = [f"--config.{key}" for key in common]
            named = _named(flag.lstrip("-").rpartition(".")[2], known)
            close = named or difflib.get_close_matches(flag, [*FLAGS, *known], n=1, cutoff=0.6)
            raise Mistake(f"unknown flag {flag!r}; {nearest(flag, close or FLAGS)}")
        if not equals or (not text and not flag.startswith("--config.")):
            value = "VALUE" if following.startswith("--") else following
            raise Mistake(f"flag {flag!r} has no value; write {flag}={value}")
        if flag in flags:
            raise Mistake(f"flag {flag!r} is given twice: {flags[flag]!r} and {text!r}")
        flags[flag] = text
    if "--workdir" in flags:
        flags["--workdir"] = os.path.expanduser(flags["--workdir"])
    return flags


def _find(text):
    """Path and variant (or None) of `FILE.py[:VARIANT]`, relative to here or to the repository."""
    name, colon, variant = text.partition(":")
    if colon and not variant:
        raise Mistake(f"--config={text} names no variant after the colon")
    path = pathlib.Path(name).expanduser()
    for candidate in (path, ROOT / path):
        if candidate.is_file() and candidate.suffix == ".py":
            return candidate, variant or None
    known = {str(path.parent / file.name) for file in path.parent.glob("*.py")}
    for folder in {path.parent, pathlib.Path("configs")}:
        known |= {str(folder / file.name) for file in (ROOT / folder).glob("*.py")}
    known -= {"configs/base.py", "configs/__init__.py"}
    raise Mistake(f"no config file {name!r}; {nearest(name, known)}")


def _execute(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(file, variant):
    """The module of a config file, and {key: value} of what its `get_config` returns."""
    try:
        module = _execute(file)
        if not callable(getattr(module, "get_config", None)):
            raise Mistake(f"config file {file} has no function get_config(variant)")
        variants = getattr(module, "VARIANTS", None)
        if variant and variants is not None and variant not in variants:
            raise Mistake(f"{file} has no variant {variant!r}; {nearest(variant, variants)}")
        if variant and not inspect.signature(module.get_config).parameters:
            raise Mistake(f"{file} has no variants, so none {variant!r}")
        config = module.get_config(variant) if variant else module.get_config()
        if not isinstance(config, ConfigDict):
            raise Mistake(f"get_config of {file} returns {config!r}, not a ConfigDict")
        return module, _flatten(config)
    except Mistake:
        raise
    except Exception as error:  # a config file is a program: it may raise anything
        if variant and error.args == (variant,):
            raise Mistake(f"{file} has no variant {variant!r}") from error
        place = _place_raised(error, file)
        raise Mistake(f"{place}: {type(error).__name__}: {error}") from error


def _place_raised(error, file):
    """`file:line` of the last line of a config file that took part in an exception."""
    path = os.path.abspath(file)
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    return f"{file}:{lines[-1]}" if lines else str(file)


# Keys and values


def _common_keys():
    """{key: Key} of configs/base.py; a type is its default's, or a placeholder's own."""
    config = _execute(BASE).get_config()
    keys = {}
    for key, default in _flatten(config).items():
        kind = type(default)
        if default is None:
            *parents, name = key.split(".")
            kind = functools.reduce(getattr, parents, config).get_type(name) | None
        elif kind is tuple:
            kind = tuple[type(default[0]), ...]
        keys[key] = Key(kind, default)
    return keys


def _flatten(tree, prefix=""):
    """{dotted key: value} of nested dicts; an empty group has no keys."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _freeze(values):
    """The nested, frozen config of {dotted key: value}."""
    tree = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        functools.reduce(lambda node, group: node.setdefault(group, {}), groups, tree)[name] = value
    return FrozenConfigDict(tree)


def _group_keys(groups):
    return {
        f"{group}.{name}": Key(*argument)
        for group, arguments in groups.items()
        for name, argument in arguments.items()
    }


def _drop_unchosen(written, given, keys, values):
    """What the file says, without the keys of names that the command line replaced."""
    kept = {}
    for key, value in written.items():
        group, *rest = key.split(".")
        chooser = CHOSEN_BY.get(group)
        replaced = chooser in given and values[chooser] != written.get(chooser)
        if group == "peft" and not set(rest[:1]).isdisjoint(values["peft.methods"]):
            replaced = False
        if key in keys or not replaced:
            kept[key] = value
    return kept


def _resolve(keys, written, given, file):
    """The value of each of `keys`: its default, or the file's, or the command line's."""
    values = {key: known.default for key, known in keys.items()}
    for source, place in ((written, f"in {file}"), (given, "on the command line")):
        for key in [key for key in source if key in keys]:
            kind = keys[key].kind
            try:
                values[key] = check.convert(source[key], kind, is_text=source is given)
            except ValueError:
                what = f"{key}={source[key]!r} {place}"
                raise Mistake(f"{what}: needs {check.describe(kind)}") from None
    # Either of the two ends a run: the command line's replaces the file's.
    for key, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
        if key in given and other not in given and values[key] is not None:
            values[other] = None
    return values


def _unknown(key, place, keys, methods):
    """What is wrong with a key that is not among `keys`."""
    what = f"{key!r} {place}"
    if below := sorted(known for known in keys if known.startswith(f"{key}.")):
        return f"{what} is a group; its keys: {', '.join(below)}"
    group, *rest = key.split(".")
    if group == "peft" and len(rest) > 1 and rest[0] not in methods:
        return f"{what}: {rest[0]!r} is not in peft.methods; {nearest(rest[0], methods)}"
    return f"unknown key {what}; {_closest(key, keys)}"


def _closest(key, keys):
    """What to say of an unknown key: one so named in any group, or the closest of its group, or of
    all. Only names are compared within a group: with the group before them they all look close."""
    group, _, name = key.rpartition(".")
    if same := _named(name, keys):
        return nearest(key, same)
    inside = {known.rpartition(".")[2]: known for known in keys if known.startswith(f"{group}.")}
    if close := difflib.get_close_matches(name, inside, n=1, cutoff=0.5):
        return nearest(key, [inside[close[0]]])
    if inside:
        return f"known: {', '.join(sorted(inside.values()))}"
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return nearest(key, close or {known.split(".")[0] for known in keys})


def _named(name, keys):
    """The keys whose last part is `name` or has it for initials, as lr is for learning_rate."""
    found = []
    for key in keys:
        last = key.rpartition(".")[2]
        if name in (last, "".join(word[:1] for word in last.split("_"))):
            found.append(key)
    return found


# Help


def _help(file, variant, module, keys, values):
    """Every key as the command line takes it, with the comment of configs/base.py or its type."""
    comments = _comments()
    lines = [f"flags: {USAGE}", ""]
    if variants := getattr(module, "VARIANTS", None):
        lines += [f"variants of {file}: {', '.join(sorted(variants))}", ""]
    lines += [f"{file}{f':{variant}' if variant else ''} with what the command line changes:"]
    order = {key: place for place, key in enumerate(comments)}
    last = len(order)
    for key in sorted(
        keys, key=lambda key: (order.get(key.split(".")[0], last), order.get(key, last))
    ):
        meaning = comments.get(key) or check.describe(keys[key].kind)
        lines.append(f"  {f'--config.{key}={spell(values[key])}':<44}  {meaning}")
    return "\n".join(lines)


def spell(value):
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(spell, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _comments():
    """{key: comment} of the lines `group.key = default  # comment` of configs/base.py."""
    source = BASE.read_text()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (function,) = ast.parse(source).body[-1:]
    groups, meanings = {"config": ""}, {}
    for node in function.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = node.targets[0]
            key = groups[target.value.id] + target.attr
            meanings[key] = comments.get(node.lineno)
            # `config.model = model = ConfigDict()`: the second name stands for the group below.
            groups |= {alias.id: f"{key}." for alias in node.targets[1:]}
    return meanings

"""What the value of a config key may be: its type, its choices, its range, and what holds between
keys.

A kind is int, float, bool, str, tuple[<one of them>, ...], or a union of those (`int | None`).
"""

import fnmatch
import math
import types
import typing

from bmft.errors import Mistake, nearest

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.storage": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "dots_saveable", "dots_with_no_batch_dims_saveable"),
    "optim.name": ("adamw", "sgd", "adafactor", "lion"),
    "optim.schedule": ("linear", "cosine", "constant"),
}

RANGES = {  # key or glob of keys: interval; a round bracket leaves the bound out
    "seed": "[0, 4294967295]",  # what fits the 32 bits of a JAX key
    "model.unroll": "[1, inf)",
    "peft.*.learning_rate": "(0, inf)",
    "peft.*.weight_decay": "[0, inf)",
    "data.max_length": "[1, inf)",
    "data.row_length": "[1, inf)",
    "data.max_train_examples": "[1, inf)",
    "train.steps": "[1, inf)",
    "train.epochs": "(0, inf)",
    "train.batch_size": "[1, inf)",
    "train.accumulate": "[1, inf)",
    "train.early_stopping": "[0, inf)",
    "optim.learning_rate": "(0, inf)",
    "optim.head_learning_rate": "(0, inf)",
    "optim.warmup": "[0, 1)",
    "optim.weight_decay": "[0, inf)",
    "optim.clip": "[0, inf)",
    "optim.beta1": "[0, 1)",
    "optim.beta2": "[0, 1)",
    "optim.eps": "(0, inf)",
    "eval.every": "[1, inf)",
    "eval.batch_size": "[1, inf)",
    "checkpoint.every": "[1, inf)",
    "checkpoint.keep": "[1, inf)",
    "log.every": "[1, inf)",
}

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "none",
}


def describe(kind):
    """A kind in words."""
    if typing.get_origin(kind) is tuple:
        return f"{describe(typing.get_args(kind)[0]).removeprefix('a ')}s separated by commas"
    return WORDS.get(kind) or " or ".join(describe(arm) for arm in typing.get_args(kind))


def convert(value, kind, is_text):
    """`value` as a `kind`; `is_text`: it is written as on the command line. Raises ValueError."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        # None first, or `none` would become a text where there may be one.
        for arm in sorted(typing.get_args(kind), key=lambda arm: arm is not types.NoneType):
            try:
                return convert(value, arm, is_text)
            except ValueError:
                continue
        raise ValueError
    if typing.get_origin(kind) is tuple:
        if is_text:
            value = [part.strip() for part in value.split(",")] if value else []
        elif not isinstance(value, tuple | list):
            raise ValueError
        return tuple(convert(part, typing.get_args(kind)[0], is_text) for part in value)
    return _parse(value, kind) if is_text else _fit(value, kind)


def _parse(text, kind):
    if kind is int:
        return int(text)
    if kind is float and math.isfinite(float(text)):
        return float(text)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is types.NoneType and text.lower() == "none":
        return None
    if kind is str and text:
        return text
    raise ValueError


def _fit(value, kind):
    if isinstance(value, bool) and kind is not bool:  # Python takes True for an int
        raise ValueError
    if kind is float and isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    if kind is not float and isinstance(value, kind):
        return value
    raise ValueError


def check(values, place):
    """Raises Mistake unless {key: value} is in order; `place(key)` says where a value was set."""
    for key, value in values.items():
        if value is None:
            continue
        what = f"{key}={value!r} {place(key)}"
        if key in CHOICES and value not in CHOICES[key]:
            raise Mistake(f"{what}: {nearest(value, CHOICES[key])}")
        for pattern, interval in RANGES.items():
            if fnmatch.fnmatchcase(key, pattern):
                _check_range(what, value, interval)
    _check_end(values, place)
    _check_methods(values["peft.methods"], place)
    _check_mesh(values, place)


def _check_range(what, value, interval):
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if above and below:
        return
    limits = f"{'at least' if interval[0] == '[' else 'more than'} {low:.0f}"
    if high < math.inf:
        limits += f" and {'at most' if interval[-1] == ']' else 'less than'} {high:.0f}"
    raise Mistake(f"{what}: needs {limits}")


def _check_end(values, place):
    ends = [key for key in ("train.steps", "train.epochs") if values[key] is not None]
    if len(ends) != 1:
        said = "both set" if ends else "both none"
        where = place("train.steps")
        raise Mistake(f"train.steps and train.epochs are {said} {where}: set exactly one of them")


def _check_methods(methods, place):
    if not methods or len(set(methods)) < len(methods):
        what = f"peft.methods={','.join(methods)!r} {place('peft.methods')}"
        raise Mistake(f"{what}: name each method once, and at least one ('full' moves every leaf)")


def _check_mesh(values, place):
    axes = {key: size for key, size in values.items() if key.startswith("mesh.")}
    for key, size in axes.items():
        if size != -1 and size < 1:
            raise Mistake(f"{key}={size} {place(key)}: needs at least 1, or -1 (the rest)")
    if list(axes.values()).count(-1) > 1:
        said = ", ".join(f"{key}={size}" for key, size in axes.items())
        raise Mistake(f"{said}: only one axis of the mesh may be -1, the rest of the devices")

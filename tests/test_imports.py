"""Who may import whom, and how long a file and a function may be (DESIGN, section 3)."""

import ast
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ("bmft", "configs", "experiments")
CODE = sorted(file for room in (*ROOMS, "benchmarks") for file in (ROOT / room).rglob("*.py"))
LINES, FUNCTION_LINES = 400, 60

# Of our own modules, a room may import these, but not those; and errors, and what is in its folder.
# A name stands for what is below it, too. The first row that fits a file counts.
PARTS = ("bmft.models", "bmft.peft", "bmft.tasks")
ARROWS = {
    "bmft.errors": ((), ()),
    "bmft.check": ((), ()),
    "bmft.config": (("bmft.check",), ()),
    "bmft.tree": ((), ()),
    "bmft.quantize": (("bmft.tree",), ()),
    "bmft.activations": ((), ()),
    "bmft.layers": (("bmft.activations", "bmft.quantize"), ()),
    "bmft.names": (("bmft.tree",), ()),
    "bmft.models": (
        ("bmft.activations", "bmft.layers", "bmft.quantize", "bmft.tree", "bmft.names")
        + ("bmft.assets",),
        (),
    ),
    "bmft.peft": (
        ("bmft.layers", "bmft.quantize", "bmft.tree", "bmft.names", "bmft.check"),
        (),
    ),
    "bmft.tasks": (("bmft",), ("bmft.models", "bmft.peft")),
    "bmft.train": (("bmft",), PARTS),
    "bmft.evaluate": (("bmft",), PARTS),
    "bmft.loop": (("bmft",), PARTS),
    "bmft.run": (("bmft",), PARTS),
    "bmft.checkpoint": (("bmft",), PARTS),
    "bmft.export": (("bmft",), PARTS),
    "bmft.sharding": (("bmft",), PARTS),
    "bmft.optim": (("bmft",), PARTS),
    "bmft.data": (("bmft",), PARTS),
    "bmft.log": (("bmft",), PARTS),
    "bmft": (("bmft",), ()),
    "configs": (("configs.base",), ()),
    "experiments": (("bmft",), ()),
}
FOLDERS = (*PARTS, "bmft.data")
FLAX = ("bmft.layers", "bmft.models", "bmft.peft")  # a port to another library is these files
FOREIGN = ("torch", "tensorflow", "absl", "peft", "accelerate")  # run time does without


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name, modules):
    """Is the module `name` one of `modules`, or below one of them?"""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(source, name, is_package=False):
    """The modules that a module's source imports, wherever in it."""
    package = name if is_package else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:  # `from bmft import tree` imports bmft.tree, not bmft
                below = f"{base}.{alias.name}"
                found.add(below if within(base, ROOMS) and is_module(below) else base)
    return found


def wrong_imports(name, found):
    """Those of the modules `found` that the module `name` may not import."""
    these, not_those = next(arrow for room, arrow in ARROWS.items() if within(name, (room,)))
    own = [folder for folder in FOLDERS if within(name, (folder,))]

    def may_import(other):
        if within(other, ROOMS):
            permitted = within(other, these) and not within(other, not_those)
            return permitted or within(other, (*own, "bmft.errors", name))
        if within(other, ("flax",)):
            return within(name, FLAX)
        return not within(other, FOREIGN)

    return sorted(other for other in found if not may_import(other))


@pytest.mark.parametrize("file", CODE, ids=module_name)
def test_imports(file):
    name = module_name(file)
    if not within(name, ("benchmarks",)):  # they measure the others, torch too
        found = imports(file.read_text(), name, file.name == "__init__.py")
        assert wrong_imports(name, found) == []


def function_lines(source):
    """{function: its lines}; a function within another counts by itself."""
    lines = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            inner = [
                range(below.lineno, below.end_lineno + 1)
                for below in ast.walk(node)
                if isinstance(below, ast.FunctionDef) and below is not node
            ]
            whole = range(node.lineno, node.end_lineno + 1)
            lines[node.name] = sum(not any(line in part for part in inner) for line in whole)
    return lines


@pytest.mark.parametrize("file", CODE, ids=module_name)
def test_lengths(file):
    source = file.read_text()
    assert len(source.splitlines()) <= LINES
    if file.parent.name != "configs":  # their functions are lists of keys
        lines = function_lines(source)
        assert {name: n for name, n in lines.items() if n > FUNCTION_LINES} == {}


def test_function_lines():
    assert function_lines("def a():\n    def b():\n        return 1\n\n    return b\n") == {
        "a": 3,
        "b": 2,
    }


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("bmft.tree", "from bmft import config", ["bmft.config"]),
        ("bmft.tree", "from bmft.errors import Mistake\nimport numpy", []),
        ("bmft.models.bert", "from bmft import layers, tree, peft", ["bmft.peft"]),
        ("bmft.models.bert", "from . import gpt2\nimport flax.linen as nn", []),
        ("bmft.peft.lora", "def f():\n    from bmft.models import bert", ["bmft.models.bert"]),
        ("bmft.peft.lora", "from bmft.peft import Method\nfrom bmft.layers import Dense", []),
        ("bmft.peft.lora", "from ..models.bert import load", ["bmft.models.bert"]),
        ("bmft.tasks.x", "from bmft.data import text\nfrom bmft import peft", ["bmft.peft"]),
        ("bmft.loop", "from bmft import checkpoint, log\nimport bmft.tasks", ["bmft.tasks"]),
        ("bmft.train", "import flax", ["flax"]),
        ("bmft.predict", "from bmft import models, peft\nimport experiments", ["experiments"]),
        ("bmft.data.text", "from bmft.data import sources\nimport torch", ["torch"]),
        ("configs.mine", "from configs import base", []),
        ("configs.mine", "from configs import other_thing\nimport bmft", ["bmft", "configs"]),
        ("experiments.a", "from bmft import loop\nfrom experiments import b", ["experiments"]),
    ],
)
def test_these_rules_see_what_they_should(name, source, wrong):
    assert wrong_imports(name, imports(source, name)) == wrong

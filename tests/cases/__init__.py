"""What each method is tested with, a file a method, found by its name.

SETTINGS    arguments of its make, for the contract tests (tests/test_methods.py)
CASES       {name: Case}, for the tests against Hugging Face PEFT, where PEFT has the method:
            tests/parity/test_both_ways.py live, tests/test_catalogue.py by stored goldens
"""

import importlib
import pkgutil
from typing import NamedTuple

# BERT's modules, as PEFT's configuration names them, in DistilBERT.
DISTILBERT = {
    "query": "q_lin",
    "key": "k_lin",
    "value": "v_lin",
    "attention.output.dense": "out_lin",
    "intermediate.dense": "lin1",
    "output.dense": "lin2",
}


class Case(NamedTuple):
    config: str  # PEFT's class: "LoraConfig"
    settings: dict  # its arguments, with BERT's names
    group: dict  # of our make: what PEFT reads
    families: tuple = ("bert", "distilbert")
    golden: bool = True  # is its adapter stored, too?
    tolerance: float = 1e-5  # of logits


def _files():
    names = [entry.name for entry in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"cases.{name}") for name in names}


def settings():
    """{method: [arguments of its make]}"""
    return {name: file.SETTINGS for name, file in _files().items() if hasattr(file, "SETTINGS")}


def catalogue():
    """{name: (method, Case)}"""
    return {
        name: (method, case)
        for method, file in _files().items()
        for name, case in getattr(file, "CASES", {}).items()
    }


def for_family(settings, family):
    """A case's settings in the names of another family."""

    def spelled(value):
        return DISTILBERT.get(value, value) if family == "distilbert" else value

    return {
        key: [spelled(entry) for entry in value] if isinstance(value, list) else value
        for key, value in settings.items()
    }

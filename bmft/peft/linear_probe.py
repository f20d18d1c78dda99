"""Linear probe: the base stays as it is; only the task's head moves."""

from bmft.peft import Method


def make(model):
    return Method("linear_probe", lambda path: None)

"""Full fine-tuning: every leaf of the base moves. The baseline of every comparison."""

from bmft.peft import Method


def make(model):
    return Method("full", lambda path: "full" if path.startswith("params/") else None)

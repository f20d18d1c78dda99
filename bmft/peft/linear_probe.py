"""Linear probe: the base stays as it is; only the task's head moves."""

from bmft.errors import Mistake
from bmft.peft import Method


def make(model):
    """Raises Mistake for a model without a task's head."""
    if not model.heads:
        raise Mistake(
            f"peft.linear_probe: {model.name} has no head of a task, so nothing would move; it is "
            "for classifiers"
        )
    return Method("linear_probe", lambda path: None)

"""Instructions of one split: dialogs between a user and an assistant, and what is refused of them.

Every format ends as turns: a text is one turn of the assistant, a prompt with its completion a turn
of the user and one of the assistant. A preference pair is a dialog and another last answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bmft.data.table import wrong_text
from bmft.errors import Mistake, nearest

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    role: str  # one of ROLES
    content: str


class Dialogs(NamedTuple):
    """The examples of one split.

    dialogs: a tuple of `Turn` an example, which ends with the assistant's. rejected: the answers
    that were not preferred to the last turns, a str an example; None: no preference pairs. format:
    which of `dialog_formats.FORMATS` they were written in. source, numbers, unit: where they are
    from, as for `Table`. notes: what a user should know of the split.
    """

    dialogs: list
    rejected: list | None = None
    format: str = "messages"
    source: str = "examples"
    numbers: Sequence[int] | None = None
    unit: str = "row"
    notes: tuple = ()

    @property
    def size(self):
        """How many examples (`len` of a tuple would count its fields)."""
        return len(self.dialogs)

    def where(self, row):
        """Where example `row` comes from: `FILE line 7`, or `SOURCE row 6` counted from 0."""
        return f"{self.source} {self.unit} {self.numbers[row] if self.numbers else row}"

    def take(self, rows):
        """These examples alone. rows: a slice or an integer array."""
        rows = np.arange(self.size)[rows].tolist()
        numbers = self.numbers or range(self.size)
        return self._replace(
            dialogs=[self.dialogs[row] for row in rows],
            rejected=self.rejected and [self.rejected[row] for row in rows],
            numbers=[numbers[row] for row in rows],
        )

    def questions(self):
        """[(turns without the last answer, [answers])]: examples of one question are put together,
        as E2E has several references for a meaning. In the order of the first of each."""
        answers = {}
        for turns in [turns for turns in self.dialogs if len(turns) > 1]:
            answers.setdefault(turns[:-1], []).append(turns[-1].content)
        return list(answers.items())


def text(value, name, where):
    """`value`, if it is a text with something in it. name: what it is, for messages."""
    if value is None:
        raise Mistake(f"{where}: {name} is missing")
    reason = wrong_text(value)
    if reason:
        raise Mistake(f"{where}: {name} {reason}")
    if not value.strip():
        raise Mistake(f"{where}: {name} is empty")
    return value


def turns_of(
    messages, where, name, *,
    role="role", content="content", roles=None, answered=True, alone=False,
):  # fmt: skip
    """The tuple of `Turn` of a list of messages, in which user and assistant take turns.

    name: of the column. role, content: keys of a message. roles: {role as written: one of ROLES}.
    answered: the last turn is the assistant's; otherwise it is the user's. alone: the answer stands
    alone, nobody asks. Raises Mistake.
    """
    if messages is None:
        raise Mistake(f"{where}: {name!r} is missing")
    if not isinstance(messages, list):
        kind = type(messages).__name__
        raise Mistake(f"{where}: {name!r} is a {kind} ({messages!r:.40}), not a list of messages")
    roles = roles or {known: known for known in ROLES}
    turns = []
    for i, message in enumerate(messages):
        here = f"{name!r}[{i}]"
        if not isinstance(message, dict):
            raise Mistake(f"{where}: {here} is a {type(message).__name__}, not an object")
        written = message.get(role)
        if not isinstance(written, str):
            raise Mistake(f"{where}: {here} has no {role!r}; {nearest(role, message)}")
        if written not in roles:
            raise Mistake(f"{where}: {here}: unknown role {written!r}; {nearest(written, roles)}")
        said = text(message.get(content), f"{here} ({written}): {content!r}", where)
        turns.append(Turn(roles[written], said))
    check(turns, where, answered, "assistant" if alone else "user")
    return tuple(turns)


def check(turns, where, answered=True, expected="user"):
    """Raise Mistake unless the turns are the user's and the assistant's by turns, after one of the
    system at most, and the last is the assistant's (not answered: the user's). expected: the role
    of the first."""
    for i, turn in enumerate(turns):
        if turn.role == "system":
            if i:
                raise Mistake(f"{where}: turn {i + 1} is the system's, which may only be the first")
            continue
        if turn.role != expected:
            before = turns[i - 1].role if i else "nothing"
            raise Mistake(
                f"{where}: turn {i + 1} is the {turn.role}'s, after {before}; mixed roles"
            )
        expected = "assistant" if turn.role == "user" else "user"
    last = "assistant" if answered else "user"
    if not turns or turns[-1].role != last:
        ends = f"ends with the {turns[-1].role}'s turn" if turns else "has no messages"
        missing = "there is no answer to learn" if answered else "a prompt ends with the user's"
        raise Mistake(f"{where}: the dialog {ends}: {missing}")

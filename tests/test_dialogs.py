"""Instructions: every common format ends as the same turns, and what is refused in which words."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bmft.data import dialog_formats, dialog_sources
from bmft.data.dialogs import Turn
from bmft.errors import Mistake
from configs import base

ASKED = (Turn("user", "two?"), Turn("assistant", "2"))
MESSAGES = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
SYSTEM = {"role": "system", "content": "short"}
OTHER = {"role": "assistant", "content": "3"}


def load(tmp_path, content, ending=".jsonl", pairs=False, **changes):
    """The training split of a file with this content: a text, or objects, one a line."""
    if not isinstance(content, str):
        content = "\n".join(map(json.dumps, content))
    path = tmp_path / f"mine{ending}"
    path.write_text(content)
    group = base.get_config().data
    group.update({"format": None, "name": "files", "train": str(path)} | changes)
    return dialog_sources.load(group, pairs=pairs)["train"]


FORMATS = {
    "messages": ([{"messages": MESSAGES, "text": "rendered before", "source": 1}], ".jsonl"),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "2"}]}],
        ".jsonl",
    ),
    "alpaca": ([{"instruction": "two?", "input": "", "output": "2", "text": "x"}], ".jsonl"),
    "completion": ([{"prompt": "two?", "completion": "2"}], ".jsonl"),
    "gsm8k": ([{"question": "two?", "answer": "<<1+1=2>>2"}], ".jsonl"),
    "e2e": ("two?||2 \n\n", ".txt"),
}


@pytest.mark.parametrize(("name", "content", "ending"), [(n, *c) for n, c in FORMATS.items()])
def test_a_format_is_known_by_its_columns(name, content, ending, tmp_path):
    table = load(tmp_path, content, ending)
    assert (table.format, table.dialogs) == (name, [ASKED])
    assert table.notes == (f"format {name}",)
    assert table.where(0).endswith(f"mine{ending} line 1")


def test_other_files(tmp_path):
    assert load(tmp_path, json.dumps(FORMATS["alpaca"][0]), ".json").dialogs == [ASKED]
    table = load(tmp_path, "question,answer\ntwo?,2\n", ".csv")
    assert (table.format, table.dialogs) == ("gsm8k", [ASKED])
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"messages": [MESSAGES, [SYSTEM, *MESSAGES]]}), path)
    group = base.get_config().data
    group.update({"format": None, "name": "files", "train": str(path)})
    found = dialog_sources.load(group)["train"]
    assert found.dialogs == [ASKED, (Turn("system", "short"), *ASKED)]
    assert found.where(1).endswith("row 1")


def test_texts(tmp_path):
    for content, ending, changes in (
        ([{"text": "two"}], ".jsonl", {}),
        ([{"body": "two"}], ".jsonl", {"text": "body"}),
        ("two\n", ".txt", {}),
    ):
        table = load(tmp_path, content, ending, **changes)
        assert (table.format, table.dialogs) == ("text", [(Turn("assistant", "two"),)])
    lines = load(tmp_path, "a||b||c\n", ".txt", format="text")
    assert lines.dialogs == [(Turn("assistant", "a||b||c"),)]


def test_input_and_lists_of_messages(tmp_path):
    alpaca = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    assert load(tmp_path, [alpaca]).dialogs[0][0] == Turn("user", "Add.\n\n1 and 1")
    listed = {"prompt": [SYSTEM, MESSAGES[0]], "completion": [MESSAGES[1]]}
    table = load(tmp_path, [listed])
    assert (table.format, table.dialogs[0][1:]) == ("messages", ASKED)


def test_a_format_may_be_named(tmp_path):
    both = {"prompt": "p", "completion": "c", "question": "two?", "answer": "2"}
    with pytest.raises(Mistake, match=r"fits the formats completion and gsm8k; .*data\.format"):
        load(tmp_path, [both])
    assert load(tmp_path, [both], format="gsm8k").dialogs == [ASKED]


PAIRS = {
    "texts": {"prompt": "two?", "chosen": "2", "rejected": "3"},
    "answers": {"prompt": "two?", "chosen": [MESSAGES[1]], "rejected": [OTHER]},
    "messages": {"prompt": MESSAGES[:1], "chosen": [MESSAGES[1]], "rejected": [OTHER]},
    "dialogs": {"chosen": MESSAGES, "rejected": [MESSAGES[0], OTHER]},
    "ultrafeedback": {
        "prompt": "two?",
        "chosen": MESSAGES,
        "rejected": [MESSAGES[0], OTHER],
        "messages": MESSAGES,
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_preference_pairs(row, tmp_path):
    table = load(tmp_path, [row], pairs=True)
    assert (table.format, table.dialogs, table.rejected) == ("preference", [ASKED], ["3"])
    assert table.take([0]).rejected == ["3"]


def says(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


WRONG = {
    "broken": ('{"messages": [}', r"line 1 column 15: Expecting value"),
    "no format": ([{"body": "a"}], r"fits no format; it has body; formats: messages \(messages\)"),
    "missing key": ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2: 'compl.* miss"),
    "empty": ([{"prompt": "a", "completion": " "}], "line 1: 'completion' is empty"),
    "number": (
        [{"prompt": "a", "completion": 5}],
        r"line 1: 'completion' is a int \(5\), not text",
    ),
    "surrogate": ('{"prompt": "a", "completion": "\\ud83d"}', "holds half of a surrogate pair"),
    "one list": ([{"prompt": "a", "completion": MESSAGES}], "one is a text and one is a list"),
    "no messages": ([{"messages": []}], "line 1: the dialog has no messages"),
    "null messages": ([{"messages": None}], "line 1: 'messages' is missing"),
    "text for messages": ([{"messages": "hi"}], r"'messages' is a str \('hi'\), not a list of"),
    "text in messages": ([{"messages": ["hi"]}], r"'messages'\[0\] is a str, not an object"),
    "no role": ([{"messages": [{"from": "user"}]}], r"'messages'\[0\] has no 'role'"),
    "unknown role": ([says("user", "bot")], r"\[1\]: unknown role 'bot'; known: assistant, syst"),
    "null content": (
        [{"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}],
        r"line 1: 'messages'\[1\] \(assistant\): 'content' is missing",
    ),
    "empty answer": (
        [{"messages": [MESSAGES[0], {"role": "assistant", "content": ""}]}],
        r"line 1: 'messages'\[1\] \(assistant\): 'content' is empty",
    ),
    "two users": ([says("user", "user")], "line 1: turn 2 is the user's, after user; mixed roles"),
    "answer first": ([says("assistant")], "turn 1 is the assistant's, after nothing; mixed roles"),
    "late system": (
        [says("user", "assistant", "system")],
        "turn 3 is the system's, which may only be the first",
    ),
    "no answer": ([says("user", "assistant", "user")], "ends with the user's turn: there is no an"),
    "sharegpt role": ([{"conversations": [{"from": "me", "value": "a"}]}], "unknown role 'me'"),
    "answer in prompt": (
        [{"prompt": MESSAGES, "completion": [OTHER]}],
        "ends with the assistant's turn: a prompt ends with the user's",
    ),
    "two completions": ([{"prompt": MESSAGES[:1], "completion": MESSAGES}], "not one message of"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_wrong_examples(content, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        load(tmp_path, content)


WRONG_PAIRS = {
    "no prompt": ({"chosen": "a", "rejected": "b"}, "line 1: 'prompt' is missing"),
    "mixed": ({"prompt": "a", "chosen": "b", "rejected": [OTHER]}, "'rejected' one is a text and"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
    "other prompts": (
        {"chosen": MESSAGES, "rejected": [{"role": "user", "content": "three?"}, OTHER]},
        "differ before their last answers",
    ),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": ""}, "line 1: 'rejected' is empty"),
    "no pair": ({"prompt": "a", "completion": "b"}, r"formats: preference \(chosen, rejected\)"),
}


@pytest.mark.parametrize(("row", "message"), WRONG_PAIRS.values(), ids=WRONG_PAIRS)
def test_wrong_pairs(row, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        load(tmp_path, [row], pairs=True)


WRONG_KEYS = {
    "unknown format": ({"format": "alpacca"}, "data.format='alpacca'; did you mean 'alpaca'"),
    "pairs": ({"format": "preference"}, "the task takes no preference pairs: messages, share"),
    "column": ({"format": "gsm8k"}, r"no column 'question', which format gsm8k has; it has text"),
    "tweets": ({"name": "tweets"}, "data.name='tweets' has labels, no answers"),
    "label": ({"label": "stars"}, "data.label='stars' is not read"),
    "dir": ({"dir": "x"}, "data.dir='x' is not read"),
    "other column": ({"text": "body"}, "data.text='body' is not read: .* has format alpaca"),
    "no file": ({"train": None}, "needs data.train"),
    "no split": ({"name": "hub:me/x", "train": "a"}, "data.train='a' is not read"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_wrong_keys(changes, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        rows = FORMATS["alpaca"][0] if changes.get("text") else [{"text": "a"}]
        load(tmp_path, rows, **changes)


def test_a_line_of_e2e_has_two_fields(tmp_path):
    with pytest.raises(Mistake, match=r"mine\.txt line 3: 0 times '\|\|'"):
        load(tmp_path, "a||b\n\nc\n", ".txt")


def test_a_data_set_of_the_hub(tmp_path):
    for split in ("train", "test"):
        for part in range(2):
            path = tmp_path / "data" / f"{split}-0000{part}-of-00002.parquet"
            path.parent.mkdir(exist_ok=True)
            columns = {"instruction": [f"{split} {part}"], "input": [""], "output": ["2"]}
            pq.write_table(pa.table(columns), path)
    group = base.get_config().data
    group.update(
        {"format": None, "max_eval_examples": None, "name": "hub:me/mine", "dir": str(tmp_path)}
    )
    found = dialog_sources.load(group, splits=["train"])
    assert list(found) == ["train"]
    assert [turns[0].content for turns in found["train"].dialogs] == ["train 0", "train 1"]
    assert found["train"].where(1) == "hub:me/mine train row 1"


@pytest.mark.parametrize("pairs", [False, True])
def test_the_questions_of_this_repository(pairs):
    group = base.get_config().data
    group.update({"format": None, "name": "instruct", "max_eval_examples": 10})
    group.max_train_examples = 50
    found = dialog_sources.load(group, pairs=pairs)
    assert [(split, table.size) for split, table in found.items()] == [
        ("train", 50),
        ("validation", 10),
    ]
    for table in found.values():
        for row, turns in enumerate(table.dialogs):
            lines = turns[1].content.split("\n")
            assert [line.partition(": ")[0] for line in lines] == ["In short", "Why", "Try"]
            if pairs:
                assert table.rejected[row] == " ".join(line.partition(": ")[2] for line in lines)
    assert not {turns[0] for turns in found["train"].dialogs} & {
        turns[0] for turns in found["validation"].dialogs
    }


def test_examples_of_one_question_are_put_together(tmp_path):
    table = load(tmp_path, "a||1\nb||2\na||3\n", ".txt", max_train_examples=3)
    assert table.questions() == [
        ((Turn("user", "a"),), ["1", "3"]),
        ((Turn("user", "b"),), ["2"]),
    ]
    assert table.take(slice(1, 3)).where(0).endswith("line 2")


def test_every_format_needs_its_columns():
    assert [*dialog_formats.FORMATS] == [*FORMATS, "text", "preference"]

"""experiments/instruct_lora.py on a tiny llama: what it leaves, resumes, says, refuses."""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import tiny
import tiny_causal
import tiny_dialogs
from safetensors.numpy import load_file

import bmft
from bmft import chat, prepare, writing
from bmft.errors import Mistake, command
from experiments import instruct_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("instruct")


@pytest.fixture(scope="module")
def arguments(folder):
    model = tiny_dialogs.model(folder / "model")
    return tiny_dialogs.arguments(model, tiny_dialogs.data(folder / "data"))


@pytest.fixture(scope="module")
def finished(arguments, folder):
    assert command(instruct_lora.main, [*arguments, f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def leaves(run):
    file = run / "adapter" / "adapter_model.safetensors"
    return {name: array.tobytes() for name, array in load_file(file).items()}


def rows(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def test_what_a_run_leaves(finished):
    report = json.loads((finished / "report.json").read_text())
    before, after = report["metrics_before"], report["metrics"]
    assert before.keys() == {"validation", "test"}
    assert after["test"]["perplexity"] < before["test"]["perplexity"]
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [one["question"] for one in samples] == ["one?", "What is two?"]
    assert samples[0]["references"] == ["No way."]
    assert json.loads((finished / "before.json").read_text())["texts"] == [
        one["before"] for one in samples
    ]
    told = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (told["peft_type"], told["task_type"]) == ("LORA", "CAUSAL_LM")
    assert {row["split"] for row in rows(finished)} == {"train", "validation", "test"}


def test_stopped_and_continued_is_as_if_it_had_not_been(
    arguments, finished, folder, monkeypatch, capsys
):
    """SIGTERM in the seventh step: status 75, then the same end to the bit."""
    make_step, calls = prepare.make_step, itertools.count(1)

    def kills(*given, **how):
        step = make_step(*given, **how)

        def run(*state):
            if next(calls) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*state)

        return run

    monkeypatch.setattr(prepare, "make_step", kills)
    again = [*arguments, f"--workdir={folder / 'stopped'}"]
    assert command(instruct_lora.main, again) == 75
    assert "at step 7 of 10" in capsys.readouterr().err
    assert command(instruct_lora.main, again) == 0
    assert next(calls) == 7 + 3 + 1
    assert rows(folder / "stopped") == rows(finished)
    assert leaves(folder / "stopped") == leaves(finished)
    for name in ("before.json", "samples.jsonl"):
        assert (folder / "stopped" / name).read_text() == (finished / name).read_text()


def test_a_run_answers_as_it_did_at_its_end(finished):
    """And talks: what is said streams, with what was said before."""
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    writer = bmft.load(finished)
    assert writer.predict([]) == []
    found = writer.predict(["one?", {"messages": [{"role": "user", "content": "What is two?"}]}])
    for one, sample in zip(found, samples, strict=True):
        assert one["answer"] == sample["after"]
    for wrong, says in (
        (("one?", "two?"), "example 0 is no text, and no object with one"),
        ({"instruction": "one?", "input": 2}, "example 0: 'input' is a int"),
        ("\ud83d", "example 0: 'text' holds half of a surrogate pair"),
        ({"query": "one?"}, "example 0 has none of messages, prompt, instruction"),
    ):
        with pytest.raises(Mistake, match=says):
            writer.predict([wrong])


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_whole_language_model_is_known_by_its_name(kind, tmp_path, monkeypatch):
    """GPT-2's is not called like the others'."""
    family = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2"}[kind]
    settings = tiny_causal.CONFIGS[family] | {"architectures": [kind]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(writing, "load", lambda base, **how: base)
    assert bmft.load(tmp_path) == str(tmp_path)


def test_a_conversation(finished, capsys):
    from bmft import predict

    writer = predict.load(finished, tokens=6)
    asked = []
    answer = writer.answer
    writer.answer = lambda turns, **how: asked.append(tuple(turns)) or answer(turns, **how)
    lines = ["one?", "", "two?", "/system Be brief.", "/nothing", "one?", "short? " * 60, "/quit"]
    chat.converse(writer, [*lines, "two?"])
    printed = capsys.readouterr().out.splitlines()
    assert [[turn.role for turn in turns] for turns in asked] == [
        ["user"],
        ["user", "assistant", "user"],
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert printed[0] == asked[1][1].content
    assert "/nothing is no command; /new, /system TEXT, /quit" in printed
    assert printed[-1].endswith("/new begins anew")


class Interrupted:
    """A writer whose first answer is stopped by Ctrl-C."""

    def __init__(self):
        self.asked = []

    def answer(self, turns, *, seed, show):
        self.asked.append([turn.content for turn in turns])
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        return "No."


def test_an_answer_that_is_stopped_is_forgotten():
    writer = Interrupted()
    chat.converse(writer, ["one?", "two?", "short?"])
    assert writer.asked == [["one?"], ["two?"], ["two?", "No.", "short?"]]


def test_preferences_on_a_quantized_base(folder, finished):
    data = tiny_dialogs.data(folder / "pairs", pairs=True)
    given = [*tiny_dialogs.arguments(folder / "model", data), f"--workdir={folder / 'dpo'}"]
    given += ["--config.task.name=preference", "--config.model.quantize=int8"]
    assert command(instruct_lora.main, given) == 0
    report = json.loads((folder / "dpo" / "report.json").read_text())
    before, after = report["metrics_before"]["test"], report["metrics"]["test"]
    assert before["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert after["margin"] > before["margin"] == 0


WRONG = {
    "an encoder": (["--config.model.name=BERT"], "there is no language model here"),
    "no pairs": (["--config.task.name=preference"], "it does fit messages: task.name=causal_lm"),
    "pairs alone": (["PAIRS"], "it does fit preference: task.name=preference"),
    "tweets": (["--config.data.name=tweets"], "data.name='tweets' has labels, no answers"),
    "data": (["--config.data.name=instrukt"], "did you mean 'instruct'?"),
    "format": (["--config.data.format=alpaca"], "no column 'instruction'"),
    "task": (["--config.task.name=text_classification"], "its own: causal_lm, preference"),
    "probe": (["--config.peft.methods=linear_probe"], "has no head of a task"),
    "head": (["--config.optim.head_learning_rate=0.1"], "has no head of a task"),
    "sampling": (["--config.generate.top_p=1.5"], "top_p is 1.5; it must be above 0"),
    "tokens": (["--config.generate.tokens=0"], "generate.tokens=0: needs at least 1"),
    "examples": (["--config.data.max_eval_examples=0"], "max_eval_examples=0: needs at least 1"),
    "separator": (["--config.task.separator=:"], "is not read with task.template=chat"),
    "measure": (["--config.task.measures=blue"], "did you mean 'bleu'?"),
    "moves": (
        ["--config.peft.methods=full", "--config.task.name=preference", "PAIRS"],
        "but params/embeddings/word/embedding and",
    ),
    "template": (["--config.model.name=BARE"], "has no chat template: set task.template=plain"),
    "length": (["--config.data.max_length=4"], "leaves no example with anything to learn"),
    "room": (["--config.generate.tokens=500"], "more than the 128"),
    "vocabulary": (["--config.model.name=FEWER"], "but the model embeds only 0 to 19"),
    "quantize": (["--config.model.quantize=nf5"], "did you mean 'nf4'?"),
}


@pytest.fixture(scope="module")
def places(folder, arguments):
    """{what WRONG calls it: arguments}"""
    bert = tiny.directory(folder / "bert")
    bare = tiny_dialogs.model(folder / "bare", template=None)
    pairs = tiny_dialogs.data(folder / "pairs", pairs=True)
    fewer = tiny_causal.directory(
        tiny_dialogs.model(folder / "fewer"), vocab_size=20, max_position_embeddings=128
    )
    return {"BERT": str(bert), "BARE": str(bare), "FEWER": str(fewer), "PAIRS": pairs}


@pytest.mark.parametrize(("more", "says"), WRONG.values(), ids=WRONG)
def test_mistakes(arguments, places, tmp_path, capsys, more, says):
    given = {a.partition("=")[0]: a for a in [*arguments, f"--workdir={tmp_path / 'run'}"]}
    for argument in more:
        key, _, value = argument.partition("=")
        for one in places["PAIRS"] if key == "PAIRS" else [f"{key}={places.get(value, value)}"]:
            given[one.partition("=")[0]] = one
    if "peft.methods" in more[0]:
        given.pop("--config.peft.lora.rank")
    if "=tweets" in more[0] or "=instrukt" in more[0]:
        given = {key: one for key, one in given.items() if "data" not in one or key in more[0]}
    assert command(instruct_lora.main, list(given.values())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "run" / "checkpoints").exists()

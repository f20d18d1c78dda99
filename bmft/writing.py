"""What language models write: samples of a split before and after training, and answers of a run.

writer = Writer(apply, variables, model, style, tokens=64)
writer.write([[1, 4093, 28], ...])           # a text for each prompt of ids
writer.predict(["Why is the sky blue?"])     # [{"answer": "..."}]
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bmft import generate, models, peft
from bmft.data import chat, dialog_text, dialogs
from bmft.data.dialogs import Turn
from bmft.data.table import wrong_text
from bmft.errors import Mistake
from bmft.generate import LIKELIEST, Sampling
from bmft.models import weights
from bmft.peft import files
from bmft.run import write_whole

# The group `generate` of a config: {key: (type, default)}.
KEYS = {
    "prompts": (int | None, 8),  # questions of the last split that are answered; None: all
    "tokens": (int, 64),  # of an answer, at most
    "stops": (tuple[str, ...], ()),  # texts before which an answer ends
} | {name: (type(value), value) for name, value in LIKELIEST._asdict().items()}
STYLE = "bmft_style.json"  # beside an adapter or a model: how its prompts are rendered
QUESTIONS = ("prompt", "instruction", "question", "meaning", "text")  # columns that may hold one
ROWS = 8  # prompts that are answered together


class Writer:
    """A language model that answers; in the place of a `bmft.predict.Predictor`."""

    takes = "text"

    def __init__(
        self, apply, variables, model, style, *,
        tokens=256, sampling=LIKELIEST, stops=(), rows=ROWS, **how,
    ):  # fmt: skip
        """apply: of bmft.peft.attach. style: `chat.Style`. rows: prompts at a time. how: further
        arguments of `generate.Generator`. Raises Mistake."""
        generate.check(sampling)
        if tokens < 1:
            raise Mistake(f"an answer of {tokens} tokens; it needs 1 or more")
        self.tokenizer, self.style = models.tokenizer(model), style
        self._sampling, self._stops, self._rows = sampling, stops, rows
        how["ends"] = dialog_text.ends(self.tokenizer, style)
        self._generator = generate.Generator(apply, variables, model, tokens=tokens, **how)

    def with_variables(self, variables):
        """The same for others of the same shapes."""
        other = copy.copy(self)
        other._generator = self._generator.with_variables(variables)
        return other

    def write(self, prompts):
        """The texts that are written after prompts, lists of ids."""
        texts = []
        for start in range(0, len(prompts), self._rows):
            some = prompts[start : start + self._rows]
            full = some + some[-1:] * (self._rows - len(some))  # one program, on all devices
            texts += self._speak(full, seed=start)[: len(some)]
        return texts

    def check(self, prompts):
        """Raise Mistake for prompts, lists of ids, that no answer can be written after."""
        if prompts:
            self._generator.longest(prompts)

    def answer(self, turns, *, seed=0, show=None):
        """The assistant's answer to turns. show: called with each piece of it, as it is written.
        Raises Mistake where the style has no place for such turns."""
        shown = show and (lambda row, text: show(text))
        return self._speak([self.ids(turns)], seed=seed, show=shown)[0]

    def predict(self, examples):
        """[{"answer": text}]. examples: questions, or dicts with one in a column of `QUESTIONS`, or
        with `messages` that end with the user's."""
        asked = [_turns(example, row) for row, example in enumerate(examples)]
        return [{"answer": text} for text in self.write([self.ids(turns) for turns in asked])]

    def ids(self, turns):
        """The prompt of turns that end with the user's."""
        try:
            return dialog_text.prompt(self.tokenizer, tuple(turns), self.style)
        except chat.Unfit as error:
            raise Mistake(f"template {self.style.template}: {error}") from None

    def _speak(self, prompts, **how):
        how |= {"stops": self._stops}
        return generate.speak(self._generator, self.tokenizer, prompts, self._sampling, **how)


def _turns(example, row):
    where = f"example {row}"
    if isinstance(example, str):
        example = {"text": example}
    if not isinstance(example, dict):
        raise Mistake(f"{where} is no text, and no object with one: {example!r:.80}")
    if "messages" in example:
        return dialogs.turns_of(example["messages"], where, "messages", answered=False)
    column = next((name for name in QUESTIONS if example.get(name) is not None), None)
    if column is None:
        raise Mistake(f"{where} has none of messages, {', '.join(QUESTIONS)}: {example!r:.80}")
    more = example.get("input") if column == "instruction" else None
    parts = {column: example[column]} | ({"input": more} if more else {})
    for name, part in parts.items():
        if reason := wrong_text(part):
            raise Mistake(f"{where}: {name!r} {reason}")
    return (Turn("user", "\n\n".join(parts.values())),)


def load(base, *, adapter=None, quantize=None, **how):
    """The `Writer` of a language model by name, with the adapter in a directory. how: as `Writer`
    takes it. Raises Mistake."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = models.find(base, dtype=dtype)
    read = files.read(adapter, model, fingerprint=weights.fingerprint(model)) if adapter else None
    moved = read.leaves if read else {}
    kernels = weights.quantized(model, quantize, lambda path: f"params/{path}" in moved)
    loaded = weights.load(model, jax.random.key(0), dtype=lambda path: dtype, quantized=kernels)
    variables = files.insert(read, loaded.variables(), loaded.fresh) if read else loaded.variables()
    methods = read.methods if read else ()
    apply = peft.attach(methods, model).apply
    style = read_style(adapter or model.folder, models.tokenizer(model))
    how = {"methods": methods, "columns": generate.power} | how
    return Writer(apply, variables, model, style, **how)


def is_for(card, base):
    """Is the adapter of a `files.Card` one of a language model? PEFT's need not say so: then its
    base does."""
    if card.task_type is None and card.outputs is None:
        return models.speaks(models.locate(base))
    return card.task_type == files.LANGUAGE[0]


# --- what a run shows and leaves -------------------------------------------------------------


class Beside(NamedTuple):
    """What lies beside an adapter or a model: its tokenizer, and how prompts are rendered."""

    tokenizer: Any
    style: chat.Style

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(self.style._asdict(), indent=2) + "\n"
        (Path(folder) / STYLE).write_text(text, encoding="utf-8")


def read_style(folder, tokenizer):
    """The `chat.Style` in a directory; without one, chat if the tokenizer has a template."""
    try:
        return chat.Style(**json.loads((Path(folder) / STYLE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return chat.Style("chat" if tokenizer.chat_template else "plain")
    except (TypeError, ValueError) as error:
        raise Mistake(f"{Path(folder) / STYLE}: {error}") from None


class Samples(NamedTuple):
    """Questions of a split that are answered before and after training."""

    split: str
    prompts: list  # ids
    questions: list  # the same as a user wrote them
    references: list  # the answers to each in the data


def samples(config, task, tables, tokenizer):
    """The `Samples` of a config: of the last split, which is the test split where there is one."""
    split = list(tables)[-1]
    found = list(
        zip(tables[split].questions(), task.prompts(tables[split], tokenizer), strict=True)
    )
    found = found[: config.generate.prompts]
    return Samples(
        split,
        prompts=[ids for _, (ids, _) in found],
        questions=[turns[-1].content for (turns, _), _ in found],
        references=[references for _, (_, references) in found],
    )


def settings(group):
    """What the group `generate` of a config says to a `Writer`. Raises Mistake."""
    sampling = Sampling(**{name: group[name] for name in Sampling._fields})
    generate.check(sampling)
    for key, least in (("prompts", 0), ("tokens", 1)):
        if group[key] is not None and group[key] < least:
            raise Mistake(f"generate.{key}={group[key]}: needs at least {least}")
    return {"tokens": group["tokens"], "stops": tuple(group["stops"]), "sampling": sampling}


def rows_at_a_time(config, multiple):
    """How many prompts of a config are answered together; multiple: of the devices. Each beam is
    a row."""
    most = config.eval.batch_size // config.generate.beams
    return -(-max(min(most, config.generate.prompts or most), 1) // multiple) * multiple


def write_samples(path, samples, before, after):
    """A line of JSON for each question: its references, what was written before and after."""
    columns = zip(samples.questions, samples.references, before, after, strict=True)
    names = ("question", "references", "before", "after")
    lines = (json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in columns)
    write_whole(path, "".join(line + "\n" for line in lines))

"""Language modelling: texts, prompts with completions, chats; the loss is on the answers alone.

    template    chat or plain; None: as the format of the data says (bmft/data/dialog_formats.py)
    separator   plain: what stands between prompt and answer; None: as the format says
    answers     all or last: which answers of a dialog are learned
    measures    of bmft/tasks/answers.py, by which written answers are measured; None: as the format
                says
    pattern     of exact_match: the regular expression of an answer; None: GSM8K's number
    label_smoothing   the share of each target that is spread evenly over the vocabulary, in
                training alone: nothing that is measured is smoothed

What is learned of an example is decided when it is tokenized (bmft/data/dialog_text.py): a batch
has `targets`, and forward gives their negative log-likelihood, 0 where there is none.
"""

import jax.numpy as jnp
import numpy as np

from bmft.data import chat, dialog_text
from bmft.data.dialog_formats import FORMATS
from bmft.data.dialogs import Dialogs
from bmft.errors import Mistake
from bmft.tasks import Task
from bmft.tasks import answers as written

EXAMPLES = Dialogs
NAMES = {"loss": "min", "perplexity": "min"}


def make(
    tables,
    *,
    template: str | None = None,
    separator: str | None = None,
    answers: str = "all",
    measures: tuple[str, ...] | None = None,
    pattern: str | None = None,
    label_smoothing: float = 0.0,
):
    """The `Task` of `{split: Dialogs}`, or of none. Raises Mistake for a key that cannot be."""
    for table in tables.values():
        chat.check_style(style_of(table, template, separator, answers))
    if measures is None:
        measures = tuple(
            dict.fromkeys(m for t in tables.values() for m in FORMATS[t.format].measures)
        )
    written.check(measures, pattern)
    if not 0 <= label_smoothing < 1:
        raise Mistake(f"task.label_smoothing={label_smoothing} is not in [0, 1)")

    encode, prompts = readers(template, separator, answers)

    def measure(texts, references):
        return written.measure(measures, texts, references, pattern)

    return Task(
        name="causal_lm",
        labels=None,
        num_outputs=None,
        heads=(),
        metric=("loss", "min"),
        directions=NAMES,
        targets=lambda table: None,
        loss=loss(label_smoothing),
        outputs=outputs,
        metrics=lambda outputs, targets: metrics(**outputs),
        decode=lambda outputs: decode(**outputs),
        encode=encode,
        show=show,
        prompts=prompts,
        measure=measure if measures else None,
    )


def style_of(table, template=None, separator=None, answers="all"):
    """The `chat.Style` of a table: what the keys say, else what its format says. Raises Mistake for
    a separator that a chat template would not read."""
    form = FORMATS[table.format]
    template = form.template if template is None else template
    if template == "chat" and separator is not None:
        raise Mistake(f"task.separator={separator!r} is not read with task.template=chat")
    return chat.Style(template, form.separator if separator is None else separator, answers)


def readers(template, separator, answers):
    """(encode, prompts) of a `Task`, by its keys."""

    def encode(table, tokenizer, max_length, cache=None):
        style = style_of(table, template, separator, answers)
        return dialog_text.encode(table, tokenizer, style, max_length, cache)

    def prompts(table, tokenizer):
        return dialog_text.prompts(table, tokenizer, style_of(table, template, separator))

    return encode, prompts


def show(encoded, tokenizer):
    """What a user should see before training: the first example, what is learned of it marked."""
    share = encoded.learned.mean()
    lines = [
        f"{encoded.learned.sum():,} of {len(encoded.tokens):,} tokens are learned ({share:.1%}); "
        "the first example, with what is learned of it between ⟦ and ⟧:",
        dialog_text.shown(encoded, tokenizer),
    ]
    if tokenizer.pad_token_id is None:
        lines.append(
            f"the tokenizer of {chat.name_of(tokenizer)} has no pad token: none is needed here; "
            "transformers wants tokenizer.pad_token = tokenizer.eos_token for batches"
        )
    return "\n".join(lines)


# --- loss and metrics ------------------------------------------------------------------------


def by_segment(values, segments, count):
    """Sums of values [R, T] over the tokens of each segment: float32 [R, count]."""
    own = segments[..., None] == jnp.arange(1, count + 1)
    return jnp.where(own, values[..., None].astype(jnp.float32), 0.0).sum(1)


def loss(smoothing=0.0):
    """The `Task.loss`: (sum of the learned tokens' negative log-likelihoods, their number),
    {examples}."""
    asked = {"smoothing": np.float32(smoothing)} if smoothing else {}

    def of_batch(forward, batch, key):
        learned = batch["targets"] >= 0
        nll = jnp.where(learned, forward(batch | asked, train=True), 0.0)
        return (nll.sum(), learned.sum(dtype=jnp.float32)), {"examples": batch["weights"].sum()}

    return of_batch


def outputs(forward, batch):
    """Of each example, float32 [R, K]: nll, the sum of its learned tokens', and their number."""
    learned, slots = batch["targets"] >= 0, batch["index"].shape[1]
    nll = jnp.where(learned, forward(batch, train=False), 0.0)
    sums = (by_segment(values, batch["segments"], slots) for values in (nll, learned))
    return dict(zip(("nll", "tokens"), sums, strict=True))


def metrics(nll, tokens):
    """{name: float} of nll and tokens [n], by token over the whole split."""
    mean = nll.astype(np.float64).sum() / tokens.astype(np.float64).sum()
    with np.errstate(over="ignore"):
        return {"loss": float(mean), "perplexity": float(np.exp(mean))}


def decode(nll, tokens):
    """A dict an example: its nll, its learned tokens, its perplexity."""
    return [
        {"nll": float(one), "tokens": int(count), **metrics(one, count)}
        for one, count in zip(nll, tokens, strict=True)
    ]

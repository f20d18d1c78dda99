"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691), as PEFT computes it: n learnt tokens before
each example, in the word embedding's place.

    embedded = norm([P; words] + positions + types)     P at positions 0 to n - 1, of type 0

The classification is read at the first of them. It does not start as the base.

    random        normal with deviation 1, as torch's embeddings
    vocabulary    rows of the word embedding, drawn with equal chances
    text          rows of the tokens of a text, special tokens among them, repeated or cut to n

    peft/embeddings/word/prompt [n, d]
"""

import math

import jax
import numpy as np

from bmft import peft
from bmft.errors import Mistake, nearest
from bmft.peft import prompts
from bmft.peft.files import Layout

NAME, LEAF = "prompt_tuning", f"peft/{prompts.WORDS}/prompt"
STARTS = ("random", "vocabulary", "text")


def make(
    model,
    *,
    tokens: int = 20,
    init: str = "random",
    text: str | None = None,
    modules_to_save: tuple[str, ...] = (),
):
    """tokens: 20 are those of PEFT's examples; the paper has up to 150. text: what `init=text`
    starts from. Raises Mistake for a model that reads no words."""
    prompts.check_words(model, NAME)
    prompts.check(model, NAME, tokens)
    if init not in STARTS:
        raise Mistake(f"peft.prompt_tuning.init is {init!r}; {nearest(init, STARTS)}")
    if (init == "text") != (text is not None):
        raise Mistake(
            f"peft.prompt_tuning: init is {init!r}, text is {text!r}; each asks for the other"
        )
    ids = np.resize(_tokenized(model, text), tokens) if text is not None else None

    def start(table):
        def of_words(key, shape, dtype):
            drawn = jax.random.randint(key, shape[:1], 0, len(table))
            return table[drawn if ids is None else ids].astype(dtype)

        return jax.nn.initializers.normal(1.0) if init == "random" else of_words

    def hook(module, call, *args):
        if peft.path_of(module) != prompts.WORDS:
            return call(*args)
        table = module.get_variable("params", "embedding")
        prompt = peft.leaf(module, "prompt", start(table), (tokens, module.features))
        return prompts.embed(module, call, args[0], prompt)

    moves, rows = prompts.claims(model, NAME, lambda path: path == LEAF, modules_to_save)
    files = prompts.files(
        model,
        "PROMPT_TUNING",
        tokens,
        modules_to_save,
        lambda leaves: leaves[LEAF],
        lambda table: {LEAF: table},
        prompt_tuning_init="RANDOM",
    )
    return peft.Method(
        NAME,
        moves,
        hook,
        rows=rows,
        axes={"prompt": "o"},
        identity=math.inf,
        virtual_tokens=tokens,
        positions=tokens,
        files=files,
    )


def _tokenized(model, text):
    """The ids of a text, at least one, each in the vocabulary."""
    try:
        ids = model.tokenizer()(text)["input_ids"]
    except Mistake as error:
        raise Mistake(f"peft.prompt_tuning.text: no tokenizer in {model.name}: {error}") from None
    if not ids or max(ids) >= model.config.vocabulary:
        raise Mistake(f"peft.prompt_tuning.text: {text!r} has no tokens that {model.name} knows")
    return ids


LAYOUT = Layout(
    peft_type="PROMPT_TUNING",
    fields=prompts.FIELDS,
    ignored=(
        *("prompt_tuning_init", "prompt_tuning_init_text"),  # the start is of no matter afterwards
        *("tokenizer_name_or_path", "tokenizer_kwargs"),
        "num_attention_heads",  # PEFT asks for them, and has no use for them here
    ),
    defaults={},
    arguments=prompts.arguments,
    fits=prompts.fits,
)

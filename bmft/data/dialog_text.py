"""Token ids of dialogs and which of them are learned, end to end in one array, cached by content.

A text is tokenized as a whole. Where a token then lies across the beginning or the end of an answer
(`A: ` and `yes` are `A`, `:`, ` yes`), the parts are tokenized one by one instead: what a model
goes on from ends at the beginning of an answer, and so must a token.
"""

import hashlib
import itertools

import numpy as np
import tokenizers

from bmft.data import chat, text
from bmft.data.dialogs import Turn
from bmft.errors import Mistake

FORMAT = "bmft dialogs 1"  # of the cache; a new number makes old files unread


def encode(table, tokenizer, style, max_length, cache=None):
    """The `text.Encoded` of `Dialogs`, with its fields of a language model.

    tokenizer: of transformers, one of the fast ones. style: `chat.Style`. max_length: tokens that a
    sequence is cut to, from the right; an example of which nothing learned remains is left out.
    cache: folder for the result, None for no cache. A pair is one example of two sequences.
    Raises Mistake for a template that does not fit, with file and line if it is by the example.
    """
    if not table.size:
        raise Mistake(f"{table.source}: there are no examples")
    chat.check_style(style)
    backend = text.core(tokenizer)
    if style.template == "chat":
        chat.check_template(tokenizer, style, lambda turns: _ids(tokenizer, style, [turns])[0])
    elif tokenizer.eos_token_id is None:
        raise Mistake(
            f"the tokenizer of {chat.name_of(tokenizer)} has no eos_token, which ends a text: "
            "no answer would ever be ended"
        )

    def key():
        template = chat.template(tokenizer) if style.template == "chat" else ""
        digest = hashlib.sha256()
        parts = (FORMAT, tokenizers.__version__, backend.to_str(), template, str(max_length))
        text.add_texts(digest, [*parts, *style, str(tokenizer.special_tokens_map)])
        turns = [turn for dialog in table.dialogs for turn in (*dialog, ("", ""))]
        text.add_texts(digest, [part for turn in turns for part in turn])
        text.add_texts(digest, table.rejected or ())
        return digest.hexdigest()

    return text.cached(cache, key, lambda: _encode(table, tokenizer, style, max_length))


def shown(encoded, tokenizer, example=0, marks=("⟦", "⟧")):
    """An example as text, what is learned between `marks`; of a pair both sequences.

    For a human to see that the loss is where it should be.
    """
    start, end = (int(offset) for offset in encoded.offsets[example : example + 2])
    cuts = [start, end]
    if encoded.second is not None:
        cuts.insert(1, start + int(encoded.second[example]))
    return "\n".join(
        _marked(encoded.tokens[a:b], encoded.learned[a:b], tokenizer, marks)
        for a, b in itertools.pairwise(cuts)
    )


def _marked(ids, learned, tokenizer, marks):
    found, at = "", 0
    for a, b in chat.runs_of(learned):
        found += tokenizer.decode(ids[at:a]) + marks[0] + tokenizer.decode(ids[a:b]) + marks[1]
        at = b
    return found + tokenizer.decode(ids[at:])


def _encode(table, tokenizer, style, max_length):
    parts = 1 if table.rejected is None else 2
    tokens, learned, lengths, rows, truncated = [], [], [], [], 0
    for start in range(0, table.size, text.CHUNK):
        chunk = range(start, min(start + text.CHUNK, table.size))
        dialogs = [turns for row in chunk for turns in _sequences(table, row)]
        found = _ids(tokenizer, style, dialogs, lambda i, s=start: table.where(s + i // parts))
        pairs = [found[i : i + parts] for i in range(0, len(found), parts)]
        for row, pair in zip(chunk, pairs, strict=True):
            pair = [_until_learned(*one) for one in pair]
            cut = [(ids[:max_length], mask[:max_length]) for ids, mask in pair]
            # Nothing comes before a first token that it could be predicted from.
            if all(any(mask[1:]) for _, mask in cut):
                truncated += any(len(ids) > max_length for ids, _ in pair)
                rows.append(row)
                lengths.append([len(ids) for ids, _ in cut])
                tokens += [np.array(ids, np.int32) for ids, _ in cut]
                learned += [np.array([False, *mask[1:]]) for _, mask in cut]
    if not rows:
        raise Mistake(
            f"{table.source}: data.max_length={max_length} leaves no example with anything to learn"
        )
    lengths = np.array(lengths, np.int64)
    tokens = np.concatenate(tokens)
    return text.Encoded(
        tokens=tokens,
        types=np.zeros(len(tokens), np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths.sum(1))]),
        truncated=truncated,
        learned=np.concatenate(learned),
        second=lengths[:, 0] if parts == 2 else None,
        rows=np.array(rows, np.int64),
    )


def _until_learned(ids, learned):
    """Without what follows the last learned token, which nothing depends on."""
    end = len(ids) - learned[::-1].index(True)
    return ids[:end], learned[:end]


def _sequences(table, row):
    """The dialogs that an example is."""
    turns = table.dialogs[row]
    if table.rejected is None:
        return (turns,)
    return turns, (*turns[:-1], Turn("assistant", table.rejected[row]))


def _ids(tokenizer, style, dialogs, where=lambda i: None):
    """[(ids, learned)] of dialogs, not cut. where(i): of dialog i, for messages; None: Unfit is
    raised as it is."""
    in_chat, rendered = style.template == "chat", []
    says_itself = in_chat and chat.says_itself(tokenizer)
    ends = chat.ends(tokenizer)
    for i, turns in enumerate(dialogs):
        try:
            if says_itself:
                rendered.append(_generation(tokenizer, turns, style))
            else:
                rendered.append(chat.spans(tokenizer, turns, style, ends))
        except chat.Unfit as error:
            if where(i) is None:
                raise
            chats = f"the chat template of {chat.name_of(tokenizer)}"
            name = chats if in_chat else "task.template=plain"
            raise Mistake(f"{where(i)}: {name} {error}") from None
    if in_chat:
        return rendered if says_itself else _tokenize(tokenizer, rendered)
    before, end = _first(tokenizer), tokenizer.eos_token_id
    return [
        ([*before, *ids, end], [*[False] * len(before), *mask, True])
        for ids, mask in _tokenize(tokenizer, rendered)
    ]


def prompts(table, tokenizer, style):
    """[(ids that an answer is to be written after, its references)] of each question of `Dialogs`;
    texts, which nothing comes before, have none."""
    found = []
    for turns, references in table.questions():
        try:
            found.append((prompt(tokenizer, turns, style), references))
        except chat.Unfit as error:
            asked = turns[-1].content[:40]
            raise Mistake(
                f"{table.source}: {asked!r}: task.template={style.template} {error}"
            ) from None
    return found


def prompt(tokenizer, turns, style):
    """The ids that an answer to `turns` is written after. Raises `chat.Unfit`."""
    body = chat.prompt(tokenizer, turns, style)
    ids = text.core(tokenizer).encode(body, add_special_tokens=False).ids
    return ids if style.template == "chat" else [*_first(tokenizer), *ids]


def ends(tokenizer, style):
    """The ids behind which an answer is over: the tokenizer's eos_token, and the special token that
    a chat template puts there. Raises Mistake for a template that is none."""
    found = {tokenizer.eos_token_id} - {None}
    if style.template == "chat":
        try:
            sequence = _ids(tokenizer, style._replace(answers="last"), [chat.PROBE])[0]
        except chat.Unfit as error:
            raise Mistake(f"the chat template of {chat.name_of(tokenizer)} {error}") from None
        found |= _mark(tokenizer, _until_learned(*sequence)[0])
    return tuple(sorted(found))


def _mark(tokenizer, ids):
    """The first of the special tokens that ids end with, as a set; blanks between them do not
    count, such as a line end that `{% generation %}` has in it."""
    special, found = chat.ends(tokenizer), set()
    for one in reversed(ids):
        if special.fullmatch(tokenizer.convert_ids_to_tokens(one)):
            found = {one}
        elif tokenizer.decode([one]).strip():
            break
    return found


def _first(tokenizer):
    """What the tokenizer puts before any text: its beginning-of-sequence token, or nothing."""
    found = text.core(tokenizer).encode("a", add_special_tokens=True)
    own = found.special_tokens_mask.index(0) if 0 in found.special_tokens_mask else 0
    return found.ids[:own]


def _generation(tokenizer, turns, style):
    """(ids, learned) by a template's own `{% generation %}`. Raises Unfit."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    chat.render(tokenizer, turns)  # raises what it has to say of the dialog
    found = tokenizer.apply_chat_template(
        messages,
        chat_template=chat.template(tokenizer),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learned = [bool(one) for one in found["assistant_masks"]]
    runs = chat.runs_of(learned)
    answers = sum(turn.role == "assistant" for turn in turns)
    if len(runs) != answers:
        raise chat.Unfit(
            f"marks {len(runs)} stretches by generation in a dialog of {answers} answers"
        )
    if style.answers == "last":
        learned = [at >= runs[-1][0] and one for at, one in enumerate(learned)]
    return list(found["input_ids"]), learned


def _tokenize(tokenizer, rendered):
    """[(ids, learned)] of (text, [(start, end) of what is learned])."""
    backend = text.core(tokenizer)

    def ids_of(texts):
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    wholes = ids_of([whole for whole, _ in rendered])
    cuts = [sorted({c for span in spans for c in span} - {0, len(t)}) for t, spans in rendered]
    heads = iter(
        ids_of([t[:c] for (t, _), places in zip(rendered, cuts, strict=True) for c in places])
    )
    found = []
    for (whole, spans), ids, places in zip(rendered, wholes, cuts, strict=True):
        own = [next(heads) for _ in places]
        ends = [len(head) for head in own]
        if any(ids[: len(head)] != head for head in own):
            pieces = itertools.pairwise([0, *places, len(whole)])
            parts = _one_by_one(ids_of, [whole[a:b] for a, b in pieces])
            ids, ends = sum(parts, []), list(itertools.accumulate(map(len, parts)))[:-1]
        token_at = dict(zip([0, *places, len(whole)], [0, *ends, len(ids)], strict=True))
        learned = [False] * len(ids)
        for start, end in spans:
            a, b = token_at[start], token_at[end]
            learned[a:b] = [True] * (b - a)
        found.append((ids, learned))
    return found


def _one_by_one(ids_of, pieces):
    """The ids of each piece of a text. SentencePiece puts a blank before a text, but not before
    what goes on behind a line end."""
    (line_end,), alone = ids_of(["\n"]), ids_of(pieces)
    if ids_of(["\na"])[0] == line_end + ids_of(["a"])[0]:
        return alone
    behind = ids_of(["\n" + piece for piece in pieces])
    goes_on = [i > 0 and ids[: len(line_end)] == line_end for i, ids in enumerate(behind)]
    both = zip(goes_on, behind, alone, strict=True)
    return [ids[len(line_end) :] if on else own for on, ids, own in both]

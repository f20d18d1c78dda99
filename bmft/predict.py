"""Predictions of a finished run, of an adapter on its base, or of a merged model.

    ./run.sh -m bmft.predict --run DIR --input FILE.jsonl --output OUT.jsonl
    ./run.sh -m bmft.predict --run DIR --text "what a day" --text "not again"
    ./run.sh -m bmft.predict --base MODEL [--adapter DIR] --input FILE.tsv --output OUT.jsonl

An output line repeats the input and adds what the task decodes: label, scores, logits. In Python:
`bmft.load(DIR).predict(["what a day"])`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

from bmft import evaluate, models, peft, sharding, tasks
from bmft.data import files as data_files
from bmft.data import text
from bmft.data.batches import Batches, row_length
from bmft.data.table import Table
from bmft.errors import Mistake, command
from bmft.models import weights
from bmft.peft import files
from bmft.run import write_whole

BATCH = 64  # examples


class Predictor:
    """A model that answers; made by `load`."""

    def __init__(self, model, task, methods, variables, settings):
        self.task, self.settings = task, settings  # settings: text, text_pair, max_length
        self._model, self._variables = model, variables
        self._tokenizer = models.tokenizer(model)
        apply = peft.attach(methods, model).apply
        self._outputs_of = evaluate.make_outputs(apply, task.outputs)

    def predict(self, examples):
        """A dict an example: for classes `label`, `scores` and `logits`.

        examples: texts, (text, text) pairs, or dicts with the columns the model was trained on.
        """
        if not examples:
            return []
        table = self._table(list(examples))
        encoded = text.encode(table, self._tokenizer, self.settings["max_length"])
        batches = Batches(
            encoded,
            batch_size=BATCH,
            row_length=row_length(None, encoded.longest, jax.default_backend()),
            put=_few_shapes,
        )
        return self.task.decode(evaluate.over_split(self._outputs_of, self._variables, batches))

    def _table(self, examples):
        columns = [self.settings["text"], self.settings["text_pair"]]
        if isinstance(examples[0], dict):
            columns = [column for column in columns if column]
            for row, example in enumerate(examples):
                for column in columns:
                    if not isinstance(example.get(column), str):
                        raise Mistake(f"example {row} has no text in {column!r}: {example!r:.80}")
            examples = [tuple(example[column] for column in columns) for example in examples]
        examples = [(one,) if isinstance(one, str) else tuple(one) for one in examples]
        wanted = 2 if self.settings["text_pair"] else len(examples[0])
        for row, example in enumerate(examples):
            if len(example) != wanted or not all(isinstance(part, str) for part in example):
                raise Mistake(f"example {row} is not {wanted} text(s): {example!r:.80}")
        texts = [example[0] for example in examples]
        return Table(texts, [example[1] for example in examples] if wanted == 2 else None)


def load(where, *, base=None):
    """The `Predictor` of a run directory, an adapter directory (on `base`, or on the model it
    names), or a model directory with a trained head. Raises Mistake for anything else."""
    where = Path(where)
    if not where.is_dir():
        raise Mistake(f"there is no directory {str(where)!r}")
    settings = {"text": "text", "text_pair": None, "max_length": None}
    adapter = where
    record = _run_record(where)
    if record:
        base = base or record["config"]["model"]["name"]
        data = record["config"]["data"]
        settings = {key: data[key] for key in settings}
        adapter = where / "adapter"
        if not adapter.is_dir():
            raise Mistake(f"{where} has no adapter/: an unfinished run? Run its command again")
    if not (adapter / files.CONFIG).is_file():
        return _of_model(where, settings)
    card = files.card(adapter)
    base = base or card.base
    if base is None:
        raise Mistake(f"{adapter} does not say what it was trained on; give --base")
    if card.outputs is None:
        raise Mistake(f"{adapter} has no classifier: it cannot predict by itself")
    model = models.find(base, outputs=card.outputs)
    loaded = weights.load(model, jax.random.key(0))
    read = files.read(adapter, model, fingerprint=weights.fingerprint(model))
    variables = files.insert(read, loaded.variables(), loaded.fresh)
    labels = card.labels or (_numbered(card.outputs) if card.outputs > 1 else None)
    return Predictor(model, _task(labels), read.methods, variables, _limited(settings, model))


def _of_model(folder, settings):
    """The `Predictor` of a directory with a whole fine-tuned model."""
    named = models.read_json(folder).get("id2label") or {}
    labels = tuple(name for _, name in sorted(named.items(), key=lambda item: int(item[0])))
    model = models.find(str(folder), outputs=max(1, len(labels)))
    loaded = weights.load(model, jax.random.key(0))
    if loaded.fresh:
        raise Mistake(f"{folder} has no {loaded.fresh[0]}, no trained head; give --adapter")
    task = _task(labels if len(labels) > 1 else None)
    return Predictor(model, task, (), loaded.variables(), _limited(settings, model))


def _run_record(folder):
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Mistake(f"{path}: not JSON: {error}") from None
    return record if "experiment" in record else None


def _task(labels):
    return tasks.get("text_classification").make({}, labels=labels, regression=labels is None)


def _numbered(count):
    return tuple(f"LABEL_{i}" for i in range(count))


def _limited(settings, model):
    most = model.config.max_length
    return settings | {"max_length": min(settings["max_length"] or most, most)}


def _few_shapes(arrays):
    """Rows and slots padded to powers of two: calls of many sizes share few compiled programs."""

    def pad(array, axes, empty):
        width = [(0, 0)] * array.ndim
        for axis in axes:
            size = array.shape[axis]
            width[axis] = (0, (1 << (size - 1).bit_length()) - size)
        return np.pad(array, width, constant_values=empty)

    slots = ("first", "labels", "weights", "index")
    return {
        name: pad(array, (0, 1) if name in slots else (0,), -1 if name == "index" else 0)
        for name, array in arrays.items()
    }


# --- command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(f"{message}; see --help")


def main(argv):
    layout = argparse.RawTextHelpFormatter
    parser = _Parser("bmft.predict", description=__doc__, formatter_class=layout)
    parser.add_argument("--run", help="a run directory")
    parser.add_argument("--base", help="a model: directory, preset or Hub id")
    parser.add_argument("--adapter", help="an adapter directory, ours or PEFT's")
    parser.add_argument("--input", help=".jsonl, .csv, .tsv or .parquet")
    parser.add_argument("--output", help=".jsonl; standard output where it is not given")
    parser.add_argument("--text", action="append", default=[], help="a text; may be given again")
    parser.add_argument("--text-pair", action="append", default=[], help="the second text of each")
    options = parser.parse_args(argv)
    where = options.run or options.adapter or options.base
    if where is None or (options.run and (options.base or options.adapter)):
        raise Mistake("give --run DIR, or --base MODEL with or without --adapter DIR")
    if bool(options.text) == bool(options.input):
        raise Mistake("give either --input FILE or --text TEXT")
    if options.adapter:
        files.card(options.adapter)  # a run or a model in its place is a mistake
    sharding.use_all_cores(os.cpu_count())
    examples, shown = _examples(options)
    predictor = load(where, base=options.base if options.adapter else None)
    lines = [
        json.dumps({**example, **answer}, ensure_ascii=False) + "\n"
        for example, answer in zip(shown, predictor.predict(examples), strict=True)
    ]
    if options.output:
        write_whole(Path(options.output), "".join(lines))
        print(f"{len(lines)} predictions in {options.output}", file=sys.stderr)
    else:
        sys.stdout.write("".join(lines))


def _examples(options):
    """(what predict takes, what the output repeats)."""
    if options.input:
        columns, _, _ = data_files.contents(options.input, key="--input")
        lines = zip(*columns.values(), strict=True)
        rows = [dict(zip(columns, values, strict=True)) for values in lines]
        return rows, rows
    if options.text_pair and len(options.text_pair) != len(options.text):
        raise Mistake(f"{len(options.text)} --text but {len(options.text_pair)} --text-pair")
    if options.text_pair:
        pairs = list(zip(options.text, options.text_pair, strict=True))
        return pairs, [{"text": a, "text_pair": b} for a, b in pairs]
    return options.text, [{"text": one} for one in options.text]


if __name__ == "__main__":
    raise SystemExit(command(main))

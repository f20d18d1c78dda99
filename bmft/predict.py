"""Predictions of a finished run, of an adapter on its base, or of a merged model.

    ./run.sh -m bmft.predict --run DIR --input FILE.jsonl --output OUT.jsonl
    ./run.sh -m bmft.predict --run DIR --text "what a day" --text "not again"
    ./run.sh -m bmft.predict --run DIR --image a.png --image b.jpg
    ./run.sh -m bmft.predict --base MODEL [--adapter DIR] --input FILE.tsv --output OUT.jsonl

An output line repeats the input and adds what the task decodes: label, scores, logits; of a
language model the answer (bmft/writing.py; ./run.sh -m bmft.chat talks). For images, a file of
inputs has the column `image` with paths. In Python:
`bmft.load(DIR).predict(["what a day"])`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

from bmft import evaluate, models, peft, prepare_images, sharding, tasks, writing
from bmft.data import files as data_files
from bmft.data import text
from bmft.data.batches import Batches, row_length
from bmft.data.image_batches import ImageBatches
from bmft.data.image_table import ImageTable
from bmft.data.table import Table
from bmft.errors import Mistake, Parser, command
from bmft.models import weights
from bmft.peft import files
from bmft.run import write_whole

BATCH = 64  # examples


class Predictor:
    """A text classifier that answers; made by `load`."""

    takes = "text"

    def __init__(self, model, task, methods, variables, settings):
        self.task, self.settings = task, settings  # settings: text, text_pair, max_length
        self._variables = variables
        self._tokenizer = models.tokenizer(model)
        self._virtual = peft.virtual_ids(methods, model)
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
        encoded = encoded.behind(self._virtual)
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


class ImagePredictor:
    """An image classifier that answers; made by `load`."""

    takes = "image"

    def __init__(self, model, task, methods, variables, preprocessor, to_rgb):
        self.task, self._variables = task, variables
        self._preprocessor, self._to_rgb = preprocessor, to_rgb
        apply = peft.attach(methods, model).apply
        self._outputs_of = evaluate.make_outputs(apply, task.outputs)

    def predict(self, examples):
        """A dict an example: `label`, `scores` and `logits`.

        examples: images as paths, bytes of a file, or uint8 arrays [h, w, 3]; or dicts with one
        under `image`. Raises Mistake for what cannot be read.
        """
        if not examples:
            return []
        found = [one.get("image") if isinstance(one, dict) else one for one in examples]
        for row, image in enumerate(found):
            if not isinstance(image, str | os.PathLike | bytes | np.ndarray):
                raise Mistake(f"example {row} has no 'image': {examples[row]!r:.80}")
        found = [Path(image) if isinstance(image, str) else image for image in found]
        size = min(BATCH, 1 << (len(found) - 1).bit_length())  # calls share few compiled programs
        batches = ImageBatches(
            ImageTable(found, to_rgb=self._to_rgb),
            batch_size=size,
            resize=self._preprocessor.resize,
            rows_multiple=size,
        )
        return self.task.decode(evaluate.over_split(self._outputs_of, self._variables, batches))


def load(where, *, base=None, **how):
    """The `Predictor` (of images: `ImagePredictor`, of a language model: `writing.Writer`, which
    takes `how`) of a run directory, an adapter directory (on `base`, or on the model it names), or
    a model directory with a trained head. Raises Mistake for anything else."""
    where = Path(where)
    if not where.is_dir():
        raise Mistake(f"there is no directory {str(where)!r}")
    settings = {"text": "text", "text_pair": None, "max_length": None, "to_rgb": False}
    adapter, quantize = where, None
    record = _run_record(where)
    if record:
        base = base or record["config"]["model"]["name"]
        quantize = record["config"]["model"].get("quantize")  # the base as it was trained on
        if "generate" in record["config"]:
            how = writing.settings(record["config"]["generate"]) | how
        data = record["config"]["data"]
        settings |= {key: data[key] for key in settings if key in data}
        adapter = where / "adapter"
        if not adapter.is_dir():
            raise Mistake(f"{where} has no adapter/: an unfinished run? Run its command again")
    if not (adapter / files.CONFIG).is_file():
        return _of_model(where, settings, how)
    card = files.card(adapter)
    base = base or card.base
    if base is None:
        raise Mistake(f"{adapter} does not say what it was trained on; give --base")
    if writing.is_for(card, base):
        return writing.load(base, adapter=adapter, quantize=quantize, **how)
    if card.outputs is None:
        raise Mistake(f"{adapter} has no classifier: it cannot predict by itself")
    model = models.find(base, outputs=card.outputs)
    read = files.read(adapter, model, fingerprint=weights.fingerprint(model))
    kernels = weights.quantized(model, quantize, lambda path: f"params/{path}" in read.leaves)
    loaded = weights.load(model, jax.random.key(0), quantized=kernels)
    variables = files.insert(read, loaded.variables(), loaded.fresh)
    labels = card.labels or (_numbered(card.outputs) if card.outputs > 1 else None)
    return _predictor(model, labels, read.methods, variables, settings, adapter)


def _predictor(model, labels, methods, variables, settings, folder):
    """folder: where the tokenizer's or the preprocessor's files lie."""
    if not prepare_images.takes_images(model):
        task = tasks.get("text_classification").make({}, labels=labels, regression=labels is None)
        limit = peft.room(methods, model)
        settings = settings | {"max_length": min(settings["max_length"] or limit, limit)}
        return Predictor(model, task, methods, variables, settings)
    how = prepare_images.read_preprocessor(folder, model)
    model = prepare_images.standardized(model, how)
    task = tasks.get("image_classification").make({}, how.size, labels=labels)
    return ImagePredictor(model, task, methods, variables, how, settings["to_rgb"])


def _of_model(folder, settings, how):
    """The `Predictor` of a directory with a whole fine-tuned model."""
    if models.speaks(folder):
        return writing.load(str(folder), **how)
    named = models.read_json(folder).get("id2label") or {}
    labels = tuple(name for _, name in sorted(named.items(), key=lambda item: int(item[0])))
    model = models.find(str(folder), outputs=max(1, len(labels)))
    loaded = weights.load(model, jax.random.key(0))
    if loaded.fresh:
        raise Mistake(f"{folder} has no {loaded.fresh[0]}, no trained head; give --adapter")
    labels = labels if len(labels) > 1 else None
    return _predictor(model, labels, (), loaded.variables(), settings, folder)


def _run_record(folder):
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Mistake(f"{path}: not JSON: {error}") from None
    return record if "experiment" in record else None


def _numbered(count):
    return tuple(f"LABEL_{i}" for i in range(count))


def _few_shapes(arrays):
    """Rows and slots padded to powers of two: calls of many sizes share few compiled programs."""

    def pad(array, axes, empty):
        width = [(0, 0)] * array.ndim
        for axis in axes:
            size = array.shape[axis]
            width[axis] = (0, (1 << (size - 1).bit_length()) - size)
        return np.pad(array, width, constant_values=empty)

    slots, nothing = ("first", "labels", "weights", "index"), ("index", "targets")
    return {
        name: pad(array, (0, 1) if name in slots else (0,), -1 if name in nothing else 0)
        for name, array in arrays.items()
    }


# --- command line ----------------------------------------------------------------------------


def main(argv):
    layout = argparse.RawTextHelpFormatter
    parser = Parser("bmft.predict", description=__doc__, formatter_class=layout)
    parser.add_argument("--run", help="a run directory")
    parser.add_argument("--base", help="a model: directory, preset or Hub id")
    parser.add_argument("--adapter", help="an adapter directory, ours, PEFT's or AdapterHub's")
    parser.add_argument("--input", help=".jsonl, .json, .csv, .tsv, .txt or .parquet")
    parser.add_argument("--output", help=".jsonl; standard output where it is not given")
    parser.add_argument("--text", action="append", default=[], help="a text; may be given again")
    parser.add_argument("--text-pair", action="append", default=[], help="the second text of each")
    parser.add_argument("--image", action="append", default=[], help="a file; may be given again")
    options = parser.parse_args(argv)
    where = options.run or options.adapter or options.base
    if where is None or (options.run and (options.base or options.adapter)):
        raise Mistake("give --run DIR, or --base MODEL with or without --adapter DIR")
    if [bool(options.text), bool(options.image), bool(options.input)].count(True) != 1:
        raise Mistake("give one of --input FILE, --text TEXT, --image FILE")
    if options.adapter:
        files.card(options.adapter)  # a run or a model in its place is a mistake
    sharding.use_all_cores(os.cpu_count())
    examples, shown = _examples(options)
    predictor = load(where, base=options.base if options.adapter else None)
    given = "text" if options.text else "image" if options.image else predictor.takes
    if given != predictor.takes:
        raise Mistake(f"{where} takes {predictor.takes}: give --{predictor.takes}, not --{given}")
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
    if options.image:
        return options.image, [{"image": one} for one in options.image]
    if options.text_pair and len(options.text_pair) != len(options.text):
        raise Mistake(f"{len(options.text)} --text but {len(options.text_pair)} --text-pair")
    if options.text_pair:
        pairs = list(zip(options.text, options.text_pair, strict=True))
        return pairs, [{"text": a, "text_pair": b} for a, b in pairs]
    return options.text, [{"text": one} for one in options.text]


if __name__ == "__main__":
    raise SystemExit(command(main))

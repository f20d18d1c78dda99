"""Adapter directories, ours, Hugging Face PEFT's or AdapterHub's: looked at, folded in, combined,
converted.

    ./run.sh -m bmft.adapters show DIR
    ./run.sh -m bmft.adapters merge --adapter DIR [--base MODEL] --output DIR
    ./run.sh -m bmft.adapters merge --undo --adapter DIR --base MERGED --output DIR
    ./run.sh -m bmft.adapters combine --adapter DIR:0.7 --adapter DIR:0.3 --how svd --output DIR
    ./run.sh -m bmft.adapters convert --rank 8 --adapter DIR [--base MODEL] --output DIR
    ./run.sh -m bmft.adapters convert --rank 8 --from TUNED --base MODEL --output DIR
    ./run.sh -m bmft.adapters convert --to adapterhub --adapter DIR [--base MODEL] --output DIR
    ./run.sh -m bmft.adapters convert --to bmft --adapter DIR [--base MODEL] --output DIR

The last two write the same adapter in another format: AdapterHub's, of bottleneck adapters, or the
one that a run writes. Without --base it is the model that the adapter names. Each prints how far
its result is from the exact one. The mathematics: bmft/peft/{showing,updates,combining,
converting}.py; several adapters in one batch, in Python: bmft/peft/several.py.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bmft import export, log, models, peft, prepare_images, sharding, tree, writing
from bmft.errors import Mistake, Parser, command
from bmft.models import weights
from bmft.peft import adapterhub, combining, converting, files, showing, updates


def show(options):
    found = showing.about(options.directory)
    card = found.card
    still = f", {found.constants:,} never moved" if found.constants else ""
    facts = {
        "peft_type": card.peft_type,
        "base": card.base,
        "fingerprint": card.fingerprint or "none: not written by bmft",
        "task_type": found.task_type,
        "head": _said_of_head(card),
        "tensors": f"{found.tensors} in {found.size:,} bytes",
        "numbers": f"{found.numbers:,} moved{still}",
        **found.settings,
    }
    for name, value in facts.items():
        print(f"{name:<18} {value}")
    rows = [
        (row.module, row.what, " x ".join(map(str, row.shape)), row.rank, _by_layer(row.norms))
        for row in found.rows
    ]
    log.show_table(("module", "what", "shape", "rank", "norm, by layer"), rows)


def _said_of_head(card):
    if card.task_type == files.LANGUAGE[0]:
        return "its base's, over the vocabulary"
    if card.outputs:
        return ", ".join(card.labels or [f"{card.outputs} outputs without names"])
    return "none of a name known here"


# --- merge -----------------------------------------------------------------------------------


def merge(options):
    model = _base_of(options.adapter, options.base)
    if options.undo:
        return _undo(options, model)
    loaded, adapter = weights.load(model, jax.random.key(0)), _read(options.adapter, model)
    variables = files.insert(adapter, loaded.variables(), loaded.fresh)
    _write_model(
        options.output,
        model,
        loaded.leaves,
        lambda params: peft.merge(adapter.methods, params, variables),
        tree.split(variables, adapter.leaves.__contains__)[0],
        adapter.labels or _numbered(_outputs(model)),
        options.adapter,
    )
    batch = _some_inputs(model)
    want = jax.jit(peft.attach(adapter.methods, model).apply)(variables, batch)
    again = models.find(options.output, outputs=_outputs(model))
    merged = weights.load(again, jax.random.key(0)).variables()
    worst = float(abs(jax.jit(again.module.apply)(merged, batch) - want).max())
    share = worst / float(abs(want).max())
    print(
        f"{options.output}: logits differ by {worst:.1e} from the adapter's, relative {share:.1e}"
    )
    return 0


def _undo(options, model):
    if options.base is None:
        raise Mistake("merge --undo: give --base MERGED, the model that the adapter is in")
    adapter = files.read(options.adapter, model)  # of another base than this one, by its nature
    found = converting.unmerge(adapter, _arrays(weights.load(model, jax.random.key(0))))
    _write_model(
        options.output,
        model,
        lambda: tree.unflatten(found.params),
        lambda params: params,
        {},
        _labels_of(model.folder) or _numbered(_outputs(model)),
        options.base,
    )
    print(f"{options.output}: merged again, leaves differ by {found.error:.1e} at most, relative")
    if found.replaced:
        listed = ", ".join(sorted({path.rpartition("/")[0] for path in found.replaced}))
        print(f"still the adapter's, which holds them whole: {listed}")
    return 0


def _write_model(folder, model, load, fold, moving, labels, beside):
    _check_output(folder, model.folder, beside)
    export.merged(
        folder,
        load=load,
        merge=fold,
        moving=moving,
        names=model.names,
        settings=models.written_json(model),
        labels=labels,
        beside=_beside(model, beside),
    )


def _some_inputs(model):
    """A small batch of random inputs: two rows, of images in the model's size."""
    rng, c = np.random.default_rng(0), model.config
    if prepare_images.takes_images(model):
        return {"images": jnp.asarray(rng.random((2, c.size, c.size, 3), np.float32))}
    shape = (2, min(16, c.max_length))
    ids = rng.integers(0, c.vocabulary, shape)
    batch = {"input_ids": ids, "segments": ids * 0 + 1}
    batch |= {"positions": np.tile(np.arange(shape[1]), (2, 1))}
    if not model.names.head:
        batch |= {"token_types": ids * 0, "first": ids[:, :1] * 0}
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


# --- combine, convert ------------------------------------------------------------------------


def combine(options):
    chosen = {}
    for entry in options.adapter:
        folder, weight = _weighted(entry)
        if folder in chosen:
            raise Mistake(f"--adapter {folder} is given twice")
        chosen[folder] = weight
    cards = {folder: files.card(folder) for folder in chosen}
    bases = {card.base for card in cards.values()}
    if options.base is None and len(bases) > 1:
        listed = " and ".join(sorted(map(repr, bases)))
        raise Mistake(f"the adapters were trained on {listed}; if these are one model, give --base")
    # Each with its own number of outputs: heads that differ are refused by their labels.
    read = {folder: _base_of(folder, options.base) for folder in chosen}
    model = next(iter(read.values()))
    fingerprint = weights.fingerprint(model)
    adapters = {
        folder: files.read(folder, of, fingerprint=fingerprint) for folder, of in read.items()
    }
    settings = ("how", "rank", "density", "sign", "seed", "heads")
    found = combining.combine(
        adapters,
        list(chosen.values()),
        model,
        **{name: getattr(options, name) for name in settings},
    )
    _write_adapter(options.output, found.adapter, model, next(iter(chosen)))
    _show_errors(options.output, found, "the weighted sum of the updates")
    return 0


def convert(options):
    if (options.adapter is None) == (options.tuned is None):
        raise Mistake("give one of --adapter DIR, --from TUNED")
    if options.to != "lora":
        return _rewrite(options)
    if options.rank is None:
        raise Mistake("convert: give --rank, of the LoRA; or --to another format")
    if options.tuned:
        if options.base is None:
            raise Mistake("convert --from: give --base MODEL, what the model was trained from")
        where = models.locate(options.tuned)
        labels = _labels_of(where)
        outputs = None if models.speaks(where) else len(labels or [None])
        tuned = models.find(options.tuned, outputs=outputs)
        model = models.find(options.base, outputs=outputs)
        of_tuned = weights.load(tuned, jax.random.key(0))
        if of_tuned.fresh:
            raise Mistake(f"{options.tuned} has no {of_tuned.fresh[0]}, no trained head")
        after = _arrays(of_tuned)
    else:
        model = _base_of(options.adapter, options.base)
        adapter = _read(options.adapter, model)
        labels = adapter.labels
    loaded = weights.load(model, jax.random.key(0))
    if options.adapter:
        after = converting.merged(adapter, loaded.variables(), loaded.fresh)
    about = {"fresh": loaded.fresh, "labels": labels}
    found = converting.to_lora(_arrays(loaded), after, model, options.rank, **about)
    _write_adapter(options.output, found.adapter, model, options.adapter or options.tuned)
    _show_errors(options.output, found, "the difference of the weights")
    if found.whole:
        size = sum(after[path].size for path in found.whole)
        listed = ", ".join(dict.fromkeys(path.rpartition("/")[0] for path in found.whole))
        print(f"carried as they are, {size:,} numbers, biases or whole modules: {listed}")
    return 0


def _rewrite(options):
    """The same adapter in another format."""
    if options.tuned or options.rank is not None:
        raise Mistake(f"convert --to {options.to}: give --adapter DIR, and no --rank")
    model = _base_of(options.adapter, options.base)
    adapter = _read(options.adapter, model)
    write = adapterhub.write if options.to == "adapterhub" else updates.write
    _write_adapter(options.output, adapter, model, options.adapter, write)
    again, worst = _read(options.output, model).leaves, 0.0
    for path, leaf in adapter.leaves.items():
        rows = adapter.rows.get(path, peft.moving_rows(adapter.methods, path))
        change = np.abs(again[path] - leaf)[slice(None) if rows is None else rows]
        worst = max(worst, float(change.max(initial=0)))
    kind, names = files.card(options.output).peft_type, " + ".join(adapter.names)
    print(f"{options.output}: {names} as {kind}; read again, its numbers differ by {worst:.1e}")
    return 0


def _write_adapter(folder, adapter, model, beside, write=updates.write):
    _check_output(folder, model.folder, beside)
    about = {"base": models.hub_id(model.name), "fingerprint": weights.fingerprint(model)}
    export.adapter(
        folder,
        lambda partial: write(partial, adapter, model, **about),
        _beside(model, beside),
    )


def _show_errors(folder, found, exact):
    """Relative Frobenius errors, a row a module, and that of all."""
    by_module = {}
    for (path, layer), (wrong, norm) in found.errors.items():
        module = path.replace("layers/", "layers/{}/", 1) if layer is not None else path
        by_module.setdefault(module, {})[layer] = wrong / norm if norm else wrong
    rows = [(module, _by_layer(errors)) for module, errors in by_module.items()]
    log.show_table(("module", "relative error, by layer"), rows)
    rank = found.adapter.groups["lora"]["rank"]
    print(f"{folder}: LoRA of rank {rank}, relative error {found.error:.2e} against {exact}")


def _weighted(entry):
    """DIR:WEIGHT -> (DIR, WEIGHT); the weight is 1 where there is none."""
    folder, colon, weight = entry.rpartition(":")
    try:
        return (folder, float(weight)) if colon else (entry, 1.0)
    except ValueError:
        if Path(entry).is_dir():
            return entry, 1.0
        raise Mistake(f"--adapter {entry}: {weight!r} is no weight") from None


# --- what they share -------------------------------------------------------------------------


def _base_of(adapter, base):
    """The model of an adapter directory, with a head as the adapter's; or the language model."""
    card = files.card(adapter)
    if base is None and card.base is None:
        raise Mistake(f"{adapter} does not say what it was trained on; give --base")
    if writing.is_for(card, base or card.base):
        return models.find(base or card.base)
    if card.outputs is None:
        raise Mistake(f"{adapter} has no classifier")
    return models.find(base or card.base, outputs=card.outputs)


def _read(folder, model):
    return files.read(folder, model, fingerprint=weights.fingerprint(model))


def _arrays(loaded):
    """{path: array} of all leaves of a base."""
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(loaded.leaves()).items()}


def _outputs(model):
    """How many numbers the head gives; None of a language model."""
    return None if model.names.head else model.config.outputs


def _labels_of(folder):
    """Names of the outputs by a model's config.json; None for fewer than two, and where it speaks,
    though transformers says two of those, too."""
    if models.speaks(folder):
        return None
    named = models.read_json(folder).get("id2label") or {}
    labels = tuple(name for _, name in sorted(named.items(), key=lambda item: int(item[0])))
    return labels if len(labels) > 1 else None


def _numbered(count):
    return tuple(f"LABEL_{i}" for i in range(count)) if count and count > 1 else None


def _beside(model, folder):
    """What lies in a folder beside an adapter or a model: the tokenizer, and how prompts are
    rendered with it, or the preprocessor of images; None if there is none."""
    if prepare_images.takes_images(model):
        return prepare_images.read_preprocessor(folder, model)
    try:
        tokenizer = models.tokenizer(model)
    except Mistake as mistake:
        print(f"without a tokenizer: {mistake}")
        return None
    if not model.names.head:
        return tokenizer
    return writing.Beside(tokenizer, writing.read_style(folder, tokenizer))


def _check_output(folder, *inputs):
    if any(Path(folder).resolve() == Path(one).resolve() for one in inputs):
        raise Mistake(f"--output {folder} is what is read: give another directory")


def _by_layer(values):
    """{layer or None: number} in one cell."""
    listed = [f"{layer}: {value:.3g}" for layer, value in values.items() if layer is not None]
    return "  ".join(listed) or f"{values[None]:.2e}"


# --- command line ----------------------------------------------------------------------------


def main(argv):
    layout = argparse.RawTextHelpFormatter
    parser = Parser("bmft.adapters", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="{show,merge,combine,convert}")
    known = {}
    for run in (show, merge, combine, convert):
        known[run] = commands.add_parser(run.__name__)
        known[run].set_defaults(run=run)
    known[show].add_argument("directory", help="of an adapter")
    for run in (merge, combine, convert):
        known[run].add_argument("--base", help="a model: directory, preset or Hub id")
        known[run].add_argument("--output", required=True, help="a directory")
    known[merge].add_argument("--adapter", required=True, help="a directory")
    known[merge].add_argument("--undo", action="store_true", help="take the adapter out of --base")
    add = known[combine].add_argument
    add("--adapter", required=True, action="append", help="DIR or DIR:WEIGHT; again for each")
    add("--how", default="svd", help=", ".join(combining.HOWS))
    add("--rank", type=int, help="of svd; the largest of the adapters where it is not given")
    add("--density", type=float, help="share of the numbers that pruning keeps")
    add("--sign", default="total", help="of ties: total or frequency")
    add("--seed", type=int, default=0, help="of what dare drops")
    add("--heads", default="mean", help="of whatever was trained whole: mean, or first")
    add = known[convert].add_argument
    add("--adapter", help="a directory, of any method that merges")
    add("--from", dest="tuned", help="a model that was trained whole")
    add("--rank", type=int, help="of the LoRA")
    formats = ("lora", "adapterhub", "bmft")
    add("--to", choices=formats, default="lora", help="a LoRA; or the same adapter in a format")
    options = parser.parse_args(argv)
    sharding.use_all_cores(os.cpu_count())
    return options.run(options)


if __name__ == "__main__":
    raise SystemExit(command(main))

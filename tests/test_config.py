"""The command line of an experiment: what it resolves to, and the one line each mistake gets."""

import json
import pathlib

import pytest

from bmft import config, errors

ROOT = pathlib.Path(__file__).resolve().parents[1]

FILE = """
from configs import base

VARIANTS = {"short": 5, "long": 500}


def get_config(variant="short"):
    config = base.get_config()
    config.train.steps = VARIANTS[variant]
    config.peft.lora = {"rank": 4, "targets": ["query", "key"]}
    config.task.label_smoothing = 0.1
    return config
"""


def lora(
    model,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: tuple[str, ...] = ("query", "value"),
    layers: tuple[int, ...] | None = None,
    rslora: bool = False,
    init: str | None = None,
):
    raise AssertionError("reading a config makes no method")


def bitfit(model, *, only: tuple[str, ...] = ()):
    raise AssertionError("reading a config makes no method")


METHODS = {"lora": lora, "bitfit": bitfit}
TASKS = {
    "text_classification": {"label_smoothing": (float, 0.0), "class_weights": (float | None, None)},
    "token_classification": {"label_smoothing": (float, 0.0)},
    "language_model": {},
}


def groups(chosen):
    """What an experiment says: the keys of the methods and of the task the config names."""
    keys = {"task": TASKS[chosen.task.name]}
    for method in chosen.peft.methods:
        if method not in METHODS:
            hint = errors.nearest(method, METHODS)
            raise errors.Mistake(f"peft.methods: no method {method!r}; {hint}")
        keys[f"peft.{method}"] = config.signature(METHODS[method]) | {
            "learning_rate": (float | None, None)
        }
    return keys


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the config file mine.py."""
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BMFT_TRACEBACK", raising=False)
    return tmp_path


def read(*argv):
    return config.read(list(argv), "mine.py", groups)


# What is right


def test_defaults_then_file_then_command_line(folder):
    result = read("--config.peft.lora.rank=2", "--config.optim.learning_rate=1e-3")
    assert result.config.train.steps == 5
    assert result.config.peft.lora.to_dict() == {
        "rank": 2,  # the command line's
        "alpha": 16.0,  # make's default
        "targets": ("query", "key"),  # the file's
        "layers": None,
        "rslora": False,
        "init": None,
        "learning_rate": None,
    }
    assert result.config.task.to_dict() == {
        "name": "text_classification",
        "label_smoothing": 0.1,
        "class_weights": None,
    }
    assert result.overrides == {"peft.lora.rank": 2, "optim.learning_rate": 1e-3}
    assert (result.file, result.variant, result.workdir) == ("mine.py", None, None)


def test_variant_workdir_and_a_file_of_the_repository(folder):
    result = read("--config=mine.py:long", "--workdir=runs/one")
    assert (result.variant, result.workdir, result.config.train.steps) == ("long", "runs/one", 500)
    base = config.read(["--config=configs/base.py", "--config.train.steps=1"], "mine.py")
    assert base.file == str(ROOT / "configs" / "base.py")
    assert read("--workdir=~/runs").workdir == str(pathlib.Path("~/runs").expanduser())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seed=7", 7),
        ("optim.learning_rate=1e-3", 1e-3),
        ("optim.learning_rate=1", 1.0),
        ("data.row_length=64", 64),
        ("data.row_length=none", None),
        ("data.train=a=b.csv", "a=b.csv"),
        ("data.name=none", "none"),
        ("model.dtype=None", None),
        ("log.wandb=True", True),
        ("log.progress=false", False),
        ("peft.lora.targets=query,value", ("query", "value")),
        ("peft.lora.targets=query", ("query",)),
        ("peft.lora.targets=", ()),
        ("peft.lora.layers=0, 2", (0, 2)),
        ("peft.lora.layers=none", None),
        ("peft.lora.init=none", None),
        ("peft.lora.learning_rate=3e-4", 3e-4),
        ("mesh.data=2", 2),
    ],
)
def test_values_of_the_command_line(folder, flag, value):
    result = read(f"--config.{flag}")
    found = result.overrides[flag.partition("=")[0]]
    assert found == value and type(found) is type(value)


def test_steps_and_epochs_replace_each_other(folder):
    result = read("--config.train.epochs=0.5")
    assert (result.config.train.steps, result.config.train.epochs) == (None, 0.5)
    assert read("--config.train.epochs=none").config.train.steps == 5


def test_another_method_drops_the_groups_of_the_file(folder):
    result = read("--config.peft.methods=bitfit", "--config.peft.bitfit.only=query")
    assert result.config.peft.to_dict() == {
        "methods": ("bitfit",),
        "bitfit": {"only": ("query",), "learning_rate": None},
    }
    assert read("--config.peft.methods=bitfit,lora").config.peft.lora.rank == 4


def test_another_task_keeps_what_it_knows_of_the_file(folder):
    kept = read("--config.task.name=token_classification").config.task
    assert kept.to_dict() == {"name": "token_classification", "label_smoothing": 0.1}
    assert read("--config.task.name=language_model").config.task.to_dict() == {
        "name": "language_model"
    }


def test_the_result_is_frozen(folder):
    with pytest.raises(AttributeError, match="immutable"):
        read().config.train.steps = 3


def test_json_and_difference(folder):
    old = config.to_json(read().config)
    assert json.loads(json.dumps(old)) == old and old["peft"]["lora"]["targets"] == ["query", "key"]
    new = config.to_json(
        read("--config.peft.lora.rank=2", "--config.log.every=3", "--config.train.steps=9").config
    )
    assert config.difference(old, old) == []
    assert config.difference(old, new, may_differ=("log", "train.steps")) == [
        "peft.lora.rank: 4 != 2"
    ]
    del new["seed"]
    assert "seed: 0 != 'absent'" in config.difference(old, new)


def test_help_prints_every_key_as_it_is_given(folder, capsys):
    with pytest.raises(SystemExit) as end:
        read("--help", "--config.peft.lora.rank=2")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--config.train.batch_size=32 " in shown
    assert "examples a step, over all hosts and devices" in shown
    assert "--config.peft.lora.rank=2 " in shown and "short" in shown
    flags = [word for word in shown.split() if word.startswith("--config.") and "=" in word]
    given = [flag for flag in flags if flag != "--config.KEY=VALUE"]
    assert len(given) == len(set(given)) > 50
    assert read(*given) == read("--config.peft.lora.rank=2")._replace(
        overrides=read(*given).overrides
    )


def test_signature_wants_types_and_defaults():
    def untyped(model, *, rank=8):
        raise AssertionError

    def required(model, *, rank: int):
        raise AssertionError

    for function in (untyped, required):
        with pytest.raises(TypeError, match="rank needs a type and a default"):
            config.signature(function)


def test_every_key_with_a_rule_exists():
    """A key that base.py renames must not lose its range in silence."""
    from bmft import check

    common = config._common_keys()
    plain = [key for key in [*check.CHOICES, *check.RANGES] if "*" not in key]
    assert [key for key in plain if key not in common] == []
    defaults = {key: known.default for key, known in common.items()} | {"train.steps": 1}
    check.check(defaults, lambda key: "in base.py")


# What is wrong

COMMAND_LINE = {
    # flags
    "--wrkdir=x": "unknown flag '--wrkdir'; did you mean '--workdir'?",
    "--confg=mine.py": "unknown flag '--confg'; did you mean '--config'?",
    "--train.steps=3": "unknown flag '--train.steps'; did you mean '--config.train.steps'?",
    "--steps=3": "did you mean '--config.train.steps'?",
    "--workdir": "flag '--workdir' has no value; write --workdir=VALUE",
    "--workdir=": "flag '--workdir' has no value",
    "--workdir out": "write --workdir=out",
    "--config=": "flag '--config' has no value",
    "--config.seed": "write --config.seed=VALUE",
    "--config.seed=1 --config.seed=2": "'--config.seed' is given twice: '1' and '2'",
    "mine.py": "unexpected argument 'mine.py'; flags: --config=FILE.py",
    "-c": "unexpected argument '-c'",
    # files and variants
    "--config=mien.py": "no config file 'mien.py'; did you mean 'mine.py'?",
    "--config=mine": "did you mean 'mine.py'?",
    "--config=configs/bas": "no config file 'configs/bas'; ",
    "--config=nowhere/at_all.py": "no config file 'nowhere/at_all.py'; ",
    "--config=.": "no config file '.'; ",
    "--config=mine.py:": "names no variant after the colon",
    "--config=mine.py:shrot": "mine.py has no variant 'shrot'; did you mean 'short'?",
    # keys
    "--config.train.stesp=3": "'train.stesp' on the command line; did you mean 'train.steps'?",
    "--config.trian.steps=3": "did you mean 'train.steps'?",
    "--config.batch_size=3": "did you mean 'eval.batch_size'?",
    "--config.optim.lr=3": "did you mean 'optim.learning_rate'?",
    "--config.learning_rte=3": "did you mean 'optim.learning_rate'?",
    "--config.train.xyzzy=3": "known: train.accumulate, train.batch_size, train.early_stopping, ",
    "--config.zzz=3": "known: checkpoint, data, eval, export, log, mesh, model, optim, peft, ",
    "--config.train=3": "'train' on the command line is a group; its keys: train.accumulate, ",
    "--config.seed.x=3": "unknown key 'seed.x'",
    "--config.=3": "unknown key ''",
    "--config.peft.lora.rnk=3": "did you mean 'peft.lora.rank'?",
    "--config.peft.lroa.rank=3": "'lroa' is not in peft.methods; did you mean 'lora'?",
    "--config.peft.bitfit.only=query": "'bitfit' is not in peft.methods; known: lora",
    "--config.task.smoothing=0.1": "did you mean 'task.label_smoothing'?",
    "--config.peft.methods=lroa": "no method 'lroa'; did you mean 'lora'?",
    # types
    "--config.train.steps=ten": "train.steps='ten' on the command line: needs a whole",
    "--config.train.batch_size=1.5": "='1.5' on the command line: needs a whole number",
    "--config.train.batch_size=none": "needs a whole number",
    "--config.train.batch_size=": "train.batch_size='' on the command line",
    "--config.optim.learning_rate=fast": "needs a number",
    "--config.optim.learning_rate=nan": "needs a number",
    "--config.optim.clip=inf": "needs a number",
    "--config.log.wandb=yes": "log.wandb='yes' on the command line: needs true or false",
    "--config.data.text=": "data.text='' on the command line: needs a text",
    "--config.peft.lora.targets=query,,key": "needs texts separated by commas",
    "--config.peft.lora.layers=0,x": "needs whole numbers separated by commas or none",
    # choices
    "--config.optim.name=adamm": "optim.name='adamm' on the command line: did you mean 'adamw'?",
    "--config.optim.schedule=cosin": "did you mean 'cosine'?",
    "--config.model.remat=blocks": "did you mean 'block'?",
    "--config.model.dtype=bf16": "did you mean 'bfloat16'?",
    # ranges
    "--config.seed=-1": "seed=-1 on the command line: needs at least 0 and at most 4294967295",
    "--config.train.batch_size=0": "train.batch_size=0 on the command line: needs at least 1",
    "--config.train.accumulate=0": "needs at least 1",
    "--config.train.epochs=0": "train.epochs=0.0 on the command line: needs more than 0",
    "--config.optim.learning_rate=-1e-3": "needs more than 0",
    "--config.peft.lora.learning_rate=0": "needs more than 0",
    "--config.optim.clip=-1": "needs at least 0",
    "--config.optim.warmup=1": "=1.0 on the command line: needs at least 0 and less than 1",
    "--config.data.row_length=0": "needs at least 1",
    "--config.mesh.tensor=0": "mesh.tensor=0 on the command line: needs at least 1, or -1",
    "--config.mesh.fsdp=-1": "mesh.data=-1, mesh.fsdp=-1, mesh.tensor=1: only one axis",
    "--config.peft.methods=lora,lora": "name each method once",
    "--config.peft.methods=": "at least one ('full' moves every leaf)",
    # both ends, or none
    "--config.train.steps=1 --config.train.epochs=1": "are both set on the command line",
    "--config.train.steps=none": "are both none on the command line: set exactly one of them",
}


def command(argv, capsys):
    """The one line that the mistake in `argv` gives."""
    status = errors.command(lambda argv: read(*argv) and 0, argv)
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize("argv", COMMAND_LINE)
def test_mistakes_on_the_command_line(folder, capsys, argv):
    assert COMMAND_LINE[argv] in command(argv.split(), capsys)


IN_A_FILE = {
    "config.train.stesp = 3": "'train.stesp' in theirs.py; did you mean 'train.steps'?",
    "config.trian = {'steps': 3}": "'trian.steps' in theirs.py; did you mean 'train.steps'?",
    "config.peft.lora.rnk = 3": "did you mean 'peft.lora.rank'?",
    "config.peft.bitfit = {'only': ()}": "'bitfit' is not in peft.methods; known: lora",
    "config.peft.methods = ('lroa',)": "no method 'lroa'; did you mean 'lora'?",
    "config.train.batch_size = 'big'": "theirs.py:8: TypeError: ",
    "config.train.batch_size = None": "train.batch_size=None in theirs.py: needs a whole number",
    "config.train.batch_size = True": "train.batch_size=True in theirs.py: needs a whole number",
    "config.peft.lora.rank = 2.5": "theirs.py:8: TypeError: ",
    "config.peft.lora.alpha = '16'": "peft.lora.alpha='16' in theirs.py: needs a number",
    "config.peft.lora.targets = [1]": "peft.lora.targets=[1] in theirs.py: needs texts",
    "config.optim.name = 'adam'": "optim.name='adam' in theirs.py: did you mean 'adamw'?",
    "config.optim.warmup = 1.5": "optim.warmup=1.5 in theirs.py: needs at least 0 and less than 1",
    "config.train.epochs = 1": "are both set in theirs.py",
    "config.train.steps = None": "are both none in theirs.py",
    "config.train.step += 1": "theirs.py:8: AttributeError: ",
    "config.train.steps = 1 / 0": "theirs.py:8: ZeroDivisionError: ",
    "config.train.steps = = 3": "theirs.py:8: SyntaxError: ",
    "import no_such_package": "theirs.py:8: ModuleNotFoundError: ",
    "config = None": "get_config of theirs.py returns None, not a ConfigDict",
    "raise KeyError('x')": "theirs.py:8: KeyError: ",
}


@pytest.mark.parametrize("line", IN_A_FILE)
def test_mistakes_in_a_config_file(folder, capsys, line):
    (folder / "theirs.py").write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.train.steps = 3\n    config.peft.lora = {'rank': 4}\n"
        f"    {line}\n    return config\n"
    )
    assert IN_A_FILE[line] in command(["--config=theirs.py"], capsys)


def test_a_config_file_without_variants_or_function(folder, capsys):
    (folder / "none.py").write_text("steps = 3\n")
    assert "none.py has no function get_config" in command(["--config=none.py"], capsys)
    (folder / "one.py").write_text(
        "from configs import base\n\n\ndef get_config():\n    return 3\n"
    )
    assert "one.py has no variants, so none 'x'" in command(["--config=one.py:x"], capsys)
    (folder / "looks.py").write_text("def get_config(variant='a'):\n    return {'a': 1}[variant]\n")
    assert "looks.py has no variant 'x'" in command(["--config=looks.py:x"], capsys)
    text = "def get_config(variant):\n    raise ValueError(f'{variant} or\\nwhat')\n"
    (folder / "says.py").write_text(text)
    assert "says.py:2: ValueError: x or what" in command(["--config=says.py:x"], capsys)


def test_a_traceback_on_demand(folder, monkeypatch):
    monkeypatch.setenv("BMFT_TRACEBACK", "1")
    with pytest.raises(errors.Mistake):
        errors.command(lambda argv: read(*argv), ["--config.zzz=3"])


def test_there_are_many_mistakes():
    assert len(COMMAND_LINE) + len(IN_A_FILE) >= 40

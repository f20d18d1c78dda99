"""Where leaves lie on a mesh, and that a step on any mesh is the same step."""

import json
import math
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import tiny_causal
import tiny_vit
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from bmft import models, peft, prepare, sharding, tasks, tree
from bmft.checkpoint import Checkpoints
from bmft.config import read
from bmft.errors import Mistake
from bmft.models import weights

CUBE = AbstractMesh((2, 2, 2), sharding.AXES)
BERT = {"hidden_size": 32, "num_hidden_layers": 2}
LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


# --- leaves ----------------------------------------------------------------------------------

QUERY, DOWN = "layers/attention/query", "layers/mlp/down"
WORD, NORM = "embeddings/word", "layers/mlp_norm"
# (method, path, axes of the leaf, where it lies)
PLACES = [
    ("lora", f"peft/{QUERY}/lora_a", 3, (None, "fsdp", None)),
    ("lora", f"peft/{QUERY}/lora_b", 3, (None, None, "tensor")),
    ("lora", f"peft/{DOWN}/lora_a", 3, (None, "tensor", None)),
    ("lora", f"peft/{DOWN}/lora_b", 3, (None, None, "fsdp")),
    ("lora", f"peft/{WORD}/lora_a", 2, (None, None)),
    ("lora", f"peft/{WORD}/lora_b", 2, (None, "fsdp")),
    ("lora", f"peft_const/{QUERY}/lora_scale", 2, ()),
    ("lora_plus", f"peft/{QUERY}/lora_b", 3, (None, None, "tensor")),
    ("dora", f"peft/{QUERY}/lora_magnitude", 2, (None, "tensor")),
    ("pissa", f"peft_const/{DOWN}/pissa_a", 3, (None, "tensor", None)),
    ("pissa", f"peft_const/{DOWN}/pissa_b", 3, (None, None, "fsdp")),
    ("adalora", f"peft/{QUERY}/adalora_a", 3, (None, "fsdp", None)),
    ("adalora", f"peft/{QUERY}/adalora_e", 2, (None, None)),
    ("loha", f"peft/{QUERY}/loha_b1", 3, (None, "fsdp", None)),
    ("loha", f"peft/{QUERY}/loha_a2", 3, (None, None, "tensor")),
    ("lokr", f"peft/{QUERY}/lokr_w1", 3, (None, None, None)),
    ("vera", f"peft/{QUERY}/vera_lambda_b", 2, (None, "tensor")),
    ("vera", "peft_shared/vera/a", 2, ()),
    ("ia3", f"peft/{DOWN}/ia3_in", 2, (None, "tensor")),
    ("ia3", f"peft/{QUERY}/ia3_out", 2, (None, "tensor")),
    ("boft", f"peft/{QUERY}/boft_s", 2, (None, "tensor")),
    ("adapter", f"peft/{NORM}/adapter_down_kernel", 3, (None, "fsdp", None)),
    ("adapter", f"peft/{NORM}/adapter_up_bias", 2, (None, "fsdp")),
    ("prompt_tuning", f"peft/{WORD}/prompt", 2, (None, "fsdp")),
    ("token_rows", f"peft/{WORD}/token_rows", 2, (None, "fsdp")),
    ("prefix_tuning", "peft/layers/attention/keys_values/prefix_key", 3, (None, None, None)),
]
GROUPS = {"token_rows": {"tokens": (7,)}}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("bert"), **BERT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal.directory(tmp_path_factory.mktemp("llama"), **LLAMA)


def test_where_the_leaves_of_methods_lie(bert):
    model = models.find(str(bert), outputs=tiny.OUTPUTS)
    for name, path, ndim, spec in PLACES:
        methods = peft.build(model, (name,), GROUPS)
        where = sharding.of_leaf(CUBE, model.sharding, peft.axes(methods))
        assert where(path, (8,) * ndim).spec == P(*spec), path


def test_methods_of_images_say_where_their_leaves_lie(tmp_path):
    model = models.find(str(tiny_vit.directory(tmp_path / "vit")), outputs=tiny.OUTPUTS)
    axes = peft.axes(peft.build(model, ("visual_prompt",), {}))
    where = sharding.of_leaf(CUBE, model.sharding, axes)
    assert where("peft/layers/prompt", (3, 10, 24)).spec == P(None, None, "fsdp")


def test_a_quantized_kernel_and_its_adapter(llama):
    """Blocks run along the inputs, which `fsdp` does not part; the adapter has no blocks."""
    model = models.find(str(llama))
    where = sharding.of_leaf(CUBE, model.sharding, {"lora_a": "i."})
    assert where(f"quant/{QUERY}/nf4", (2, 32, 16)).spec == P(None, ("tensor", "fsdp"), None)
    assert where(f"peft/{QUERY}/lora_a", (2, 32, 4)).spec == P(None, "fsdp", None)


def test_what_has_no_place_is_refused():
    rules = (("layers/**/kernel", (None, "fsdp", "tensor")),)
    mesh = AbstractMesh((1, 4, 3), sharding.AXES)
    where = sharding.of_leaf(mesh, rules, {"lora_a": "i."})
    on = r"\(data=1, fsdp=4, tensor=3\)"
    for path, shape, why in (
        ("a/b", (3,), rf"no sharding rule for a/b \[3\] {on}: the model's SHARDING"),
        ("peft/layers/x/y", (2, 3), rf"peft/layers/x/y \[2, 3\] {on}: its method's `axes` .* 'y'"),
        ("layers/x/kernel", (2, 6, 9), rf"fsdp=4 does not divide 6 of .* {on}; fsdp=3 would"),
        ("layers/x/kernel", (2, 8, 10), rf"tensor=3 does not divide 10 of .* {on}; tensor=2"),
        ("peft/layers/x/lora_a", (2, 6, 4), rf"peft/layers/x/lora_a \[2, 6, 4\] {on}; fsdp=3"),
    ):
        with pytest.raises(Mistake, match=why):
            where(path, shape)


# --- steps -----------------------------------------------------------------------------------

ROWS, TOKENS = 24, 20


class Run:
    """A run on a mesh of this shape, on the first of the devices; its compiled step."""

    def __init__(self, folder, shape, task, batch, *more):
        argv = [f"--config.model.name={folder}", f"--config.task.name={task}", *more]
        argv += ["--config.train.steps=20", "--config.optim.learning_rate=0.01"]
        config = read(argv, default="configs/base.py", groups=prepare.groups).config
        kinds, devices = (AxisType.Auto,) * 3, jax.devices()[: math.prod(shape)]
        self.mesh = jax.make_mesh(shape, sharding.AXES, axis_types=kinds, devices=devices)
        classes = {} if task == "causal_lm" else {"labels": tuple("abcde")}
        outputs = None if task == "causal_lm" else tiny.OUTPUTS
        model = prepare.find_model(config, outputs)
        methods = prepare.find_methods(config, model)
        self.fit = prepare.fit(config, model, methods, self.mesh, 20)
        step = prepare.make_step(config, self.fit, tasks.get(task).make({}, **classes).loss)
        self.batch = lambda number: sharding.put_batch(self.mesh)(batch(number))
        lowered = step.lower(self.fit.state, self.fit.frozen, self.batch(0))
        self.step = lowered.compile(compiler_options=tiny.IN_HASTE)
        self.text = self.step.as_text()

    def losses(self, state, numbers):
        """The state after the steps of these numbers, and their losses."""
        found = []
        for number in numbers:
            state, metrics = self.step(state, self.fit.frozen, self.batch(number))
            found.append(float(metrics["loss"]))
        return state, np.array(found)


def classified(number):
    return tiny.batch(rows=ROWS, tokens=TOKENS, seed=number)


def spoken(number):
    row = tiny_causal.packed(tiny_causal.texts((7, 3, 6), number))
    batch = {name: np.repeat(array, ROWS, 0) for name, array in row.items()}
    batch["targets"][: 2 * number + 1] = -1  # rows count for more or less
    return batch | {"weights": np.ones((ROWS, 3), np.float32)}


LORA = ("--config.peft.methods=lora", "--config.peft.lora.targets=all-linear")


def of_lora(bert, shape):
    return Run(bert, shape, "text_classification", classified, *LORA)


@pytest.fixture(scope="module")
def one(bert):
    return of_lora(bert, (1, 1, 1))


@pytest.fixture(scope="module")
def spread(bert):
    return of_lora(bert, (8, 1, 1))


@pytest.fixture(scope="module")
def cube(bert):
    return of_lora(bert, (2, 2, 2))


@pytest.fixture
def fresh():
    """A copy of a state, for a step takes the memory of the one it is given."""
    return lambda run: jax.tree.map(lambda leaf: leaf.copy(), run.fit.state)


def test_losses_and_what_was_saved_do_not_depend_on_the_mesh(one, spread, cube, fresh, tmp_path):
    """A checkpoint of one mesh goes on on another."""
    _, want = one.losses(fresh(one), range(6))
    assert want[:3].mean() > want[3:].mean()
    half, first = spread.losses(fresh(spread), range(3))
    with Checkpoints(tmp_path, fingerprint="base") as checkpoints:
        checkpoints.save(3, half, {})
        checkpoints.wait()
        state = checkpoints.restore(3, cube.fit.state)
    _, second = cube.losses(state, range(3, 6))
    np.testing.assert_allclose(np.concatenate([first, second]), want, rtol=1e-5)
    _, all_of_cube = cube.losses(fresh(cube), range(6))
    np.testing.assert_allclose(all_of_cube, want, rtol=1e-5)


def test_losses_of_full_tuning_do_not_depend_on_the_mesh(llama, fresh):
    runs = [
        Run(llama, shape, "causal_lm", spoken, "--config.peft.methods=full")
        for shape in ((1, 1, 1), (1, 2, 4))
    ]
    (_, want), (_, found) = (run.losses(fresh(run), range(4)) for run in runs)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert want[3] < want[0]


def test_moments_lie_as_their_leaves(cube, fresh):
    """Before the first step and after it."""
    state, _ = cube.losses(fresh(cube), range(1))
    moving = tree.flatten(state.moving)
    assert moving[f"peft/{QUERY}/lora_a"].sharding.spec == P(None, "fsdp", None)
    for of in (cube.fit.state, state):
        seen = 0
        for keys, leaf in jax.tree_util.tree_leaves_with_path(of.opt):
            path = "/".join(str(key.key) for key in keys if hasattr(key, "key"))
            own = next((x for name, x in moving.items() if path.endswith(name)), None)
            if own is not None and own.shape == leaf.shape:
                assert leaf.sharding.is_equivalent_to(own.sharding, leaf.ndim), path
                seen += 1
        assert seen == 2 * len(moving)  # Adam has two


def collectives(text):
    """[(kind, shapes, times)] of a compiled module: in a loop, as often as it runs."""
    bodies, inside, found = {}, None, []
    for line in text.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            inside = begins[1]
        if loop := re.search(r" while\(.*body=%?([\w.-]+).*\"n\":\"(\d+)\"", line):
            bodies[loop[1]] = inside, int(loop[2])
        if call := re.search(r"= (.+?) (all-\w+|reduce-scatter|collective-\w+)(-start)?\(", line):
            found.append((call[2], re.findall(r"(\w+)\[([\d,]*)\]", call[1]), inside))

    def times(name):
        return times(bodies[name][0]) * bodies[name][1] if name in bodies else 1

    return [(kind, shapes, times(inside)) for kind, shapes, inside in found]


def test_more_devices_exchange_what_moves_and_no_more(spread):
    """Between copies of the model: the gradients of its moving leaves, and a few sums."""
    found = collectives(spread.text)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    each = [
        (math.prod(int(n) for n in shape.split(",") if n), times)
        for _, shapes, times in found
        for _, shape in shapes
    ]
    numbers, scalars = (sum(n * t for n, t in each if (n == 1) == alone) for alone in (False, True))
    assert numbers == tree.count(spread.fit.state.moving)
    assert 0 < scalars < 10


def test_each_device_computes_its_own_rows(cube):
    """No activation is gathered for, or summed over, all rows of the batch."""
    every = [shape for _, shapes, _ in collectives(cube.text) for shape in shapes]
    shapes = [shape for dtype, shape in every if dtype == "f32"]
    assert shapes
    assert not [shape for shape in shapes if shape.split(",")[0] == str(ROWS)]


# --- reading ---------------------------------------------------------------------------------

READER = """
import resource, sys
import jax
from jax.sharding import AxisType
from bmft import models, sharding
from bmft.models import weights

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
model = models.find(sys.argv[3])
mesh = jax.make_mesh((1, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
key, files = jax.random.key(0), weights.index(model)
wanted = weights.expected(model, files, sharding=sharding.of_leaf(mesh, model.sharding))
before = peak()  # XLA has started, and the model was traced
loaded = weights.read(model, key, files, wanted)
held = sum(s.data.nbytes for x in jax.tree.leaves(loaded.params) for s in x.addressable_shards)
print(held, 1024 * (peak() - before))
"""


def sparse(folder):
    """A llama in which no leaf is a seventh, and which takes no room on the disk; its bytes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    changes = sizes | heads | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(tiny_causal.CONFIGS["llama"] | changes))
    model = models.find(str(folder))
    shapes, header, end = tree.flatten(weights.shapes(model)), {}, 0
    for leaf in model.names.leaves:
        for layer in model.names.layers_of(leaf.path):
            shape = shapes[leaf.path].shape[0 if layer is None else 1 :]
            shape = shape[::-1] if leaf.layout == "transpose" else shape
            start, end = end, end + 4 * math.prod(shape)
            about = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
            header[model.names.written(leaf).format(layer)] = about
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def test_no_process_holds_the_whole_model(tmp_path):
    """Two processes with a device each: half of the weights, and one leaf's share on the way."""
    total = sparse(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", READER, address]
    about = {"env": os.environ | {"XLA_FLAGS": ""}, "text": True}
    processes = [
        subprocess.Popen([*command, str(i), str(tmp_path)], stdout=subprocess.PIPE, **about)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        held, peak = map(int, output.split())
        assert held < 0.51 * total
        assert peak < 0.75 * total


def test_what_several_devices_hold_is_read_once():
    mesh = jax.make_mesh((4, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    table, read = np.arange(24).reshape(4, 6), []

    def part(cut):
        read.append(cut)
        return table[cut]

    array = weights._array(table.shape, jax.NamedSharding(mesh, P("fsdp")), part)
    assert len(read) == 2
    np.testing.assert_array_equal(array, table)

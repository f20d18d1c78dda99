"""Plans: what is counted by formula, what is read off a compiled program, and the command.

No TPU program is compiled here: benchmarks/plans.py does, with the package libtpu.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from bmft import abstract, collectives, hlo, models, operations, plan, topology, tree
from bmft.config import read
from bmft.errors import Mistake, command
from bmft.models import weights
from tests import tiny_causal


def counted(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return operations.count(jax.jit(function).trace(*arguments).jaxpr)


# --- operations ------------------------------------------------------------------------------


def layers(x, kernels, remat):
    """x [3, 4] through five layers [5, 4, 4]; the sum."""

    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, kernels)[0].sum()


ONE = 2 * 3 * 4 * 4  # a product [3, 4] @ [4, 4]


@pytest.mark.parametrize(("remat", "passes"), [(False, 3), (True, 4)])
def test_a_loop_counts_as_often_as_it_runs_and_what_is_computed_again_too(remat, passes):
    gradient = jax.grad(lambda x, kernels: layers(x, kernels, remat), argnums=(0, 1))
    assert counted(lambda x, w: layers(x, w, remat), (3, 4), (5, 4, 4)).products == 5 * ONE
    assert counted(gradient, (3, 4), (5, 4, 4)).products == passes * 5 * ONE


def test_products_of_every_kind():
    def batched(a, b):
        return jnp.einsum("bij,bkj->bik", a, b)

    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def convolved(x, w):
        about = {"window_strides": (2, 2), "padding": "VALID", "feature_group_count": 2}
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **about)

    assert counted(batched, (7, 2, 3), (7, 5, 3)).products == 2 * 7 * 2 * 3 * 5
    assert counted(branches, (3, 4), (4, 4)).products == 2 * ONE
    # Of 9 x 9 pixels 4 x 4 windows of 3 x 3; each of 6 outputs sees 4 of 8 inputs.
    assert counted(convolved, (1, 9, 9, 8), (3, 3, 4, 6)).products == 2 * 16 * 6 * 9 * 4


def test_what_is_not_counted_is_named():
    def looped(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    found = counted(looped, (4, 4))
    assert (found.products, found.uncounted) == (2 * 4**3, {"while"})
    assert counted(jnp.linalg.cholesky, (4, 4)).uncounted == {"cholesky"}
    assert counted(lambda x: (x + 1).reshape(2, 8).T, (4, 4)).total == 16


# --- what a program says ---------------------------------------------------------------------

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%slice_fusion (q: f32[5,4,4], i: s32[]) -> f32[4,4] {
  %q = f32[5,4,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %dynamic-slice.1 = f32[1,4,4]{2,1,0} dynamic-slice(%q, %i, %i, %i)
}

%around (r: f32[5,4,4], j: s32[]) -> f32[4,4] {
  %r = f32[5,4,4]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %inner = f32[4,4]{1,0} fusion(%r, %j), kind=kLoop, calls=%slice_fusion
}

%body (c: (s32[], bf16[2,8], f32[5,4,4])) -> (s32[], bf16[2,8], f32[5,4,4]) {
  %c = (s32[], bf16[2,8]{1,0}, f32[5,4,4]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %x = bf16[2,8]{1,0:S(1)} get-tuple-element(%c), index=1
  %w = f32[5,4,4]{2,1,0} get-tuple-element(%c), index=2
  %begun = bf16[8,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%start
  %all-gather.2 = bf16[8,8]{1,0:S(1)} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8]
  %sliced = f32[4,4]{1,0:S(1)} fusion(%w, %n), kind=kLoop, calls=%around
  ROOT %out = (s32[], bf16[2,8]{1,0}, f32[5,4,4]{2,1,0}) tuple(%n, %x, %w)
}

%condition (d: (s32[], bf16[2,8], f32[5,4,4])) -> pred[] {
  %d = (s32[], bf16[2,8]{1,0}, f32[5,4,4]{2,1,0}) parameter(0)
  %bound = s32[] constant(5)
  %m = s32[] get-tuple-element(%d), index=0
  ROOT %lt = pred[] compare(%m, %bound), direction=LT
}

ENTRY %main (a: f32[6], b: (s32[], bf16[2,8], f32[5,4,4])) -> f32[6] {
  %a = f32[6]{0} parameter(0)
  %b = (s32[], bf16[2,8]{1,0}, f32[5,4,4]{2,1,0}) parameter(1)
  %loop = (s32[], bf16[2,8]{1,0}, f32[5,4,4]{2,1,0}) while(%b), condition=%condition, body=%body
  ROOT %all-reduce.1 = f32[6]{0} all-reduce(%a), channel_id=9, replica_groups={{0,1},{2,3}}, \
to_apply=%add
}
"""


def test_traffic_of_a_program():
    module = hlo.read(PROGRAM)
    assert (module.runs["body"], module.runs["start"], module.unknown) == (5, 5, 0)
    gathered, reduced = sorted(collectives.collectives(module))
    assert gathered == ("all-gather", 5, 5 * 128, 5 * 128 * 3 / 4)  # once, though written twice
    assert reduced == ("all-reduce", 1, 24, 24)  # of pairs: 2 (2 - 1) / 2
    # Each turn a slice of w is read with its index, and the condition compares two numbers; all
    # else is on the chip. The sum is read and written.
    assert collectives.moved(module) == 5 * (64 + 4 + 9) + 2 * 24


def test_groups_in_every_spelling():
    assert collectives.group_size("replica_groups=[2,4]<=[8], x={1}", 8) == 4
    assert collectives.group_size("replica_groups={{0,2,4},{1,3,5}}", 6) == 3
    assert collectives.group_size("replica_groups={}, channel_id=1", 8) == 8
    mesh = "replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([4,2]T(1,0)) {'x','z'}, z"
    assert collectives.group_size(mesh, 16) == 8


# --- topologies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5e-16", "'v5e:4x4'"),
        ("v5litepod-8", "'v5e:2x4'"),
        ("v5p-8", "'v5p:2x2x1'"),
        ("v5e:4x5", "'v5e:4x4'"),
        ("h100x7", "'h100x8'"),
        ("laptop", "known: "),
    ],
)
def test_a_wrong_topology_is_named_with_the_nearest(name, nearest):
    with pytest.raises(Mistake) as caught:
        topology.find(name)
    assert repr(name) in str(caught.value) and nearest in str(caught.value)


# --- a run's shapes --------------------------------------------------------------------------

LORA = ["--config.peft.methods=lora", "--config.peft.lora.targets=all-linear"]
RUN = ["--config=configs/gsm8k_lora.py", "--config.data.max_length=16"]


@pytest.mark.parametrize("how", ["int8", "int4", "nf4"])
def test_a_quantized_base_is_expected_as_it_is_loaded(how, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    model = models.find(str(tiny_causal.directory(tmp_path / "base", **sizes)))
    kernels = weights.quantized(model, how, lambda path: path.endswith("down/kernel"))
    about = {"dtype": lambda path: jnp.bfloat16, "quantized": kernels}
    loaded = weights.load(model, jax.random.key(0), **about)
    for files in (weights.index(model), None):
        expected = tree.flatten(weights.expected(model, files, **about).variables())
        found = tree.flatten(loaded.variables())
        assert {path: (x.shape, x.dtype, x.sharding) for path, x in found.items()} == {
            path: (x.shape, x.dtype, x.sharding) for path, x in expected.items()
        }


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    """The folder of a language model that has a config.json alone."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_causal.CONFIGS["qwen3"]))
    return folder


def test_the_command_without_weights_data_or_compiler(without_weights, capsys):
    argv = ["--topology=h100x8", f"--config.model.name={without_weights}", *RUN, *LORA]
    argv += ["--config.train.batch_size=8", "--config.train.steps=none", "--config.train.epochs=2"]
    argv += ["--price=3", "--json"]
    assert command(plan.main, argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] is None and "--examples=N" in " ".join(found["notes"])
    assert "run_hours" not in found["estimate"]["best"]
    assert command(plan.main, [*argv, "--examples=100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 * 13 and "memory" not in found and found["fits"] is None
    # Rows of 128 tokens hold 8 examples of 16; each of 8 chips has one, most of them empty.
    assert found["batch"]["rows"] == 8 and found["batch"]["padding_share"] == 1 - 1 / 8
    assert found["numbers"]["moving"] * 4 == found["arguments"]["moving"]
    best, worst = found["estimate"]["best"], found["estimate"]["worst"]
    assert best["epoch_cost"] == pytest.approx(best["epoch_hours"] * 8 * 3)
    assert best["step_seconds"] <= worst["step_seconds"]


def test_a_step_that_is_compiled_here(without_weights, capsys):
    """On this machine's devices: the gradients that are summed are those of what moves alone."""
    argv = ["--topology=cpu", f"--config.model.name={without_weights}", *RUN, *LORA]
    config = read(argv[1:], None, abstract.groups).config
    where = topology.find("cpu")
    found = plan.make(config, where, abstract.Told())
    assert found["loops_of_unknown_length"] == 0
    held = found["memory"]["arguments"]
    assert held == pytest.approx(sum(found["arguments"].values()), rel=0.01)
    sums = {one["kind"]: one["bytes"] for one in found["collectives"]}
    scalars = 64  # sums of losses, weights, examples
    if where.count > 1:
        assert 0 <= sums["all-reduce"] - found["arguments"]["moving"] <= scalars


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config.mesh.fsdp=16"], "does not fit 8 devices"),
        (["--config.mesh.fsdp=8"], "fsdp=8 does not divide 36 of"),
        (["--config.peft.lora.targets=qury"], "qury"),
        (["--config.data.max_length=100"], "has 64 positions"),
        (["--topology=v5e-16"], "did you mean 'v5e:4x4'?"),
        (["--price=0"], "--price=0"),
        (["--fit"], "--fit compiles for TPUs"),
    ],
)
def test_mistakes(without_weights, capsys, more, says):
    argv = [f"--config.model.name={without_weights}", *RUN, *LORA]
    named = {one.partition("=")[0] for one in more}
    argv = [one for one in ["--topology=h100x8", *argv] if one.partition("=")[0] not in named]
    assert command(plan.main, [*argv, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line

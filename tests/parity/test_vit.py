"""ViT against transformers, against a plain torch module named as timm's, and against PEFT."""

import json
import re
import warnings

import hugging
import jax
import numpy as np
import peft as hf
import pytest
import tiny_vit
import torch
import transformers
from safetensors.torch import load_file, save_file
from trained import LABELS, Trained

from bmft import export, models, peft, tree
from bmft.models import vit, weights
from bmft.peft import files

SIZES = ((20, 20), (28, 28), (12, 36), (4, 24))
SETTINGS = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 20,
    "patch_size": 4,
    "num_labels": 5,
}
CLASSIFIER = transformers.ViTForImageClassification


def random_model(kind=CLASSIFIER, **changes):
    return hugging.random_model(transformers.ViTConfig(**SETTINGS | changes), kind)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """transformers' model and its folder."""
    model, folder = random_model(), tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return model, folder


def read(folder, **expected):
    model = models.find(str(folder), outputs=5)
    loaded = weights.load(model, jax.random.key(0))
    for field, want in expected.items():
        assert set(getattr(loaded, field)) == set(want), field
    return model, loaded


def images(size=(20, 20), rows=3):
    return np.random.default_rng(0).random((rows, *size, 3)).astype(np.float32)


def pixels(images, mean=0.5, std=0.5):
    return torch.tensor((images - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)


def logits(theirs, images):
    with torch.no_grad():
        given = pixels(images)
        return theirs(pixel_values=given, interpolate_pos_encoding=True).logits.numpy()


def ours(model, variables, images):
    return np.asarray(jax.jit(model.module.apply)(variables, {"images": images}))


def close(one, other, atol=1e-5):
    np.testing.assert_allclose(one, other, atol=atol)


# --- transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_logits(saved, size):
    theirs, folder = saved
    model, loaded = read(folder, fresh=(), ignored=())
    want = logits(theirs, images(size))
    assert np.abs(want).max() > 0.1
    close(ours(model, loaded.variables(), images(size)), want)


@pytest.mark.parametrize(
    "changes",
    [{"qkv_bias": False}, {"hidden_act": "gelu_new"}, {"layer_norm_eps": 0.1}, {"patch_size": 5}],
    ids=str,
)
def test_settings(tmp_path, changes):
    theirs = random_model(**changes)
    theirs.save_pretrained(tmp_path)
    model, loaded = read(tmp_path, fresh=(), ignored=())
    close(ours(model, loaded.variables(), images()), logits(theirs, images()))


@pytest.mark.parametrize("count, wanted", [(5, 9), (7, 3), (14, 24), (14, 13), (1, 4), (6, 6)])
def test_interpolation(count, wanted):
    given = np.random.default_rng(0).normal(size=(2, 3, count, count)).astype(np.float32)
    size = (wanted, count + 2)
    want = torch.nn.functional.interpolate(
        torch.tensor(given), size=size, mode="bicubic", align_corners=False
    )
    down, across = (vit.bicubic(count, n) for n in size)
    close(np.einsum("yi,xj,bcij->bcyx", down, across, given), want.numpy())


HEAD = ("classifier/out/kernel", "classifier/out/bias")


def test_the_encoder_alone(tmp_path):
    """Its file has no prefix, a pooler, and no head, as google/vit-base-patch16-224-in21k's."""
    random_model(transformers.ViTModel).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in tensors
    model, loaded = read(tmp_path, fresh=HEAD, ignored=("pooler.dense.weight", "pooler.dense.bias"))
    # With our new head, made large enough to matter, transformers computes the same.
    loaded.params["classifier"] = jax.tree.map(lambda leaf: 30 * leaf, loaded.params["classifier"])
    theirs = CLASSIFIER.from_pretrained(tmp_path, num_labels=5).eval()
    own = loaded.params["classifier"]["out"]
    with torch.no_grad():
        theirs.classifier.weight.copy_(torch.tensor(np.array(own["kernel"].T)))
        theirs.classifier.bias.copy_(torch.tensor(np.array(own["bias"])))
    close(ours(model, loaded.variables(), images()), logits(theirs, images()))


def test_masked_image_modelling(tmp_path):
    random_model(transformers.ViTForMaskedImageModeling).save_pretrained(tmp_path)
    read(
        tmp_path,
        fresh=HEAD,
        ignored=("decoder.0.weight", "decoder.0.bias", "embeddings.mask_token"),
    )


def test_a_file_in_bfloat16_and_in_shards(saved, tmp_path):
    low = random_model().bfloat16()
    low.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, loaded = read(tmp_path, fresh=(), ignored=())
    want = logits(low.float(), images())
    assert np.abs(want - logits(saved[0], images())).max() > 1e-3  # it was rounded
    close(ours(model, loaded.variables(), images()), want)


# --- timm ------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """timm's Block, as far as ViT-S, B and L use it."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attn.qkv = torch.nn.Linear(width, 3 * width)
        self.attn.proj = torch.nn.Linear(width, width)
        self.mlp.fc1 = torch.nn.Linear(width, inner)
        self.mlp.fc2 = torch.nn.Linear(inner, width)

    def forward(self, x):
        b, t, d = x.shape
        parts = self.attn.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.attn.proj(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Timm(torch.nn.Module):
    """timm's VisionTransformer with global_pool "token" or "avg"."""

    def __init__(self, pooled, width=24, heads=3, inner=40, patch=4, grid=5, depth=3):
        super().__init__()
        self.pooled = pooled
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, width, patch, patch)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = torch.nn.Sequential(*[Block(width, heads, inner) for _ in range(depth)])
        setattr(self, "fc_norm" if pooled else "norm", torch.nn.LayerNorm(width, eps=1e-6))
        self.head = torch.nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.blocks(x)
        x = self.fc_norm(x[:, 1:].mean(1)) if self.pooled else self.norm(x)[:, 0]
        return self.head(x)


@pytest.fixture(scope="module", params=[False, True], ids=["token", "avg"])
def timm(request, tmp_path_factory):
    """The torch module, its folder as timm writes it, and logits of `images()`."""
    module, rng = Timm(request.param).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            one = "norm" in name and name.endswith("weight")
            weight.copy_(torch.tensor(rng.normal(0, 0.2, weight.shape) + one))
        about = tiny_vit.TIMMS["pretrained_cfg"]
        given = pixels(images(), np.array(about["mean"]), np.array(about["std"]))
        want = module(given).numpy()
    folder = tmp_path_factory.mktemp("timm")
    save_file(module.state_dict(), folder / "model.safetensors", {"format": "pt"})
    pool = {"global_pool": "avg" if request.param else "token"}
    (folder / "config.json").write_text(json.dumps(tiny_vit.TIMMS | pool))
    return module, folder, want


def test_timms_logits(timm):
    _, folder, want = timm
    model, loaded = read(folder, fresh=(), ignored=())
    assert np.abs(want).max() > 0.1
    close(ours(model, loaded.variables(), images()), want)


# --- merged models ---------------------------------------------------------------------------


def merged(folder, model, loaded, groups):
    """The logits of methods in a model, which is written into a folder with them folded in."""
    trained = Trained(model, loaded.params, groups, size=0.1)
    export.merged(
        folder,
        load=loaded.leaves,
        merge=trained.merged,
        moving=trained.moving,
        names=model.names,
        settings=models.written_json(model),
        labels=LABELS,
    )
    apply = jax.jit(peft.attach(trained.methods, model).apply)
    return np.asarray(apply(trained.variables, {"images": images()}))


def in_transformers(folder, config):
    """transformers' logits of a merged model, with the means and deviations of a `Config`."""
    auto = transformers.AutoModelForImageClassification
    theirs, told = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs) is CLASSIFIER and theirs.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        given = pixels(images(), np.array(config.mean), np.array(config.std))
        return theirs.eval()(pixel_values=given).logits.numpy()


LORA = {"lora": {"rank": 3, "alpha": 7.0, "targets": ("all-linear",), "bias": "all"}}


@pytest.mark.parametrize("groups", [LORA, {"full": {}}], ids="+".join)
def test_merged_models(saved, tmp_path, groups):
    theirs, folder = saved
    model, loaded = read(folder)
    want = merged(tmp_path, model, loaded, groups)
    assert np.abs(want - logits(theirs, images())).max() > 0.1
    close(in_transformers(tmp_path, model.config), want)


def test_timms_merged_for_transformers(timm, tmp_path):
    """What reads the class token is written for transformers; what is pooled as timm has it."""
    _, folder, before = timm
    model, loaded = read(folder)
    if model.config.pooled:
        assert models.written_json(model)["model_type"] == "timm_vit"
        assert model.names.written(model.names.leaf("norm/scale")) == "fc_norm.weight"
        return
    want = merged(tmp_path, model, loaded, LORA)
    assert np.abs(want - before).max() > 0.1
    close(in_transformers(tmp_path, model.config), want)
    again, same = read(tmp_path, fresh=(), ignored=())
    assert again.config == model.config._replace(family="vit")
    close(ours(again, same.variables(), images()), want)


# --- PEFT ------------------------------------------------------------------------------------


def base_of(folder):
    return CLASSIFIER.from_pretrained(folder).eval()


def loaded_by_peft(folder, adapter):
    """PEFT's model of an adapter directory; no warning that it did not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return hf.PeftModel.from_pretrained(base_of(folder), adapter).eval()


OURS = {
    "plain": {"rank": 3, "alpha": 7.0, "dropout": 0.1},
    "all-linear": {"rank": 3, "alpha": 7.0, "rslora": True, "targets": ("all-linear",)},
    "patterns": {
        "rank": 3,
        "alpha": 7.0,
        "targets": ("q_proj", "up", "output.dense"),
        "rank_pattern": ("layers.[01].*up=5", "layers.2.attention.query=2", "down=4"),
        "alpha_pattern": ("layers.1.*=11", "query=2"),
    },
    "some layers": {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("query", "down"),
        "layers_to_transform": (0, 2),
        "bias": "lora_only",
    },
    "saved": {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("value", "up"),
        "bias": "all",
        "modules_to_save": ("layers.1", "layernorm"),
    },
}


@pytest.mark.parametrize("variant", OURS)
def test_ours_read_by_peft(saved, tmp_path, variant):
    theirs, folder = saved
    model, loaded = read(folder)
    trained = Trained(model, loaded.params, {"lora": OURS[variant]}, size=0.1)
    trained.write(tmp_path, labels=LABELS)
    apply = jax.jit(peft.attach(trained.methods, model).apply)
    want = np.asarray(apply(trained.variables, {"images": images()}))
    assert np.abs(want - logits(theirs, images())).max() > 0.1
    close(logits(loaded_by_peft(folder, tmp_path), images()), want)


PEFTS = {
    "plain": {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["q_proj", "fc1", "o_proj"],
        "rank_pattern": {"fc1": 2, "layers.1.*": 5},
        "alpha_pattern": {".*[02].*": 11, "fc1": 3},
    },
    "expression": {"r": 2, "lora_alpha": 5, "target_modules": r".*\.[12]\..*(_proj|fc2)"},
    "some layers": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["k_proj", "fc2"],
        "layers_to_transform": [0, 2],
        "bias": "lora_only",
    },
    "all-linear": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
    "saved": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_proj"],
        "modules_to_save": ["classifier", "layernorm_after"],
        "bias": "all",
    },
}


def trained_by_peft(base, settings, task=None):
    """Some of PEFT's own training steps."""
    torch.manual_seed(0)
    settings = {"modules_to_save": ["classifier"], **settings}
    model = hf.get_peft_model(base, hf.LoraConfig(task_type=task, **settings)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    for _ in range(4):
        optimizer.zero_grad()
        out = model(pixel_values=pixels(images()), labels=torch.arange(3))
        out.loss.backward()
        optimizer.step()
    return model.eval()


def computed_by_us(model, loaded, folder):
    """Our logits with an adapter directory, folded in."""
    adapter = files.read(folder, model)
    variables = files.insert(adapter, loaded.variables())
    added = {name: variables[name] for name in ("peft", "peft_const")}
    merged = peft.merge(adapter.methods, variables["params"], added)
    return adapter, variables, ours(model, {"params": merged}, images())


@pytest.mark.parametrize("variant", PEFTS)
def test_pefts_read_by_us(saved, tmp_path, variant):
    _, folder = saved
    model, loaded = read(folder)
    task = "FEATURE_EXTRACTION" if variant == "patterns" else None
    theirs = trained_by_peft(base_of(folder), PEFTS[variant], task)
    theirs.save_pretrained(tmp_path)
    want = logits(theirs, images())
    assert np.abs(want - logits(base_of(folder), images())).max() > 0.1
    adapter, variables, found = computed_by_us(model, loaded, tmp_path)
    close(found, want)
    # ... and written again, PEFT reads it.
    moving, frozen = tree.split(variables, lambda path: path in adapter.leaves)
    about = {"base": "tiny", "fingerprint": ""}
    again = tmp_path / "again"
    files.write(again, adapter.methods, adapter.groups, model, moving, frozen, **about)
    close(logits(loaded_by_peft(folder, again), images()), want)


# How the modules of transformers 4.x are called.
OLD = {
    r"vit\.layers\.": "vit.encoder.layer.",
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
OLD_VARIANTS = {
    "plain": {"target_modules": ["query", "value"]},
    "patterns": {
        "target_modules": ["query", "intermediate.dense", "attention.output.dense"],
        "rank_pattern": {"intermediate.dense": 2, "layer.1.*": 5},
        "alpha_pattern": {".*[02].*": 11, "intermediate.dense": 3},
    },
    "some layers": {
        "target_modules": ["key", r"output.dense"],
        "exclude_modules": ["attention.output.dense"],
    },
    "saved": {"target_modules": ["attention.query"]},
}


@pytest.mark.parametrize("variant", OLD_VARIANTS)
def test_adapters_of_transformers_4(saved, tmp_path, variant):
    """A real adapter with its keys and its target_modules as 4.x calls the modules."""
    _, folder = saved
    model, loaded = read(folder)
    theirs = trained_by_peft(base_of(folder), PEFTS[variant])
    theirs.save_pretrained(tmp_path)
    want = logits(theirs, images())

    def renamed(key):
        for new, old in OLD.items():
            key = re.sub(new, old, key)
        return key

    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = {renamed(key): tensor for key, tensor in load_file(file).items()}
    query = "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight"
    assert (query in tensors) == (variant != "some layers")
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | OLD_VARIANTS[variant]))
    close(computed_by_us(model, loaded, tmp_path)[2], want)

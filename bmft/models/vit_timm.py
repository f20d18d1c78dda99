"""A ViT in timm's safetensors: what its tensors and its config.json say, as a config.json of
transformers' would (bmft.models.vit computes it).

timm's config.json has no model_type; it names an `architecture`, `global_pool`, `model_args` and a
`pretrained_cfg`, and may be missing altogether.
"""

import math

from bmft.errors import Mistake

MODEL_TYPE = "timm_vit"  # of what has timm's names
KEYS = ("architecture", "global_pool", "model_args")  # of timm's config.json
QKV = "blocks.0.attn.qkv"
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # Ti, S, B, L: 64 numbers a head

# In the names of tensors: what makes a model another than this one.
OTHERS = {
    "ls1.": "layer scale",
    "gamma_1": "layer scale",
    "reg_token": "register tokens",
    "dist_token": "distillation token",
    "norm_pre.": "norm before the layers",
    "attn_pool.": "attention pooling",
    "q_norm.": "norms of queries and keys",
    "rope": "rotary positions",
    "relative_position": "relative positions",
}
# timm's arguments that the shapes say too, or that change nothing outside its training.
TOLD = (
    *("num_heads", "img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "qkv_bias"),
    *("num_classes", "in_chans", "class_token", "global_pool", "fc_norm", "dynamic_img_size"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init"),
)


def recognize(shapes):
    """The json of a ViT with tensors named as timm names them, by {name: shape}; None.

    How many heads there are is in no shape: `checked` takes model_args.num_heads of timm's
    config.json, or 64 numbers a head for the widths that Ti, S, B and L have. Raises Mistake,
    naming the tensor, for what this encoder does not compute.
    """
    patch, qkv = (shapes.get(f"{name}.weight", ()) for name in ("patch_embed.proj", QKV))
    if len(patch) != 4 or len(qkv) != 2:
        return None
    for name in shapes:
        for part, what in OTHERS.items():
            if part in name:
                raise Mistake(f"tensor {name!r}: this ViT has no {what}")
    width, _, *sides = patch
    for name in ("cls_token", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in shapes:
            raise Mistake(f"tensor {name!r} is missing, which this ViT has")
    rows = shapes["pos_embed"][1]
    grid = math.isqrt(rows - 1)
    if grid**2 != rows - 1:
        raise Mistake(
            f"tensor 'pos_embed' has {rows} rows, not one for the class token and a square"
        )
    layers_there = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "model_type": MODEL_TYPE,
        "image_size": grid * sides[0],
        "patch_size": sides,
        "num_channels": patch[1],
        "hidden_size": width,
        "num_hidden_layers": len(layers_there),
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "qkv_bias": f"{QKV}.bias" in shapes,
        "pooled": "fc_norm.weight" in shapes,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def checked(json):
    """The fields that are in no shape, of a json from `recognize` and timm's config.json; Mistake
    where the two contradict each other."""
    arguments = json.get("model_args") or {}
    for name in arguments:
        if name not in TOLD:
            raise Mistake(f"config.json: model_args has {name!r}, which is not known here")
    pool = json.get("global_pool", arguments.get("global_pool"))
    if pool is not None and pool != ("avg" if json["pooled"] else "token"):
        norm = "fc_norm" if json["pooled"] else "norm"
        raise Mistake(f"config.json: global_pool is {pool!r} with tensor '{norm}.weight'")
    heads = json.get(
        "num_attention_heads", arguments.get("num_heads", HEADS.get(json["hidden_size"]))
    )
    if heads is None:
        raise Mistake(
            f"config.json: no model_args.num_heads, and how many heads a ViT {json['hidden_size']} "
            f"wide has is known only of the widths {', '.join(map(str, HEADS))}"
        )
    return {"num_attention_heads": heads}

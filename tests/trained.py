"""The end of a run without the run: methods, and leaves that are no longer as they started."""

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, peft, tree
from bmft.peft import files, portable

LABELS = ("very bad", "bad", "so so", "good", "very good")


class Trained:
    """Methods in a model whose moving leaves, and only those, are random."""

    def __init__(self, model, params, groups, fresh=(), size=0.2):
        self.model, self.groups = model, groups
        self.methods = peft.build(model, tuple(groups), groups)
        rng, added = np.random.default_rng(0), portable.expected(self.methods, model)[1]
        flat = tree.flatten({"params": params})
        flat |= {
            path: np.full(leaf.shape, self.start(path), np.float32)
            for path, leaf in added.items()
            if peft.may_move(path)
        }
        self.claims = peft.claims(self.methods, flat, heads=model.heads, fresh=fresh)
        for path in self.claims:
            moved = flat[path] + rng.normal(0, size, flat[path].shape).astype(np.float32)
            flat[path] = np.where(self.mask(path, moved), moved, flat[path])
        flat |= tree.flatten(peft.constants(self.methods))
        still = [path for path in added if path not in self.claims]
        if any(path not in flat or path.startswith("peft_shared/") for path in still):
            made = self.made(params)
            flat |= {path: made[path] for path in still}
        self.variables = tree.unflatten(flat)
        self.moving, self.frozen = tree.split(self.variables, lambda path: path in self.claims)

    def made(self, params):
        """{collection/path: leaf} of what the methods add to a base."""
        shapes = layers.shapes(self.model.module, self.model.dummy)
        base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        add = jax.jit(peft.attach(self.methods, self.model).add)
        return tree.flatten(add(jax.random.key(1), base | {"params": params}))

    def start(self, path):
        """What a leaf of a method is where it changes nothing."""
        own = (m.files for m in self.methods if m.files and m.moves(path))
        return next((portable.at_rest(files, path) for files in own), 0.0)

    def mask(self, path, leaf):
        """Which numbers of a leaf move: layers that stay, ranks and numbers that are not there."""
        rows = peft.moving_rows(self.methods, path)
        module = path.replace("peft/", "peft_const/", 1).rpartition("/")[0]
        constants = tree.flatten(peft.constants(self.methods))
        scales = [leaf for where, leaf in constants.items() if where.startswith(f"{module}/")]
        if any(leaf.shape == scale.shape for scale in scales):
            return np.asarray(next(scale for scale in scales if leaf.shape == scale.shape)) > 0
        scale = constants.get(f"{module}/lora_scale")
        if path.endswith("/lora_a"):
            return np.broadcast_to(np.asarray(scale)[..., None, :] > 0, leaf.shape)
        if path.endswith("/lora_b"):
            return np.broadcast_to(np.asarray(scale)[..., None] > 0, leaf.shape)
        return True if rows is None else rows.reshape(-1, *[1] * (leaf.ndim - 1))

    def merged(self, params):
        return peft.merge(self.methods, params, peft.added(self.moving, self.frozen))

    def write(self, folder, **changes):
        told = {"base": "tiny", "fingerprint": "f" * 64, "labels": LABELS} | changes
        files.write(folder, self.methods, self.groups, self.model, self.moving, self.frozen, **told)
        return folder

"""The end of a run without the run: methods, and leaves that are no longer as they started."""

import numpy as np

from bmft import peft, tree
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
        self.variables = tree.unflatten(flat) | peft.constants(self.methods)
        self.moving, self.frozen = tree.split(self.variables, lambda path: path in self.claims)

    def start(self, path):
        """What a leaf of a method is where it changes nothing."""
        own = (m.files for m in self.methods if m.files and m.moves(path))
        return next((files.elsewhere for files in own), 0.0)

    def mask(self, path, leaf):
        """Which numbers of a leaf move: layers that stay, ranks that are not there."""
        rows = peft.moving_rows(self.methods, path)
        scale = path.replace("peft/", "peft_const/").rpartition("/")[0] + "/lora_scale"
        scale = tree.flatten(peft.constants(self.methods)).get(scale)
        if path.endswith("/lora_a"):
            return np.broadcast_to(np.asarray(scale)[..., None, :] > 0, leaf.shape)
        if path.endswith("/lora_b"):
            return np.broadcast_to(np.asarray(scale)[..., None] > 0, leaf.shape)
        return True if rows is None else rows.reshape(-1, *[1] * (leaf.ndim - 1))

    def write(self, folder, **changes):
        told = {"base": "tiny", "fingerprint": "f" * 64, "labels": LABELS} | changes
        files.write(folder, self.methods, self.groups, self.model, self.moving, self.frozen, **told)
        return folder

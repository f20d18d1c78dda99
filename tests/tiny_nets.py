"""Methods in tiny convolutional nets, as tests/tiny.py has them in encoders."""

import jax
import tiny

from bmft import models, peft, tree
from bmft.models import weights


class Fitted:
    """What an experiment builds, in short; `forward` is not compiled, `apply` in evaluation is."""

    def __init__(self, folder, groups, **find):
        self.model, self.groups = models.find(str(folder), outputs=tiny.OUTPUTS, **find), groups
        self.loaded = weights.load(self.model, jax.random.key(0))
        self.methods = peft.build(self.model, tuple(groups), groups)
        self.add, self.forward = peft.attach(self.methods, self.model)
        self.apply = jax.jit(lambda variables, batch: self.forward(variables, batch))
        base = self.loaded.variables()
        self.variables = base | tiny.hasty(self.add)(jax.random.key(1), base)
        paths = [p for p in tree.flatten(self.variables) if p.startswith(("params/", "peft/"))]
        about = {"heads": self.model.heads, "fresh": self.loaded.fresh}
        self.claims = peft.claims(self.methods, paths, **about)
        self.moving, self.frozen = tree.split(self.variables, lambda path: path in self.claims)

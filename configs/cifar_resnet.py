"""CIFAR-10 with a convolutional net.

    ./run.sh experiments/image_classification.py --config=configs/cifar_resnet.py
    ./run.sh experiments/image_classification.py --config=configs/cifar_resnet.py:resnet20 \\
        --config.model.name=resnet20_cifar10.safetensors --config.data.train=cifar10_small.npz

`resnet50` (the default): microsoft/resnet-50 from the Hub on CIFAR-10 from TFDS, every number
moving, at 224 pixels. Kornblith et al. 2019 (arXiv:1805.08974) report 96.8 % for an ImageNet
ResNet-50 fine-tuned so (20,000 steps of 256, SGD with momentum 0.9, best of a grid of rates and
decays). It wants an accelerator. It was not run by us: no network, no accelerator.

`resnet20`: a CIFAR ResNet (He et al. 2015, arXiv:1512.03385, section 4.2) from a file of weights,
on images in an .npz file (train_x, train_y, test_x, test_y; see bmft/data/image_files.py). A tenth
of train is held out. On two CPU cores: minutes. What each method reaches on 6,000 JPEG copies of
CIFAR-10 images: README, by `benchmarks/cifar_methods.py`.
"""

from configs import base

VARIANTS = ("resnet50", "resnet20")


def get_config(variant="resnet50"):
    """`variant`: resnet50, resnet20."""
    config = base.get_config()
    config.task.name = "image_classification"
    config.task.flip = True
    config.optim.schedule = "cosine"
    if variant == "resnet50":
        config.model.name = "microsoft/resnet-50"
        config.model.batch_norm = "update"
        config.data.name = "tfds:cifar10"
        config.data.validation_share = 0.1
        config.peft.methods = ("full",)
        config.task.crop = "resized"
        config.train.batch_size = 256
        config.train.steps = 20_000
        config.optim.name = "sgd"
        config.optim.learning_rate = 0.01
        config.optim.weight_decay = 1e-4
        return config
    config.model.name = "resnet20_cifar10.safetensors"
    config.task.crop = "pad"
    config.data.name = "npz"
    config.data.train = "cifar10_small.npz"
    config.data.validation_share = 0.1
    config.peft.methods = ("lora",)
    config.peft.lora = {"rank": 8, "alpha": 16.0, "targets": ("all-conv",)}
    config.train.epochs = 5.0
    config.train.batch_size = 64
    config.optim.learning_rate = 3e-3
    return config

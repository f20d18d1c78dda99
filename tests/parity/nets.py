"""Plain torch modules with torchvision's names, which is no requirement of ours, and the CIFAR
repositories'; filled at random so that every part matters."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, before, inner, after, *, stride, groups, bottleneck, pad):
        super().__init__()
        if bottleneck:
            self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
            self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
            self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(after)
        else:
            self.conv1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(inner, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(self.conv2.out_channels)
        self.stride, self.bottleneck = stride, bottleneck
        self.padded = after // 4 if pad and (stride != 1 or before != after) else 0
        if not pad and (stride != 1 or before != after):
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            h = self.bn3(self.conv3(F.relu(h)))
        if self.padded:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0,) * 4 + (self.padded,) * 2)
        elif hasattr(self, "downsample"):
            x = self.downsample(x)
        return F.relu(x + h)


class ResNet(nn.Module):
    """As torchvision's, with any widths; or as those for CIFAR."""

    def __init__(self, stem, depths, inner, widths, *, bottleneck, groups=1, cifar=False):
        super().__init__()
        kernel = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, stem, *kernel, bias=False), nn.BatchNorm2d(stem)
        self.cifar, self.stages, before = cifar, len(depths), stem
        for i, (depth, middle, after) in enumerate(zip(depths, inner, widths, strict=True)):
            blocks = []
            for j in range(depth):
                about = {"stride": 2 if i and not j else 1, "groups": groups, "pad": cifar}
                blocks.append(Block(before, middle, after, bottleneck=bottleneck, **about))
                before = after
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        setattr(self, "linear" if cifar else "fc", nn.Linear(before, 5))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.cifar else F.max_pool2d(x, 3, 2, 1)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return (self.linear if self.cifar else self.fc)(x.mean((2, 3)))


class VGG(nn.Module):
    """As torchvision's, with any widths; without `dense` the head reads the mean."""

    def __init__(self, depths, widths, *, norm=False, dense=(13, 11), cells=3):
        super().__init__()
        layers, before = [], 3
        for depth, width in zip(depths, widths, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, 1, 1)]
                layers += [nn.BatchNorm2d(width)] if norm else []
                layers += [nn.ReLU()]
                before = width
            layers += [nn.MaxPool2d(2, 2)]
        self.features, self.cells = nn.Sequential(*layers), cells if dense else 1
        if not dense:
            self.classifier = nn.Linear(before, 5)
            return
        one, two = dense
        first = [nn.Linear(before * cells**2, one), nn.ReLU(), nn.Dropout()]
        second = [nn.Linear(one, two), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*first, *second, nn.Linear(two, 5))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), self.cells)
        return self.classifier(x.flatten(1))


RESNETS = {
    "resnet": {"inner": (3, 5, 7), "bottleneck": True},
    "resnet_basic": {"inner": (6, 8, 11), "widths": (6, 8, 11), "bottleneck": False},
    "resnext": {"inner": (6, 8, 14), "bottleneck": True, "groups": 2},
    "wide": {"inner": (5, 8, 11), "bottleneck": True},
}


def resnet(name):
    return ResNet(6, (2, 1, 2), **{"widths": (12, 20, 28)} | RESNETS[name])


def cifar(depth=2):
    return ResNet(4, (depth,) * 3, (4, 8, 16), (4, 8, 16), bottleneck=False, cifar=True)


def vgg(**about):
    return VGG((1, 2, 2), (4, 6, 9), **about)


def fill(model, seed=0, dtype=np.float32):
    """Random weights and running statistics, of values that `dtype` can hold; returns the model."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.ndim > 1:
                drawn = rng.normal(0, (2 / tensor[0].numel()) ** 0.5, tensor.shape)
            elif name.endswith("running_var"):
                drawn = rng.uniform(0.5, 1.5, tensor.shape)
            elif tensor.ndim == 1:
                is_scale = name.endswith("weight")
                drawn = rng.normal(0, 0.2, tensor.shape) + is_scale
            else:
                continue  # num_batches_tracked
            tensor.copy_(torch.tensor(drawn.astype(dtype), dtype=torch.float32))
    return model.eval()


def standardized(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """float32 [b, 3, y, x] of uint8 [b, y, x, 3]."""
    x = torch.tensor(np.asarray(images)).float() / 255
    return ((x - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).contiguous()


def logits(model, images, **standard):
    """float32 [b, 5] of uint8 images, in the mode that the model is in."""
    with torch.no_grad():
        found = model(standardized(images, **standard))
    return getattr(found, "logits", found).numpy()

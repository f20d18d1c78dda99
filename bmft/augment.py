"""Pictures changed at random, inside the jitted step.

    images = random_crop(key, images, 32, padding=4)        float32 [b, h, w, 3] in [0, 1]

Pure functions with static shapes, over a whole batch at once; each example draws its own chance
(what is drawn once for a batch is said where it is). What comes out depends on key and batch alone,
not on the devices that the batch lies on. Pixel (y, x) covers [y, y + 1) by [x, x + 1). What can be
is drawn at once: on a CPU each draw takes half a second and more to compile.

Milliseconds, jitted, least of 15 runs on two CPU cores that others used too, for 64 pictures of
32 px | 16 of 224 px: random_crop 0.3 | 2, random_resized_crop 2 | 45, random_flip 0.1 | 2, jitter
of all four 1 | 21, randaugment of two operations 13 | 200, erase 0.7 | 7, mix 0.6 | 3.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L and torchvision
TRIES = 10  # boxes drawn until one fits, as torchvision does

OPERATIONS = (  # of RandAugment; at magnitude m of 30, as torchvision has them:
    "identity",
    "shear_x",  # by up to 0.3, about the top left corner, either way
    "shear_y",
    "translate_x",  # by up to 150/331 of the width, whole pixels, either way
    "translate_y",
    "rotate",  # by up to 30 degrees, either way
    "brightness",  # factor 1 - 0.9 to 1 + 0.9: to black and away from it
    "colour",  # to grey
    "contrast",  # to the mean grey
    "sharpness",  # to a smoothed picture
    "posterize",  # 8 to 4 bits a channel
    "solarize",  # inverts what is at least 255 to 0
    "autocontrast",
    "equalize",
)
MOST = 30  # the largest magnitude
FILL = 0.5  # what a moved picture leaves behind, as in the authors' code; about the mean


# Crops


def centre_crop(images, size):
    """[b, size, size, 3], from the middle; of any dtype."""
    top, left = (_spare(extent, size) // 2 for extent in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def random_crop(key, images, size, padding):
    """[b, size, size, 3] at a random place of the pictures with `padding` black pixels around them.

    He et al. 2016, arXiv:1512.03385, section 4.2: 4 pixels around CIFAR's 32.
    """
    around = (padding, padding)
    images = jnp.pad(images, ((0, 0), around, around, (0, 0)))
    spare = jnp.array([_spare(extent, size) for extent in images.shape[1:3]])
    corners = _place(jax.random.uniform(key, (len(images), 2)), spare).astype(jnp.int32)

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, image.shape[-1]))

    return jax.vmap(cut)(images, corners)


def random_resized_crop(key, images, size, share=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box of each picture, resized to [b, size, size, 3] as Pillow's BILINEAR does.

    share: of the picture's area, uniform; ratio: width by height, uniform in its logarithm. A box
    that does not fit is drawn anew; after ten it is the whole picture.
    Szegedy et al. 2015, arXiv:1409.4842, section 6; numbers and draws are torchvision's.
    """
    draws = jax.random.uniform(key, (4, TRIES, len(images)))
    box, fits = _boxes(draws, images.shape, share, ratio)
    whole = jnp.array([0, 0, *images.shape[1:3]])
    top, left, height, width = jnp.where(fits, box, whole[:, None]).astype(jnp.float32)
    scale = size / jnp.stack([height, width], axis=1)
    move = -jnp.stack([top, left], axis=1) * scale

    def resize(image, scale, move):
        shape = (size, size, image.shape[-1])
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, move, "linear")

    return jax.vmap(resize)(images, scale, move)


def random_flip(key, images):
    """Left and right swapped in half of the pictures."""
    flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def _spare(extent, size):
    if extent < size:
        raise ValueError(f"no {size} pixels of {extent}")
    return extent - size


def _boxes(draws, shape, share, ratio):
    """int32 [4, b] (top, left, height, width) of boxes in pictures [b, h, w, ...], and bool [b]:
    does the box fit, the first of TRIES that does. draws: uniform [4, TRIES, b]."""
    h, w = shape[1:3]
    areas, ratios, down, right = draws
    side = jnp.sqrt(h * w * (share[0] + (share[1] - share[0]) * areas))
    low, high = map(math.log, ratio)
    root = jnp.exp((low + (high - low) * ratios) / 2)
    heights, widths = jnp.round(side / root), jnp.round(side * root)
    fit = (heights >= 1) & (heights <= h) & (widths >= 1) & (widths <= w)
    first = fit.argmax(0)[None]
    height, width = (jnp.take_along_axis(x, first, 0)[0] for x in (heights, widths))
    top, left = _place(down[0], h - height), _place(right[0], w - width)
    return jnp.stack([top, left, height, width]).astype(jnp.int32), fit.any(0)


def _place(draw, spare):
    """A whole number from 0 to `spare`, each as likely, of a uniform draw from [0, 1)."""
    return jnp.floor(draw * (jnp.maximum(spare, 0) + 1))


def _inside(box, shape):
    """bool [b, h, w, 1]: does a pixel lie in its picture's box?"""
    top, left, height, width = (x[:, None] for x in box)
    y, x = (jnp.arange(extent)[None] for extent in shape[1:3])
    rows, columns = (top <= y) & (y < top + height), (left <= x) & (x < left + width)
    return (rows[:, :, None] & columns[:, None, :])[..., None]


# Colours


def blend(towards, images, factor):
    """towards at factor 0, images at 1, further away beyond; cut to [0, 1]."""
    return jnp.clip(towards + factor * (images - towards), 0.0, 1.0)


def grey(images):
    """[b, h, w, 1]: lightness."""
    # Not a sum over an axis of three, which takes ten times as long on a CPU.
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def mean_grey(images):
    """[b, 1, 1, 1]: the mean lightness."""
    return grey(images.mean((1, 2), keepdims=True))


def smooth(images):
    """Pillow's filter SMOOTH: the mean of 3 x 3 pixels, the middle counted five times; pixels at
    the edge stay."""
    h, w = images.shape[1:3]
    around = sum(images[:, y : h - 2 + y, x : w - 2 + x] for y in range(3) for x in range(3))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    return images.at[inner].set((around + 4 * images[inner]) / 13)


def turn_hue(images, turn):
    """Hues turned by `turn` [b, 1, 1, 1] of the circle of colours, saturation and value kept."""
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    tops = [value == red, value == green]
    beyond = jnp.select(tops, [green - blue, blue - red], red - green)
    hue = jnp.select(tops, [0.0, 2.0], 4.0) + beyond / jnp.where(chroma > 0, chroma, 1.0)
    # A channel is the value less the chroma, or less a part of it near the channel's own third.
    place = hue + 6 * turn + jnp.array([5.0, 3.0, 1.0])
    place -= 6 * jnp.floor(place / 6)  # the operator % takes ten times as long on a CPU
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)


def jitter(key, images, brightness, contrast, saturation, hue):
    """torchvision's ColorJitter: factors from [max(0, 1 - s), 1 + s], a hue turned by up to `hue`.

    Their order is drawn once for the batch (torchvision: for each picture), so that each is
    computed once.
    """
    order_key, key = jax.random.split(key)
    draws = jax.random.uniform(key, (4, len(images), 1, 1, 1))
    changes = []
    strengths, ends = (brightness, contrast, saturation), (jnp.zeros_like, mean_grey, grey)
    for draw, strength, end in zip(draws[:3], strengths, ends, strict=True):
        low, high = max(0.0, 1 - strength), 1 + strength
        factor = low + (high - low) * draw
        if strength:
            changes.append(lambda x, end=end, factor=factor: blend(end(x), x, factor))
    if hue:
        changes.append(partial(turn_hue, turn=hue * (2 * draws[3] - 1)))
    if not changes:
        return images
    order = jnp.argsort(jax.random.uniform(order_key, (len(changes),)))
    return jax.lax.fori_loop(
        0, len(changes), lambda i, x: jax.lax.switch(order[i], changes, x), images
    )


# RandAugment


def randaugment(key, images, count, magnitude):
    """`count` of OPERATIONS one after the other, drawn with equal chances, at `magnitude` of 30.

    Cubuk et al. 2020, arXiv:1909.13719; ranges as in torchvision's RandAugment.
    """
    ops, signs = jax.random.uniform(key, (2, count, len(images)))
    ops = _place(ops, len(OPERATIONS) - 1).astype(jnp.int32)
    signs = jnp.where(signs < 0.5, -1.0, 1.0)

    def layer(images, drawn):
        return operate(images, *drawn, magnitude), None

    return jax.lax.scan(layer, images, (ops, signs))[0]


def operate(images, op, sign, magnitude):
    """The operation OPERATIONS[op], op int32 [b], on each picture; sign [b] is 1 or -1.

    Every operation would be computed for every picture if they were branches. They are three
    families instead, each one computation that leaves the pictures of the others as they are.
    """
    signed = sign * (magnitude / MOST)
    families = (
        partial(_move, op=op, signed=signed),
        partial(_blend, op=op, factor=1 + 0.9 * signed),
        partial(_map, op=op, magnitude=magnitude),
    )
    # One after the other, but as branches in a loop, which XLA does not fuse: fused on a CPU, a
    # pixel of one family is computed anew for each that the next makes of it, five times as long.
    return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.switch(i, families, x), images)


def _is(op, name):
    """bool [b, 1, 1, 1]: is the operation of this name?"""
    return (op == OPERATIONS.index(name))[:, None, None, None]


def _move(images, op, signed):
    """Shear, translate and rotate: each pixel is fetched from where it was, the nearest one.

    Nearest as in the authors' code and torchvision; a gather takes 6 ms of 16 pictures of 224 px,
    and the four of a bilinear one would take 24.
    """
    b, h, w, channels = images.shape

    def amount(name, most):
        return jnp.where(_is(op, name)[..., 0], signed[:, None, None] * most, 0.0)

    y, x = jnp.arange(h)[None, :, None] + 0.5, jnp.arange(w)[None, None, :] + 0.5
    angle = amount("rotate", math.radians(30))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    from_x = cos * (x - w / 2) - sin * (y - h / 2) + w / 2
    from_y = sin * (x - w / 2) + cos * (y - h / 2) + h / 2
    from_x += amount("shear_x", 0.3) * y + jnp.trunc(amount("translate_x", w * 150 / 331))
    from_y += amount("shear_y", 0.3) * x + jnp.trunc(amount("translate_y", h * 150 / 331))
    there = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
    place = jnp.floor(from_y) * w + jnp.floor(from_x)
    place = jnp.where(there, place, 0).astype(jnp.int32).reshape(b, h * w)
    moved = jax.vmap(lambda image, place: image[place])(images.reshape(b, h * w, channels), place)
    return jnp.where(there[..., None], moved.reshape(images.shape), FILL)


def _blend(images, op, factor):
    """Brightness, colour, contrast and sharpness, as Pillow's ImageEnhance."""
    names = ("brightness", "colour", "contrast", "sharpness")
    ends = (jnp.zeros_like(images), grey(images), mean_grey(images), smooth(images))
    # Towards itself, by whatever factor, a picture stays exactly as it is.
    end = jnp.select([_is(op, name) for name in names], ends, images)
    return blend(end, images, factor[:, None, None, None])


def _map(images, op, magnitude):
    """Posterize, solarize, autocontrast and equalize: a map of each channel's 256 values."""
    values = jnp.round(images * 255).astype(jnp.int32)
    bits = round(magnitude * 4 / MOST)
    low, high = (f(images, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    stretched = (images - low) / jnp.where(high > low, high - low, 1.0)
    mapped = {
        "posterize": (values >> bits << bits) / 255,
        "solarize": jnp.where(values >= 255 * (1 - magnitude / MOST), 1 - images, images),
        "autocontrast": jnp.where(high > low, stretched, images),
        "equalize": _equalize(values) / 255,
    }
    return jnp.select([_is(op, name) for name in mapped], list(mapped.values()), images)


def _equalize(values):
    """Pillow's ImageOps.equalize of int32 [b, h, w, 3] in 0 to 255, each channel by itself.

    The histogram is a scatter: 15 ms of 16 pictures of 224 px, where a sort takes 190 and a product
    of one-hot vectors 330. A table of the 256 results would be computed for each pixel anew.
    """

    def channel(values):
        counts = jnp.zeros(256).at[values].add(1.0)  # float32 is exact up to 4096 x 4096 pixels
        up_to = jnp.cumsum(counts)
        below = jnp.where(values > 0, up_to[values - 1], 0.0)
        step = jnp.floor((values.size - counts[values.max()]) / 255)
        equal = jnp.floor((jnp.floor(step / 2) + below) / jnp.maximum(step, 1.0))
        return jnp.where(step > 0, jnp.minimum(equal, 255.0), values)

    b, h, w, channels = values.shape
    rows = values.transpose(0, 3, 1, 2).reshape(b, channels, h * w)
    rows = jax.vmap(jax.vmap(channel))(rows)
    return rows.reshape(b, channels, h, w).transpose(0, 2, 3, 1)


# Erasing and mixing


def erase(key, images, probability, share=(0.02, 0.4), ratio=(0.3, 1 / 0.3)):
    """A random box of a picture filled with noise, in a share `probability` of the pictures.

    share: of the picture's area, uniform; ratio: uniform in its logarithm. Zhong et al. 2017,
    arXiv:1708.04896, random values. The noise is one picture for the batch: noise for each took
    100 ms of 16 pictures of 224 px, fourteen times the rest.
    """
    box_key, noise_key = jax.random.split(key)
    draws = jax.random.uniform(box_key, (5, TRIES, len(images)))
    box, fits = _boxes(draws[:4], images.shape, share, ratio)
    chosen = (draws[4, 0] < probability) & fits
    noise = jax.random.uniform(noise_key, images.shape[1:])
    return jnp.where(_inside(box, images.shape) & chosen[:, None, None, None], noise, images)


def mix(key, images, labels, weights, mixup=0.0, cutmix=0.0):
    """Each picture mixed with the next of the batch: images, (labels, other labels, share).

    The loss is share * loss(label) + (1 - share) * loss(other label), share float32 [b].
    mixup: its share is drawn from Beta(mixup, mixup) (Zhang et al. 2018, arXiv:1710.09412).
    cutmix: a box of the other picture, 1 - Beta(cutmix, cutmix) of the area; the share is that of
    the pixels, as the box may end at the edge (Yun et al. 2019, arXiv:1905.04899).
    With both, each example takes one or the other, with equal chances.
    weights [b]: 0 is padding, which is mixed into nothing: an example before it stays as it is.
    """
    up, which, *box = jax.random.uniform(key, (5, len(images)))
    up, which = up[:, None, None, None], which[:, None, None, None]
    own = jnp.ones_like(up)  # the share of the example itself in each of its pixels
    if mixup:
        own = _beta(up, mixup)
    if cutmix:
        outside = ~_inside(_cutmix_boxes(*box, images.shape, cutmix), images.shape)
        own = jnp.where(which < 0.5 if mixup else True, outside, own)
    other_is_real = (jnp.roll(weights, -1) > 0)[:, None, None, None]
    own = jnp.where(other_is_real, own, 1.0)
    mixed = own * images + (1 - own) * jnp.roll(images, -1, axis=0)
    return mixed, (labels, jnp.roll(labels, -1), own.mean((1, 2, 3)))


def _cutmix_boxes(share, y, x, shape, alpha):
    """[4, b] (top, left, height, width): centres anywhere, cut off at the edges. share, y and x:
    uniform draws [b]."""
    h, w = shape[1:3]
    side = jnp.sqrt(1 - _beta(share, alpha))

    def interval(draw, extent):
        half, middle = jnp.floor(extent * side / 2), _place(draw, extent - 1)
        first, last = jnp.maximum(middle - half, 0), jnp.minimum(middle + half, extent)
        return first, last - first

    (top, height), (left, width) = interval(y, h), interval(x, w)
    return jnp.stack([top, left, height, width])


def _beta(draw, alpha):
    """Draws from Beta(alpha, alpha), of uniform ones by its quantiles: jax.random.beta takes 4 s to
    compile."""
    at = np.linspace(0, 1, 1025)
    quantiles = scipy.stats.beta.ppf(at, alpha, alpha).astype(np.float32)
    return jnp.interp(draw, at, quantiles)

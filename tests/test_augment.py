"""Augmentations against Pillow, colorsys, scipy and what the papers' own code draws."""

import colorsys
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageEnhance, ImageOps

from bmft import augment

H, W = 37, 45


def picture(seed=0, size=(H, W), low=0, high=255):
    """A uint8 picture with slopes, edges and noise, and no value twice as often as another."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    slopes = np.stack([x / size[1], y / size[0], (x + y) / sum(size)], -1)
    slopes[size[0] // 3 :, size[1] // 2 :] *= 0.6
    noisy = np.clip(slopes + rng.normal(0, 0.08, slopes.shape), 0, 1)
    return (low + noisy * (high - low)).round().astype(np.uint8)


def floats(pictures):
    return jnp.asarray(np.asarray(pictures), jnp.float32) / 255


def coordinates(count, height, width):
    """Pictures of which a pixel holds its row, its column and 1."""
    y, x = np.mgrid[:height, :width]
    one = np.stack([y, x, np.ones_like(x)], -1).astype(np.float32)
    return jnp.asarray(np.tile(one, (count, 1, 1, 1)))


# Compiled once each: one operation after the other would be compiled by itself.
random_crop = jax.jit(augment.random_crop, static_argnums=(2, 3))
resized_crop = jax.jit(augment.random_resized_crop, static_argnums=(2, 3, 4))
random_flip = jax.jit(augment.random_flip)
turn_hue = jax.jit(augment.turn_hue)
jitter = jax.jit(augment.jitter, static_argnums=(2, 3, 4, 5))
operate = jax.jit(augment.operate, static_argnums=3)
erase = jax.jit(augment.erase, static_argnums=2)
mix = jax.jit(augment.mix, static_argnums=(4, 5))

# Crops and flips


@partial(jax.jit, static_argnums=(1, 2, 3))
def boxes(key, shape, share, ratio):
    """What random_resized_crop draws."""
    draws = jax.random.uniform(key, (4, augment.TRIES, shape[0]))
    return augment._boxes(draws, shape, share, ratio)


def test_centre_crop():
    images = coordinates(2, 9, 12)
    cropped = augment.centre_crop(images, 4)
    assert cropped.shape == (2, 4, 4, 3)
    assert cropped[1, 0, 0].tolist() == [2, 4, 1]
    assert augment.centre_crop(np.zeros((1, 5, 5, 3), np.uint8), 5).dtype == np.uint8
    with pytest.raises(ValueError, match="no 10 pixels of 9"):
        augment.centre_crop(images, 10)


def test_random_crop_is_a_piece_of_the_padded_picture_and_reaches_every_place():
    images, padding, size = coordinates(2000, 7, 6), 2, 5
    found = np.asarray(random_crop(jax.random.key(0), images, size, padding))
    assert found.shape == (2000, size, size, 3)
    padded = np.pad(np.asarray(images[0]), ((padding, padding), (padding, padding), (0, 0)))
    pieces = {
        padded[top : top + size, left : left + size].tobytes(): (top, left)
        for top in range(7 + 2 * padding - size + 1)
        for left in range(6 + 2 * padding - size + 1)
    }
    corners = [pieces[crop.tobytes()] for crop in found]  # a KeyError: no piece of the picture
    counts = np.unique(corners, axis=0, return_counts=True)[1]
    assert len(counts) == 7 * 6
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def pillow_resized(data, box, size):
    """One channel, cut out and resized; box: top, left, height, width."""
    top, left, height, width = box
    box = (left, top, left + width, top + height)
    image = Image.fromarray(data.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def test_random_resized_crop_is_pillows():
    size, key, data = 8, jax.random.key(3), picture()
    found = np.asarray(resized_crop(key, jnp.tile(floats([data]), (16, 1, 1, 1)), size))
    assert found.shape == (16, size, size, 3)
    drawn, fits = boxes(key, (16, H, W, 3), (0.08, 1.0), (3 / 4, 4 / 3))
    assert fits.all()
    assert len(np.unique(drawn, axis=1).T) == 16
    for one, box in zip(found, np.asarray(drawn).T.tolist(), strict=True):
        for channel in range(3):
            expected = pillow_resized(data[..., channel], box, size)
            np.testing.assert_allclose(one[..., channel] * 255, expected, atol=0.02)


def test_boxes_of_random_resized_crop():
    drawn, fits = boxes(jax.random.key(1), (4000, 64, 60, 3), (0.08, 1.0), (3 / 4, 4 / 3))
    assert fits.mean() > 0.99
    top, left, height, width = np.asarray(drawn)[:, np.asarray(fits)]
    share, ratio = height * width / (64 * 60), width / height
    assert 0.07 < share.min() < 0.1
    assert share.max() > 0.95
    small = share < 0.5  # any ratio fits, but for what is large
    low, high = np.log([3 / 4, 4 / 3])
    evenly = scipy.stats.uniform(low, high - low).cdf
    assert scipy.stats.kstest(np.log(ratio[small]), evenly).statistic < 0.05
    evenly = scipy.stats.uniform(0.08, 0.42).cdf
    assert scipy.stats.kstest(share[small], evenly).statistic < 0.03
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + height).max(), (left + width).max()) == (64, 60)
    roomy = height < 44
    places = (top + 0.5)[roomy] / (64 - height + 1)[roomy]
    assert scipy.stats.kstest(places, "uniform").statistic < 0.05


def test_a_box_that_never_fits_is_the_whole_picture():
    data = picture(size=(30, 5))  # six times as high as wide
    found = resized_crop(jax.random.key(0), floats([data] * 3), 4, (0.9, 1.0), (1.0, 1.1))
    for one in np.asarray(found):
        expected = pillow_resized(data[..., 0], (0, 0, 30, 5), 4)
        np.testing.assert_allclose(one[..., 0] * 255, expected, atol=0.02)


def test_half_of_the_pictures_are_flipped():
    images = floats([picture(seed) for seed in range(4)] * 250)
    found = random_flip(jax.random.key(0), images)
    flipped = (np.asarray(found) == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    same = (np.asarray(found) == np.asarray(images)).all((1, 2, 3))
    assert (flipped ^ same).all()
    assert scipy.stats.binomtest(int(flipped.sum()), 1000).pvalue > 1e-3


# Colours


@pytest.mark.parametrize("turn", [-0.5, -0.13, 0.0, 0.07, 0.4])
def test_hue_is_that_of_colorsys(turn):
    data = picture(size=(9, 8))
    data[0, 0], data[0, 1], data[0, 2] = 77, 0, 255  # grey, black, white
    found = turn_hue(floats([data]), jnp.full((1, 1, 1, 1), turn))[0]

    def turned(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)

    expected = np.apply_along_axis(turned, -1, data / 255)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def factors(key, images, strength):
    """The factors of brightness that `jitter` drew."""
    ratio = np.asarray(jitter(key, images, strength, 0.0, 0.0, 0.0) / images)
    assert np.ptp(ratio, (1, 2, 3)).max() < 1e-5
    return ratio[:, 0, 0, 0]


def test_brightness_factors_are_drawn_for_each_picture():
    images = floats([picture(size=(4, 5), low=20, high=80)] * 500)
    found = factors(jax.random.key(0), images, 0.4)
    assert scipy.stats.kstest(found, scipy.stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    found = factors(jax.random.key(0), images, 1.5)
    assert scipy.stats.kstest(found, scipy.stats.uniform(0, 2.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("place", "name", "change"),
    [(0, "Brightness", 0.3), (1, "Contrast", 0.6), (2, "Color", 0.9)],
)
def test_each_jitter_is_pillows_for_some_factor(place, name, change):
    data = picture()
    strengths = [0.0] * 4
    strengths[place] = change
    found = jitter(jax.random.key(5), floats([data] * 3), *strengths) * 255
    enhance = getattr(ImageEnhance, name)(Image.fromarray(data)).enhance
    tried = np.linspace(1 - change, 1 + change, 400)
    options = np.stack([enhance(factor) for factor in tried]).astype(np.float32)
    best = []
    for one in np.asarray(found):
        difference = np.abs(options - one).mean((1, 2, 3))
        best.append(tried[difference.argmin()])
        assert difference.min() < 0.7
    assert len(set(best)) == 3


def test_hues_turn_by_no_more_than_asked():
    images = jnp.tile(jnp.array([0.8, 0.2, 0.2]), (400, 2, 2, 1))  # hue 0
    found = np.asarray(jitter(jax.random.key(0), images, 0.0, 0.0, 0.0, 0.1))[:, 0, 0]
    hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in found])
    hues = (hues + 0.5) % 1 - 0.5
    assert scipy.stats.kstest(hues, scipy.stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3


def test_jitter_comes_in_both_orders():
    # Nothing is cut off, and there is far more red than blue: turned, it is lighter or darker.
    image = floats([picture(low=60, high=150)]) * jnp.array([1.0, 0.6, 0.4])
    mean, orders = augment.mean_grey(image), []
    for seed in range(8):
        key = jax.random.key(seed)
        turned = jitter(key, image, 0.0, 0.0, 0.0, 0.5)
        contrasted = jitter(key, image, 0.0, 0.4, 0.0, 0.0)
        both = jitter(key, image, 0.0, 0.4, 0.0, 0.5)
        factor = ((contrasted - mean) / (image - mean))[0, 0, 0, 0]
        contrast_last = augment.blend(augment.mean_grey(turned), turned, factor)
        hue_last = factor * turned + (1 - factor) * mean
        close = [np.allclose(both, end, atol=1e-4) for end in (contrast_last, hue_last)]
        assert any(close)
        orders += [close[0]] * (close[0] != close[1])  # a factor near 1 does not show the order
    assert set(orders) == {True, False}


def test_no_jitter_leaves_the_pictures():
    images = floats([picture()])
    np.testing.assert_array_equal(jitter(jax.random.key(0), images, 0.0, 0.0, 0.0, 0.0), images)


# RandAugment


def affine(*coefficients):
    def apply(image):
        nearest, fill = Image.Resampling.NEAREST, (128, 128, 128)
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, nearest, fillcolor=fill
        )

    return apply


def rotate(degrees):
    return lambda image: image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=(128,) * 3)


def enhance(name, factor):
    return lambda image: getattr(ImageEnhance, name)(image).enhance(factor)


def pillows(sign, m):
    """{operation: function of a Pillow image}, with torchvision's ranges in 31 steps."""

    def up_to(most):
        return sign * np.linspace(0.0, most, 31)[m]

    bits = int(8 - np.round(np.arange(31) / (30 / 4))[m])
    factor = 1 + up_to(0.9)
    return {
        "identity": lambda image: image,
        "shear_x": affine(1, up_to(0.3), 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, up_to(0.3), 1, 0),
        "translate_x": affine(1, 0, int(up_to(150 / 331 * W)), 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, int(up_to(150 / 331 * H))),
        "rotate": rotate(up_to(30.0)),
        "brightness": enhance("Brightness", factor),
        "colour": enhance("Color", factor),
        "contrast": enhance("Contrast", factor),
        "sharpness": enhance("Sharpness", factor),
        "posterize": lambda image: ImageOps.posterize(image, bits),
        "solarize": lambda image: ImageOps.solarize(image, np.linspace(255.0, 0.0, 31)[m]),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }


@pytest.mark.parametrize("magnitude", [0, 9, 22])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_pillows(sign, magnitude):
    data = picture(low=12, high=231)
    expected = pillows(sign, magnitude)
    assert tuple(expected) == augment.OPERATIONS
    count = len(expected)
    found = operate(
        floats([data] * count), jnp.arange(count), jnp.full(count, float(sign)), magnitude
    )
    found = np.asarray(found) * 255
    for one, (name, apply) in zip(found, expected.items(), strict=True):
        wanted = np.asarray(apply(Image.fromarray(data))).astype(np.float32)
        difference = np.abs(one - wanted).max(-1)
        if name in ("shear_x", "shear_y", "rotate"):  # a pixel between two may go to either
            assert (difference < 1).mean() > 0.985, name
        else:
            assert difference.max() < 2, name
        if name in ("identity", "posterize", "solarize", "equalize"):
            assert difference.max() < 1e-3, name


def test_equalize_of_few_values_and_of_one():
    rng = np.random.default_rng(0)
    few = rng.choice([3, 90, 91, 200], (H, W, 3), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    flat = np.full((H, W, 3), 90, np.uint8)
    tiny = picture(size=(5, 7))  # fewer pixels than values
    for data in (few, flat, tiny):
        for name, apply in (
            ("equalize", ImageOps.equalize),
            ("autocontrast", ImageOps.autocontrast),
        ):
            op = jnp.array([augment.OPERATIONS.index(name)])
            found = operate(floats([data]), op, jnp.ones(1), 9)[0] * 255
            expected = np.asarray(apply(Image.fromarray(data)))
            np.testing.assert_allclose(found, expected, atol=1)


def test_randaugment_draws_every_operation_and_both_signs(monkeypatch):
    seen = []

    def record(images, op, sign, magnitude):
        seen.append((magnitude, op, sign))
        return images + op[:, None, None, None] + 100 * sign[:, None, None, None]

    monkeypatch.setattr(augment, "operate", record)
    images = jnp.zeros((2000, 1, 1, 3))
    found = np.asarray(augment.randaugment(jax.random.key(0), images, 1, 9))[:, 0, 0, 0]
    signs, ops = np.where(found > 50, 1, -1), np.where(found > 50, found - 100, found + 100)
    counts = np.unique(ops, return_counts=True)[1]
    assert len(counts) == len(augment.OPERATIONS)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert scipy.stats.binomtest(int((signs > 0).sum()), 2000).pvalue > 1e-3
    assert {magnitude for magnitude, *_ in seen} == {9}
    twice = np.asarray(augment.randaugment(jax.random.key(0), images, 2, 9))[:, 0, 0, 0]
    assert len(np.unique(twice)) > 2 * len(augment.OPERATIONS)  # two drawn, not one repeated


# Erasing and mixing


def erased(key, count, probability, size=(40, 40)):
    found = erase(key, jnp.full((count, *size, 3), 2.0), probability)
    noise = np.asarray(found) != 2.0
    assert (noise == noise[..., :1]).all()
    return np.asarray(found), noise[..., 0]


def test_erasing_fills_boxes_with_noise():
    found, mask = erased(jax.random.key(0), 3000, 0.25)
    hit = mask.any((1, 2))
    assert scipy.stats.binomtest(int(hit.sum()), 3000, 0.25).pvalue > 1e-3
    rows, columns = mask[hit].any(2).sum(1), mask[hit].any(1).sum(1)
    np.testing.assert_array_equal(rows * columns, mask[hit].sum((1, 2)))  # boxes, without holes
    noise = found[found != 2.0]
    assert 0 <= noise.min() < 0.05
    assert 0.95 < noise.max() < 1
    assert len(np.unique(found[hit][0][mask[hit][0]])) > mask[hit][0].sum()  # each pixel its own


def test_area_and_place_of_what_is_erased():
    _, mask = erased(jax.random.key(1), 3000, 1.0)
    share = mask.mean((1, 2))
    assert (share > 0).mean() > 0.999  # ten draws: one nearly always fits
    assert 0.015 < share.min() < 0.04
    assert 0.36 < share.max() < 0.42
    # The longest of large boxes do not fit, and are drawn anew: a little below the middle of
    # 2 and 40 %.
    assert 0.18 < share.mean() < 0.21
    rows, columns = mask.any(2).sum(1), mask.any(1).sum(1)
    assert 0.25 < (columns / rows).min() < 0.5
    assert 2 < (columns / rows).max() < 4  # 3.3, before rounding to pixels
    assert abs(np.log(columns / rows).mean()) < 0.06
    everywhere = mask.mean(0)
    assert everywhere.min() > 0
    np.testing.assert_allclose(everywhere, everywhere[::-1, ::-1], atol=0.05)


def mixing(count, size=(12, 10), seed=0):
    images = floats(np.random.default_rng(seed).integers(0, 256, (count, *size, 3)))
    labels = jnp.arange(count) % 7
    return images, labels, jnp.ones(count)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup(alpha):
    images, labels, weights = mixing(4000, (2, 2))
    found, (own, other, share) = mix(jax.random.key(0), images, labels, weights, alpha, 0.0)
    part = share[:, None, None, None]
    np.testing.assert_allclose(
        found, part * images + (1 - part) * jnp.roll(images, -1, 0), atol=1e-6
    )
    np.testing.assert_array_equal(own, labels)
    np.testing.assert_array_equal(other, np.roll(labels, -1))
    # In the tails of a small alpha a table has no room: shares below 1e-3 are as good as none.
    above = np.linspace(1e-3, 1 - 1e-3, 200)
    empirical = np.searchsorted(np.sort(share), above) / len(share)
    assert np.abs(empirical - scipy.stats.beta(alpha, alpha).cdf(above)).max() < 0.035


def paper_boxes(rng, count, height, width, alpha):
    """Areas that the code of the paper on cutmix (rand_bbox) cuts out."""
    share = rng.beta(alpha, alpha, count)
    cut_h, cut_w = (np.int64(extent * np.sqrt(1 - share)) for extent in (height, width))
    y, x = rng.integers(height, size=count), rng.integers(width, size=count)
    rows = np.clip(y + cut_h // 2, 0, height) - np.clip(y - cut_h // 2, 0, height)
    columns = np.clip(x + cut_w // 2, 0, width) - np.clip(x - cut_w // 2, 0, width)
    return rows * columns


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix(alpha):
    size = (24, 18)
    images, labels, weights = mixing(2000, size)
    found, (_, other, share) = mix(jax.random.key(0), images, labels, weights, 0.0, alpha)
    np.testing.assert_array_equal(other, np.roll(labels, -1))
    own, next_one = np.asarray(images), np.roll(images, -1, axis=0)
    found = np.asarray(found)
    is_own, is_other = (found == own).all(-1), (found == next_one).all(-1)
    assert (is_own | is_other).all()
    np.testing.assert_allclose(is_own.mean((1, 2)), share, atol=2e-3)  # pixels alike in both
    cut = ~is_own
    np.testing.assert_array_equal(cut.any(2).sum(1) * cut.any(1).sum(1), cut.sum((1, 2)))
    areas = paper_boxes(np.random.default_rng(0), 20_000, *size, alpha)
    assert scipy.stats.ks_2samp(np.round((1 - share) * 24 * 18), areas).statistic < 0.05
    assert cut.mean(0).min() > 0.05


def test_both_mixings_take_turns():
    images, labels, weights = mixing(1000)
    found, (_, _, share) = mix(jax.random.key(0), images, labels, weights, 1.0, 1.0)
    found, own, other = map(np.asarray, (found, images, jnp.roll(images, -1, 0)))
    cut = ((found == own) | (found == other)).all((1, 2, 3))
    assert scipy.stats.binomtest(int(cut.sum()), 1000).pvalue > 1e-3
    part = np.asarray(share)[:, None, None, None]
    blended = part * own + (1 - part) * other
    np.testing.assert_allclose(found[~cut], blended[~cut], atol=1e-6)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_padding_is_mixed_into_nothing(alphas):
    images, labels, _ = mixing(64)
    weights = jnp.ones(64).at[jnp.array([7, 60, 61, 62, 63])].set(0.0)
    clean, (_, _, share) = mix(jax.random.key(0), images, labels, weights, *alphas)
    padding = (weights == 0)[:, None, None, None]
    garbage = jnp.where(padding, 1e6, images)
    found, (_, _, again) = mix(jax.random.key(0), garbage, labels, weights, *alphas)
    real = np.asarray(weights) > 0
    np.testing.assert_array_equal(found[real], clean[real])
    np.testing.assert_array_equal(again, share)
    before = np.array([6, 59])  # the next in the batch is padding
    np.testing.assert_array_equal(share[before], 1.0)
    np.testing.assert_array_equal(found[before], images[before])
    others = np.setdiff1d(np.flatnonzero(real), before)
    assert (np.asarray(share)[others] < 1).mean() > 0.8


def test_one_picture_alone_is_itself():
    images, labels, weights = mixing(1)
    found, _ = mix(jax.random.key(0), images, labels, weights, 1.0, 1.0)
    np.testing.assert_allclose(found, images, atol=1e-6)


# All of them


ALL = {
    "random_crop": lambda key, x, *_: augment.random_crop(key, x, 8, 2),
    "random_resized_crop": lambda key, x, *_: augment.random_resized_crop(key, x, 8),
    "random_flip": lambda key, x, *_: augment.random_flip(key, x),
    "jitter": lambda key, x, *_: augment.jitter(key, x, 0.4, 0.4, 0.4, 0.1),
    "randaugment": lambda key, x, *_: augment.randaugment(key, x, 2, 15),
    "erase": lambda key, x, *_: augment.erase(key, x, 0.7),
    "mix": lambda key, x, *rest: augment.mix(key, x, *rest, 0.4, 1.0),
}


@pytest.mark.parametrize("name", ALL)
def test_same_on_eight_devices_and_by_key_alone(name):
    images = floats([picture(seed, size=(9, 11)) for seed in range(16)])
    batch = images, jnp.arange(16) % 5, jnp.ones(16).at[-2:].set(0.0)
    function, key = jax.jit(ALL[name]), jax.random.key(7)
    alone = function(key, *batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    spread = jax.device_put(batch, split)
    compiled = function.lower(key, *spread).compile()
    shared = compiled(key, *spread)
    # Pictures stay on their devices, but for the one that mixes with the next device's first.
    talk = re.findall(
        r"(all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text()
    )
    assert set(talk) <= ({"collective-permute"} if name == "mix" else set())
    again, other = function(key, *batch), function(jax.random.key(8), *batch)
    for a, b, c in zip(*map(jax.tree.leaves, (alone, shared, again)), strict=True):
        assert b.sharding.is_equivalent_to(split, b.ndim) or b.ndim < 2
        np.testing.assert_allclose(a, b, atol=2e-6)
        np.testing.assert_array_equal(a, c)
    a, d = jax.tree.leaves(alone)[0], jax.tree.leaves(other)[0]
    assert (np.abs(a - d).max((1, 2, 3)) > 0.01).mean() > 0.3
    assert a.dtype == jnp.float32
    assert float(a.min()) >= -1e-6
    assert float(a.max()) <= 1 + 1e-6

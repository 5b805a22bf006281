"""RandAugment as ALBEF uses it: a few changes of an image, drawn from ten.

RandAugment is by Cubuk et al. 2020; ALBEF (Li et al. 2021) leaves out the changes of colour and draws two with
replacement, each of which then happens in half of the cases. Magnitudes are those of its public code, where 10 is the
most: brightness and sharpness by a factor of 0.1 to 1.9, shear by up to 0.3, rotation by up to 30 degrees, translation
by up to 10 of 256 pixels, in proportion at other sizes. Directions are random, and what comes into the image is grey.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..recipe import RandAugmentSection

DRAWS = 3  # random numbers of an operation: which, whether, in which direction
_CHANCE = 0.5
_GREY = (128, 128, 128)
_BILINEAR = Image.Resampling.BILINEAR


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    """The pixel at (x, y) becomes that at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, _BILINEAR, fillcolor=_GREY)


def _enhanced(kind: type[ImageEnhance.Brightness] | type[ImageEnhance.Sharpness]) -> Operation:
    return lambda image, level: kind(image).enhance(0.1 + 1.8 * abs(level))


Operation = Callable[[Image.Image, float], Image.Image]  # level: -1..1, the sign is the direction
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level: image,
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalise": lambda image, level: ImageOps.equalize(image),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level: _affine(image, 1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level: _affine(image, 1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": lambda image, level: _affine(image, 1, 0, image.width / 25.6 * level, 0, 1, 0),
    "translate_y": lambda image, level: _affine(image, 1, 0, 0, 0, 1, image.height / 25.6 * level),
    "rotate": lambda image, level: image.rotate(30 * level, _BILINEAR, fillcolor=_GREY),
}
_ALL = tuple(OPERATIONS.values())


def rand_augment(image: Image.Image, section: RandAugmentSection, luck: np.ndarray) -> Image.Image:
    """An RGB image after ``section.operations`` changes; ``luck`` (operations * :data:`DRAWS`,) in [0, 1)."""
    for which, whether, direction in luck.reshape(-1, DRAWS).tolist():
        if whether < _CHANCE:
            level = section.magnitude / 10
            image = _ALL[int(which * len(_ALL))](image, level if direction < 0.5 else -level)
    return image

"""Image files as square RGB pictures: whole for evaluation, cropped, mirrored and changed for training."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError
from ..recipe import DataSection
from .rand_augment import DRAWS, rand_augment
from .randomness import Draws

MAX_PIXELS = 64 * 2**20  # a larger image is refused before it is decoded
STORED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_NESTED = frozenset({"EPS", "IPTC"})  # read by Ghostscript, and by whatever reads what is in it
MAX_ASPECT = 4 / 3  # of a crop, either way
_TRIES = 10  # crops that are drawn until one fits into the image
# An oversized image is an error of ours (MAX_PIXELS), so Pillow's warning would only be a second, less useful line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112  # tag of Exif, as are these values of it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


def read_picture(path: str, where: str | None = None, contents: bytes | None = None) -> Image.Image:
    """RGB, upright, transparency on white; ``contents`` in place of the file's, then ``path`` is a name for it.

    Raises:
        DataError: a file that is no image or is too large; ``where`` says what named it, None: the command line.
    """
    try:
        with open_picture(path, contents) as file:
            if file.width * file.height > MAX_PIXELS:
                named, remedy = (path, "leave it out") if where is None else (f"{where}: image {path}", "remove it")
                raise DataError(f"{named} has {file.width} x {file.height} pixels, more than"
                                f" {MAX_PIXELS >> 20} million; make it smaller or {remedy}")  # fmt: skip
            file.load()
            return on_white(upright(file))
    except DataError:
        raise
    except Exception as error:  # what a damaged image makes Pillow raise is not foreseen: struct.error, say
        # the system's own line would name the file again
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "it is not an image"
        if where is None:
            raise DataError(f"{path} cannot be read: {reason}; give another picture, or leave it out") from None
        raise DataError(
            f"{where}: cannot read image {path}: {reason}; replace it, or remove it and start again"
        ) from None


def open_picture(path: str, contents: bytes | None = None) -> Image.Image:
    """Opened and not decoded; close it. Raises whatever Pillow raises for what is no image.

    Contents that came in somebody's archive are only read as the formats of :data:`STORED_FORMATS`, and files as any,
    whatever their names end in, but for those for which Pillow starts programs.
    """
    if contents is None:
        Image.init()  # so that all formats are there, those of plug-ins among them
        return Image.open(path, formats=[name for name in Image.ID if name not in _NESTED])
    return Image.open(io.BytesIO(contents), formats=STORED_FORMATS)


def upright(image: Image.Image) -> Image.Image:
    """Turned as the camera says. Pillow's own way writes all metadata anew, and fails where any of it is damaged."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # viewers show such an image as it lies
        turn = None
    return image if turn is None else image.transpose(turn)


def on_white(image: Image.Image) -> Image.Image:
    """RGB, transparency on white; 16-bit greys are scaled, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


class Chances:
    """The random numbers of some samples' pictures, each a function of seed, epoch and index alone.

    Drawn as [0, 1): ``area``, ``aspect`` and the crop's ``place`` (B, 2), ``mirror``, ``contrast``, ``brightness`` and
    what :func:`rand_augment` wants.
    """

    def __init__(self, draws: Draws, section: DataSection) -> None:
        luck = draws.uniform("crop", 7 + 2 * (_TRIES - 1))
        self.area = np.concatenate([luck[:, :1], luck[:, 7::2]], 1)  # (B, tries)
        self.aspect = np.concatenate([luck[:, 1:2], luck[:, 8::2]], 1)
        self.place, self.mirror, self.contrast, self.brightness = luck[:, 2:4], luck[:, 4], luck[:, 5], luck[:, 6]
        self.changes = draws.uniform("rand augment", DRAWS * section.rand_augment.operations)


def square(image: Image.Image, size: int, box: Box | None = None) -> Image.Image:
    """The image, or a part of it, squeezed to ``size`` x ``size`` pixels as ALBEF does."""
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def augmented(
    image: Image.Image, size: int, section: DataSection, chances: Chances, row: int, may_mirror: bool
) -> Image.Image:
    """A training picture: a crop, mirrored by half where that is allowed, and RandAugment's changes."""
    image = square(image, size, crop(*image.size, section, chances, row))
    if may_mirror and section.mirror and chances.mirror[row] < 0.5:
        image = ImageOps.mirror(image)
    return rand_augment(image, section.rand_augment, chances.changes[row])


def lights(section: DataSection, chances: Chances) -> np.ndarray | None:
    """(2, B): factors on contrast and brightness; None where RandAugment changes the light itself."""
    if section.rand_augment.operations:
        return None
    return np.asarray(1 + section.augment * (0.4 * np.stack([chances.contrast, chances.brightness]) - 0.2))


def crop(width: int, height: int, section: DataSection, chances: Chances, row: int) -> Box:
    """Where to crop: torchvision's RandomResizedCrop at ``augment`` 1, the whole image at 0, in between for the rest.

    At full strength the area is uniform between ``crop_area`` and 1 of the image, and the aspect log-uniform between
    3/4 and 4/3. Where no drawn crop fits, as in a panorama, it is the largest of an allowed aspect, but never less than
    ``crop_area``.
    """
    strength, own = section.augment, width / height
    areas = 1 - strength * (1 - section.crop_area) * (1 - chances.area[row])
    aspects = own ** (1 - strength) * MAX_ASPECT ** (strength * (2 * chances.aspect[row] - 1))
    w, h = (width * height * areas * aspects) ** 0.5, (width * height * areas / aspects) ** 0.5
    fitting = np.flatnonzero((w <= width) & (h <= height))
    if len(fitting):
        w, h = float(w[fitting[0]]), float(h[fitting[0]])
    else:
        low, high = (own ** (1 - strength) * MAX_ASPECT**power for power in (-strength, strength))
        w = max(min(width, height * high), width * section.crop_area)
        h = max(min(height, width / low), height * section.crop_area)
    x, y = chances.place[row] * (width - w, height - h)
    return x, y, min(x + w, width), min(y + h, height)  # rounding must not carry it over the edge

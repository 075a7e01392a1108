"""PNG and TIF slices: one file per slice, or all pages of one TIF. They carry no geometry."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cohort.limits import DEFLATE_RATIO, check_unpacked, check_voxels
from runtime.errors import InputError

SLICES_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # PNG and TIF carry no geometry: 1 mm, LPS, stated as unknown
TIF_RATIO = 10_000  # a byte of a TIF unpacks to no more; blank LZW reaches 1,400
PNG = b"\x89PNG\r\n\x1a\n"
MOST_TAGS = 4096  # of a page that are looked at
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # of TIF, all that libtiff takes for a size
EIGHT_BYTES = {16: "Q", 17: "q"}  # of BigTIFF
SIZE_TAGS = (256, 257, 258, 277, 322, 323)  # width, height, bits, channels, width and height of a tile
RGB_CHANNELS = {"t1": 0, "flair": 1, "t1ce": 2}  # kaggle_3m: before contrast, FLAIR, after contrast


class PageSize(NamedTuple):
    """What a picture declares of one page."""

    width: int
    height: int
    channels: int
    bits: int  # of a channel
    tile: int = 0  # pixels of a tile, which is decoded whole

    @property
    def values(self) -> int:
        """How many values are decoded."""
        return max(self.width * self.height, self.tile) * self.channels


def read_directories(path: Path) -> Iterator[dict[int, int]]:
    """Yield {tag: value} of each page that a TIF file says it has, empty for one that is cut off.

    Only the chain of page directories is followed (TIFF 6.0, section 2; BigTIFF with 8-byte offsets), and of
    tags those with one whole number are read, others are -1. Nothing is yielded for a file that is no TIF.
    """
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16:
            return
        version = struct.unpack_from(f"{order}H", head, 2)[0]
        if version not in (42, 43):
            return
        at, count_type, entry_bytes, link_type = (4, "H", 12, "I") if version == 42 else (8, "Q", 20, "Q")
        link = struct.unpack_from(order + link_type, head, at)[0]
        links: set[int] = set()
        size = path.stat().st_size
        while link and link not in links and link < size:
            links.add(link)
            file.seek(link)
            count = file.read(struct.calcsize(order + count_type))
            is_whole = len(count) == struct.calcsize(order + count_type)
            entries = struct.unpack(order + count_type, count)[0] if is_whole else 0
            content = file.read(min(entries, MOST_TAGS) * entry_bytes)
            tags = list(_read_tags(content, order, entry_bytes))
            yield dict(reversed(tags))  # of two alike the first counts
            file.seek(link + len(count) + min(entries * entry_bytes, size))
            following = file.read(struct.calcsize(order + link_type))
            if not is_whole or len(following) < struct.calcsize(order + link_type):
                return
            link = struct.unpack(order + link_type, following)[0]


def _read_tags(content: bytes, order: str, entry_bytes: int) -> Iterator[tuple[int, int]]:
    is_big = entry_bytes == 20
    kinds = WHOLE_NUMBERS | (EIGHT_BYTES if is_big else {})  # elsewhere they stand for an offset
    for at in range(0, len(content) - entry_bytes + 1, entry_bytes):
        tag, kind = struct.unpack_from(f"{order}HH", content, at)
        if kind in kinds:
            yield tag, struct.unpack_from(order + kinds[kind], content, at + (12 if is_big else 8))[0]
        else:
            yield tag, -1


def count_pages(path: Path) -> int:
    """Return how many pages a TIF file says it has, a cut-off one included; 0 where it is no TIF."""
    return sum(1 for _ in read_directories(path))


def read_sizes(path: Path) -> list[PageSize]:
    """Return what a picture declares of each page; InputError where it is neither PNG nor TIF inside."""
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        raise InputError(path, f"not readable ({error.strerror})", "fetch it again") from error
    if head.startswith(PNG) and len(head) == 26:
        width, height, bits, colour = struct.unpack_from(">IIBB", head, 16)
        return [PageSize(width, height, {2: 3, 4: 2, 6: 4}.get(colour, 1), bits)]
    sizes = []
    for tags in read_directories(path):
        if min(tags.get(tag, 0) for tag in SIZE_TAGS) < 0:
            raise InputError(path, "declares a size that is none: not a readable picture", "export it again")
        channels = tags.get(277, 1)
        bits = tags.get(258, 1) if channels == 1 else 8  # of several channels the tag is elsewhere
        tile = tags.get(322, 0) * tags.get(323, 0)
        sizes.append(PageSize(tags.get(256, 0), tags.get(257, 0), channels, bits, tile))
    if not sizes:
        raise InputError(path, "is neither PNG nor TIF inside: not a readable picture", "export it again")
    return sizes


def check_size(path: Path) -> None:
    """Raise InputError where a picture declares more than is read, or than its file can hold."""
    sizes = read_sizes(path)
    size = path.stat().st_size
    largest = max(sizes, key=lambda page: page.values)
    pages = f"{len(sizes)} pages of " if len(sizes) > 1 else ""
    what = f"{pages}{largest.width:,} x {largest.height:,} pixels"
    check_voxels(path, sum(page.values for page in sizes), what)
    ratio = DEFLATE_RATIO if path.suffix.lower() == ".png" else TIF_RATIO
    check_unpacked(path, sum(page.values * max(page.bits, 1) // 8 for page in sizes), size, ratio)
    if not is_whole_png(path, size):
        raise InputError(path, "is cut short or damaged: not a readable picture", "export it again")


def is_whole_png(path: Path, size: int) -> bool:
    """Return whether all parts of a PNG of `size` bytes lie in it; True for what is no PNG.

    OpenCV takes memory for as much as a part declares.
    """
    with path.open("rb") as file:
        if not file.read(8).startswith(PNG):
            return True
        kind = b""
        while kind != b"IEND":
            start = file.read(8)
            if len(start) < 8:
                return False
            length, kind = struct.unpack(">I4s", start)
            if file.seek(length + 4, 1) > size:
                return False
    return True


def decode(path: Path) -> np.ndarray:
    """Return the first page of a picture, (H, W), or (H, W, C) in BGR order; see `check_size`."""
    check_size(path)
    try:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise InputError(path, "not a readable picture", "export it again")
    return pixels


def is_colour(path: Path) -> bool:
    """Return whether a picture file has three channels or more; False where it is not readable."""
    try:
        pixels = decode(path)
    except InputError:
        return False
    return pixels.ndim == 3 and pixels.shape[2] >= 3


def is_stack(path: Path) -> bool:
    """Return whether a picture file is a TIF of several pages; False where it cannot be opened."""
    try:
        return path.suffix.lower() in (".tif", ".tiff") and count_pages(path) > 1
    except OSError:
        return False


def read_pages(path: Path) -> list[np.ndarray]:
    """Return the pages of a picture, of which all but TIF have one; (H, W), or (H, W, C) in BGR order."""
    if not is_stack(path):
        return [decode(path)]
    check_size(path)
    try:
        _, pages = cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pages = ()
    if len(pages) != (expected := count_pages(path)):
        raise InputError(path, f"only {len(pages)} of its {expected} pages are readable", "export it again")
    return list(pages)


def read_slices(paths: Sequence[Path], channel: int | None, needs_colour: bool = False) -> np.ndarray:
    """Return the slices of one case as (D, H, W) of their own integer type: one file each, or one of pages.

    Of RGB files one channel; with None, for masks, whatever their colour, the brightest. Grey files have no
    channels and are taken as they are, unless `needs_colour`.
    """
    slices: list[np.ndarray] = []
    voxels = 0
    for path in paths:
        pages = read_pages(path)
        if len(pages) > 1 and len(paths) > 1:
            raise InputError(
                path, f"has {len(pages)} pages among slices of one", "a multi-page TIF is a case by itself"
            )
        for pixels in pages:
            pixels = _choose_channel(path, pixels, channel, needs_colour)
            if slices and pixels.shape != slices[0].shape:
                raise InputError(path, f"has shape {pixels.shape}, the case's first slice {slices[0].shape}")
            slices.append(pixels)
            voxels += pixels.size
            check_voxels(path, voxels, f"slices of {pixels.shape[1]:,} x {pixels.shape[0]:,} pixels")
    return np.stack(slices)


def _choose_channel(path: Path, pixels: np.ndarray, channel: int | None, needs_colour: bool) -> np.ndarray:
    if pixels.ndim == 2:
        if needs_colour:
            raise InputError(path, "is grey, and T1 and T1ce are the red and blue of RGB slices")
        return pixels
    if channel is None:
        return pixels[..., :3].max(-1)
    if not 0 <= channel < min(pixels.shape[2], 3):
        raise InputError(path, f"has no channel {channel}", "--slice-channel takes 0, 1 or 2")
    return pixels[..., 2 - channel]  # OpenCV reads BGR


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write one slice (H, W) as PNG or TIF."""
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path}: the picture could not be written")


def write_stack(path: Path, pages: list[np.ndarray]) -> None:
    """Write slices (H, W) as the pages of one TIF."""
    if not cv2.imwritemulti(str(path), pages):
        raise OSError(f"{path}: the pages could not be written")

"""PNG and TIF slices: one file per slice, or all pages of one TIF. They carry no geometry."""

import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from runtime.errors import InputError

SLICES_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # PNG and TIF carry no geometry: 1 mm, LPS, stated as unknown
RGB_CHANNELS = {"t1": 0, "flair": 1, "t1ce": 2}  # kaggle_3m: before contrast, FLAIR, after contrast


def count_pages(path: Path) -> int:
    """Return how many pages a TIF file says it has, a cut-off one included; 0 where it is no TIF.

    Only the chain of page directories is followed (TIFF 6.0, section 2; BigTIFF with 8-byte offsets).
    """
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16:
            return 0
        version = struct.unpack_from(f"{order}H", head, 2)[0]
        if version not in (42, 43):
            return 0
        at, count_type, entry_bytes, link_type = (4, "H", 12, "I") if version == 42 else (8, "Q", 20, "Q")
        link = struct.unpack_from(order + link_type, head, at)[0]
        links: set[int] = set()
        while link and link not in links:
            links.add(link)
            file.seek(link)
            count = file.read(struct.calcsize(order + count_type))
            if len(count) < struct.calcsize(order + count_type):
                break
            file.seek(struct.unpack(order + count_type, count)[0] * entry_bytes, 1)
            following = file.read(struct.calcsize(order + link_type))
            if len(following) < struct.calcsize(order + link_type):
                break
            link = struct.unpack(order + link_type, following)[0]
    return len(links)


def is_colour(path: Path) -> bool:
    """Return whether a picture file has three channels or more; False where it is not readable."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return pixels is not None and pixels.ndim == 3 and pixels.shape[2] >= 3


def is_stack(path: Path) -> bool:
    """Return whether a picture file is a TIF of several pages; False where it cannot be opened."""
    try:
        return path.suffix.lower() in (".tif", ".tiff") and count_pages(path) > 1
    except OSError:
        return False


def read_pages(path: Path) -> list[np.ndarray]:
    """Return the pages of a picture, of which all but TIF have one; (H, W), or (H, W, C) in BGR order."""
    if not is_stack(path):
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise InputError(path, "not a readable picture", "export it again")
        return [pixels]
    _, pages = cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)
    if len(pages) != (expected := count_pages(path)):
        raise InputError(path, f"only {len(pages)} of its {expected} pages are readable", "export it again")
    return list(pages)


def read_slices(paths: Sequence[Path], channel: int | None, needs_colour: bool = False) -> np.ndarray:
    """Return the slices of one case as (D, H, W) of their own integer type: one file each, or one of pages.

    Of RGB files one channel; with None, for masks, whatever their colour, the brightest. Grey files have no
    channels and are taken as they are, unless `needs_colour`.
    """
    slices: list[np.ndarray] = []
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

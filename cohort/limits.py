"""What a file may hold at most, and what it says of its size held against what it is: before it is read."""

from runtime.errors import InputError

# In one file, all volumes, pages or colours of it counted: 512 x 512 x 512. The largest head MRI, at 0.5 mm,
# has 0.8 of it. In memory a volume is then 0.5 GiB as float32, and a case takes a few times that.
MOST_VOXELS = 2**27
SPACING_RANGE_MM = (0.001, 1000.0)  # between voxels; beyond it a header is wrong
DEFLATE_RATIO = 1032  # a byte of a .gz or PNG file unpacks to no more (zlib's technical details)


def check_voxels(path: object, count: int, what: str) -> None:
    """Raise InputError where a file declares more voxels than are read; `what` says what it declares."""
    if count > MOST_VOXELS:
        raise InputError(
            path,
            f"declares {what}, and no more than {MOST_VOXELS:,} voxels are read",
            "repair its header, or cut it to the head",
        )


def check_unpacked(path: object, declared: int, size: int, ratio: int = DEFLATE_RATIO) -> None:
    """Raise InputError where a packed file of `size` bytes cannot hold the bytes that it declares."""
    if declared > ratio * size:
        raise InputError(
            path, f"declares {declared:,} bytes, which its {size:,} bytes cannot hold", "fetch it again"
        )

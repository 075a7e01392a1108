"""What a file declares is held against what it is, before it is read; and what no network can use."""

import gzip
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from audit.inputs import read_case
from cohort import limits, nifti
from cohort.cache import prepare_cases
from cohort.check import check_cohort
from cohort.layouts import CaseSource, find_cases
from cohort.nifti import decode_nifti, read_nifti_header, read_nifti_volume
from cohort.pictures import count_pages, is_colour, read_pages, read_sizes, read_slices
from runtime.errors import InputError

FLAIR = np.arange(1, 61, dtype=np.int16).reshape(3, 4, 5)
SEG = np.array([0, 1, 2, 4], np.uint8)[FLAIR % 4]
MIB = 2**20


def header_bytes(shape=(3, 4, 5), dtype=np.int16, **fields):
    """Return the 352 bytes before the voxels of a NIfTI-1 file."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["pixdim"][1:4] = 1
    header["vox_offset"], header["magic"] = 352, b"n+1"
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4)


def write_packed(path: Path, *parts: bytes) -> Path:
    """Write parts as one .gz; only as much is in memory as the parts are."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for part in parts:
            file.write(part)
    return path


def peak_of(work) -> float:
    """Return the MiB that Python allocated at most while `work` ran."""
    tracemalloc.start()
    try:
        work()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak / MIB


# ------------------------------------------------------------------------------------------------------------
# NIfTI
# ------------------------------------------------------------------------------------------------------------


def test_a_gzip_bomb_is_read_no_further_than_its_header_declares(tmp_path, input_error):
    bomb = write_packed(tmp_path / "x.nii.gz", header_bytes(), FLAIR.tobytes(), *[bytes(MIB)] * 64)
    assert bomb.stat().st_size < MIB

    def read() -> None:
        with input_error(bomb, "declares 472 bytes", "more"):
            decode_nifti(bomb)

    assert peak_of(read) < 2


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_header_of_the_largest_size_over_a_small_file_is_refused(tmp_path, name, input_error):
    path, content = tmp_path / name, header_bytes((32767,) * 3) + FLAIR.tobytes()
    (write_packed(path, content) if name.endswith("gz") else path.write_bytes(content))
    for read in (decode_nifti, read_nifti_header):
        with input_error(path, "32767 x 32767 x 32767", f"{limits.MOST_VOXELS:,}"):
            read(path)


def test_a_size_below_the_limit_that_the_file_cannot_hold_is_refused(tmp_path, input_error):
    content = header_bytes((500, 500, 500)) + FLAIR.tobytes()
    (tmp_path / "x.nii").write_bytes(content)
    with input_error("x.nii", "declares 250,000,352 bytes and has 472"):
        decode_nifti(tmp_path / "x.nii")
    packed = write_packed(tmp_path / "x.nii.gz", content)

    def read() -> None:
        with input_error("x.nii.gz", "250,000,352 bytes", "cannot hold"):
            decode_nifti(packed)

    assert peak_of(read) < 2


def test_a_file_cut_short_says_both_sizes(tmp_path, input_error):
    packed = write_packed(tmp_path / "x.nii.gz", header_bytes(), FLAIR.tobytes()[:-2])
    with input_error(packed, "declares 472 bytes", "has 470"):
        decode_nifti(packed)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_padding_after_the_voxels_is_read_over_and_the_checksum_verified(tmp_path, name, input_error):
    path, content = tmp_path / name, header_bytes() + FLAIR.tobytes(order="F") + bytes(1000)
    (write_packed(path, content) if name.endswith("gz") else path.write_bytes(content))
    assert (decode_nifti(path)[0] == FLAIR).all()
    if name.endswith("gz"):
        packed = bytearray(path.read_bytes())
        packed[-5] ^= 1  # of the CRC, or of the size
        path.write_bytes(packed)
        with input_error(path, "damaged"):
            decode_nifti(path)


def test_an_extension_of_gigabytes_is_not_read(tmp_path, input_error):
    extension = struct.pack("<ii", 2**31 - 16, 0)
    start = header_bytes(vox_offset=2**31)[:348] + b"\1\0\0\0" + extension
    packed = write_packed(tmp_path / "x.nii.gz", start, *[bytes(MIB)] * 64)

    def read() -> None:
        with input_error(packed, "damaged"):
            decode_nifti(packed)

    assert peak_of(read) < 2


@pytest.mark.parametrize("dims", [(0, 4, 5), (-3, 4, 5), (3, 4, 0)])
def test_sizes_below_one_are_refused(tmp_path, dims, input_error):
    (tmp_path / "x.nii").write_bytes(header_bytes(dims) + FLAIR.tobytes())
    with input_error("x.nii"):
        decode_nifti(tmp_path / "x.nii")


@pytest.mark.parametrize("size", [1e20, 1e-9, 0.0, np.nan, np.inf, -1e20])
def test_spacings_no_scan_has_are_refused(tmp_path, size, input_error):
    rows = {"srow_x": [-1, 0, 0, 0], "srow_y": [0, -1, 0, 0], "srow_z": [0, 0, size, 0]}
    path = tmp_path / "x.nii"
    path.write_bytes(header_bytes(sform_code=1, **rows) + FLAIR.tobytes())
    with input_error(path, "mm by its header", "0.001 to 1000"):
        read_nifti_volume(path)


def test_spacings_that_scans_have_are_taken(tmp_path, write_nifti):
    for size in (0.05, 30.0):
        path = write_nifti(tmp_path / "x.nii", FLAIR, np.diag([-size, -size, size, 1]))
        assert read_nifti_volume(path)[0].shape == (5, 4, 3)


def test_the_limit_is_what_the_files_are_held_against(tmp_path, write_nifti, monkeypatch, input_error):
    path = write_nifti(tmp_path / "x.nii", FLAIR)
    monkeypatch.setattr(limits, "MOST_VOXELS", FLAIR.size)
    decode_nifti(path)
    monkeypatch.setattr(limits, "MOST_VOXELS", FLAIR.size - 1)
    with input_error(path, "3 x 4 x 5", "no more than 59 voxels"):
        decode_nifti(path)


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------


def write_png(path: Path, width: int, height: int) -> Path:
    """Write a PNG whose header alone declares a size."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    path.write_bytes(content + bytes(5000))
    return path


def write_tif(path: Path, width: int, height: int, tile: int = 0) -> Path:
    """Write a TIF whose directory alone declares a size."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile)] if tile else []
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + bytes(5000))
    return path


@pytest.mark.parametrize("write", [write_png, write_tif])
def test_a_picture_of_sixty_thousand_pixels_is_refused_by_its_header(
    tmp_path, write, input_error, monkeypatch
):
    path = write(tmp_path / f"a_1.{write.__name__[6:]}", 60_000, 60_000)
    monkeypatch.setattr(cv2, "imread", lambda *_: pytest.fail("decoded"))
    with input_error(path, "60,000 x 60,000"):
        read_pages(path)
    assert not is_colour(path)


@pytest.mark.parametrize("write", [write_png, write_tif])
def test_a_picture_that_its_file_cannot_hold_is_refused(tmp_path, write, input_error, monkeypatch):
    path = write(tmp_path / f"a_1.{write.__name__[6:]}", 11_000, 11_000)
    path.write_bytes(path.read_bytes()[:600])
    monkeypatch.setattr(cv2, "imread", lambda *_: pytest.fail("decoded"))
    with input_error(path, "121,000,000 bytes", "cannot hold"):
        read_pages(path)


def write_width(path: Path, kind: int, value: bytes, twice: bool = False) -> Path:
    """Write a TIF of height 5 whose width is of a type of TIFF 6.0, `value` in its four bytes."""
    entries = [struct.pack("<HHI4s", 256, kind, 1, value)]
    entries += [struct.pack("<HHII", 256, 4, 1, 6)] if twice else []
    tags = [(257, 5), (258, 8), (259, 1), (262, 1), (273, 300), (277, 1), (278, 5), (279, 200)]
    entries += [struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", 8) + directory
    path.write_bytes(head.ljust(200, b"\0") + struct.pack("<Q", 40).ljust(100, b"\0") + bytes(200))
    return path


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("kind", range(1, 19))
def test_the_size_of_a_tif_is_the_one_that_is_decoded_whatever_its_type(tmp_path, kind, twice):
    value = struct.pack("<I", 200) if kind in (13, 16, 17, 18) else bytes([40, 0, 0, 0])  # at 200 a 40
    path = write_width(tmp_path / "a_1.tif", kind, value, twice)
    decoded = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if kind in (1, 3, 4, 6, 8, 9):
        assert [(page.width, page.height) for page in read_sizes(path)] == [decoded.shape[::-1]] == [(40, 5)]
    else:
        with pytest.raises(InputError, match="size that is none"):
            read_sizes(path)


def test_a_tile_larger_than_its_picture_counts(tmp_path, input_error):
    path = write_tif(tmp_path / "a_1.tif", 16, 16, tile=16_000)
    with input_error(path):
        read_pages(path)


def test_every_page_of_a_stack_counts(tmp_path, monkeypatch, input_error):
    pages = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (1, 2, 3)]
    path = tmp_path / "a.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert (
        [(page.width, page.height) for page in read_sizes(path)]
        == [(5, 4)] * 3
        == [(5, 4)] * count_pages(path)
    )
    assert len(read_pages(path)) == 3
    monkeypatch.setattr(limits, "MOST_VOXELS", 59)
    with input_error(path, "3 pages of 5 x 4"):
        read_pages(path)


def test_slices_of_a_case_count_together(tmp_path, monkeypatch, write_slices, input_error):
    write_slices(tmp_path, "a", dict.fromkeys(range(4), np.ones((4, 5), np.uint8)))
    paths = sorted(tmp_path.iterdir())
    assert read_slices(paths, None).shape == (4, 4, 5)
    monkeypatch.setattr(limits, "MOST_VOXELS", 79)
    with input_error(paths[3], "no more than 79 voxels"):
        read_slices(paths, None)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_sizes_are_those_that_pillow_writes(tmp_path, mode):
    for suffix in (".png", ".tif"):
        picture = Image.new(mode, (7, 5))
        picture.save(tmp_path / f"x{suffix}")
        (page,) = read_sizes(tmp_path / f"x{suffix}")
        assert (page.width, page.height, page.channels) == (7, 5, len(picture.getbands()))


def test_a_part_of_a_png_that_is_longer_than_the_file_is_not_decoded(tmp_path, input_error, monkeypatch):
    path = tmp_path / "a_1.png"
    Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5)).save(path)
    sound = path.read_bytes()
    at = sound.index(b"IDAT") - 4
    for spoilt in (sound[:at] + b"\x7f\xff\xff\xff" + sound[at + 4 :], sound[:-3], sound[:40]):
        path.write_bytes(spoilt)
        with monkeypatch.context() as patch, input_error(path, "not a readable picture"):
            patch.setattr(cv2, "imread", lambda *_: pytest.fail("decoded"))
            read_pages(path)
    path.write_bytes(sound + b"more")
    assert read_pages(path)[0].shape == (4, 5)


def test_what_is_no_picture_inside_is_refused(tmp_path, input_error):
    (tmp_path / "a_1.png").write_bytes(b"P5 60000 60000 255\n" + bytes(2000))
    with input_error("a_1.png", "neither PNG nor TIF"):
        read_pages(tmp_path / "a_1.png")


def test_check_lists_all_of_them_and_goes_on(tmp_path, write_nifti, write_slices):
    data = tmp_path / "data"
    for case_id in "abcdef":
        for name, array in (("flair", FLAIR), ("seg", SEG)):
            write_nifti(data / case_id / f"{case_id}_{name}.nii.gz", array)
    bad = [data / case_id / f"{case_id}_flair.nii.gz" for case_id in "abc"]
    write_packed(bad[0], header_bytes(), FLAIR.tobytes(), *[bytes(MIB)] * 8)
    write_packed(bad[1], header_bytes((32767,) * 3), FLAIR.tobytes())
    write_nifti(bad[2], FLAIR, np.diag([-1, -1, 1e20, 1]))
    write_nifti(data / "d" / "d_flair.nii.gz", FLAIR.astype(np.complex64))
    write_nifti(data / "e" / "e_flair.nii.gz", FLAIR * 1e300)
    bad += [data / case_id / f"{case_id}_flair.nii.gz" for case_id in "de"]
    write_slices(data / "p", "p", {1: FLAIR[0].astype(np.uint8)}, {1: SEG[0] // 4})
    bad.append(write_png(data / "p" / "p_1.png", 60_000, 60_000))
    _, problems = check_cohort(CaseSource(str(data)), ("flair",))
    assert [found.file for found in problems if found.severity == "error"] == list(map(str, bad))


# ------------------------------------------------------------------------------------------------------------
# Intensities that no network can use
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def head():
    """(16, 16, 4) int16: a ball of 300 to 800 in air of 0."""
    x, y, _ = np.ogrid[-7.5:8.5, -7.5:8.5, 0:4]
    ball = np.broadcast_to(x**2 + y**2 < 36, (16, 16, 4))
    return np.where(ball, np.random.default_rng(0).integers(300, 800, ball.shape), 0).astype(np.int16)


def test_a_sound_head_is_taken(tmp_path, write_nifti, head):
    write_nifti(tmp_path / "a_flair.nii.gz", head)
    (case,) = find_cases(CaseSource(str(tmp_path)))
    assert read_case(case, ("flair",)).brain_voxels.min() >= 64
    assert len(prepare_cases([case], ("flair",), (), tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda head: np.full_like(head, 9), "its flair is constant, 9 everywhere"),
        (lambda head: (1 + head * 1e-30).astype(np.float64), "its flair is constant, 1 everywhere"),
        (lambda head: head * 1e300, "beyond what float32 computes with"),
        (lambda head: (head * 1e35).astype(np.float32), "beyond what float32 computes with"),
        (lambda head: head.astype(np.complex64), "complex64"),
        (lambda head: 1000 - head, "its flair is brightest in air"),
    ],
)
def test_training_audit_and_inference_refuse_what_shows_no_brain(
    tmp_path, write_nifti, head, spoil, words, input_error
):
    path = write_nifti(tmp_path / "a_flair.nii.gz", spoil(head))
    (case,) = find_cases(CaseSource(str(tmp_path)))
    with input_error(path, words):
        prepare_cases([case], ("flair",), (), tmp_path / "cache")
    with input_error(path, words):
        read_case(case, ("flair",))
    _, problems = check_cohort(CaseSource(str(tmp_path)), ("flair",))
    assert "error" in [found.severity for found in problems]


def test_a_second_modality_that_shows_no_brain_is_refused_too(tmp_path, write_nifti, head, input_error):
    write_nifti(tmp_path / "a_flair.nii.gz", head)
    path = write_nifti(tmp_path / "a_t1.nii.gz", np.full_like(head, 3))
    (case,) = find_cases(CaseSource(str(tmp_path)))
    with input_error(path, "its t1 is constant"):
        prepare_cases([case], ("flair", "t1"), (), tmp_path / "cache")


def test_too_little_brain_for_the_network_is_no_finding(tmp_path, write_nifti, head, caplog, input_error):
    small = np.where(np.arange(16)[:, None, None] < 8, head, 0)
    assert 0 < (small > 0).sum((0, 1)).max() < 64
    path = write_nifti(tmp_path / "a_flair.nii.gz", small)
    (case,) = find_cases(CaseSource(str(tmp_path)))
    with input_error(path, "no slice has 64 voxels of brain"):
        read_case(case, ("flair",))
    prepare_cases([case], ("flair",), (), tmp_path / "cache")
    assert "1 of 1 cases: no slice has 64 voxels of brain" in caplog.text


def test_the_size_is_measured_in_either_order_of_bytes(tmp_path):
    for order in "<>":
        header = nib.Nifti1Header(endianness=order)
        header.set_data_shape((3, 4, 5))
        header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
        header["vox_offset"], header["magic"] = 352, b"n+1"
        (tmp_path / "x.nii").write_bytes(header.binaryblock + bytes(4 + 120))
        assert nifti.measure_declared(tmp_path / "x.nii") == 472
    nib.save(nib.Nifti2Image(FLAIR, np.eye(4)), tmp_path / "y.nii")
    assert nifti.measure_declared(tmp_path / "y.nii") == 544 + 120

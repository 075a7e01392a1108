"""A small mutator: the same number gives the same damage, on every machine."""

import json
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

INTERESTING = (b"", b"\0", b"-1", b"0", b"1e999", b"NaN", b"9" * 400, b"null", b"[]", b"{}", b'""', b"true")
INTERESTING += (b'"', b"\n", b"\r", b",,,,", b"\xff\xfe", b"\xef\xbb\xbf", b"=1+1", b"../../x", b"[" * 3000)
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1)
PLAIN = (None, True, False, 0, -1, 1, 3, 0.5, 1e308, -1e-300, 10**30, "", "x", "../../x", "a\nb", [], {})
PLAIN += ([1], ["a"], {"a": 1}, [[]], float("nan"), float("inf"))


def mutate_bytes(content: bytes, other: bytes, rng: random.Random, head: int = 0) -> bytes:
    """Return content with one to four pieces of damage; half of them in its first `head` bytes, if any.

    `other` is a second file, of which pieces may be put in.
    """
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = min(head, len(damaged)) if head and rng.random() < 0.5 else len(damaged)
        at = rng.randrange(size) if size else 0
        length = rng.choice((1, 2, 4, 8, 32, max(1, len(damaged) // 3)))
        kind = rng.randrange(9)
        if kind == 0 and size:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            damaged[at] = rng.randrange(256)
        elif kind == 2:
            del damaged[at : at + length]
        elif kind == 3:
            damaged[at:at] = damaged[at : at + length]
        elif kind == 4:
            damaged[at : at + rng.choice((0, length))] = rng.choice(INTERESTING)
        elif kind == 5:
            del damaged[at:]
        elif kind == 6 and other:
            start = rng.randrange(len(other))
            damaged[at : at + length] = other[start : start + length]
        elif kind == 7:
            number = rng.choice(NUMBERS)
            packed = struct.pack(rng.choice("<>") + "I", number)
            packed = (
                packed[: rng.choice((1, 2, 4))] if rng.random() < 0.5 else packed[-rng.choice((1, 2, 4)) :]
            )
            damaged[at : at + len(packed)] = packed
        else:
            value = rng.choice((0.0, -1.0, 1e30, 1e-30, float("nan"), float("inf")))
            damaged[at : at + 4] = struct.pack("<f", value)
    return bytes(damaged)


def mutate_plain(content: Any, rng: random.Random) -> Any:
    """Return plain values with one to three of them, at any depth, replaced, doubled, renamed or gone."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            return rng.choice(PLAIN)
        parent, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[f"{key}{rng.choice(('x', ' ', chr(0)))}"] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, parent[key])
        else:
            parent[key] = json.loads(json.dumps(rng.choice(PLAIN)))
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(content, dict | list):
        return
    keys = list(content) if isinstance(content, dict) else range(len(content))
    for key, value in [(key, content[key]) for key in keys]:
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def mend_png(content: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums of what they now hold, so that a reader goes on."""
    mended, at = bytearray(content), 8
    while at + 12 <= len(mended):
        length = int.from_bytes(mended[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(mended[at + 4 : end]))
        at = end + 4
    return bytes(mended)

"""Seeded damage for readers of files: what one of them does with it must be defined.

for content in fuzz.mutations(good, 300):
    path.write_bytes(content)
    with fuzz.bounded(megabytes=64):
        ...  # the project's named error, or right values
"""

import contextlib
import tracemalloc

import numpy as np

# Bytes that mean something to many formats: ends, signs, nesting, lengths, numbers.
TOKENS = (
    b"\0", b"\xff", b"\x80", b"-", b"9" * 40, b"1e999", b"NaN", b"null", b"[", b"{", b'"', b"\n",
    b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x7f" * 8, b"[" * 2000, b"..", b"\xed\xa0\x80",
)  # fmt: skip


def mutations(content, count, seed=0):
    """`count` damaged versions of the bytes: cut, flipped, replaced, moved, repeated."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(damaged) + 1))
            size = int(rng.integers(1, 24))
            match int(rng.integers(6)):
                case 0:
                    del damaged[at:]
                case 1:
                    damaged[at : at + 1] = bytes([int(rng.integers(256))])
                case 2:
                    token = TOKENS[int(rng.integers(len(TOKENS)))]
                    damaged[at : at + len(token)] = token
                case 3:
                    damaged[at:at] = TOKENS[int(rng.integers(len(TOKENS)))]
                case 4:
                    del damaged[at : at + size]
                case 5:
                    damaged[at:at] = damaged[at : at + size]
        yield bytes(damaged)


@contextlib.contextmanager
def bounded(megabytes):
    """Fails when more than this is allocated inside."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= megabytes * 2**20, f"{peak / 2**20:.0f} MiB were allocated at once"

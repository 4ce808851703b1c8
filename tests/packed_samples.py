"""Random packed weights for tests of foreign formats."""

import numpy as np

from linocut.formats.packed import PackedTensor, pack


def sample(encoding: str, shape: tuple[int, int] = (6, 768), seed: int = 0, tied: bool = False) -> PackedTensor:
    """A packed weight with scales over all of float16's range, a group of zeros if ternary; with `tied`, scales are
    shared by pairs of groups."""
    rng = np.random.default_rng(seed)
    o, n = shape
    if encoding == "affine4":
        scales = (2.0 ** rng.uniform(-12, 4, (o, n // 64))).astype(np.float16)
        return pack(rng.integers(0, 16, shape), scales, encoding, rng.integers(0, 16, scales.shape))
    if encoding == "int8":
        scales = (2.0 ** rng.uniform(-24, 8, (o, n // 128))).astype(np.float16)
        return pack(rng.integers(-127, 128, shape), scales, encoding)
    values = rng.choice([-1, 1], shape) if encoding == "binary" else rng.integers(-1, 2, shape)
    if encoding == "ternary":
        values[1, 128:256] = 0
    scales = (2.0 ** rng.uniform(-24, 14.9, (o, n // 128))).astype(np.float16)
    if tied:
        scales[:, 1::2] = scales[:, 0::2]
    return pack(values, scales, encoding)


def assert_same(found: PackedTensor, expected: PackedTensor) -> None:
    """Codes, scales and zero points are equal bit for bit."""
    assert (found.encoding, found.shape) == (expected.encoding, expected.shape)
    for suffix, part in expected.parts().items():
        assert found.parts()[suffix].tobytes() == part.tobytes(), suffix

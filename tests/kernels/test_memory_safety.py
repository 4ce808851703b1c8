"""Decoders are total and stay inside their tensors: any byte decodes, nothing past the end is touched.

The guard-page tests run in a process of their own, since what they look for is a crash.
"""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linocut.formats.packed import ENCODINGS, decode_rows, groups, row_bytes
from linocut.kernels import dispatch, native

GUARD = '''
import ctypes, mmap, sys
import numpy as np, torch
from linocut.formats.packed import groups, row_bytes
from linocut.kernels import dispatch, native
from linocut.kernels.fusible import MULTIPLIED

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE

def against_guard(array):
    """A copy of `array` whose last byte is the last byte before a page that may not be touched."""
    size = -(-array.nbytes // PAGE) * PAGE
    base = libc.mmap(None, size + PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(base + size, PAGE, 0) == 0
    raw = (ctypes.c_uint8 * array.nbytes).from_address(base + size - array.nbytes)
    copy = np.frombuffer(raw, dtype=np.uint8).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return torch.from_numpy(copy)

def run(encoding, n, rows):
    rng = np.random.default_rng(n)
    codes = against_guard(rng.integers(0, 256, (rows, row_bytes(encoding, n)), dtype=np.uint8))
    scales = against_guard(rng.uniform(0.1, 1, (rows, groups(encoding, n))).astype(np.float16))
    zeros = None
    if encoding == "affine4":
        zeros = against_guard(rng.integers(0, 256, (rows, (groups(encoding, n) + 1) // 2), dtype=np.uint8))
    module, line = native.status()
    assert module is not None, line
    wanted = None
    for name in [name for name, reason in module.variants() if not reason]:
        out = against_guard(np.zeros((rows, n), np.float32))
        module.decode(codes, scales.view(torch.int16), zeros, encoding, n, out, name)
        wanted = out.clone() if wanted is None else wanted
        assert torch.equal(out, wanted)
        half = against_guard(np.zeros((rows, n), np.int16))
        module.decode(codes, scales.view(torch.int16), zeros, encoding, n, half, name)
    for kernel in ("reference", "generic", "native"):
        with dispatch.use_kernel(kernel):
            dispatch.linear(torch.ones(2, n), codes, scales, zeros, encoding)
    if encoding in MULTIPLIED:
        products(module, (codes, scales.view(torch.int16), zeros, encoding, n), rows, rng)

def products(module, weight, rows, rng):
    """Both ends of the int8 product: floats to activations, activations to floats, in every variant."""
    n = weight[-1]
    for m in (1, 7):
        x = rng.standard_normal((m, n), dtype=np.float32)
        values = against_guard(np.zeros((m, n + module.ACTIVATION_PADDING), np.int8))
        steps = against_guard(np.zeros((m, n // 128), np.float32))
        sums = against_guard(np.zeros((m, n // 64), np.int32))
        half = against_guard((x.view(np.uint32) >> 16).astype(np.int16))
        module.quantize_activations(half, values, steps, sums, n, 0, 1)
        module.quantize_activations(against_guard(x), values, steps, sums, n, 0, 1)
        wanted = None
        for name in [name for name, _, reason in module.gemm_variants() if not reason]:
            y = against_guard(np.zeros((m, rows), np.float32))
            module.gemm(values, steps, sums, *weight, y, 1, name)
            wanted = y.clone() if wanted is None else wanted
            assert torch.equal(y, wanted), name
            y = against_guard(np.zeros((m, rows), np.int16))
            module.gemm(values, steps, sums, *weight, y, 1, name)

if sys.argv[1] == "overrun":
    tensor = against_guard(np.zeros(16, np.uint8))
    ctypes.string_at(tensor.data_ptr(), 17)
for n in range(128, 1408, 128):
    for rows in (1, 3, 33):
        run(sys.argv[1], n, rows)
print("stayed inside")
'''


def guarded(argument: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", GUARD, argument], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not hasattr(signal, "SIGSEGV") or sys.platform != "linux", reason="mprotect as on Linux")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_kernel_reads_or_writes_past_the_end(encoding):
    done = guarded(encoding)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    assert "stayed inside" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
def test_the_guard_page_would_notice():
    assert guarded("overrun").returncode == -signal.SIGSEGV


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_alike_everywhere(data):
    """Random bytes, invalid trit bytes among them, give the same weights in every implementation of the format."""
    encoding = data.draw(st.sampled_from(ENCODINGS))
    n = 128 * data.draw(st.integers(1, 11))
    rows = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    codes = rng.integers(0, 256, (rows, row_bytes(encoding, n)), dtype=np.uint8)
    scales = rng.integers(1, 0x7C00, (rows, groups(encoding, n)), dtype=np.uint16).view(np.float16)
    zeros = rng.integers(0, 256, (rows, groups(encoding, n) // 2), dtype=np.uint8) if encoding == "affine4" else None
    wanted = torch.from_numpy(decode_rows(codes, scales, zeros, encoding, n))
    packed = (torch.from_numpy(codes), torch.from_numpy(scales), None if zeros is None else torch.from_numpy(zeros))
    for kernel in ("reference", "native"):
        with dispatch.use_kernel(kernel):
            assert torch.equal(dispatch.dequantize(*packed, encoding, n), wanted), kernel


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_byte_and_every_scale_is_survived(encoding):
    """All 256 code bytes and NaN, infinite, negative, zero and subnormal scales: odd values, no harm."""
    n = 1280
    width = row_bytes(encoding, n)
    codes = torch.arange(256, dtype=torch.uint8).repeat(width)[: 4 * width].view(4, -1)
    special = torch.tensor([0x7E00, 0x7C00, 0xFC00, 0x0000, 0x8000, 0x0001, 0xBC00, 0x7BFF]).to(torch.int16)
    scales = special.repeat(4 * groups(encoding, n))[: 4 * groups(encoding, n)].view(4, -1).view(torch.float16)
    zeros = torch.full((4, groups(encoding, n) // 2), 0x5A, dtype=torch.uint8) if encoding == "affine4" else None
    found = {}
    for kernel in ("reference", "native"):
        with dispatch.use_kernel(kernel):
            found[kernel] = dispatch.dequantize(codes, scales, zeros, encoding, n)
            dispatch.linear(torch.ones(3, n, dtype=torch.bfloat16), codes, scales, zeros, encoding)
    assert torch.equal(found["reference"].nan_to_num(7.0), found["native"].nan_to_num(7.0))


def test_the_native_module_checks_shapes_itself():
    module, line = native.status()
    assert module is not None, line
    codes = torch.zeros(2, row_bytes("ternary", 256), dtype=torch.uint8)
    scales = torch.ones(2, 2, dtype=torch.float16).view(torch.int16)
    out = torch.empty(2, 256)
    module.decode(codes, scales, None, "ternary", 256, out)
    wrong = [
        (codes[:, :-1].contiguous(), scales, None, "ternary", 256, out),
        (codes, scales[:1], None, "ternary", 256, out),
        (codes, scales, codes, "ternary", 256, out),
        (codes, scales, None, "ternary", 384, out),
        (codes, scales, None, "ternary", 0, out),
        (codes, scales, None, "ternary", 256, out[:1]),
        (codes, scales, None, "ternary", 256, out[:, :128].contiguous()),
        (codes, scales, None, "octal", 256, out),
        (codes, scales, None, "affine4", 256, out),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"must|belong"):
            module.decode(*arguments)
    with pytest.raises(TypeError):
        module.decode(codes, scales, None, "ternary", 256, torch.empty(256, 2).T)
    with pytest.raises(ValueError, match="no decoder variant"):
        module.decode(codes, scales, None, "ternary", 256, out, "avx9000")

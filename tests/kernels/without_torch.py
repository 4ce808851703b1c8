"""A program for CPUs that torch may not know: prints which variants the C++ module chose, and a hash of what they gave.

Takes the module's path; needs nothing outside the standard library, so that it starts within an emulator in a second.
"""

import hashlib
import importlib.util
import json
import random
import sys


def load(path: str):
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    native = load(sys.argv[1])
    generator = random.Random(3)
    m, n, rows = 5, 768, 20
    digest = hashlib.sha256()

    def array(kind: str, shape: list[int], data: bytes | None = None) -> memoryview:
        size = {"b": 1, "B": 1, "h": 2, "f": 4, "i": 4}[kind] * shape[0] * shape[1]
        return memoryview(bytearray(data if data is not None else size)).cast(kind, shape)

    x = array("f", [m, n])
    for t in range(m):
        for k in range(n):
            x[t, k] = generator.uniform(-3, 3)
    values = array("b", [m, n + native.ACTIVATION_PADDING])
    scales, sums = array("f", [m, n // 128]), array("i", [m, n // 64])
    native.quantize_activations(x, values, scales, sums, n, 0, 2)
    for each in (scales, sums):
        digest.update(each.tobytes())
    for encoding, group in (("binary", 128), ("ternary", 128), ("affine4", 64)):
        size = native.row_bytes(encoding, n)
        codes = array("B", [rows, size], generator.randbytes(rows * size))
        steps = array("h", [rows, n // group], b"\x00\x2c" * (rows * (n // group)))
        zeros = None
        if encoding == "affine4":
            zeros = array("B", [rows, n // 128], generator.randbytes(rows * (n // 128)))
        y, w = array("f", [m, rows]), array("f", [rows, n])
        native.gemm(values, scales, sums, codes, steps, zeros, encoding, n, y, 2)
        native.decode(codes, steps, zeros, encoding, n, w)
        digest.update(y.tobytes())
        digest.update(w.tobytes())
    # Row operations give other bits where there is no fused multiplication and addition: it is enough that they run.
    gate = array("f", [m, 128])
    native.swiglu(gate, gate, values, scales, sums, n, 128, 2)
    kinds = {"decoder": native.variants, "attention": native.attention_variants, "product": native.gemm_variants}
    chosen = {kind: next(name for name, *_, why_not in every() if not why_not) for kind, every in kinds.items()}
    print(json.dumps(chosen | {"digest": digest.hexdigest()}))


main()

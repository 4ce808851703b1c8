"""Every kernel compiles for the GPUs that it is meant for, which needs no GPU: ptxas comes with Triton.

In a process of its own, since Triton decides at import whether it interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = '''
import subprocess
import sys
import tempfile
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from linocut.kernels.gpu import accuracy, columns, decode, gemm, group_norm, routes, rows, runtime
from linocut.kernels.gpu.routes import Shape

capability = int(sys.argv[1])
runtime.why_not = lambda device: None
runtime.interpreted = lambda: False
runtime.capability = lambda device="cuda": divmod(capability, 10)


def build(kernel, given, warps=4, stages=3, **options):
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, str):
            signature[name] = value
            if value[0] == "*" or name in ("o", "n", "stride_y", "pixels", "channels"):
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": warps, "num_stages": stages, **options})


def spilled(found):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    assert "STACK:" in said, said
    return "STACK:0 " not in said


KINDS = {0: "*i8", 1: "*i8", 2: "*fp8e4nv", 3: "*bf16"}
weight = {"codes": "*u8", "scales": "*fp16", "row_scales": "*fp32", "o": "i32", "n": "i32", "groups": "i32",
          "row_bytes": "i32", "ROWS": 32, "GROUPS": 32, "LAST_GROUPS": 4, "LAST_BYTES": 103}
for kind, out in ((0, "*bf16"), (0, "*fp16"), (1, "*i8"), (1, "*fp8e4nv"), (2, "*i8")):
    if out == "*fp8e4nv" and capability < 89:
        continue
    build(decode._binary, {**weight, "out": out, "KIND": kind})
    build(decode._ternary, {**weight, "out": out, "KIND": kind})
build(decode._affine4, {**weight, "zeros": "*u8", "out": "*bf16"})
build(decode._int8, {**weight, "out": "*bf16"})
for kind, out in KINDS.items():
    if out == "*fp8e4nv" and capability < 89:
        continue
    row = {"x": "*fp32", "y": "*bf16", "gate": "*bf16", "value": "*bf16", "attended": "*bf16", "factor": "*fp32",
           "shift": "*fp32", "out": out, "scales": "*fp32", "stride_scales": "i32", "n": "i32", "stride_x": "i32",
           "stride_y": "i32", "stride_attended": "i32", "stride": "i32", "first": "i32", "hidden": "i32",
           "eps": "fp32", "ADDED": True, "KIND": kind}
    build(rows._quantize, {**row, "WIDTH": 4096}, enable_fp_fusion=False)
    build(rows._normalize, {**row, "gate": "*fp32", "WIDTH": 4096}, enable_fp_fusion=False)
    build(rows._gated, {**row, "WIDTH": 16384}, 16, enable_fp_fusion=False)
build(rows._turn, {"qkv": "*bf16", "norm_q": "*fp32", "norm_k": "*fp32", "cos": "*fp32", "sin": "*fp32",
                   "stride": "i32", "width": "i32", "heads": "i32", "first": "i32", "eps": "fp32", "HEADS": 32,
                   "K": 128})
for channels in (128, 512):
    given = {"x": "*bf16", "y": "*bf16", "sums": "*fp32", "scale": "*fp32", "shift": "*fp32", "pixels": "i32",
             "channels": "i32", "parts": "i32", "CHANNELS": channels, "ROWS": group_norm._VALUES // channels,
             "TILES": group_norm._TILES, "SILU": True}
    for kernel in (group_norm._moments, group_norm._scaled):
        assert not spilled(build(kernel, given)), kernel
floats = dict.fromkeys(("x", "before", "scale", "upper", "square", "codes", "errors", "moved"), "*fp32")
strides = dict.fromkeys(("o", "stride_x", "stride_before", "stride_scale", "stride_upper", "stride_square"), "i32")
for binary in (True, False):
    given = {**floats, **strides, "ROWS": columns._ROWS, "GROUP": 128, "BINARY": binary}
    for kernel in (columns._propagate, columns._descend):
        assert not spilled(build(kernel, given, enable_fp_fusion=False)), kernel
built = 0
for name in accuracy.KIND if capability >= 80 else ():
    shape = Shape(64 if name in routes.DECODING else 1536, 3072, 3072, "ternary")
    if routes.why_not(name, shape, "cuda") is not None:
        continue
    for tile in routes.tiles(name, shape, "cuda"):
        if tile is None:
            continue
        limit = {} if tile.registers is None else {"maxnreg": tile.registers}
        cut = {"BLOCK_M": tile.block_m, "BLOCK_O": tile.block_o, "TOGETHER": tile.together, "GROUPS": 0, "m": "i32",
               "o": "i32", "n": "i32", "stride_y": "i32", "stride_scales": "i32", "x_scales": "*fp32", "y": "*bf16"}
        value = "fp8e4nv" if name == "fp8" else "i8"
        if name in routes.DECODING:
            given = {"x": "*i8"} if name == "packed" else {"x": "*bf16", "x_scales": None}
            for ternary in (True, False):
                found = build(gemm._packed_product, {
                    **cut, **given, "codes": "*u8", "w_scales": "*fp16", "TERNARY": ternary, "FLOATS": name == "fused",
                    "row_bytes": "i32", "last_bytes": "i32"}, tile.warps, tile.stages)
        else:
            x, w = (f"tensordesc<{value}[{side}, 128]>" if tile.bulk else f"*{value}"
                    for side in (tile.block_m, tile.block_o))
            scales = {"rows": 1, "folded": 2}.get(name, 0)
            found = build(gemm._product, {**cut, "x": x, "w": w, "w_scales": "*fp32", "SCALES": scales,
                                          "FP8": name == "fp8", "BULK": tile.bulk, "STAGES": tile.stages}, tile.warps,
                          tile.stages, **limit)
        code = found.asm["ptx"]
        tensor_cores = "wgmma" if capability == 90 else "mma.sync"
        assert tensor_cores in code or (name in routes.DECODING and "mma.sync" in code), (name, tile)
        assert found.metadata.shared <= (227 if capability == 90 else 99) * 1024, (name, tile, found.metadata.shared)
        assert capability < 90 or not spilled(found), (name, tile)
        built += 1
print("built", built)
'''


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 89, 90])
def test_kernels_compile(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE, str(capability)], capture_output=True, text=True, check=False,
                          env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert capability < 80 or int(done.stdout.split("built ")[1]) > 8

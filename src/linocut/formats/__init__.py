"""Bytes: the packed layout, safetensors files, model folders. numpy only, no torch.

packed.py      binary, ternary, affine4 and int8 weights as bytes: pack, unpack, dequantize, validate
header.py      the safetensors header, read as a security boundary
writer.py      atomic and resumable writing
checkpoint.py  memory-mapped reading; re-exports the writer
folder.py      model folders: embedded, local, from the hub
names.py       the original FLUX.2 single file under diffusers' names
"""

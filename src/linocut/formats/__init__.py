"""Bytes: the packed layout, safetensors files, model folders. numpy only, no torch.

packed.py      binary, ternary, affine4 and int8 weights as bytes: pack, unpack, dequantize, validate
header.py      the safetensors header, read as a security boundary
writer.py      atomic and resumable writing
checkpoint.py  memory-mapped reading; re-exports the writer
folder.py      model folders: embedded, local, from the hub
layouts.py     where the parts of a model lie, and which files it needs
hub.py         names and lists of files on the Hugging Face hub, and what is in the cache
fetch.py       fetching: resumable, checked
names.py       the original FLUX.2 single file under diffusers' names
"""

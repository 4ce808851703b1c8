"""The networks on MLX, for the GPU of Apple machines: the same weights, configs and pictures as `linocut.models`.

    runtime.py      whether mlx can be used and on what it computes; the only file that can be imported without mlx
    layers.py       weights out of a checkpoint, packed products, norms
    flux2.py, text_encoder.py, autoencoder.py      one network each
    selfcheck.py    packed products against the reference, for `linocut doctor`

Nothing here knows torch's networks, and nothing outside imports these files before mlx was chosen
(`linocut.pipeline.device`). What is not a network (noise, sampler, modulations, previews) is computed as everywhere.
"""

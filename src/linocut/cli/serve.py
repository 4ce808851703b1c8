"""`linocut serve`: the web studio and the HTTP API."""

import importlib.util
from pathlib import Path
from typing import Any

import click

from linocut.errors import UsageError

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "segno": "segno"}


@click.command()
@click.option("-m", "--model", "models", multiple=True, metavar="MODEL",
              help="A model to offer: embedded, embedded-binary, a folder, or a name on the Hugging Face hub; "
              "repeatable, the first is the default. Default: both embedded ones.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Where to listen; 0.0.0.0 lets other devices in, who then need the token.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes any free one.")
@click.option("--token", envvar="LINOCUT_TOKEN", metavar="TEXT",
              help="What clients must show; default: a random one, and none on 127.0.0.1. Also LINOCUT_TOKEN, which "
              "other users of this machine cannot read.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Another name of this server; repeatable.")
@click.option("--tls", is_flag=True, help="Serve https with a certificate made for this machine.")
@click.option("--home", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where the gallery is kept. Default: LINOCUT_HOME, else ~/.local/share/linocut.")
@click.option("--device", "devices", multiple=True, metavar="DEVICE",
              help="cpu, cuda, cuda:1, mlx, ...; repeatable, each draws its own job. Default: as generate's auto.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Number format of the computation.")
@click.option("--threads", type=click.IntRange(1, 4096), metavar="N", help="CPU threads.")
@click.option("--idle", type=click.FloatRange(1, 10**7), default=600, show_default=True, metavar="SECONDS",
              help="Let models leave memory when nothing was drawn for so long.")
@click.option("--max-queue", type=click.IntRange(1, 10_000), default=64, show_default=True, metavar="N",
              help="Jobs that may wait.")
@click.option("--max-side", type=click.IntRange(32, 16384), default=4096, show_default=True, metavar="PX",
              help="Longest side of a picture.")
@click.option("--open", "open_browser", is_flag=True, help="Open the studio in the browser.")
def command(models: tuple[str, ...], host: str, token: str | None, home: Path | None, hosts: tuple[str, ...],
            devices: tuple[str, ...], idle: float, max_queue: int, max_side: int, open_browser: bool,
            **options: Any) -> None:
    """Serve the web studio and an HTTP API that OpenAI's clients speak.

    \b
    linocut serve
    linocut serve --host 0.0.0.0 --tls
    linocut serve --model embedded --model ./klein-ternary
    """
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if options["tls"] and importlib.util.find_spec("cryptography") is None:
        missing.append("cryptography")
    if missing:
        raise UsageError(f"serving needs {', '.join(missing)}; install linocut with the extra 'serve': "
                         "pip install 'linocut[serve]'")
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token or len(token) < 8):
        raise UsageError("a token must be at least 8 printable ASCII characters without spaces")
    from linocut.cli._fetch import bring
    from linocut.pipeline.device import choose
    from linocut.server.settings import Settings, default_home

    for model in models:
        bring(model)

    settings = Settings(home=(home or default_home()).absolute(), host=host, token=token,
                        hosts=tuple(name.lower() for name in hosts), idle_seconds=idle, most_queued=max_queue,
                        devices=tuple(choose(name).name for name in devices or ("auto",)), largest_side=max_side,
                        **options)
    from dataclasses import replace

    from linocut.server.serve import serve
    serve(replace(settings, models=models) if models else settings, open_browser)

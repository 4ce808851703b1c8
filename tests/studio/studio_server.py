"""A real `linocut serve` for browsers to visit, and the windows that they visit it in."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
SIZES = {"phone": {"width": 360, "height": 740}, "wide": {"width": 1440, "height": 900},
         "zoomed": {"width": 720, "height": 450}}  # what is left of the wide one at 200 %


def start(home: Path, *options: str) -> tuple["subprocess.Popen[str]", str]:
    """Start `linocut serve` on a free port with its data in `home`; returns the process and its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "linocut", "serve", "--port", "0", "--home", str(home), *options],
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        if select.select([process.stdout], [], [], 0.2)[0]:
            said += process.stdout.readline()
        if found := re.search(r"serves at (http://\S+)/", said):
            return process, found[1]
    process.kill()
    raise AssertionError(f"linocut serve did not start: {said}")


def stop(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise

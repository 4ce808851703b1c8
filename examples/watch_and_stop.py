"""Save a preview after each step, and stop after some seconds: python examples/watch_and_stop.py [SECONDS] [MODEL]"""

import sys
import threading

import linocut
from linocut.errors import Cancelled

seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
pipe = linocut.Pipeline.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else "embedded")
stop = threading.Event()
timer = threading.Timer(seconds, stop.set)
timer.start()


def on_step(pipe, i, sigma, state):
    state["preview"].save(f"step{i + 1}.png")  # computed only because it is asked for
    print(f"step {i + 1}: sigma {sigma:.3f}")


try:
    pipe("a green fox", callback_on_step_end=on_step, cancel=stop).images[0].save("fox.png")
except Cancelled:
    print("stopped")
finally:
    timer.cancel()

"""What the programs in Python have in common: the nonce, steps, and the last line."""

import os

NONCE = os.urandom(8).hex()


def work(size):
    """`size`, or WORK percent of it."""
    return max(1, size * int(os.environ.get("WORK", "100")) // 100)


def say(line):
    print(line, flush=True)


class Steps:
    """Numbers what is done. A step that was lost or done twice would be seen in the lines of all lives together."""

    def __init__(self):
        self.done = 0
        say(f"nonce {NONCE}")

    def next(self):
        self.done += 1
        if self.done == 1:
            say("ready")
        say(f"step {self.done}")


def finish(nonce, result):
    """The nonce as it was kept somewhere else must be the one of this process."""
    if nonce != NONCE:
        say(f"differs: the nonce is {NONCE}, and was {nonce}")
        raise SystemExit(1)
    say(f"OK {NONCE} {result}")

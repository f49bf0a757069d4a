#!/usr/bin/python3
"""fetch.py PORT: a connection that is kept alive, to a server outside of the container: at the gateway, wherever it is now.

The other end of a connection does not move. So it must be reset, at once and by name, and a new one must work.
"""

import hashlib
import http.client
import sys
import time

from program import NONCE, Steps, finish, work


def gateway():
    """As the kernel's table of routes has it."""
    with open("/proc/net/route") as table:
        for line in table:
            words = line.split()
            if words[1] == "00000000":
                return ".".join(str(byte) for byte in bytes.fromhex(words[2])[::-1])
    raise SystemExit("differs: there is no gateway")


def main():
    port = int(sys.argv[1])
    steps = Steps()
    digest = hashlib.sha256()
    connection, resets = None, 0
    for step in range(work(1500)):
        while True:
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(gateway(), port, timeout=60)
                connection.request("GET", f"/{NONCE}/{step}")
                body = connection.getresponse().read()
                break
            except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
                # A timeout is none of these: it ends the program.
                resets += 1
                connection = None
                time.sleep(0.01)
        if body != f"/{NONCE}/{step}".encode() * 100:
            raise SystemExit(f"differs: the answer to {step} was {body[:60]}")
        digest.update(b"%d" % (step * len(body)))
        work_on = b"%d" % step
        for _ in range(20000):
            work_on = hashlib.sha256(work_on).digest()
        digest.update(work_on)
        steps.next()
    print(f"resets {resets}", flush=True)
    finish(NONCE, digest.hexdigest())


if __name__ == "__main__":
    main()

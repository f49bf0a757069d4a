#!/usr/bin/python3
"""Redis with an append-only file, forks that rewrite it, and clients on the loopback and on a socket with a path."""

import hashlib
import os
import socket
import subprocess
import time

from program import NONCE, Steps, finish, work

FOLDER = "/var/tmp/redis"
PATH = f"{FOLDER}/socket"


class Client:
    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(600)
        self.socket.connect(address)
        self.file = self.socket.makefile("rb")

    def ask(self, *commands):
        """Several commands in one go, and their answers."""
        out = b""
        for words in commands:
            words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
            out += b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self.socket.sendall(out)
        return [self.answer() for _ in commands]

    def answer(self):
        line = self.file.readline()
        kind, rest = line[:1], line[1:].strip()
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self.file.read(size + 2)[:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        raise SystemExit(f"differs: redis said {line}")


def start():
    server = subprocess.Popen(
        ["redis-server", "--dir", FOLDER, "--appendonly", "yes", "--save", "", "--bind", "127.0.0.1", "--unixsocket", PATH,
         "--auto-aof-rewrite-min-size", "1mb", "--auto-aof-rewrite-percentage", "50", "--logfile", f"{FOLDER}/log"])
    for _ in range(600):
        try:
            return server, [Client(PATH), Client(("127.0.0.1", 6379))]
        except OSError:
            time.sleep(0.05)
    raise SystemExit("differs: redis does not start")


def digest_of(client):
    """Over all keys and values."""
    digest = hashlib.sha256()
    keys, = client.ask(("KEYS", "*"))
    for key in sorted(keys):
        if key == b"nonce":
            continue
        kind, = client.ask(("TYPE", key))
        value, = client.ask(("GET", key) if kind == b"string" else ("LRANGE", key, 0, -1))
        digest.update(repr((key, value)).encode())
    return digest.hexdigest()


def main():
    steps = Steps()
    os.mkdir(FOLDER)
    server, clients = start()
    clients[0].ask(("SET", "nonce", NONCE))
    for step in range(1, work(150) + 1):
        for number, client in enumerate(clients):
            commands = []
            for turn in range(2000):
                commands.append(("INCR", f"count-{number}-{turn % 50}"))
                commands.append(("SET", f"value-{number}-{turn}", f"{step} {turn} " * 8))
                commands.append(("RPUSH", f"list-{number}-{turn % 10}", step))
                commands.append(("LTRIM", f"list-{number}-{turn % 10}", -500, -1))
            answers = client.ask(*commands)
            # Each INCR is done once, and each in its turn.
            for turn in range(2000):
                expected = (step - 1) * 40 + turn // 50 + 1
                if answers[turn * 4] != expected:
                    raise SystemExit(f"differs: step {step} counts {answers[turn * 4]}, expected {expected}")
        steps.next()
    digest = digest_of(clients[1])
    nonce, = clients[0].ask(("GET", "nonce"))
    # What is in the append-only file is all there is.
    server.terminate()
    server.wait(600)
    server, clients = start()
    again = digest_of_loaded(clients)
    if again != digest:
        raise SystemExit(f"differs: after a restart of redis it is {again}, and was {digest}")
    server.terminate()
    server.wait(600)
    finish(nonce.decode(), digest)


def digest_of_loaded(clients):
    for _ in range(600):
        try:
            return digest_of(clients[0])
        except SystemExit as error:
            if "LOADING" not in str(error):
                raise
            time.sleep(0.1)
    raise SystemExit("differs: redis does not load its file")


if __name__ == "__main__":
    main()

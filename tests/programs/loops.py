#!/usr/bin/python3
"""asyncio: a server and its clients in one process, over TCP on the loopback and over a socket with a path."""

import asyncio
import hashlib
import os

from program import NONCE, Steps, finish, work

CLIENTS, TURNS = 20, 20
PATH = "/var/tmp/loops.sock"


async def serve(reader, writer):
    """Answers each block with what it makes of it and of all before."""
    state = hashlib.sha256()
    try:
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            state.update(await reader.readexactly(size))
            writer.write(state.digest() * 64)
            await writer.drain()
    except asyncio.IncompleteReadError as end:
        if end.partial:
            raise
    finally:
        writer.close()


class Client:
    def __init__(self, number):
        self.number = number
        self.expected = hashlib.sha256()

    async def connect(self, port):
        if self.number % 2:
            self.reader, self.writer = await asyncio.open_unix_connection(PATH)
        else:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)

    async def turn(self, step):
        for turn in range(TURNS):
            block = hashlib.sha256(f"{self.number} {step} {turn}".encode()).digest() * (1 + (turn * 37) % 500)
            self.writer.write(len(block).to_bytes(4, "big") + block)
            await self.writer.drain()
            self.expected.update(block)
            answer = await self.reader.readexactly(32 * 64)
            if answer != self.expected.digest() * 64:
                raise SystemExit(f"differs: client {self.number} was answered {answer[:32].hex()}")


async def main():
    steps = Steps()
    with open("/var/tmp/nonce", "w") as out:
        out.write(NONCE)
    tcp = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = tcp.sockets[0].getsockname()[1]
    unix = await asyncio.start_unix_server(serve, PATH)
    clients = [Client(number) for number in range(CLIENTS)]
    for client in clients:
        await client.connect(port)
    # A connection that is made anew in each step, beside those that stay.
    for step in range(work(200)):
        short = Client(1000 + step)
        await short.connect(port)
        await asyncio.gather(*(client.turn(step) for client in [*clients, short]))
        short.writer.close()
        await short.writer.wait_closed()
        await asyncio.sleep(0.002)
        steps.next()
    digest = hashlib.sha256()
    for client in clients:
        digest.update(client.expected.digest())
        client.writer.close()
    tcp.close()
    unix.close()
    with open("/var/tmp/nonce") as kept:
        finish(kept.read(), digest.hexdigest())


if __name__ == "__main__":
    asyncio.run(main())

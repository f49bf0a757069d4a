#!/usr/bin/python3
"""NumPy in threads and in a pool of processes, on shared memory, with temporary files, one of them without a name."""

import hashlib
import multiprocessing
import os
import tempfile
import threading
from multiprocessing import shared_memory

import numpy as np

from program import NONCE, Steps, finish, work

ROWS, COLUMNS = 256, 4096


def attached(name):
    memory = shared_memory.SharedMemory(name=name)
    return memory, np.ndarray((ROWS, COLUMNS), dtype=np.uint64, buffer=memory.buf)


def scramble(name, first, last, step):
    """A process of the pool: changes its rows in place, and answers their sum."""
    memory, table = attached(name)
    rows = table[first:last]
    for turn in range(60):
        rows *= np.uint64(6364136223846793005)
        rows += np.uint64(step * 64 + turn)
        rows ^= rows >> np.uint64(29)
    total = int(rows.sum())
    del rows, table
    memory.close()
    return total


def multiply(matrix, turns):
    """A thread: floating point in fixed order."""
    for _ in range(turns):
        matrix[:] = matrix @ matrix
        matrix /= np.abs(matrix).max()


def main():
    steps = Steps()
    random = np.random.default_rng(7)
    memory = shared_memory.SharedMemory(create=True, size=ROWS * COLUMNS * 8)
    table = np.ndarray((ROWS, COLUMNS), dtype=np.uint64, buffer=memory.buf)
    table[:] = random.integers(0, 2**63, size=(ROWS, COLUMNS), dtype=np.uint64)
    matrices = [random.random((160, 160)) for _ in range(2)]
    digest = hashlib.sha256()
    with multiprocessing.Pool(2) as pool, tempfile.TemporaryFile() as hidden, tempfile.NamedTemporaryFile() as named:
        hidden.write(NONCE.encode())
        hidden.flush()
        for step in range(work(400)):
            threads = [threading.Thread(target=multiply, args=(matrix, 4)) for matrix in matrices]
            for thread in threads:
                thread.start()
            quarter = ROWS // 4
            sums = pool.starmap(scramble, [(memory.name, at, at + quarter, step) for at in range(0, ROWS, quarter)])
            for thread in threads:
                thread.join()
            named.write(repr(sums).encode())
            named.flush()
            digest.update(repr(sums).encode())
            for matrix in matrices:
                digest.update(matrix.tobytes())
            steps.next()
        digest.update(table.tobytes())
        with open(named.name, "rb") as again:
            digest.update(again.read())
        hidden.seek(0)
        nonce = hidden.read().decode()
        pool.close()
        pool.join()
    del table
    memory.close()
    memory.unlink()
    if os.path.exists(f"/dev/shm/{memory.name}"):
        raise SystemExit("differs: the shared memory is still there")
    finish(nonce, digest.hexdigest())


if __name__ == "__main__":
    main()

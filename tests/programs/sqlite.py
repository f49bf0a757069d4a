#!/usr/bin/python3
"""SQLite: one process writes in transactions, one reads at the same time, in WAL mode and with a rollback journal."""

import hashlib
import multiprocessing
import sqlite3

from program import NONCE, Steps, finish, work

FOLDER = "/var/tmp"


def opened(mode):
    base = sqlite3.connect(f"{FOLDER}/{mode}.db", timeout=600, isolation_level=None)
    base.execute(f"PRAGMA journal_mode={mode}")
    base.execute("PRAGMA synchronous=NORMAL")
    return base


def read(mode, told, answer):
    """What is read in one transaction must be as if written in one go: the sum over all accounts never changes."""
    base = opened(mode)
    seen = 0
    while not told.is_set():
        base.execute("BEGIN")
        total, = base.execute("SELECT sum(amount) FROM account").fetchone()
        turns, = base.execute("SELECT count(*) FROM turn").fetchone()
        base.execute("COMMIT")
        if total != 0 or turns < seen:
            answer.put(f"a sum of {total}, {turns} turns after {seen}")
            return
        seen = turns
        # A reader that is always there would keep the writer out.
        told.wait(0.02)
    answer.put("")


def main():
    steps = Steps()
    modes = ["WAL", "DELETE"]
    bases = {}
    for mode in modes:
        base = bases[mode] = opened(mode)
        base.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, amount INTEGER, note TEXT)")
        base.execute("CREATE TABLE turn (id INTEGER PRIMARY KEY, nonce TEXT)")
        base.execute("BEGIN")
        base.executemany("INSERT INTO account VALUES (?, 0, '')", [(number,) for number in range(2000)])
        base.execute("COMMIT")
    # Without the connections of their parent: SQLite's must not be carried over a fork.
    spawned = multiprocessing.get_context("spawn")
    told, answer = spawned.Event(), spawned.Queue()
    readers = [spawned.Process(target=read, args=(mode, told, answer)) for mode in modes]
    for reader in readers:
        reader.start()
    for step in range(work(900)):
        for base in bases.values():
            base.execute("BEGIN IMMEDIATE")
            for turn in range(250):
                source, target = (step * 7919 + turn * 104729) % 2000, (step * 31337 + turn * 15485863) % 2000
                base.execute("UPDATE account SET amount = amount - ?, note = ? WHERE id = ?", (turn, f"{step}/{turn}" * 20, source))
                base.execute("UPDATE account SET amount = amount + ? WHERE id = ?", (turn, target))
            base.execute("INSERT INTO turn VALUES (?, ?)", (step, NONCE))
            base.execute("COMMIT")
        steps.next()
    told.set()
    for said in [answer.get(timeout=600) for _ in readers]:
        if said:
            raise SystemExit(f"differs: {said}")
    for reader in readers:
        reader.join()
    digest = hashlib.sha256()
    for mode, base in bases.items():
        whole, = base.execute("PRAGMA integrity_check").fetchone()
        turns = base.execute("SELECT count(*), min(nonce), max(nonce) FROM turn").fetchone()
        if whole != "ok" or turns != (steps.done, NONCE, NONCE):
            raise SystemExit(f"differs: {mode} is {whole}, with {turns}")
        for row in base.execute("SELECT * FROM account ORDER BY id"):
            digest.update(repr(row).encode())
    finish(NONCE, digest.hexdigest())


if __name__ == "__main__":
    main()

#!/usr/bin/python3
"""heap.py RECORDS FILE: a heap of CPython: a dictionary of records with strings, numbers, lists and small dictionaries.

For the benchmarks. FILE is created when the heap is filled, and has 64-bit words at the places that tests/workloads/memory.c
gives them: readings (1) grows while the program runs; request (2) is answered in its place by 2 (done, or as it was) or 3
(differs): 1 asks for the check of all records, 8 for updates at random for a second of processor time; written (6) is how
many were made. All of it follows from one seed, and the check makes it again.
"""
import os
import random
import struct
import sys
import time

READINGS, REQUEST, WRITTEN = 1, 2, 6
CHECK, DONE, DIFFERS, UPDATE = 1, 2, 3, 8

FIRST = "Ada Ben Cleo Dora Emil Fritz Gina Hugo Ines Jan Kira Lars Mona Nils Olga Paul".split()
LAST = "Arndt Bauer Conrad Dietz Ernst Fuchs Graf Haas Jung Kraus Lang Maier Noll Otto Pohl Roth".split()
PLACES = "Aachen Berlin Chemnitz Dresden Erfurt Fulda Gera Halle Ilmenau Jena Kassel Leipzig".split()


def record(chance, number):
    return {
        "id": number,
        "name": chance.choice(FIRST) + " " + chance.choice(LAST),
        "mail": f"user{number}@{chance.choice(PLACES).lower()}.example",
        "score": chance.random() * 100,
        "visits": [chance.randrange(10000) for _ in range(6)],
        "address": {"place": chance.choice(PLACES), "street": chance.randrange(300), "code": f"{chance.randrange(100000):05d}"},
        "active": chance.random() < 0.7,
        "token": f"{chance.getrandbits(256):064x}",
        "series": [chance.random() for _ in range(4)],
    }


def filled(count):
    chance = random.Random(7)
    return {f"record-{number:07d}": record(chance, number) for number in range(count)}


class Heap:
    def __init__(self, count):
        self.count = count
        self.records = filled(count)
        self.chance = random.Random(11)
        self.updates = 0

    def update(self):
        at = self.chance.randrange(self.count)
        entry = self.records[f"record-{at:07d}"]
        entry["score"] = self.chance.random() * 100
        entry["visits"][self.chance.randrange(6)] = self.chance.randrange(10000)
        self.updates += 1

    def is_right(self):
        other = Heap(self.count)
        for _ in range(self.updates):
            other.update()
        return other.records == self.records


def main():
    count, path = int(sys.argv[1]), sys.argv[2]
    heap = Heap(count)
    made = path + ".new"
    fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, 4096)
    os.rename(made, path)

    def word(index, value=None):
        if value is None:
            return struct.unpack("<Q", os.pread(fd, 8, index * 8))[0]
        os.pwrite(fd, struct.pack("<Q", value), index * 8)

    readings = 0
    while True:
        readings += 1
        word(READINGS, readings)
        request = word(REQUEST)
        if request == CHECK:
            right = heap.is_right()
            word(WRITTEN, heap.updates)
            word(REQUEST, DONE if right else DIFFERS)
        elif request == UPDATE:
            end = time.process_time() + 1
            while time.process_time() < end:
                for _ in range(100):
                    heap.update()
            word(WRITTEN, heap.updates)
            word(REQUEST, DONE)
        time.sleep(0.005)


main()

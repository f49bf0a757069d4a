#!/usr/bin/node
// heap.js RECORDS FILE: a heap of Node: a map of records as JSON has them, as heap.py has them, and with the same report in FILE.
// It knows the check alone.
'use strict';
const fs = require('fs');
const assert = require('assert');

const READINGS = 1, REQUEST = 2, CHECK = 1n, DONE = 2, DIFFERS = 3;
const FIRST = 'Ada Ben Cleo Dora Emil Fritz Gina Hugo Ines Jan Kira Lars'.split(' ');
const LAST = 'Arndt Bauer Conrad Dietz Ernst Fuchs Graf Haas Jung Kraus'.split(' ');
const PLACES = 'Aachen Berlin Chemnitz Dresden Erfurt Fulda Gera Halle Jena'.split(' ');

// Numbers from 1 to 2 ** 31 - 2 from a seed: the generator of Park and Miller, whose products stay exact in a double.
const PRIME = 2 ** 31 - 1;
function chances(seed) {
  return () => (seed = (seed * 48271) % PRIME);
}

function record(chance, number) {
  const below = (most) => chance() % most;
  const one = (of) => of[below(of.length)];
  return {
    id: number,
    name: `${one(FIRST)} ${one(LAST)}`,
    mail: `user${number}@${one(PLACES).toLowerCase()}.example`,
    score: (chance() / PRIME) * 100,
    visits: Array.from({ length: 6 }, () => below(10000)),
    address: { place: one(PLACES), street: below(300), code: String(below(100000)).padStart(5, '0') },
    active: below(10) < 7,
    token: Array.from({ length: 16 }, () => below(65536).toString(16).padStart(4, '0')).join(''),
    series: Array.from({ length: 4 }, () => chance() / PRIME),
  };
}

function filled(count) {
  const chance = chances(7), records = new Map();
  for (let number = 0; number < count; number++) records.set(`record-${number}`, record(chance, number));
  return records;
}

function isRight(records, count) {
  const chance = chances(7);
  try {
    assert.strictEqual(records.size, count);
    for (let number = 0; number < count; number++)
      assert.deepStrictEqual(records.get(`record-${number}`), record(chance, number));
  } catch (error) {
    return false;
  }
  return true;
}

const count = Number(process.argv[2]), path = process.argv[3];
const records = filled(count);
const report = fs.openSync(`${path}.new`, 'w+', 0o600);
fs.ftruncateSync(report, 4096);
fs.renameSync(`${path}.new`, path);
const bytes = Buffer.alloc(8);
function word(index) {
  fs.readSync(report, bytes, 0, 8, index * 8);
  return bytes.readBigUInt64LE();
}
function setWord(index, value) {
  bytes.writeBigUInt64LE(BigInt(value));
  fs.writeSync(report, bytes, 0, 8, index * 8);
}
let readings = 0;
setInterval(() => {
  setWord(READINGS, ++readings);
  if (word(REQUEST) === CHECK) setWord(REQUEST, isRight(records, count) ? DONE : DIFFERS);
}, 5);

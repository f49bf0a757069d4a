#!/usr/bin/node
// Node: workers, timers, streams through compression, and a shared buffer with atomic operations.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const { pipeline } = require('stream/promises');
const { Readable } = require('stream');
const zlib = require('zlib');
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');

if (!isMainThread) {
  const counters = new Int32Array(workerData.counters);
  parentPort.on('message', ({ step, number }) => {
    let state = Buffer.from(`${step}/${number}`);
    const kept = new Map();
    for (let turn = 0; turn < 20000; turn++) {
      state = crypto.createHash('sha256').update(state).digest();
      kept.set(turn % 4096, { turn, text: state.toString('hex') });
      if (turn % 100 === 0) Atomics.add(counters, 0, 1);
    }
    parentPort.postMessage({ number, said: state.toString('hex'), size: kept.size });
  });
} else {
  main().catch((error) => {
    console.log(`differs: ${error.stack}`);
    process.exit(1);
  });
}

function* blocks(step) {
  let state = step;
  for (let block = 0; block < 40; block++) {
    const bytes = Buffer.alloc(65536);
    for (let at = 0; at < bytes.length; at += 4) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      bytes.writeUInt32LE(state & 0x0f0f0f0f, at);
    }
    yield bytes;
  }
}

async function main() {
  const nonce = crypto.randomBytes(8).toString('hex');
  console.log(`nonce ${nonce}`);
  fs.writeFileSync('/var/tmp/nonce', nonce);
  const steps = Math.max(1, Math.floor((120 * Number(process.env.WORK || 100)) / 100));
  const counters = new SharedArrayBuffer(64);
  const workers = [0, 1].map(() => new Worker(__filename, { workerData: { counters } }));
  let ticks = 0;
  const ticking = setInterval(() => { ticks++; }, 10);
  const digest = crypto.createHash('sha256');
  for (let step = 1; step <= steps; step++) {
    const answers = workers.map((worker, number) => new Promise((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
      worker.postMessage({ step, number });
    }));
    const file = `/var/tmp/part-${step % 3}`;
    await pipeline(Readable.from(blocks(step)), zlib.createGzip(), fs.createWriteStream(file));
    const inside = crypto.createHash('sha256');
    await pipeline(fs.createReadStream(file), zlib.createGunzip(), inside);
    digest.update(inside.digest());
    for (const { said, size } of await Promise.all(answers)) digest.update(`${said} ${size}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
    if (step === 1) console.log('ready');
    console.log(`step ${step}`);
  }
  clearInterval(ticking);
  if (ticks < steps) throw new Error(`${ticks} ticks in ${steps} steps`);
  const counted = new Int32Array(counters)[0];
  if (counted !== steps * 2 * 200) throw new Error(`the workers counted ${counted}`);
  if (fs.readFileSync('/var/tmp/nonce', 'utf8') !== nonce) throw new Error('another nonce');
  await Promise.all(workers.map((worker) => worker.terminate()));
  console.log(`OK ${nonce} ${digest.digest('hex')}`);
}

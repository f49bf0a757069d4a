#!/bin/bash
# ffmpeg: a test picture, encoded by two threads, which give the same bytes each time.
set -euo pipefail
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
cd /var/tmp
echo ready
echo "step 1"
ffmpeg -nostdin -loglevel error -f lavfi -i "testsrc2=size=640x360:rate=25:duration=$((160 * ${WORK:-100} / 100 + 1))" \
  -f lavfi -i "sine=frequency=440:duration=$((160 * ${WORK:-100} / 100 + 1))" -metadata "comment=$nonce" \
  -c:v libx264 -preset medium -threads 2 -c:a aac -flags +bitexact -fflags +bitexact -y out.mkv
echo "step 2"
ffmpeg -nostdin -loglevel error -i out.mkv -f ffmetadata - | grep -q "$nonce" || { echo "differs: the film has no $nonce"; exit 1; }
echo "OK $nonce $(ffmpeg -nostdin -loglevel error -i out.mkv -map 0 -c copy -f md5 - | cut -d= -f2)"

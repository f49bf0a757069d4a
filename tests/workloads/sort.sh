#!/bin/bash
# sort.sh [--break WHAT]: sorts MEBIBYTES (2048) of lines, with less memory than that and so with temporary files, once, and
# checks order, count and content of the result. Ends by itself; prints `OK NONCE digest=…`, which SEED alone decides.
set -euo pipefail
breaks=${2:-}
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
work=${WORK:-/var/tmp}/sort
mkdir -p "$work"
lines make "${SEED:-1}" "${MEBIBYTES:-2048}" >"$work/in" 2>"$work/made"
echo ready
LC_ALL=C sort -S "${BUFFER:-128M}" --parallel=2 -T "$work" -o "$work/out" "$work/in"
case $breaks in
  order) sed -i '1{h;d};3{G}' "$work/out" ;;
  lost) sed -i '2d' "$work/out" ;;
esac
lines check <"$work/out" >"$work/checked" || { cat "$work/checked"; exit 1; }
cmp -s "$work/made" "$work/checked" || { echo "differs: made $(cat "$work/made"), sorted $(cat "$work/checked")"; exit 1; }
echo "OK $nonce digest=$(sha256sum <"$work/out" | cut -c1-64) $(cat "$work/made")"

#!/bin/bash
# compile.sh [--break WHAT]: writes C files, compiles them with `make -j4`, runs the program, and compares what it computes
# with what it must, again and again until $FINISH exists; then prints `OK NONCE …`. FILES (40) is how many.
set -euo pipefail
breaks=${2:-}
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
files=${FILES:-40}
work=${WORK:-/var/tmp}/compile
mkdir -p "$work"
cd "$work"
expected=0
for ((i = 0; i < files; i++)); do
  # Enough to keep the compiler busy for a moment, all of which counts.
  {
    echo "#include <stdio.h>"
    echo "#include <stdlib.h>"
    echo "#include <string.h>"
    for ((j = 0; j < 120; j++)); do
      echo "static long step_${i}_$j(long x) { char t[64]; snprintf(t, sizeof t, \"%ld\", x); return strtol(t, 0, 10) + $((i * j % 97)); }"
    done
    echo "long value_$i(long x) {"
    for ((j = 0; j < 120; j++)); do echo "  x = step_${i}_$j(x);"; done
    echo "  return x; }"
  } >"part_$i.c"
  for ((j = 0; j < 120; j++)); do expected=$((expected + i * j % 97)); done
done
{
  echo "#include <stdio.h>"
  for ((i = 0; i < files; i++)); do echo "long value_$i(long);"; done
  echo "int main(void) { long x = 0;"
  for ((i = 0; i < files; i++)); do echo "  x = value_$i(x);"; done
  echo '  printf("%ld\n", x); return 0; }'
} >main.c
printf 'CFLAGS = -O2\nprogram: main.o %s\n\t$(CC) -o $@ $^\n' "$(printf 'part_%d.o ' $(seq 0 $((files - 1))))" >Makefile
echo ready
rounds=0
digest=
while :; do
  rm -f ./*.o program
  make -s -j4 program
  [[ $breaks != number ]] || printf '#!/bin/sh\necho 7\n' >program
  got=$(./program)
  [[ $got == "$expected" ]] || { echo "differs: the program says $got, must say $expected"; exit 1; }
  now=$(cat ./*.o | sha256sum | cut -c1-64)
  [[ -z $digest || $digest == "$now" ]] || { echo "differs: the same sources gave other object files"; exit 1; }
  digest=$now
  rounds=$((rounds + 1))
  [[ -e ${FINISH:-/tmp/finish} ]] && break
done
echo "OK $nonce digest=$digest rounds=$rounds"

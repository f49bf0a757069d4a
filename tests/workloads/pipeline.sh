#!/bin/bash
# pipeline.sh [--break WHAT]: what shell scripts are made of: background jobs, traps, FIFOs, here-documents, command and process
# substitution, pipelines, subshells, `wait`. Round after round until $FINISH exists; then prints `OK NONCE …`.
set -uo pipefail
breaks=${2:-}
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
work=$(mktemp -d "${WORK:-/var/tmp}/pipeline.XXXXXX")
differs() { echo "differs: $*"; exit 1; }
trapped=0
ended=
trap 'trapped=$((trapped + 1))' USR1
trap 'ended=yes; rm -rf "$work"' EXIT
mkfifo "$work/numbers" "$work/answers"
exec 8>"$work/kept.log"
echo ready

rounds=0
while [[ ! -e ${FINISH:-/tmp/finish} ]]; do
  # Two jobs talk by FIFOs: one sends numbers, one adds them up in a pipeline, and the shell waits for both.
  { for ((i = 1; i <= 300; i++)); do echo "$i"; ((i % 50)) || sleep 0.02; done; } >"$work/numbers" &
  sender=$!
  { while read -r n; do echo $((n * 2)); done <"$work/numbers" | paste -sd+ | { IFS= read -r sum; echo $((sum)); } >"$work/answers"; } &
  adder=$!
  answer=$(cat "$work/answers")
  [[ $breaks == answer ]] && answer=$((answer + 1))
  wait "$sender" || differs "the sender ended with $?"
  wait "$adder" || differs "the adder ended with $?"
  [[ $answer == 90300 ]] || differs "the answer is '$answer', must be 90300"

  # Jobs with statuses of their own, asked for in another order.
  statuses=()
  pids=()
  for status in 3 0 7; do
    (sleep 0.05; exit "$status") &
    pids+=($!)
  done
  for i in 2 0 1; do
    wait "${pids[i]}"
    statuses+=($?)
  done
  [[ "${statuses[*]}" == "7 3 0" ]] || differs "statuses are ${statuses[*]}, must be 7 3 0"

  # A signal to the shell itself while it waits for a job: the trap runs, the job goes on.
  before=$trapped
  (sleep 0.03; [[ $breaks == trap ]] || kill -USR1 $$; sleep 0.03; exit 5) &
  job=$!
  wait "$job"
  status=$?
  ((status > 128)) && { wait "$job"; status=$?; }
  [[ $status == 5 ]] || differs "a job that ends with 5 ended with $status"
  [[ $trapped == $((before + 1)) ]] || differs "the trap ran $((trapped - before)) times"

  # A here-document that is read slowly, by a loop that runs programs in between.
  text=
  while read -r word; do
    text+=$(printf '%s' "$word" | tr a-z A-Z)
    sleep 0.01
  done <<END
one
two $breaks
$(echo three)
END
  [[ $text == "ONETWOTHREE" ]] || differs "the here-document says '$text'"

  # Process substitution, and a descriptor of the shell that stays open all along.
  [[ $(comm -12 <(seq 1 2000 | sort) <(seq 1000 3000 | sort) | wc -l) == 1001 ]] || differs "process substitution"
  rounds=$((rounds + 1))
  echo "$rounds" >&8
  [[ $(wc -l <"$work/kept.log") == "$rounds" && $(tail -n 1 "$work/kept.log") == "$rounds" ]] || differs "the log of rounds"
  [[ -z $(jobs -r) ]] || differs "jobs are left: $(jobs -r)"
done
[[ -z $ended ]] || differs "the exit trap ran before the end"
echo "OK $nonce rounds=$rounds trapped=$trapped"

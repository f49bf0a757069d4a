#!/bin/bash
# PostgreSQL, and pgbench's transactions in it by four clients, whose sums must agree; then what each of its tables must hold.
set -euo pipefail
bin=$(echo /usr/lib/postgresql/*/bin)
export PATH=$bin:$PATH PGHOST=/var/run/postgresql PGUSER=postgres PGDATA=/var/lib/postgresql/data LC_ALL=C.UTF-8
if ((EUID == 0)); then
  mkdir -p "$PGHOST"
  chown postgres "$PGHOST" /var/lib/postgresql
  exec setpriv --reuid postgres --regid postgres --init-groups "$0"
fi
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
cd "/var/lib/postgresql"
initdb --auth trust --no-sync >initdb.log
pg_ctl start -w -l server.log -o "-c listen_addresses=127.0.0.1" >start.log
createdb bench
pgbench -i -s 2 -q bench 2>init.log
psql -qc "CREATE TABLE start (nonce text); INSERT INTO start VALUES ('$nonce')" bench
psql -qc "CREATE TABLE turn (id int PRIMARY KEY, digest text)" bench
echo ready
turns=$((20 * ${WORK:-100} / 100))
for ((step = 1; step <= (turns > 0 ? turns : 1); step++)); do
  # Half of the clients by TCP.
  pgbench -n -c 2 -j 2 -t 250 --random-seed "$step" bench >one.log 2>&1 &
  PGHOST=127.0.0.1 pgbench -n -c 2 -j 2 -t 250 --random-seed "$((step + 1000))" bench >other.log 2>&1
  wait $! || { echo "differs: pgbench failed: $(cat one.log)"; exit 1; }
  sums=$(psql -qtAF ' ' -c "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(delta) FROM pgbench_history), (SELECT count(*) FROM pgbench_history)" bench)
  read -r accounts branches tellers history count <<<"$sums"
  [[ $accounts == "$branches" && $accounts == "$tellers" && $accounts == "$history" && $count == $((step * 1000)) ]] ||
    { echo "differs: in step $step the sums are $sums"; exit 1; }
  psql -qc "INSERT INTO turn SELECT $step, md5(string_agg(i::text, ',')) FROM generate_series(1, 100000) i" bench
  echo "step $step"
done
[[ $(psql -qtAc "SELECT nonce FROM start" bench) == "$nonce" ]] || { echo "differs: another nonce"; exit 1; }
digest=$(psql -qtAc "SELECT (SELECT count(*) FROM pgbench_history), md5(string_agg(id || digest, ',' ORDER BY id)) FROM turn" bench)
if grep -E 'PANIC|FATAL|crash' server.log; then echo "differs: the server complained"; exit 1; fi
pg_ctl stop -w -m fast >stop.log
pg_controldata | grep -q 'shut down$' || { echo "differs: the cluster is not shut down"; exit 1; }
echo "OK $nonce $digest"

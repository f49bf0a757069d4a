# Sourced by every script here: where things are, and the few functions that more than one of them calls.
# Sets nothing but shell options, these names and PATH; starts nothing.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Images, peers and daemons' folders. Images and peers are worth keeping between runs: they take minutes to make.
cache=${SAMARA_CACHE:-/var/cache/samara}
export SAMARA_CACHE=$cache
PATH=$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

need_root() { ((EUID == 0)) || die "needs root: containers, mounts and namespaces are made"; }

# locked NAME COMMAND...: one caller at a time. Bound: the longest of the guarded steps takes a few minutes.
locked() {
  local name=$1
  shift
  mkdir -p "$cache"
  (
    flock -w 1800 9 || die "another run has held $cache/$name.lock for half an hour"
    "$@"
  ) 9>"$cache/$name.lock"
}

# apt_get ARG...: apt-get that waits for another one to finish. dpkg's own lock has an option for that;
# the lock on package lists and the one on the archive folder do not, and fail at once.
apt_get() {
  local try log
  log=$(mktemp)
  for try in $(seq 60); do
    if DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 "$@" >"$log" 2>&1; then
      rm -f "$log"
      return 0
    fi
    grep -q 'Could not get lock\|Unable to lock' "$log" || break
    sleep 5
  done
  cat "$log" >&2
  rm -f "$log"
  return 1
}

codename() { (. /etc/os-release && printf '%s\n' "$VERSION_CODENAME"); }

# mirror: the address from which apt on this machine takes its release's main component.
mirror() {
  apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(SITE)' 'Created-By: Packages' |
    awk -v c="$(codename)" '$1 == c && $2 == "main" {print $3; exit}' | grep . ||
    die "apt knows no mirror of $(codename) main"
}

# components: those that apt on this machine uses of its release (main; on Ubuntu universe too, where bwa lives).
components() {
  apt-get indextargets --format '$(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
    awk -v c="$(codename)" '$1 == c {print $2}' | sort -u | paste -sd, | grep .
}

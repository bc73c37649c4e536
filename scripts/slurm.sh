#!/usr/bin/env bash
# A real SLURM of one node on this Debian or Ubuntu, for tests and for trying out:
#
#   slurm.sh install        packages slurm-wlm and munge, when they are missing
#   slurm.sh start FOLDER   munged, slurmctld and slurmd with everything they write in FOLDER; prints SLURM_CONF=...
#   slurm.sh stop FOLDER    end what start began
#
# All of it needs root. Nothing of a SLURM that the machine has already is touched: ports, key and files are its own.
set -euo pipefail

say() { echo "slurm: $*" >&2; }
fail() { say "$*"; exit 1; }

installed() { command -v slurmctld slurmd munged sbatch >/dev/null; }

install_packages() {
  installed && return
  command -v apt-get >/dev/null || fail "not Debian: install SLURM (slurmctld, slurmd) and munge by hand"
  say "installing slurm-wlm and munge"
  # Their services would start daemons that nobody configured.
  local policy=/usr/sbin/policy-rc.d made=no
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=yes; fi
  env DEBIAN_FRONTEND=noninteractive sh -c "apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge" >&2 ||
    { [ $made = no ] || rm -f $policy; fail "apt-get could not install slurm-wlm and munge"; }
  [ $made = no ] || rm -f $policy
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  local folder=$1 host cores memory_mb plugin=v1
  host=$(hostname -s)
  # The daemon counts; more than it finds would drain the node.
  cores=$(nproc --all) # without --all it gives OMP_NUM_THREADS
  memory_mb=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
  [ ! -e /sys/fs/cgroup/cgroup.controllers ] || plugin=v2
  mkdir -p "$folder"/{state,spool,munge}
  chmod 755 "$folder"
  head -c 1024 /dev/urandom >"$folder/munge/key"
  chmod 400 "$folder/munge/key"
  chown -R munge: "$folder/munge"
  chmod 755 "$folder/munge"
  # --force: it would rather have its folders in places that only root writes to.
  runuser -u munge -- munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --force
  cat >"$folder/slurm.conf" <<CONF
ClusterName=resfinetune
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
# A job that is queued again waits until its first credential has expired.
AuthInfo=socket=$folder/munge/socket,cred_expire=30
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=15
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory_mb State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=120 State=UP OverSubscribe=NO
CONF
  printf 'CgroupPlugin=cgroup/%s\nCgroupAutomount=no\n' "$plugin" >"$folder/cgroup.conf"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld
  slurmd -N "$host"
  local tries
  for tries in $(seq 100); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
      echo "SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  tail -n 20 "$folder"/*.log >&2 || true
  fail "the node did not become idle within 20 s"
}

stop() {
  local folder=$1 file pid
  for file in "$folder"/slurmd.pid "$folder"/slurmctld.pid "$folder"/munge/pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
}

case "${1:-}" in
  install) [ "$(id -u)" -eq 0 ] || fail "needs root"; install_packages ;;
  start) [ "$(id -u)" -eq 0 ] || fail "needs root"; start "$(realpath -m "$2")" ;;
  stop) stop "$(realpath -m "$2")" ;;
  *) fail "usage: slurm.sh install | start FOLDER | stop FOLDER" ;;
esac

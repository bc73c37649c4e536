#!/usr/bin/env bash
# What the Makefile needs before it can work.
#
#   setup.sh env EXTRAS     .venv with this package (editable) and the named extras, e.g. "test" or "test,dev"
#   setup.sh libraries      Debian's libraries for Qt and Xvfb; for single tests Chromium, which opens reports, and SLURM
#   setup.sh slurm          SLURM for its tests (scripts/slurm.sh)
#   setup.sh constraints    constraints.txt anew, from pyproject.toml and the registry
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.venv-tools
qt_packages=(
  xvfb libegl1 libgl1 libgl1-mesa-dri libglib2.0-0 libfontconfig1 libxkbcommon-x11-0 libxcb-cursor0 libxcb-icccm4
  libxcb-keysyms1 libxcb-shape0 libxcb-xinerama0 libdbus-1-3
)
browser=chromium

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

as_root() { # as_root COMMAND...: false when we may not become root without being asked for a password
  if [ "$(id -u)" -eq 0 ]; then "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo "$@"
  else return 1
  fi
}

apt_install() { # apt_install PACKAGE...: install, or end with the command for somebody who may
  local command="apt-get update && apt-get install --yes --no-install-recommends $*"
  say "installing Debian packages: $*"
  as_root true || fail "no root and no sudo without a password; please run: sudo sh -c '$command'"
  as_root env DEBIAN_FRONTEND=noninteractive sh -c "{ $command; } >&2" || fail "this failed: $command"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13 python3.14; do
    # Running it is the test: a name on the path may be a shim for a version that is not there.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  fail "no Python 3.11 or newer on the path; install one (Debian: apt-get install python3) or give PYTHON=/path/to/python3"
}

get_uv() { # get_uv PYTHON: uv in a folder of its own, so that nothing of the machine is changed
  local python=$1
  [ -x $tools/bin/uv ] && return
  rm -rf $tools
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    local version
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    command -v apt-get >/dev/null || fail "$python cannot make virtual environments; install its venv and ensurepip modules"
    apt_install "$version-venv"
  fi
  say "fetching uv"
  "$python" -m venv $tools
  $tools/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
}

pip_setting() { # pip_setting NAME: its value in pip's files or environment; nothing when not set
  $tools/bin/python -m pip config list 2>/dev/null | sed -n -E "s/^(global|:env:)\.$1='(.*)'\$/\2/p" | tail -n 1
}

use_index_of_pip() { # uv does not read pip's settings: a mirror or certificate given there has to be told to it
  local index certificate
  index=$(pip_setting index-url)
  certificate=$(pip_setting cert)
  if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$index"; fi
  if [ -n "$certificate" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$certificate"; fi
}

pinned() { # pinned PYTHON: whether constraints.txt was made for this interpreter
  "$1" -c 'import platform, sys
sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"))'
}

make_env() {
  local extras=$1 python constraints=()
  python=$(find_python)
  get_uv "$python"
  use_index_of_pip
  export UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=.venv
  say "environment for $("$python" --version) in .venv"
  [ -x .venv/bin/python ] || $tools/bin/uv venv --quiet --python "$python" .venv
  if pinned .venv/bin/python; then constraints=(--constraints constraints.txt)
  else say "constraints.txt is for Python 3.11 on Linux (x86_64); taking the newest versions that fit"
  fi
  # Compiled once here, not by every process of every test where the environment forbids to keep bytecode.
  $tools/bin/uv pip install --compile-bytecode --python .venv/bin/python "${constraints[@]}" --editable ".[$extras]"
}

install_libraries() {
  if ! command -v dpkg-query >/dev/null; then
    say "not Debian: the system's libraries for Qt and OpenGL are taken to be there"
    return
  fi
  # Names that an installed package provides count too: Debian renames libraries (libglib2.0-0t64).
  local there package missing=()
  there=$(dpkg-query --show --showformat='${db:Status-Status} ${Package} ${Provides}\n' | grep '^installed ' | tr -s ' ,' '\n')
  for package in "${qt_packages[@]}"; do
    grep -qxF "$package" <<<"$there" || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}"
  # Single tests need these and are skipped without, so where they cannot be had that is no reason to stop.
  grep -qxF $browser <<<"$there" || (apt_install $browser) || say "without $browser the report is not opened in a test"
  command -v slurmctld >/dev/null || as_root bash scripts/slurm.sh install || say "without SLURM no sweep is tried on a cluster"
}

make_constraints() {
  local python
  python=$(find_python)
  get_uv "$python"
  use_index_of_pip
  $tools/bin/uv pip compile --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
    --extra test --extra dev --no-emit-index-url --no-annotate --no-header --output-file constraints.new pyproject.toml
  { echo "# Versions known to work together on Python 3.11, Linux, x86_64. Renewed with: make constraints"
    cat constraints.new
  } >constraints.txt
  rm constraints.new
}

case "${1:-}" in
  env) make_env "${2:-test}" ;;
  libraries) install_libraries ;;
  slurm) as_root bash scripts/slurm.sh install || fail "SLURM could not be installed here (needs Debian, and root or sudo)" ;;
  constraints) make_constraints ;;
  *) fail "usage: setup.sh env [EXTRAS] | libraries | slurm | constraints" ;;
esac

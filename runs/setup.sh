#!/usr/bin/env bash
# Create a virtual environment with likewise in it: setup.sh PYTHON VENV EXTRAS PROBE DOWNLOAD GIGABYTES
# Where PROBE, a module of the extras, is not there yet: says how much it downloads, and refuses when the disk is too small.
set -euo pipefail
python=$1 venv=$2 extras=$3 probe=$4 download=$5 gigabytes=$6

say() { printf 'likewise: %s\n' "$*" >&2; }

command -v "$python" >/dev/null || { say "there is no $python: install Python 3.11 or later (apt-get install python3 python3-venv)"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  say "$("$python" --version) is too old: install Python 3.11 or later, and pass PYTHON=python3.11"; exit 1; }
"$python" -c 'import ensurepip, venv' 2>/dev/null || {
  say "this Python cannot make virtual environments: apt-get install python3-venv"; exit 1; }

free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
if ! "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$probe') is None)" 2>/dev/null; then
  say "installing the extras $extras into $venv: about $download to download and $gigabytes GB of disk ($free GB are free here)"
  if [ "$free" -lt "$gigabytes" ]; then
    say "the disk is too small: free $((gigabytes - free)) GB, or clone to another disk"; exit 1
  fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
say "ready: $venv/bin/likewise"

#!/usr/bin/env bash
# Make a virtual environment in .venv and install what the project needs, at the tested versions.
#   bash setup.sh         what it needs to run
#   bash setup.sh --dev   and what its tests need
# PYTHON names another interpreter (3.10 to 3.13). Run it again at any time: what is installed stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "error: $*" >&2; exit 2; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "no Python 3.10 to 3.13 found; install one (apt-get install python3) or set PYTHON=/path/to/python"

# Debian and Ubuntu ship venv in a package of its own.
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi
    echo "installing $package, which $python lacks"
    { $sudo apt-get update -qq && $sudo apt-get install -y -qq "$package"; } ||
        fail "could not install $package; install it and run this again"
fi

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv
fi
requirements=(-r requirements.txt)
[ "${1:-}" = --dev ] && requirements+=(-r requirements-dev.txt)
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "${requirements[@]}"

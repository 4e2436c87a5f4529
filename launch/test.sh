#!/usr/bin/env bash
# Everything CI runs: installs what it needs, then checks, tests, and the wheel in a clean
# environment. Arguments go to pytest:  bash launch/test.sh -k order
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
install_into_venv dev

ruff check .
ruff format --check .
mypy
python -m pytest "$@"

#!/usr/bin/env bash
# Shard, train on several processes, kill, resume on another number of them, validate: the whole
# path on screens that pixloom draws itself. Needs Python 3.11+; 10 minutes at most on 2 CPU cores.
#   bash launch/demo.sh [--dir FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
install_into_venv test
exec python -m launch.demo "$@"

#!/usr/bin/env bash
# Everything CI runs: checks, tests, and the wheel in a clean environment. Installs what it needs.
#   bash launch/test.sh              all of it
#   bash launch/test.sh -k order     arguments go to pytest; the wheel is left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
install_into_venv dev
install_into_venv test # what demo.sh asks for: its test must not install beside other tests

say() { printf '\n== %s\n' "$*"; }

# strace fails system calls for tests/faults/test_pack_kills.py; a browser opens what pipeline.report
# and pipeline.web write. Without them these tests are skipped, those of the browser fail under CI.
missing=()
command -v strace >/dev/null || missing+=(strace)
command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null ||
    missing+=(chromium-headless-shell) # 100 MB, 16 s
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "${missing[*]}"
    apt-get update >/dev/null 2>&1 || true
    for package in "${missing[@]}"; do
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$package" \
            >/dev/null 2>&1 || echo "$package cannot be installed; go on without"
    done
fi

say "Checks"
ruff check .
ruff format --check .
mypy

if [ $# -eq 0 ]; then
    say "The wheel, in a clean environment"
    clean=$(mktemp -d)
    trap 'rm -rf "$clean"' EXIT
    python -m build --wheel --outdir "$clean" . >"$clean/build.log" || { cat "$clean/build.log"; exit 1; }
    python -m venv "$clean/venv"
    "$clean/venv/bin/pip" install --quiet --disable-pip-version-check "$clean"/*.whl
    (
        cd "$clean"
        venv/bin/python -W error -c 'import launch.cli, pipeline.train, pipeline.report, shards.pack'
        venv/bin/pixloom --help >/dev/null
        venv/bin/pip check
    )
    rm -rf "$clean/venv"
fi

say "Tests"
# Two at a time, a file's tests by one process, for they share fixtures. In the order of the files'
# names: the long ones are in the first folders. `-n 0` runs them one by one.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

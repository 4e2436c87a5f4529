# Sourced by demo.sh and test.sh: makes .venv once, installs pixloom into it, activates it.
#   install_into_venv EXTRAS     e.g. install_into_venv dev
# A later call installs again only when pyproject.toml or the extras changed.

install_into_venv() {
    local extras=$1 python=${PYTHON:-python3} mark want
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "pixloom needs Python 3.11 or newer; $("$python" --version) was found." \
            "Name another one: PYTHON=python3.12 bash $0" >&2
        return 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return
    # shellcheck disable=SC1091
    source .venv/bin/activate
    mark=.venv/pixloom-installed
    want="$extras $(cksum <pyproject.toml) $PWD"
    if [ "$(grep -Fx "$want" "$mark" 2>/dev/null)" != "$want" ]; then
        echo "Installing pixloom[$extras] into .venv (torch is large: 1 to 5 minutes) ..." >&2
        python -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || return
        echo "$want" >>"$mark"
    fi
    # One thread a process: with more, processes on the same cores slow each other down.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

#!/usr/bin/env bash
# Make .venv, or bring it up to date with the pins; scripts/env.sh calls this, and it does nothing when all is in place.
#   bash scripts/venv.sh requirements-dev.txt
#   TORCH_BACKEND  which build of torch: cpu, cu126, auto ... (docs/setup.md); unset: the one that .venv has; empty: PyPI's
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
requirements="$1"

make_venv() { # an empty .venv, which may be a link or a volume
    if [ -e .venv ]; then find .venv/ -mindepth 1 -delete; fi
    if command -v uv >/dev/null; then
        uv venv --quiet .venv
    elif ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: python3 must be Python 3.10 or newer, it is: $(python3 --version 2>&1)" >&2
        exit 2
    elif ! python3 -m venv .venv; then
        find .venv/ -mindepth 1 -delete
        echo "error: python3 cannot make .venv: install python3-venv (Debian, Ubuntu) or uv" >&2
        exit 2
    fi
}

get_uv() { # which alone knows the builds of torch
    if ! command -v uv >/dev/null; then python -m pip install --quiet --disable-pip-version-check uv; fi
}

choose_pins() { # $pins: the pins without the CUDA libraries of another build, and with a torch that TORCH_BACKEND has
    local status=0
    get_uv
    cat $(printf '%s\n' requirements.txt "$requirements" | sort -u) | grep -vE '^(-r|nvidia-|cuda-|triton=)' >"$pins"
    install --dry-run || status=$?
    if [ "$status" = 1 ]; then # 2 is a word that uv does not know
        echo "TORCH_BACKEND=$TORCH_BACKEND: no such build of the pinned torch; taking the newest torch that has one" >&2
        sed -i -E 's/^(torch|torchvision)==.*/\1/' "$pins"
        install --dry-run
    elif [ "$status" != 0 ]; then
        exit 2
    fi
}

install() { # the pins, from the build of torch that was chosen
    bash scripts/install.sh --torch-backend "$TORCH_BACKEND" -r "$pins" "$@"
}

usable() { # whether .venv's Python starts, and has something that installs packages
    .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null &&
        { command -v uv >/dev/null || .venv/bin/python -m pip --version >/dev/null 2>&1; }
}

in_place() { # whether the pins are installed, for the Python that .venv has
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] &&
        .venv/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' 2>/dev/null
}

read_stamp() { # which build of torch .venv has, and what its stamp has to be
    made="$(cat .venv/torch-backend 2>/dev/null || true)"
    TORCH_BACKEND="${ASKED-$made}"
    wanted="$(cat requirements*.txt | sha256sum)$TORCH_BACKEND"
}

stamp=".venv/pins-of-$requirements"
if [ -n "${TORCH_BACKEND+x}" ]; then ASKED="$TORCH_BACKEND"; fi
read_stamp
if in_place; then exit; fi
exec 9<scripts/venv.sh
if ! flock --nonblock 9 2>/dev/null; then # another script, in another terminal; some network drives have no locks
    echo "Waiting for another script, which sets up .venv ..." >&2
    flock 9 2>/dev/null || true
    read_stamp
    if in_place; then exit; fi
fi

echo "Setting up .venv with $requirements (once; several GB with CUDA's libraries) ..." >&2
pins="$(mktemp)"
trap 'rm -f "$pins"' EXIT
there=yes
if ! usable; then there='' && make_venv; fi
export PATH="$PWD/.venv/bin:$PATH"
if [ -n "$TORCH_BACKEND" ]; then choose_pins; fi # before anything is lost
if [ "$TORCH_BACKEND" != "$made" ] && [ -n "$there" ]; then make_venv; fi
if [ -n "$TORCH_BACKEND" ]; then
    get_uv
    install
else
    bash scripts/install.sh -r "$requirements"
fi
lacks="$(python -m tools.packages "$requirements" 2>/dev/null || echo "Python 3.10 or newer")"
if [ -n "$lacks" ]; then
    echo "error: .venv lacks $lacks after its set-up${TORCH_BACKEND:+ with TORCH_BACKEND=$TORCH_BACKEND}: see docs/setup.md" >&2
    exit 2
fi
echo "$TORCH_BACKEND" >.venv/torch-backend
echo "$wanted" >.venv/pins-of-requirements.txt # which every other requirements file includes
echo "$wanted" >"$stamp"

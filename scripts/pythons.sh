#!/usr/bin/env bash
# Check the pins and the types on every Python that is supported and to be had, without installing them whole.
#   PYTHONS  which to look for (default: 3.10 3.11 3.12 3.13)
# uv resolves all pins without installing them. Types are those of that Python's own numpy and of its other typed packages
# in MATTERS; all else, torch above all, is read from the environment of the tests. scripts/test.sh checks the Python in
# use with all its pins, and so that one is left out here.
REQUIREMENTS=requirements-dev.txt
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
MATTERS="numpy pillow fastapi starlette hypothesis" # typed, and pinned to other versions on other Pythons

find_python() { # of a version: on PATH, or of pyenv
    local each
    for each in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$each" -c 'import sys; sys.exit(sys.version.startswith(sys.argv[1] + ".") - 1)' "$1" 2>/dev/null; then
            type -P "$each" && return
        fi
    done
}

check() { # a Python, of a version: what is wrong goes to standard output
    local here="$folder/$2" site
    "$folder/uv/bin/uv" venv --quiet --python "$1" "$here"
    "$folder/uv/bin/uv" pip install --quiet --python "$here/bin/python" --dry-run -r "$REQUIREMENTS"
    grep -hE "^(${MATTERS// /|})==" requirements*.txt >"$here/matters.txt"
    "$folder/uv/bin/uv" pip install --quiet --python "$here/bin/python" --no-deps -r "$here/matters.txt"
    site="$("$here/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/of_the_tests.pth"
    python -m mypy --python-version "$2" --python-executable "$here/bin/python" --cache-dir "$here/mypy"
}

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if command -v uv >/dev/null; then
    mkdir -p "$folder/uv/bin" && ln -s "$(command -v uv)" "$folder/uv/bin/uv"
else
    python -m venv "$folder/uv"
    "$folder/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
fi
declare -A job
failed=0
for version in ${PYTHONS:-3.10 3.11 3.12 3.13}; do
    found="$(find_python "$version" || true)"
    if python -c 'import sys; sys.exit(sys.version.startswith(sys.argv[1] + ".") - 1)' "$version"; then
        echo "Python $version: the one of the tests"
    elif [ -z "$found" ]; then
        echo "Python $version: not here, not checked"
    else
        (set -e; check "$found" "$version") >"$folder/$version.log" 2>&1 &
        job[$version]=$!
    fi
done
for version in "${!job[@]}"; do
    if wait "${job[$version]}"; then
        echo "Python $version: pins ok, types ok: $(tail -n 1 "$folder/$version.log")"
    else
        printf 'Python %s: FAILED\n%s\n' "$version" "$(cat "$folder/$version.log")"
        failed=1
    fi
done
exit "$failed"

#!/usr/bin/env bash
# Check the pins and the types on every Python that is supported and to be had, without installing them whole.
#   PYTHONS  which to look for (default: 3.10 3.11 3.12 3.13)
# The pins are resolved without being installed. Types are those of that Python's own numpy and of its other typed
# packages in MATTERS; all else, torch above all, is read from the environment of the tests. scripts/test.sh needs no
# help from here: it checks the Python in use with all its pins, and so does every Python that runs it.
REQUIREMENTS=requirements-dev.txt
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
MATTERS="numpy pillow fastapi starlette hypothesis" # typed, and pinned to other versions on other Pythons

find_python() { # of a version: on PATH, of pyenv, or through uv
    local each
    for each in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$each" -c 'import ensurepip' 2>/dev/null; then type -P "$each" && return; fi
    done
    if command -v uv >/dev/null; then uv python find --quiet "$1" 2>/dev/null; fi
}

check() { # a Python, in a folder, of a version: what is wrong goes to standard output
    local site
    "$1" -m venv "$2"
    site="$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$2/bin/python" -m pip install --quiet --disable-pip-version-check --dry-run -r "$REQUIREMENTS"
    grep -E "^(${MATTERS// /|})==" requirements*.txt --no-filename >"$2/matters.txt"
    "$2/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$2/matters.txt"
    command python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/of_the_tests.pth"
    command python -m mypy --python-version "$3" --python-executable "$2/bin/python" --cache-dir "$2/mypy"
}

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
missing="" jobs=""
for version in ${PYTHONS:-3.10 3.11 3.12 3.13}; do
    found="$(find_python "$version" || true)"
    if [ -z "$found" ]; then
        missing="$missing $version"
        continue
    fi
    (set -e; began=$SECONDS; check "$found" "$folder/$version" "$version"; echo "$((SECONDS - began)) s") >"$folder/$version.log" 2>&1 &
    jobs="$jobs $version:$!"
done
failed=0
for job in $jobs; do
    if wait "${job#*:}"; then result="ok"; else result="FAILED"; failed=1; fi
    echo "Python ${job%:*}: $result: $(tail -n 1 "$folder/${job%:*}.log")"
    if [ "$result" = FAILED ]; then grep -v "^WARNING" "$folder/${job%:*}.log"; fi
done
for version in $missing; do echo "Python $version: not here, not checked"; done
exit "$failed"

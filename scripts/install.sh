#!/usr/bin/env bash
# Install packages into the Python in use, with uv where there is one, else with pip: bash scripts/install.sh NAME==VERSION
if command -v uv >/dev/null; then
    exec uv pip install --quiet --python "$(command -v python)" "$@"
fi
exec python -m pip install --quiet --disable-pip-version-check "$@"

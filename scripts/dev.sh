#!/usr/bin/env bash
# Run a command in the Python of the tests, which is set up if need be: bash scripts/dev.sh ruff format .
REQUIREMENTS=requirements-dev.txt PYTHON_SAID=yes
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
exec "$@"

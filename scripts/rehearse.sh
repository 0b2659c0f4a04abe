#!/usr/bin/env bash
# Rehearse the published recipe of flickr30k or mscoco: all scripts on stand-ins for data and models (docs/rehearsal.md).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
LAUNCH= run benchmarks.rehearsal "$@" # its own steps say on how many processes they run

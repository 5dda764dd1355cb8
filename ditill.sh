#!/usr/bin/env bash
# The original's spelling of distill.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/distill.sh" "$@"

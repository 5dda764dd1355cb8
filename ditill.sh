#!/usr/bin/env bash
# The paper's README spells distill.sh so.
exec bash "$(dirname "${BASH_SOURCE[0]}")/distill.sh" "$@"

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Print the path of a Python 3.12: from PATH, from pyenv's versions, or from uv. One line on stderr if there is none.
is_312() { "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

for candidate in python3.12 python3 python; do
    path=$(command -v "$candidate" 2>/dev/null) && is_312 "$path" && echo "$path" && exit 0
done
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    [ -x "$path" ] && is_312 "$path" && echo "$path" && exit 0
done
if command -v uv >/dev/null 2>&1; then
    path=$(uv python find 3.12 2>/dev/null) || { uv python install -q 3.12 >&2 && path=$(uv python find 3.12 2>/dev/null); }
    [ -n "$path" ] && is_312 "$path" && echo "$path" && exit 0
fi
echo "Python 3.12 was not found: install it with 'pyenv install 3.12', 'uv python install 3.12' or your system's packages." >&2
exit 1

#!/usr/bin/env bash
# Type check. mypy does not know that kernels/ installs as fastsvi.kernels, so it is given a tree
# of links in which it does.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/fastsvi"
for entry in fastsvi/*; do ln -s "$PWD/$entry" "$tree/$entry"; done
ln -s "$PWD/kernels" "$tree/fastsvi/kernels"
cache="$PWD/.mypy_cache"
config="$PWD/pyproject.toml"
cd "$tree"
python -m mypy --config-file "$config" --cache-dir "$cache" -p fastsvi

#!/usr/bin/env bash
# Lint and format, without changing anything.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m ruff check .
python -m ruff format --check .

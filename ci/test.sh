#!/usr/bin/env bash
# Every test, as the README says it. Installs into the Python that is active.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install -q -e ".[test]"
python -m pytest "$@"

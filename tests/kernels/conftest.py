"""Make ``conformance`` importable by the tests of this folder, and pick the back ends to test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# The suites are imported as modules ("importlib" mode), which leaves their folder off the path.
sys.path.append(str(Path(__file__).parent))

# Triton asks for this when it is first imported, which an earlier test may do through Inductor.
# Where there is a GPU, the compiled kernels are tested instead of the interpreted ones.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""The learning study: VIMPO beside its rivals on small tasks with exact advantages. `python -m benchmarks.learning --help`."""

import sys
from pathlib import Path

# The training loop is that of examples/one_file.py, which is an example first and no package.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

"""The learning study: VIMPO beside its rivals on small tasks with exact advantages. `python -m benchmarks.learning --help`."""

import sys
from pathlib import Path

# The training loop and the quickstart's model are those of the examples, which are examples first and no package.
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "tiny")]

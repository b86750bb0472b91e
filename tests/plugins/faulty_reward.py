"""A reward function that goes wrong: $FAULTY_REWARD is `raises`, `hangs` or `nan`, from call $FAULTY_CALL on,
$FAULTY_TIMES times.
"""

import itertools
import os
import time
from pathlib import Path

_calls = itertools.count(1)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    first = int(os.environ["FAULTY_CALL"])
    if first <= next(_calls) < first + int(os.environ.get("FAULTY_TIMES", "1")):
        Path(os.environ["INCIDENT_FILE"]).touch()
        match os.environ["FAULTY_REWARD"]:
            case "raises":
                raise ZeroDivisionError("the reward of this test raises")
            case "hangs":
                time.sleep(100_000)
            case "nan":
                return float("nan")
    return float(solution_str == ground_truth)

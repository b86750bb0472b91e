"""Outcome reward for verl (reward.custom_reward_function.path): 1 for the right answer, 0 for anything else."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """Exact match; `solution_str` is the decoded response without special tokens."""
    return float(solution_str == ground_truth)

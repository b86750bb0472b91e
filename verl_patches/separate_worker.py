"""Seam: VIMPO's worker where trainer and rollout have GPUs of their own (trainer mode separate_async).

Touches verl.experimental.separation.engine_workers.DetachActorWorker, which keeps weights on the host and brings them back, by
subclassing; VIMPO's trainer puts the subclass where verl's was. Checked against verl 0.9.1; no upstream issue.

In a cycle of several updates verl computes the old log-probs at the policy that the cycle started with, for which it restores
that policy's weights around compute_log_prob. The joint pass runs there, so kappa belongs to the same policy
(kappa_policy=old). With actor_rollout_ref.hybrid_engine=False policy and reference are two workers, which is refused.
"""

from verl.experimental.separation.engine_workers import DetachActorWorker

from verl_patches.worker import VimpoActorRolloutRefWorker


class VimpoDetachActorWorker(VimpoActorRolloutRefWorker, DetachActorWorker):
    """verl's worker that saves and restores weights, with VIMPO's joint pass and loss."""

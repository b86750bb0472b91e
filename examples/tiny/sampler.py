"""verl's replay buffer, asked more often whether the responses are there.

verl's looks every two seconds, which is nothing beside a real step and half of a tiny one. Its interval is no
configuration key; a custom sampler (trainer.v1.sampler.custom_sampler) is verl's own way to change it.
"""

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class QuickReplayBuffer(ReplayBuffer):
    """Looks five times a second."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, poll_interval=0.2, **kwargs)

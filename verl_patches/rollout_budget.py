"""Seam: rollouts on demand (vimpo_verl/rollout_budget.py), prompt by prompt, while verl generates; any estimator with groups.

Touches, all by subclassing: AgentLoopWorkerTQ._run_prompt, _run_agent_loop and _agent_loop_postprocess, with the class that
`actor_rollout_ref.rollout.agent.agent_loop_manager_class`, verl's own key, names; and PPOTrainer.fit, _submit_batch_to_rollout,
_balance_batch, _get_required_batch_multiple and _step_once. Checked against verl 0.9.1; no upstream issue.

verl starts as many agent loops a prompt as `__rollout_n__` says, side by side, in an asyncio task of the prompt's own. Here
that is max_rollouts, and each loop beyond the first min_rollouts waits until the rule has let it in or closed the prompt's
budget; a loop that is not let in ends without an output, which verl knows and leaves out. So the prompts do not wait for one
another, vLLM has the next answer of a prompt as soon as its last one has its reward, and partial rollouts, abortion and
failures are verl's own. The sessions of a prompt are numbered in the order in which the rule has let them in.

A batch then has any number of sequences. verl pads it to ppo_mini_batch_size * rollout.n, which may be a mini-batch that
is nearly all placeholders; here it is cut into as many equal mini-batches as the recipe has, train_batch_size /
ppo_mini_batch_size, padded to the ranks alone.
"""

import asyncio
import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import ray
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_patches.batches import data_parallel_size, is_padding
from verl_patches.group_checks import MANAGER
from verl_patches.group_switch import budget_of
from verl_patches.prior_state import PRIOR
from vimpo_verl import __version__
from vimpo_verl.rollout_budget import SECTION, PromptBudget, budget_metrics

ROLLOUT_N = "__rollout_n__"  # verl's column of a prompt for its number of answers
ASKED = "vimpo_rollouts"  # tag of an answer of a prompt of which others are missing: how many were asked for

logger = logging.getLogger("vimpo_verl")

Worker = AgentLoopWorkerTQ.__ray_actor_class__


def install(v1: ModuleType) -> None:
    """Check that verl's agent loop and trainer have what is extended here. `v1` is the module verl.trainer.ppo.v1."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    wanted = {
        Worker._run_prompt: ["self", "prompt", "sampling_params", "trajectory", "trace"],
        Worker._run_agent_loop: ["self", "sampling_params", "trajectory", "agent_name", "trace", "kwargs"],
        Worker._agent_loop_postprocess: ["self", "output", "validate", "kwargs"],
        PPOTrainer._get_required_batch_multiple: ["self", "dp_size"],
        PPOTrainer._step_once: ["self", "metrics", "timing_raw", "sample_batch_size"],
    }
    for function, parameters in wanted.items():
        found = [name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"]  # Ray's own
        if found != parameters:
            raise RuntimeError(f"{function.__qualname__} takes {found}, not {parameters}")


# ---- generation ------------------------------------------------------------------------------------------------------


class Gate:
    """Lets the agent loops of one prompt in, as its budget says."""

    def __init__(self, budget: PromptBudget):
        self.budget, self.rewards = budget, {}
        self.keys: list[str] = []  # of answers that are stored
        self._changed = asyncio.Event()

    async def admits(self, session: int) -> bool:
        """Waits until it is known whether the answer with this number is wanted."""
        while session >= self.budget.asked and not self.budget.closed:
            await self._changed.wait()
        return session < self.budget.asked

    def settle(self, session: int) -> None:
        """The answer with this number has ended, with the reward that `rewards` has of it, or without one."""
        self.budget.settle(self.rewards.pop(session, None))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class BudgetedAgentLoopWorker(Worker):
    """verl's agent loop worker, with a budget for each prompt that is trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout_budget, problems = budget_of(self.config)
        if problems or self.rollout_budget is None:
            raise ValueError("\n".join(problems) or f"{SECTION} is not asked for, and its agent loop manager is there")
        self.gates: dict[str, Gate] = {}

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        if PRIOR not in prompt:  # of an asynchronous trainer's checkpoint, which a run without priors wrote
            logger.error("vimpo_verl: the prompt %s has no prior: it is given up, and verl takes another", uid)
            await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "failure"})
            return
        self.gates[uid] = Gate(PromptBudget(self.rollout_budget, float(prompt[PRIOR])))
        try:
            await super()._run_prompt(
                {**prompt, ROLLOUT_N: self.rollout_budget.max_rollouts}, sampling_params, trajectory, trace
            )
        finally:
            del self.gates[uid]

    async def _run_agent_loop(self, sampling_params: dict, trajectory: dict, **kwargs) -> Any:
        if trajectory["validate"]:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        gate, session = self.gates[kwargs["uid"]], kwargs["session_id"]
        if not await gate.admits(session):
            return None
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        finally:
            gate.settle(session)
            if gate.budget.closed and gate.budget.missing and gate.keys:
                await tq.async_kv_put(key=gate.keys[0], partition_id="train", tag={ASKED: gate.budget.asked})

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs) -> None:
        await super()._agent_loop_postprocess(output, validate, **kwargs)
        outputs = output if isinstance(output, list) else [output]
        if not validate and outputs:
            gate, session = self.gates[kwargs["uid"]], kwargs["session_id"]
            gate.rewards[session] = outputs[-1].reward_score
            gate.keys.append(f"{kwargs['uid']}_{session}_0")


class BudgetedAgentLoopManager(AgentLoopManagerTQ):
    """verl's agent loop manager, with those workers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(BudgetedAgentLoopWorker)


# ---- training --------------------------------------------------------------------------------------------------------


class BudgetedTrainer:
    """In front of a v1 trainer: groups of any size, and what was spent."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout_budget = budget_of(self.config)[0]
        print(f"vimpo_verl {__version__}: rollouts on demand in force: {self.rollout_budget}", flush=True)

    def fit(self, agent_loop_manager: Any) -> None:
        """As verl's.

        Raises:
            RuntimeError: the agent loop manager knows no budget.
        """
        if not isinstance(agent_loop_manager, BudgetedAgentLoopManager):
            raise RuntimeError(
                f"{SECTION}: the run's agent loop manager is {type(agent_loop_manager).__name__}, which knows no budget. "
                f"Make it of actor_rollout_ref.rollout.agent.agent_loop_manager_class={MANAGER}, as verl.trainer.main_ppo does"
            )
        return super().fit(agent_loop_manager)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """As verl's.

        Raises:
            ValueError: the data set has a number of answers for each prompt.
        """
        if ROLLOUT_N in batch.keys():
            raise ValueError(
                f"{SECTION}: the data set has a column {ROLLOUT_N} with each prompt's number of answers, which is what the "
                f"budget decides. Remove the column, or {SECTION}"
            )
        return super()._submit_batch_to_rollout(batch)

    def _responses_asked(self, batch: KVBatchMeta) -> int:
        """Of the prompts of this batch, those included of which nothing is left."""
        asked = {key.split("_")[0]: tag[ASKED] for key, tag in zip(batch.keys, batch.tags, strict=True) if ASKED in tag}
        for prompt, count in self._rollouts(batch).items():
            asked.setdefault(prompt, count)
        for prompt in self.replay_buffer.failure_keys["train"]:  # no answer: then no more than the first were asked for
            asked.setdefault(prompt, self.rollout_budget.min_rollouts)
        return sum(asked.values())

    def _rollouts(self, batch: KVBatchMeta) -> Counter:
        """Answers of each prompt; several outputs of one are one answer."""
        real = [k for k, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        return Counter(session.rsplit("_", 1)[0] for session in {key.rsplit("_", 1)[0] for key in real})

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args, **kwargs) -> KVBatchMeta:
        """As verl's; the batch is then cut into equal mini-batches, until the end of the step."""
        rollouts = list(self._rollouts(batch).values())
        metrics.update(budget_metrics(self.rollout_budget, rollouts))
        metrics["budget/missing_responses"] = self._responses_asked(batch) - sum(rollouts)
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        batch.reorder(
            placeholders_spread(is_padding(batch), data_parallel_size(self.actor_rollout_wg), self._updates())
        )
        actor = self.config.actor_rollout_ref
        actor.actor.ppo_mini_batch_size, actor.rollout.n = len(batch.keys) // self._updates(), 1
        return batch

    def _step_once(self, *args, **kwargs) -> KVBatchMeta:
        with _own_batch_sizes(self.config.actor_rollout_ref):
            return super()._step_once(*args, **kwargs)

    def _updates(self) -> int:
        """Mini-batches of a step, as the recipe has them."""
        return math.ceil(self.config.data.train_batch_size / self.config.actor_rollout_ref.actor.ppo_mini_batch_size)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        """Sequences that every mini-batch, rank and micro-batch divides."""
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        ref = self.config.actor_rollout_ref.ref
        update = 1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu
        infer = [
            worker.log_prob_micro_batch_size_per_gpu
            for worker in (rollout, ref)
            if not worker.log_prob_use_dynamic_bsz and worker.log_prob_micro_batch_size_per_gpu
        ]
        return math.lcm(self._updates() * dp_size * update, *(dp_size * size for size in infer))


def placeholders_spread(is_padding: list[bool], ranks: int, updates: int) -> list[int]:
    """An order of a batch in which no mini-batch has more than its share of each rank's placeholders.

    verl puts them at the end of a rank's share, where they could fill a mini-batch alone: the mean over its tokens would be
    0 / 0.

    Args:
        is_padding: [B], which samples are placeholders; ranks * updates divides B.
        ranks: data-parallel ranks; each gets an equal part of the batch, in its order.
        updates: mini-batches; each is an equal part of every rank's, in its order.

    Returns:
        [B], positions in the given order; each rank keeps its samples, and the real ones their order.
    """
    share, order = len(is_padding) // ranks, []
    for first in range(0, len(is_padding), share):
        rows = range(first, first + share)
        real, added = ([row for row in rows if is_padding[row] == wanted] for wanted in (False, True))
        for update in range(updates):
            start, end = (len(added) * bound // updates for bound in (update, update + 1))
            already = update * (share // updates) - start  # of the real ones
            order += real[already : already + share // updates - (end - start)] + added[start:end]
    return order


@contextmanager
def _own_batch_sizes(actor_rollout_ref: Any) -> Iterator[None]:
    """verl's own settings of a mini-batch's size, put back afterwards."""
    actor, rollout = actor_rollout_ref.actor, actor_rollout_ref.rollout
    asked = actor.ppo_mini_batch_size, rollout.n
    try:
        yield
    finally:
        actor.ppo_mini_batch_size, rollout.n = asked

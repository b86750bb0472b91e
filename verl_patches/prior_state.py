"""Seam: the prior of each prompt (vimpo_verl/prior.py), asked when the prompt is submitted and kept with its answers.

Touches PPOTrainer._init_dataloader, _submit_batch_to_rollout, _compute_advantage, _save_checkpoint and _load_checkpoint, by
subclassing. Checked against verl 0.9.1; no upstream issue.

The prior goes to the agent loop as two more columns of the prompt, and verl stores the columns of a prompt with each of its
answers: so the number that decides on rollouts is the one that the baseline is made of, also where an asynchronous trainer
trains on them steps later or after a resume.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from verl_patches.checkpoints import loaded_folder
from verl_patches.group_switch import prior_of
from vimpo_verl import __version__
from vimpo_verl.prior import SECTION, STATE, PastRewards, Prior, PriorConfig, prior_metrics

PRIOR, PRIOR_WEIGHT = "vimpo_prior", "vimpo_prior_weight"  # columns of a prompt, fields of its answers


def install(v1: ModuleType) -> None:
    """Check that verl's trainer has what PriorTrainer extends. `v1` is the module verl.trainer.ppo.v1."""
    import inspect

    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    wanted = {"_init_dataloader": ["self"], "_submit_batch_to_rollout": ["self", "batch"]}
    for method, parameters in wanted.items():
        found = list(inspect.signature(getattr(PPOTrainer, method)).parameters)
        if found != parameters:
            raise RuntimeError(f"PPOTrainer.{method} takes {found}, not {parameters}")


class BatchPrior(NamedTuple):
    """Of the B sequences of a batch, float64; placeholders have 1/2 and 1, which nobody reads."""

    mean: Tensor
    weight: Tensor


class PriorTrainer:
    """In front of a v1 trainer: each prompt is submitted with its prior; what it was worth is logged, and learnt from.

    Attributes:
        batch_prior: of the batch under way, for the estimator behind.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.priors = RunPrior(prior_of(self.config)[0])
        print(f"vimpo_verl {__version__}: prior in force: {self.priors}", flush=True)

    def _init_dataloader(self) -> None:
        """As verl's; the data set has what the prior is found by.

        Raises:
            ValueError: naming the rows that have not.
        """
        super()._init_dataloader()
        self.priors.check(self.train_dataset)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        found = self.priors.of(batch, self.global_steps)
        for name, values in ((PRIOR, [p.mean for p in found]), (PRIOR_WEIGHT, [p.weight for p in found])):
            batch[name] = NonTensorStack.from_list([NonTensorData(value) for value in values])
        return super()._submit_batch_to_rollout(batch)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As the trainer's behind it, which finds the priors in `batch_prior`.

        Raises:
            ValueError: a reward is not from 0 to 1, which a prior is about; or answers have no prior.
        """
        real = [position for position, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        keys = [batch.keys[position] for position in real]
        fields = ["uid", "rm_scores", PRIOR, PRIOR_WEIGHT, "data_source", "extra_info"]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        if PRIOR not in data.keys():
            raise ValueError(
                f"step {self.global_steps}: the batch has answers without a prior, from the checkpoint of a run that had "
                f"none. Start that checkpoint's asynchronous run anew, or resume without what reads {SECTION}"
            )
        rewards = [scores.sum().item() for scores in data.pop("rm_scores").unbind()]
        _require_rates(rewards, keys, self.global_steps)
        priors = [Prior(*pair) for pair in zip(map(float, data[PRIOR]), map(float, data[PRIOR_WEIGHT]), strict=True)]
        self.batch_prior = _of_batch(len(batch.keys), real, priors)
        groups = _groups(list(data["uid"]))
        of_groups = [[rewards[row] for row in rows] for rows in groups]
        metrics.update(prior_metrics([priors[rows[0]] for rows in groups], of_groups))
        batch = super()._compute_advantage(batch, metrics)
        sources, infos = list(data["data_source"]), list(data["extra_info"])
        prompts = [(sources[rows[0]], infos[rows[0]]) for rows in groups]
        metrics.update(self.priors.learn(prompts, of_groups, self.global_steps))
        return batch

    def _save_checkpoint(self) -> None:
        """As verl's, with the past in it."""
        self.priors.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        """As verl's; the run goes on with the checkpoint's past.

        Raises:
            ValueError: the checkpoint's file of it cannot be read.
        """
        super()._load_checkpoint()
        folder = loaded_folder(self)
        if folder is not None:
            self.priors.restore(folder)


class RunPrior:
    """Where a run's priors come from.

    Args:
        knobs: algorithm.prior.
    """

    def __init__(self, knobs: PriorConfig):
        self.knobs = knobs
        self.past = PastRewards(knobs.discount) if knobs.source == "own_past" else None
        self.function = load_function(knobs) if knobs.source == "function" else None

    def __repr__(self) -> str:
        return {
            "own_past": f"each prompt's own past, discounted by {self.knobs.discount:g} a step",
            "column": f"column {self.knobs.column} of the data set",
            "function": f"{self.knobs.name} of {self.knobs.path}",
        }[self.knobs.source]

    def check(self, data_set: Any) -> None:
        """That every row of a data set of verl's RLHFDataset has its prior, or its place in the past.

        Raises:
            ValueError: naming the first row that has not.
        """
        rows = getattr(data_set, "dataframe", None)  # of a user's own data set nothing is known before it is read
        if rows is None or self.knobs.source == "function":
            return
        names = set(getattr(rows, "column_names", None) or ())
        if self.knobs.source == "column":
            top = self.knobs.column.split(".")[0]
            values = rows[top] if top in names else [None] * len(rows)
            for row, value in enumerate(values):
                _column_value({top: value}, self.knobs.column, f"row {row} of the data set")
            return
        infos = rows["extra_info"] if "extra_info" in names else [None] * len(rows)
        sources = rows["data_source"] if "data_source" in names else [None] * len(rows)
        _require_unique([prompt_name(source, info) for source, info in zip(sources, infos, strict=True)])

    def of(self, batch: TensorDict, step: int) -> list[Prior]:
        """The priors of the prompts that are about to be submitted, [number of prompts].

        Raises:
            ValueError: a column or function has something else than a number from 0 to 1 for one of them.
        """
        if self.past is not None:
            pairs = zip(batch["data_source"], batch["extra_info"], strict=True)
            return [self.past.prior(prompt_name(source, info), step) for source, info in pairs]
        if self.function is None:
            top = self.knobs.column.split(".")[0]
            values = list(batch[top]) if top in batch.keys() else [None] * len(batch)
            means = [
                _column_value({top: value}, self.knobs.column, f"a prompt of step {step}, row {row} of its batch")
                for row, value in enumerate(values)
            ]
        else:
            means = self._asked(batch, step)
        return [Prior(mean, self.knobs.weight) for mean in means]

    def _asked(self, batch: TensorDict, step: int) -> list[float]:
        columns = {name: list(batch[name]) for name in batch.keys() if not isinstance(batch.get(name), NonTensorData)}
        prompts = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        answer = list(self.function(prompts, step=step))
        if len(answer) != len(prompts):
            raise ValueError(
                f"{SECTION}: {self} gave {len(answer)} numbers for {len(prompts)} prompts; it has to return one for each"
            )
        return [_rate(value, f"{self} for prompt {row} of step {step}") for row, value in enumerate(answer)]

    def learn(
        self, prompts: Sequence[tuple[str, dict]], rewards: Sequence[Sequence[float]], step: int
    ) -> dict[str, float]:
        """Take in what the prompts of a step were rewarded with; returns what to log."""
        if self.past is None:
            return {}
        names = [prompt_name(*prompt) for prompt in prompts]
        seen = sum(map(self.past.has_seen, names))
        for name, found in zip(names, rewards, strict=True):
            self.past.add(name, found, step)
        return {"prior/share_seen": seen / len(names)} if names else {}

    def save(self, folder: Path) -> None:
        if self.past is not None:
            self.past.save(folder)

    def restore(self, folder: Path) -> None:
        """Go on with the past of a checkpoint, global_step_N.

        Raises:
            ValueError: its file cannot be read.
        """
        if self.past is not None and not self.past.load(folder):
            print(
                f"vimpo_verl: the checkpoint {folder} has no {STATE}: {SECTION} starts without a past",
                file=sys.stderr,
                flush=True,
            )


def load_function(knobs: PriorConfig) -> Callable[..., Sequence[float]]:
    """The function that algorithm.prior names: (prompts, step=...) -> one number from 0 to 1 for each prompt.

    A prompt is a dictionary of its columns in the data set, with `raw_prompt`, its messages.

    Raises:
        ValueError: it cannot be loaded.
    """
    from verl.utils.import_utils import load_extern_object

    try:
        function = load_extern_object(knobs.path, knobs.name)
    except Exception as error:  # whatever the user's file raises
        raise ValueError(
            f"{SECTION}.path={knobs.path}, name={knobs.name}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ValueError(f"{SECTION}.path={knobs.path}, name={knobs.name}: this is no function but {function!r}")
    return function


def prompt_name(data_source: Any, extra_info: Any) -> str:
    """A prompt's name in the past. verl's own field `index` is 0 where the data have none, so it is not used.

    Raises:
        ValueError: there is no index.
    """
    index = (extra_info or {}).get("index")
    if index is None:
        raise ValueError(
            f"{SECTION}: a prompt of data_source {data_source!r} has no extra_info.index, and its past is kept by that. Write "
            "one into the parquet file, as examples/math/prepare_data.py does, or give the prior by "
            f"+{SECTION}.column=... or +{SECTION}.path=..."
        )
    return f"{data_source}/{index}"


def _require_unique(names: list[str]) -> None:
    twice = len(names) - len(set(names))
    if twice:
        seen: set[str] = set()
        first = next(name for name in names if name in seen or seen.add(name))
        raise ValueError(
            f"{SECTION}: {twice} rows of the training data have the data_source and extra_info.index of an earlier one, first "
            f"{first!r}: their pasts would be one. Number the rows of a data_source through"
        )


def _column_value(row: dict, column: str, where: str) -> float:
    value = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return _rate(value, f"{SECTION}.column={column}: {where}")


def _rate(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"{where} has {value!r} for a prior, which is a number from 0 to 1")
    return number


def _require_rates(rewards: list[float], keys: list[str], step: int) -> None:
    bad = [(key, reward) for key, reward in zip(keys, rewards, strict=True) if not 0 <= reward <= 1]
    if bad:
        key, reward = bad[0]
        raise ValueError(
            f"step {step}: the reward of sample {key} is {reward} ({len(bad)} of {len(keys)} are not from 0 to 1), and a prior "
            "is about rewards from 0 to 1. Have the reward function return such, or do without algorithm.adv_estimator=v05, "
            "algorithm.rollout_budget and algorithm.vimpo.baseline=fused or posterior_mean"
        )


def _of_batch(size: int, real: list[int], priors: list[Prior]) -> BatchPrior:
    mean, weight = torch.full((size,), 0.5, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    if real:
        mean[real] = torch.tensor([prior.mean for prior in priors], dtype=torch.float64)
        weight[real] = torch.tensor([prior.weight for prior in priors], dtype=torch.float64)
    return BatchPrior(mean, weight)


def _groups(uids: list[str]) -> list[list[int]]:
    """Rows of each prompt, in the order of their first."""
    rows: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        rows.setdefault(uid, []).append(row)
    return list(rows.values())

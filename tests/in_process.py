"""VIMPO's trainer and verl's hybrid worker in one process: verl's code from the configuration to the optimiser step.

Only what needs Ray or vLLM is replaced: the TransferQueue by a dictionary, the worker group by the worker, the rollout
by samples that are given.
"""

import copy

import torch
from engine_samples import Sample, nested
from test_validation import GRPO, compose, validate

PARTITION = "train"


class InMemoryQueue:
    """kv_batch_get and kv_batch_put of the TransferQueue: sample key -> field -> value."""

    def __init__(self):
        self.rows: dict[str, dict] = {}

    def get(self, keys, partition_id, select_fields=None):
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        rows = [self.rows[key] for key in keys]
        # The queue gives what every sample has, as verl's callers rely on for optional fields.
        names = [n for n in (select_fields or rows[0]) if all(n in row for row in rows)]
        data = list_of_dict_to_tensordict([{name: row[name] for name in names} for row in rows])
        for name in names:  # ragged fields are nested also where they happen to be of one length
            if isinstance(rows[0][name], torch.Tensor) and rows[0][name].dim() == 1:
                data[name] = nested([row[name] for row in rows])
        return data

    def put(self, keys, partition_id, fields, tags=None):
        from transfer_queue import KVBatchMeta

        self.tags.update(zip(keys, tags or self.tags_of(keys), strict=True))
        for name in fields.keys():
            rows = fields[name].unbind() if isinstance(fields[name], torch.Tensor) else fields[name]
            for key, row in zip(keys, rows, strict=True):
                self.rows.setdefault(key, {})[name] = row.clone() if isinstance(row, torch.Tensor) else row
        return KVBatchMeta(keys, self.tags_of(keys), partition_id, extra_info=dict(self.extra_info))

    def start(self, samples: list[Sample]):
        """Store samples as verl's agent loop does; returns the batch."""
        from transfer_queue import KVBatchMeta

        keys, sessions = [], {}
        for sample in samples:
            session = sessions[sample.uid] = sessions.get(sample.uid, -1) + 1
            keys.append(f"{sample.uid}_{session}_0")
        self.tags = dict(zip(keys, map(_tag_of, samples), strict=True))
        self.rows = dict(zip(keys, map(_row_of, samples), strict=True))
        self.extra_info = {}
        batch = KVBatchMeta(keys, self.tags_of(keys), PARTITION, extra_info={"global_token_num": None})
        self.extra_info = batch.extra_info
        return batch

    def tags_of(self, keys):
        return [dict(self.tags[key]) for key in keys]


def _tag_of(sample: Sample) -> dict:
    return {"is_padding": sample.is_padding, "seq_len": len(sample.prompt) + len(sample.response)}


def _row_of(sample: Sample) -> dict:
    scores = torch.zeros(len(sample.response))
    scores[-1] = sample.outcome
    tokens = sample.prompt + sample.response
    return {
        "uid": sample.uid,
        "input_ids": torch.tensor(tokens),
        "position_ids": torch.arange(len(tokens)),
        "prompts": torch.tensor(sample.prompt),
        "responses": torch.tensor(sample.response),
        "response_mask": torch.tensor(sample.mask),
        "loss_mask": torch.tensor(sample.mask),
        "rm_scores": scores,
    }


class InProcessGroup:
    """Worker group of one worker: fetches a batch from the queue and stores what the worker returns."""

    def __init__(self, worker, queue: InMemoryQueue):
        self.worker, self.queue = worker, queue

    def _data(self, batch):
        from verl.utils import tensordict_utils as tu

        data = self.queue.get(batch.keys, batch.partition_id)
        tu.assign_non_tensor(data, **{k: v for k, v in batch.extra_info.items() if v is not None})
        return data

    def compute_log_prob(self, batch):
        output = self.worker.compute_log_prob(self._data(batch))
        self.queue.put(batch.keys, batch.partition_id, output.exclude("metrics"))
        return batch

    def compute_ref_log_prob(self, batch):
        raise AssertionError("VIMPO has no separate reference pass")

    def refresh_reference(self):
        self.worker.refresh_reference()

    def update_actor(self, batch):
        return self.worker.update_actor(self._data(batch))

    def __getattr__(self, name):  # save_model_to_cpu and the like, which take no batch
        return getattr(self.worker, name)


def make_config(path, *overrides):
    """A GRPO recipe with the switch, for a batch of 8 samples on the CPU; validated as verl's driver does."""
    config = compose(
        *GRPO[1:],
        "algorithm.adv_estimator=vimpo",
        f"actor_rollout_ref.model.path={path}",
        "+actor_rollout_ref.model.load_tokenizer=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.optim.optimizer=SGD",
        "actor_rollout_ref.actor.optim.lr=0.1",
        "actor_rollout_ref.actor.optim.weight_decay=0",
        "actor_rollout_ref.actor.optim.clip_grad=1e9",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.calculate_log_probs=False",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "data.train_batch_size=4",
        "+algorithm.vimpo.beta=0.1",
        *overrides,
        base=[],
    )
    validate(config)
    return config


def make_trainer(config, monkeypatch, stock=None):
    """VIMPO's trainer of the configured mode with the hybrid worker in this process, and the queue that both use.

    `stock`: a trainer class of a user's own, in the place of verl's.
    """
    import transfer_queue
    import verl.workers.engine_workers as engine_workers
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from verl_patches.family_trainer import trainer_class
    from verl_patches.switch import knobs_of

    queue = InMemoryQueue()
    monkeypatch.setattr(transfer_queue, "kv_batch_get", queue.get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", queue.put)
    monkeypatch.setattr(engine_workers, "get_rollout_class", lambda name, mode: lambda **_: None)
    trainer_type = trainer_class(stock or TRAINER_REGISTRY[config.trainer.v1.trainer_mode], config)
    verls = verls_worker(config.trainer.v1.trainer_mode)
    worker_type = trainer_type.worker_in_place_of(verls) or verls
    role = "actor_rollout_ref" if need_reference_policy(config) else "actor_rollout"
    worker = worker_type(config=copy.deepcopy(config.actor_rollout_ref), role=role)  # it takes keys out
    worker.init_model()
    trainer = object.__new__(trainer_type)  # its __init__ makes a replay buffer
    trainer.config, trainer.knobs, trainer.global_steps = config, knobs_of(config)[0], 1
    trainer.set_up_estimator()
    trainer.actor_rollout_wg = InProcessGroup(worker, queue)
    return trainer, queue


def verls_worker(mode: str) -> type:
    """The class that verl's trainer of this mode makes its hybrid worker of."""
    from verl.experimental.separation.engine_workers import DetachActorWorker
    from verl.workers.engine_workers import ActorRolloutRefWorker

    return DetachActorWorker if mode == "separate_async" else ActorRolloutRefWorker


def run_trainer_step(trainer, queue, samples, rollout_log_probs=None) -> dict[str, float]:
    """The stages of verl's step between rollout and weight sync; returns the logged metrics.

    rollout_log_probs: of each sample [response], where the rollout has left them.
    """
    batch, metrics = queue.start(samples), {}
    if rollout_log_probs is not None:
        for row, log_probs in zip(queue.rows.values(), rollout_log_probs, strict=True):
            row["rollout_log_probs"] = log_probs
    batch.extra_info.pop("global_token_num", None)
    queue.extra_info = batch.extra_info
    for stage in ("old_log_prob", "ref_log_prob"):
        batch = getattr(trainer, f"_compute_{stage}")(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    trainer._update_actor(batch, metrics)
    return metrics

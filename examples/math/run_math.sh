#!/usr/bin/env bash
# Math with verifiable rewards: VIMPO, its GRPO twin, PACS and V0.5, for any model. The paper's recipe (arXiv 2606.20008) is the default.
#
#   ALGO=vimpo PRESET=8gpu examples/math/run_math.sh
#   ALGO=grpo  PRESET=8gpu examples/math/run_math.sh
#   ALGO=vimpo PRESET=1gpu MODEL=Qwen/Qwen3-1.7B-Base examples/math/run_math.sh algorithm.vimpo.beta=auto
#   ALGO=vimpo PRESET="8gpu reuse" examples/math/run_math.sh              # four updates on each batch
#   DRY_RUN=1 ALGO=vimpo PRESET=multinode examples/math/run_math.sh       # checks and prints the configuration, starts nothing
#
# The algorithms differ in keys under `algorithm.` only, and in UPDATES. Everything after the script's name goes to verl as Hydra overrides,
# after the settings below, so it wins. A preset sets the model and the machine, not the recipe, but for `reuse`, which is about the updates
# and goes with each of them; variables win over presets.

set -euo pipefail

#################### settings of the user, by environment variable ####################
ALGO=${ALGO:-vimpo}                     # grpo, vimpo, pacs or v05
PRESET=${PRESET:-8gpu}                  # 1gpu, 8gpu, multinode or lora: the table below; and reuse, beside one of them (alone: 8gpu)
DRY_RUN=${DRY_RUN:-0}                   # 1: check and print the resolved configuration, start nothing
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
PYTHON=${PYTHON:-python3}               # of the environment with verl and vimpo_verl
DATA=${DATA:-$ROOT/outputs/data}           # what examples/math/prepare_data.py wrote
TRAIN_SET=${TRAIN_SET:-guru_math}       # a file of $DATA without .parquet; several, separated by spaces
VAL_SETS=${VAL_SETS:-math500 aime2024 aime2025 olympiadbench}
SEED=${SEED:-1}                         # order of the prompts, sampling and the noise below
REWARD_NOISE=${REWARD_NOISE:-0}         # probability of flipping a group's rewards, in training only; the paper's noisy runs

# The paper's recipe
PROMPTS=${PROMPTS:-96}                  # prompts a step
UPDATES=${UPDATES:-}                    # mini-batches a step; empty: 1, strictly on-policy, or 4 for pacs, which is RLOO with one update
PPO_EPOCHS=${PPO_EPOCHS:-}              # times that a step goes through its mini-batches; empty: 1, or 4 with reuse
RESPONSES=${RESPONSES:-8}               # responses a prompt
PROMPT_LENGTH=${PROMPT_LENGTH:-2048}
RESPONSE_LENGTH=${RESPONSE_LENGTH:-4096}
EPOCHS=${EPOCHS:-1}
STEPS=${STEPS:-null}                    # training steps; null: as many as EPOCHS make
VAL_RESPONSES=${VAL_RESPONSES:-4}       # responses a validation prompt
TEST_FREQ=${TEST_FREQ:-20}              # steps between validations
SAVE_FREQ=${SAVE_FREQ:-20}              # steps between checkpoints: what a requeued job loses at most
KEEP=${KEEP:-3}                         # checkpoints to keep
LOGGER=${LOGGER:-'[console,file,tensorboard]'}
########################################################################################

# ------------------------------------------------------------------ presets: model and machine
default() { [[ -n ${!1:-} ]] || printf -v "$1" '%s' "$2"; }
MACHINE="" REUSE=0
for word in $PRESET; do
    if [[ $word == reuse ]]; then REUSE=1; else MACHINE+=${MACHINE:+ }$word; fi
done
MACHINE=${MACHINE:-8gpu}
if ((REUSE)); then                      # after docs/study.md: four updates on each batch, at 0.3 of the rate of one
    default PPO_EPOCHS 4
    default UPDATES 1                   # the whole batch
    if [[ $MACHINE == lora ]]; then default LR 3e-6; else default LR 3e-7; fi
fi
case $MACHINE in
    1gpu)                               # one GPU, 0.6B to 1.7B
        default MODEL Qwen/Qwen3-0.6B-Base
        default NNODES 1; default GPUS 1; default MAX_TOKENS 8192 ;;
    8gpu)                               # one node
        default MODEL Qwen/Qwen3-4B-Base
        default NNODES 1; default GPUS 8; default MAX_TOKENS 16384 ;;
    multinode)                          # several nodes; examples/slurm/train.sbatch sets NNODES and GPUS
        default MODEL Qwen/Qwen3-8B-Base
        default NNODES 2; default GPUS 8; default MAX_TOKENS 16384 ;;
    lora)                               # one GPU, adapters on a frozen model, which is the reference at once
        default MODEL Qwen/Qwen3-4B-Base
        default NNODES 1; default GPUS 1; default MAX_TOKENS 8192
        default LORA_RANK 32; default LR 1e-5 ;;
    *)                                  # refused below, with whatever else is wrong
        default MODEL none; default NNODES 1; default GPUS 1; default MAX_TOKENS 999999999 ;;
esac
default LR 1e-6
default PPO_EPOCHS 1
if [[ $ALGO == pacs ]]; then default UPDATES 4; else default UPDATES 1; fi
default LORA_RANK 0
default ROLLOUT_TP 1                    # tensor parallelism of a vLLM replica
default GPU_MEMORY 0.5                  # of a GPU, for vLLM while it generates
default OFFLOAD False                   # parameters and optimizer to CPU memory while vLLM generates
noise=$([[ $REWARD_NOISE == 0 ]] || echo "-noise$REWARD_NOISE")
default NAME "$ALGO-$(basename "$MODEL")-$MACHINE$( ((!REUSE)) || echo -reuse)$noise-seed$SEED"
default OUT "$ROOT/outputs/math/$NAME"  # checkpoints, metrics, TensorBoard; a second start with it resumes

# Absolute, because Ray starts verl's processes in other folders and on other nodes.
[[ $DATA == /* ]] || DATA=$PWD/$DATA
[[ $OUT == /* ]] || OUT=$PWD/$OUT

# ------------------------------------------------------------------ are the settings possible: all that is wrong, at once
WHOLE='[1-9][0-9]{0,8}'
NUMBER='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?'
NOT_ZERO='^[0.]*[1-9]'
PROBLEMS=()
is() { [[ ${!1} =~ ^($2)$ ]]; }
want() { is "$1" "$2" || PROBLEMS+=("$1 must be $3, not '${!1}'"); }  # variable, pattern, the pattern in words
want_above_zero() {
    if ! is "$1" "$NUMBER" || [[ ! ${!1} =~ $NOT_ZERO ]]; then PROBLEMS+=("$1 must be a number above 0, not '${!1}'"); fi
}
want_at_most_one() {
    [[ ! ${!1} =~ ^$NUMBER$ ]] || awk "BEGIN { exit !(${!1} <= 1) }" || PROBLEMS+=("$1 must be at most 1, not '${!1}'")
}
are_whole() { local setting; for setting in "$@"; do is "$setting" "$WHOLE" || return 1; done; }

want ALGO 'grpo|vimpo|pacs|v05' "grpo, vimpo, pacs or v05"
is MACHINE '1gpu|8gpu|multinode|lora' ||
    PROBLEMS+=("PRESET must be 1gpu, 8gpu, multinode or lora, with reuse or without, not '$PRESET'")
want DRY_RUN '0|1' "0 or 1"
want OFFLOAD 'True|False' "True or False"
for setting in PROMPTS UPDATES PPO_EPOCHS RESPONSES PROMPT_LENGTH RESPONSE_LENGTH EPOCHS VAL_RESPONSES NNODES GPUS MAX_TOKENS ROLLOUT_TP; do
    want "$setting" "$WHOLE" "a whole number above 0"
done
for setting in STEPS KEEP; do want "$setting" "$WHOLE|null" "a whole number above 0, or null"; done
for setting in TEST_FREQ SAVE_FREQ; do want "$setting" "$WHOLE|-1" "a whole number above 0, or -1 for never"; done
for setting in SEED LORA_RANK; do want "$setting" "0|$WHOLE" "a whole number"; done
for setting in LR GPU_MEMORY; do want_above_zero "$setting"; done
want REWARD_NOISE "$NUMBER" "a probability"
for setting in GPU_MEMORY REWARD_NOISE; do want_at_most_one "$setting"; done

if are_whole PROMPT_LENGTH RESPONSE_LENGTH MAX_TOKENS && ((PROMPT_LENGTH + RESPONSE_LENGTH > MAX_TOKENS)); then
    PROBLEMS+=("MAX_TOKENS=$MAX_TOKENS cannot hold one sequence of PROMPT_LENGTH + RESPONSE_LENGTH = $((PROMPT_LENGTH + RESPONSE_LENGTH)) tokens")
fi
if are_whole PROMPTS UPDATES && ((PROMPTS % UPDATES)); then
    PROBLEMS+=("PROMPTS=$PROMPTS must be a multiple of UPDATES=$UPDATES")
elif are_whole PROMPTS UPDATES RESPONSES NNODES GPUS && ((PROMPTS * RESPONSES / UPDATES % (NNODES * GPUS))); then
    PROBLEMS+=("PROMPTS * RESPONSES / UPDATES = $((PROMPTS * RESPONSES / UPDATES)) must be a multiple of the GPUs, NNODES * GPUS = $((NNODES * GPUS))")
fi
if are_whole ROLLOUT_TP NNODES GPUS && ((NNODES * GPUS % ROLLOUT_TP)); then
    PROBLEMS+=("ROLLOUT_TP=$ROLLOUT_TP must divide the GPUs, NNODES * GPUS = $((NNODES * GPUS))")
fi
if [[ $MACHINE == lora && $LORA_RANK == 0 ]]; then
    PROBLEMS+=("LORA_RANK must be above 0 with PRESET=lora: without adapters it is PRESET=1gpu")
fi
if [[ $DRY_RUN == 0 ]]; then
    for set in $TRAIN_SET $VAL_SETS; do
        [[ -f $DATA/$set.parquet ]] ||
            PROBLEMS+=("no $DATA/$set.parquet: make it with examples/math/prepare_data.py, or set DATA, TRAIN_SET and VAL_SETS")
    done
fi
if ((${#PROBLEMS[@]})); then
    printf 'run_math.sh: %s\n' "${PROBLEMS[@]}" >&2
    exit 2
fi

# ------------------------------------------------------------------ who can reach the run
# Ray runs what whoever reaches its ports sends it. A run on one node that starts its own Ray keeps it, and verl's and vLLM's servers,
# which take Ray's address, on the loopback address. Otherwise: RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 (Ray's name; it works on Linux, too).
if ((NNODES == 1)) && [[ -z ${RAY_ADDRESS:-} && ! -e ${RAY_TMPDIR:-/tmp}/ray/ray_current_cluster ]]; then
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=${RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER:-0}
    [[ $RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER != 0 ]] || export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1}
fi

files_of() {  # names of data sets -> a Hydra list of their files
    local set files=()
    for set in "$@"; do files+=("$DATA/$set.parquet"); done
    (IFS=,; echo "[${files[*]}]")
}
# shellcheck disable=SC2086  # lists of names
{ TRAIN_FILES=$(files_of $TRAIN_SET); VAL_FILES=$(files_of $VAL_SETS); }

# ------------------------------------------------------------------ verl
DATA_KEYS=(
    data.train_files="$TRAIN_FILES"
    data.val_files="$VAL_FILES"
    data.train_batch_size="$PROMPTS"
    data.max_prompt_length="$PROMPT_LENGTH"
    data.max_response_length="$RESPONSE_LENGTH"
    data.filter_overlong_prompts=True
    data.truncation=error
    data.seed="$SEED"
)
MODEL_KEYS=(
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
)
if ((LORA_RANK > 0)); then
    MODEL_KEYS+=(
        actor_rollout_ref.model.lora_rank="$LORA_RANK"
        actor_rollout_ref.model.lora_alpha="$((2 * LORA_RANK))"
        actor_rollout_ref.model.target_modules=all-linear
        actor_rollout_ref.rollout.load_format=safetensors  # vLLM reads the frozen weights itself; only adapters are sent
    )
fi
ACTOR=(
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.ppo_mini_batch_size=$((PROMPTS / UPDATES))
    actor_rollout_ref.actor.ppo_epochs="$PPO_EPOCHS"
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$MAX_TOKENS"
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.clip_ratio_c=10.0
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.data_loader_seed="$SEED"
    actor_rollout_ref.actor.fsdp_config.param_offload="$OFFLOAD"
    actor_rollout_ref.actor.fsdp_config.optimizer_offload="$OFFLOAD"
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n="$RESPONSES"
    actor_rollout_ref.rollout.seed="$SEED"
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP"
    actor_rollout_ref.rollout.gpu_memory_utilization="$GPU_MEMORY"
    actor_rollout_ref.rollout.max_model_len="$((PROMPT_LENGTH + RESPONSE_LENGTH))"
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.n="$VAL_RESPONSES"
)
REWARD=(
    reward.custom_reward_function.path=pkg://vimpo_verl.rewards.math
    reward.custom_reward_function.name=compute_score
)
case $ALGO-$REUSE in
    vimpo-1) ALGORITHM=(algorithm.adv_estimator=vimpo +algorithm.vimpo.use_actor=false) ;;  # the value loss alone, with its value_clip
    vimpo-0)
        ALGORITHM=(
            algorithm.adv_estimator=vimpo
            +algorithm.vimpo.beta=5e-4 +algorithm.vimpo.actor_coeff=5e-3 +algorithm.vimpo.actor_trust=false
            +algorithm.vimpo.value_clip=null
        )
        ;;
    *) ALGORITHM=(algorithm.adv_estimator="$ALGO") ;;  # with its own defaults
esac
ALGORITHM+=(
    algorithm.lam=1.0
    algorithm.use_kl_in_reward=False
)
if [[ $REWARD_NOISE != 0 ]]; then
    ALGORITHM+=(+algorithm.reward_noise.flip_prob="$REWARD_NOISE" +algorithm.reward_noise.seed="$SEED")
fi
TRAINER=(
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$GPUS"
    trainer.total_epochs="$EPOCHS"
    trainer.total_training_steps="$STEPS"
    trainer.val_before_train=True
    trainer.test_freq="$TEST_FREQ"
    trainer.save_freq="$SAVE_FREQ"
    trainer.max_actor_ckpt_to_keep="$KEEP"
    trainer.resume_mode=auto
    trainer.project_name=vimpo_math
    trainer.experiment_name="$NAME"
    trainer.default_local_dir="$OUT/checkpoints"
    trainer.logger="$LOGGER"
)
# The process that writes them may run on another node, with the environment of that node's Ray.
RUNTIME=(
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH="$OUT/metrics.jsonl"
    +ray_kwargs.ray_init.runtime_env.env_vars.TENSORBOARD_DIR="$OUT/tensorboard"
    hydra.run.dir="$OUT/hydra"
)
OVERRIDES=(
    "${DATA_KEYS[@]}" "${MODEL_KEYS[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${REWARD[@]}" "${ALGORITHM[@]}" "${TRAINER[@]}" "${RUNTIME[@]}"
    "$@"
)

if [[ $DRY_RUN == 1 ]]; then
    exec "$PYTHON" "$HERE/show_config.py" "${OVERRIDES[@]}"
fi

# verl's file logger empties its file when it starts: a resumed run keeps what the earlier ones wrote beside it.
# `vimpo compare` reads metrics.1.jsonl, metrics.2.jsonl, ... and metrics.jsonl as one run.
mkdir -p "$OUT"
if [[ -s $OUT/metrics.jsonl ]]; then
    attempt=1
    while [[ -e $OUT/metrics.$attempt.jsonl ]]; do attempt=$((attempt + 1)); done
    mv "$OUT/metrics.jsonl" "$OUT/metrics.$attempt.jsonl"
fi

exec "$PYTHON" -m verl.trainer.main_ppo "${OVERRIDES[@]}"

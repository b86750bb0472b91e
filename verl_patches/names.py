"""Names under which trainer and worker hand VIMPO's loss what it needs, through verl's batches."""

ACTOR_COEFF = "vimpo_actor_coeff"  # float, c_A of the batch
VALUE_SCALE = "vimpo_value_scale"  # float, what L_V is multiplied by
BETA = "vimpo_beta"  # float, the beta of the run
IS_REAL = "vimpo_is_real"  # [B], 0 for the placeholder samples that verl adds to fill a batch, and for rejected ones
VALUE_MASK = "vimpo_value_mask"  # [B, T], of L_V, where verl's rejection has taken tokens out of response_mask
NUM_SEQUENCES = "vimpo_num_sequences"  # int, real sequences of the global mini-batch
AT_OLD_POLICY = "vimpo_at_old_policy"  # bool: old_log_probs are the policy's as it is now; in a batch's first update

# In one pass:
ONE_PASS = "vimpo_one_pass"  # True: the update finds log-probs and kappa itself
LAM = "vimpo_lam"  # float, GAE's lambda
STEP = "vimpo_step"  # int, for messages
ADVANTAGE_MEAN = "vimpo_advantage_mean"  # float, of the raw advantages of the batch before
ADVANTAGE_STD = "vimpo_advantage_std"  # float, likewise; negative: there is no batch before
ROW = "vimpo_row"  # [B], the place in the batch, for messages
GROUP = "vimpo_group"  # [B], the number of the prompt
OUTCOME = "vimpo_outcome"  # [B], the reward of the sequence
# What the update's forward returns then beside verl's own log_probs, nested over prompt and response, without gradients.
POLICY_LOG_PROBS, POLICY_ENTROPY = "policy_log_probs", "policy_entropy"
OF_BATCH = "of_batch/"  # before the names of metrics of the whole batch that the update returns

"""A checkpoint callback of verl's: trainer.checkpoint_callback_class=checkpoint_store.Store.

Step 1 is moved to $CHECKPOINT_STORE, others are copied there. A line a call in its seen.txt says what was wrong with
the checkpoint then, if anything, and whether it had a record.
"""

import os
import shutil
from pathlib import Path

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from verl_patches.checkpoints import fault, has_record


class Store(CheckpointCallback):
    def on_save(self, trainer, global_step, checkpoint_dir, async_save=False, **kwargs):
        folder, store = Path(checkpoint_dir), Path(os.environ["CHECKPOINT_STORE"])
        with (store / "seen.txt").open("a") as seen:
            seen.write(f"{global_step} {fault(folder)} {has_record(folder)}\n")
        if global_step == 1:
            shutil.move(folder, store / folder.name)
        else:
            shutil.copytree(folder, store / folder.name)

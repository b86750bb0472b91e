"""Entry point of the group verl.plugins: verl imports this module in every process, at the end of `import verl`.

It only hooks imports, so that `import verl` stays as fast as without it. verl logs a plugin's error at DEBUG, where
nobody sees it, so a failure here is also printed.
"""

import sys

try:
    from verl_patches import seams

    seams.hook_all()
except Exception as error:
    print(
        f"vimpo_verl could not be loaded and algorithm.adv_estimator=vimpo will not work: "
        f"{type(error).__name__}: {error}. Run `vimpo check`.",
        file=sys.stderr,
        flush=True,
    )
    raise

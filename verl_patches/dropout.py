"""What makes the policy's forward of an update differ from its forward in a pass before it. No seam: the trainer asks.

verl's engines (FSDP, FSDP-Turbo, Megatron) put a model into eval mode in passes without gradients and into train mode in
updates. In train mode transformers' models apply what their configuration has of dropout; Seed-OSS has 0.1 by itself.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

# As transformers' configurations name it: attention_dropout, resid_pdrop, drop_path_rate, router_jitter_noise, ...
_NOISE = re.compile(r"dropout|pdrop|drop_path|layerdrop|jitter_noise")
_OF_OTHER_HEADS = re.compile(r"(classifier|summary)_")  # which a policy has not


def dropout_of(model: Any) -> dict[str, float]:
    """Key of the model's configuration, with the recipe's override_config in it -> its dropout, where it is not 0.

    Args:
        model: verl's actor_rollout_ref.model, a DictConfig; the model's files are read as verl reads them.
    """
    from omegaconf import open_dict
    from verl.utils.config import omega_conf_to_dataclass

    model = copy.deepcopy(model)
    with open_dict(model):
        model.load_tokenizer = False
    return dict(noise_in(omega_conf_to_dataclass(model).hf_config.to_dict()))


def noise_in(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The same of a configuration as a dict; keys of its parts are named as in text_config.attention_dropout."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from noise_in(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and value > 0 and _NOISE.search(key) and not _OF_OTHER_HEADS.match(key):
            yield f"{prefix}{key}", float(value)

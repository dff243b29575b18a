"""How the same run is asked for in each release: what a user writes differently, and no repair of ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices, versions
from trainer_fsdp_patch.estimating import settings
from trainer_fsdp_patch.versions import at_least

if TYPE_CHECKING:
    from transformers import Trainer

    from trainer_fsdp_patch.testing.case import Setup


_POLICIES = {"": "TRANSFORMER_BASED_WRAP", "size": "SIZE_BASED_WRAP", "none": "NO_WRAP"}


def dtype_argument() -> str:
    """Name of the argument of `from_pretrained` that takes a dtype."""
    return "dtype" if at_least("transformers", "4.56.0") else "torch_dtype"


def normalises_over_ranks() -> bool:
    """Whether the Trainer divides the loss by the tokens of all ranks, so that their number may differ."""
    return at_least("transformers", "4.46.2")


def has_fsdp2() -> bool:
    """Whether this stack trains FSDP2 through the Trainer, on the devices that are there.

    FSDP2 on CPU ranks needs a torch whose CPU stream records events.
    """
    device = devices.kind() != "cpu" or at_least("torch", "2.9.0")
    return settings.newest() == 2 and device


def has_bitsandbytes() -> bool:
    """Whether this stack loads packed weights on the devices that are there; CPU releases came late."""
    return versions.installed("bitsandbytes") is not None and (
        devices.kind() != "cpu" or at_least("transformers", "4.46.0")
    )


def tokens() -> dict[str, object]:
    """TrainingArguments that make the loss of several ranks that of one process."""
    return {"average_tokens_across_devices": True} if normalises_over_ranks() else {}


def state_dict_type(setup: Setup) -> str:
    """What a set-up's checkpoints hold; accelerate 1.6 knows no full ones under FSDP2."""
    sharded = setup.sharded_checkpoint or (setup.fsdp == 2 and not at_least("accelerate", "1.7.0"))
    return "SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT"


def fsdp(setup: Setup) -> dict[str, object]:
    """TrainingArguments for a set-up's FSDP; releases that read the environment get it set.

    Args:
        setup: a case with `fsdp` 1 or 2.

    Returns:
        `fsdp` and `fsdp_config`.
    """
    config: dict[str, object] = {
        "cpu_ram_efficient_loading": str(setup.ram_efficient).lower(),
        # A string would count as true whatever it says: https://github.com/huggingface/transformers/pull/34032
        "activation_checkpointing": setup.activation_checkpointing,
    }
    if setup.fsdp == 1:
        config["use_orig_params"] = str(setup.use_orig_params).lower()
        config["sync_module_states"] = str(devices.kind() != "cpu").lower()
    if at_least("transformers", "5.0.0"):
        config["version"] = setup.fsdp
    else:
        os.environ["FSDP_VERSION"] = str(setup.fsdp)
    if setup.wrap:
        config["min_num_params"] = 4000 if setup.wrap == "size" else 0
    if at_least("transformers", "5.10.0"):
        config |= {"auto_wrap_policy": _POLICIES[setup.wrap]} if setup.wrap or setup.hybrid else {}
        config |= {"reshard_after_forward": "hybrid_shard"} if setup.hybrid and setup.fsdp == 1 else {}
        config |= {"cpu_offload": True} if setup.offload else {}
        return {"fsdp": True, "fsdp_config": {**config, "state_dict_type": state_dict_type(setup)}}
    assert not setup.hybrid, "older releases are asked for this in other ways"
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict_type(setup)
    words = ["full_shard", *(["auto_wrap"] if setup.wrap != "none" else []), *(["offload"] if setup.offload else [])]
    return {"fsdp": " ".join(words), "fsdp_config": config}


def replicas(setup: Setup) -> dict[str, object]:
    """TrainingArguments for pairs of ranks that hold a replica of the base each, under FSDP2."""
    if not setup.hybrid or setup.fsdp != 2:
        return {}
    from accelerate.parallelism_config import ParallelismConfig

    return {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=setup.ranks // 2)}


def environment() -> None:
    """Settings without which one process cannot resume either.

    transformers before 4.47 reads its random states in a way that torch 2.6 refuses.
    """
    if at_least("torch", "2.6.0") and not at_least("transformers", "4.47.0"):
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


def evaluate_every_step(trainer: Trainer) -> None:
    """Have a Trainer evaluate after each step; its argument was renamed in transformers 4.41 and 4.46."""
    name = "eval_strategy" if hasattr(trainer.args, "eval_strategy") else "evaluation_strategy"
    setattr(trainer.args, name, type(getattr(trainer.args, name))("steps"))
    trainer.args.eval_steps = 1

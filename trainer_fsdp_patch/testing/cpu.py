"""Lets CPU ranks train under FSDP through the Trainer, for `check` and for the tests.

accelerate turns FSDP on for accelerators only. `bridge` makes it run over gloo, faithfully for everything that is
Python. `allow_packed_weights` has older releases of transformers load quantized bases there.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices, versions

if TYPE_CHECKING:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import TrainingArguments

_CONFIGS = (
    "FullStateDictConfig",
    "FullOptimStateDictConfig",
    "ShardedStateDictConfig",
    "ShardedOptimStateDictConfig",
)

_GRACE_S = 0.1
"""Seconds: a thread of gloo that waits for the GIL, or for a core, needs a few milliseconds."""

Setter = Callable[[object, str, object], None]
"""A `__setattr__`."""


def bridge(arguments: TrainingArguments) -> None:
    """Make this process a rank that FSDP accepts, for as long as it lives.

    Args:
        arguments: TrainingArguments with `use_cpu=True` and `ddp_backend="gloo"`; its device is set up
            here. For FSDP1, `fsdp_config` has to have `sync_module_states` false.
    """
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import fully_sharded_data_parallel as fsdp1

    assert arguments.device.type == "cpu", arguments.device
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")
    for name in _CONFIGS:
        config = getattr(fsdp1, name)
        # The name is the mark of a class that is done already.
        if config.__setattr__.__name__ != _never_offloaded.__name__:
            config.__setattr__ = _never_offloaded(config.__setattr__)
    atexit.register(_end_process_group)


def _end_process_group() -> None:
    """End gloo's threads before Python ends.

    One of them may still free the last collective's tensors, and asks for the GIL. CPython then ends the thread, and
    C++ aborts the process. Of 60 pairs of bare ranks on one core 9 ended so, and none where the group was ended.

    A mesh that the model holds keeps its group, and the threads with it. They get the time to free what they hold.
    """
    import time

    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_GRACE_S)


def _never_offloaded(upstream: Setter) -> Setter:
    """FSDP1 gives state dicts that are offloaded to the CPU as aliases of storage that it frees on the CPU."""

    def setattr_without_offload(instance: object, name: str, value: object) -> None:
        upstream(instance, name, False if name == "offload_to_cpu" else value)

    setattr_without_offload.__name__ = _never_offloaded.__name__
    return setattr_without_offload


def hand_out(plugin: FullyShardedDataParallelPlugin) -> None:
    """Have FSDP1 broadcast rank 0's bytes of each unit, which accelerate and torch refuse on a CPU: NCCL cannot.

    Args:
        plugin: of a Trainer that has not begun to train.
    """
    from torch.distributed.fsdp import _init_utils

    plugin.sync_module_states = True
    plugin.param_init_fn = lambda module: module.to_empty(device="cpu", recurse=False)
    _init_utils._check_module_states_for_sync_module_states = lambda module_states: None


def allow_packed_weights() -> None:
    """Let transformers before 4.53 load packed weights on a CPU without IPEX, which bitsandbytes 0.46 needs no more."""
    import transformers.integrations

    if devices.kind() == "cpu" and not versions.at_least("transformers", "4.53.0"):
        transformers.integrations.validate_bnb_backend_availability = lambda raise_exception=False: True

"""Which optimizers step a shard as they step the full tensor: those that look at each element alone.

Adafactor reads rows and columns, 8-bit optimizers blocks of 256 elements. FSDP1's shards are flat and end anywhere:
both take other steps there, and no error says so. FSDP2's are DTensors, which many optimizers cannot step at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

_TORCH = {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
_NAMES = {"adagrad", "adamw_anyprecision", "adamw_apex_fused", "adamw_hf", "rmsprop", "sgd"}
_OF_BITSANDBYTES = {"ademamix", "lion_32bit", "paged_adamw_32bit", "paged_ademamix_32bit", "paged_lion_32bit"}
_OF_BITSANDBYTES |= {"rmsprop_bnb", "rmsprop_bnb_32bit"}
"""Values of TrainingArguments.optim; the last ones keep 32 bits of each element, and know nothing of DTensors."""

_OTHERWISE = ("apollo_torch", "bitsandbytes", "galore_torch", "lomo_optim", "peft", "torchao", "transformers")
"""Packages whose optimizers are known, and are not elementwise where nothing else is said."""

REMEDY = 'Use an elementwise optimizer such as adamw_torch, or patch(adapter_placement="replicate")'


def why_not(trainer: Trainer, fsdp_version: int, placement: str) -> str:
    """Why no trainable tensor of a run may be sharded, or "" where its optimizer steps shards alike.

    Args:
        trainer: its optimizer need not be made yet; then `args.optim` says which it is going to be.
        fsdp_version: 1 or 2.
        placement: the user's adapter_placement: "shard" lets an optimizer pass that nobody knows.
    """
    optimizer = getattr(trainer, "optimizer", None)
    if optimizer is None:
        name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        alike = name.startswith("adamw_torch") and not name.endswith("bit")
        alike = alike or name in _NAMES or (fsdp_version == 1 and name in _OF_BITSANDBYTES)
        return "" if alike else f"optim={name} steps shards otherwise than full tensors"
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if _is_elementwise(optimizer, fsdp_version) or (placement == "shard" and not _is_known(optimizer)):
        return ""
    return f"{type(optimizer).__name__} is not known to step shards as it steps full tensors"


def refuse(optimizer: torch.optim.Optimizer, name: str, fsdp_version: int) -> None:
    """Before its first step, refuse an optimizer that was made after the plan and steps a shard otherwise.

    Args:
        optimizer: torch's or another one.
        name: of a sharded trainable tensor.
        fsdp_version: 1 or 2.

    Raises:
        AdapterError: it is known to look beyond single elements.
    """
    if not _is_known(optimizer) or _is_elementwise(optimizer, fsdp_version):
        return
    sharded = f"it is sharded, and {type(optimizer).__name__} steps shards otherwise than full tensors"
    raise AdapterError(name, sharded, "The adapter would not be the one that one process trains", REMEDY)


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    package = type(optimizer).__module__.partition(".")[0]
    return package == "torch" or package in _OTHERWISE


def _is_elementwise(optimizer: torch.optim.Optimizer, fsdp_version: int) -> bool:
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    if package == "bitsandbytes":
        bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
        return fsdp_version == 1 and bits == 32
    return (package == "torch" and kind.__name__ in _TORCH) or (package == "transformers" and kind.__name__ == "AdamW")

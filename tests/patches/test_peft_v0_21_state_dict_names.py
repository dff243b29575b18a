"""Nested FSDP and checkpoint wrappers hide the adapter from peft, and the file is empty."""

import pytest
from cells import Bench, Setup
from faults import canary, fault
from torch import nn

from trainer_fsdp_patch.saving import naming


def test_canary() -> None:
    canary("peft_v0_21_state_dict_names")


@pytest.mark.parametrize(
    "setup",
    [Setup("f1", fsdp=1), Setup("f2-ac", activation_checkpointing=True)],
    ids=lambda setup: setup.name,
)
def test_the_file_is_not_empty(bench: Bench, setup: Setup) -> None:
    fault(bench, "lora", setup, "8 of 8 keys missing")


def test_names_change_only_where_a_wrapper_sits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._fsdp_wrapped_module = nn.Linear(1, 1)

    plain = nn.Sequential(nn.Linear(1, 1))
    assert naming.with_canonical_names(plain) is plain
    proxy = naming.with_canonical_names(nn.ModuleDict({"layer": Wrapped()}))
    assert [name for name, _ in proxy.named_parameters()] == ["layer.weight", "layer.bias"]
    assert [name for name, _ in proxy.named_modules()] == ["", "layer", "layer"]
    assert isinstance(proxy, nn.ModuleDict)

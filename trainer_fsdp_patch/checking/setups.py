"""What `check` can train: set-ups of FSDP, well-known methods of PEFT, and quantized bases."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.checking.errors import CheckError
from trainer_fsdp_patch.testing import releases
from trainer_fsdp_patch.testing.case import Setup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SETUPS = (
    Setup("FSDP1, fp32", fsdp=1),
    Setup("FSDP1, use_orig_params false", fsdp=1, use_orig_params=False),
    Setup("FSDP1, bf16 mixed precision", fsdp=1, amp="bf16"),
    Setup("FSDP2, fp32", fsdp=2),
    Setup("FSDP2, bf16 mixed precision", fsdp=2, amp="bf16"),
    Setup("FSDP2, RAM-efficient loading", fsdp=2, ram_efficient=True),
)

BATCH = 4
"""Rows of the global batch, where the ranks divide them."""


class Base(NamedTuple):
    """A kind of base: what a set-up calls it, and what people do, behind the name of a method."""

    storage: str
    title: str


BASES = MappingProxyType(
    {"none": Base("", ""), "4bit": Base("uint8", " on a 4-bit base"), "8bit": Base("8bit", " on an 8-bit base")}
)
"""Kinds of base that `--quantize` knows, as bitsandbytes makes them."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of PEFT on two linear layers of each block; calling it puts the adapter on a base model.

    Attributes:
        title: for people.
        config: name of peft's configuration class.
        settings: of the configuration.
    """

    title: str
    config: str
    settings: Mapping[str, object]

    def __call__(self, model: PreTrainedModel) -> PeftModel:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(peft, self.config)(target_modules=["q_proj", "o_proj"], **self.settings)
            return peft.get_peft_model(model, config)


METHODS = MappingProxyType(
    {
        "vera": Method("VeRA", "VeraConfig", {"r": 8, "projection_prng_key": 1, "d_initial": 0.1}),
        "lora": Method("LoRA", "LoraConfig", {"r": 4}),
        "dora": Method("DoRA", "LoraConfig", {"r": 4, "use_dora": True}),
        "ia3": Method("IA3", "IA3Config", {"feedforward_modules": ["o_proj"]}),
        "loha": Method("LoHa", "LoHaConfig", {"r": 4}),
        "lokr": Method("LoKr", "LoKrConfig", {"r": 4}),
        "oft": Method("OFT", "OFTConfig", {"oft_block_size": 8}),
        "randlora": Method("RandLoRA", "RandLoraConfig", {"r": 8, "randlora_alpha": 8}),
    }
)
"""Methods that `--method` knows. VeRA is the default: this project began with its two shared projections."""


def chosen(only: Sequence[str]) -> tuple[Setup, ...]:
    """Set-ups whose names have one of the parts, whatever their case; all where none is given.

    Args:
        only: parts of names.

    Raises:
        CheckError: a part is in no name.
    """
    for part in only:
        if not any(_has(setup, part) for setup in SETUPS):
            names = "; ".join(setup.name for setup in SETUPS)
            raise CheckError(
                "check --only", f"no set-up has '{part}' in its name", "Nothing was trained", f"There are: {names}"
            )
    return tuple(setup for setup in SETUPS if not only or any(_has(setup, part) for part in only))


def _has(setup: Setup, part: str) -> bool:
    return part.strip().lower() in setup.name.lower()


def refuse_absent(method: str, quantize: str) -> None:
    """Refuse a method that the installed peft lacks, and a quantized base that nothing installed loads.

    Args:
        method: key of `METHODS`.
        quantize: key of `BASES`.

    Raises:
        CheckError: saying which package to install.
    """
    import peft

    if not hasattr(peft, METHODS[method].config):
        found = f"peft {versions.installed('peft')} has no {METHODS[method].config}"
        raise CheckError("check --method", found, "Nothing was trained", "Choose another, or install a newer peft")
    if quantize == "none":
        return
    if versions.installed("bitsandbytes") is None:
        found = "bitsandbytes is not installed"
        raise CheckError("check --quantize", found, "Nothing was trained", "Install it, or leave --quantize out")
    if not releases.has_bitsandbytes():
        found = f"transformers {versions.installed('transformers')} loads no packed weights on a CPU"
        raise CheckError("check --quantize", found, "Nothing was trained", "Install transformers 4.46 or newer")


def fitted(setups: Sequence[Setup], ranks: int, quantize: str) -> list[Setup]:
    """The set-ups for so many ranks and a base, without those that the installed releases do not have.

    Each rank gets a row at least, and one process the same global batch.

    Args:
        setups: of `SETUPS`.
        ranks: number of ranks.
        quantize: key of `BASES`.

    Raises:
        CheckError: none is left.
    """
    left = [setup for setup in setups if setup.fsdp == 1 or releases.has_fsdp2()]
    if not left:
        found = "the installed releases train no FSDP2 on these devices"
        raise CheckError("check --only", found, "Nothing was trained", "Choose a set-up of FSDP1")
    batch = BATCH if BATCH % ranks == 0 else ranks
    storage = BASES[quantize].storage
    return [dataclasses.replace(setup, ranks=ranks, batch=batch, storage=storage) for setup in left]

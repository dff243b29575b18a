"""What `nox -s gpu` trains: adapters and set-ups that behave otherwise on an accelerator than on CPU ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer_fsdp_patch.testing.case import Setup

COMPARED = 4
"""Steps that are compared with one process; those after them are timed."""

TARGETS = ["q_proj", "o_proj"]


@dataclass(frozen=True)
class Size:
    """Of the base, its data, and the number of steps that are timed."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    spread: float
    rows: int
    length: int
    timed: int

    def config(self) -> dict[str, Any]:
        """Arguments of LlamaConfig."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "max_position_embeddings": 2 * self.length,
            "tie_word_embeddings": False,
            "initializer_range": self.spread,
        }

    def global_batch(self, ranks: int) -> int:
        """Rows of a step: each rank gets as many as any other."""
        return -(-self.rows // ranks) * ranks


TINY = Size(64, 128, 2, 4, 96, 0.1, rows=4, length=12, timed=3)
"""Of CPU ranks."""
SMALL = Size(1024, 2816, 4, 16, 4096, 0.02, rows=4, length=256, timed=10)
"""Of an accelerator: 220 MB in fp32, of which a shard and a copy can be told apart."""


@dataclass(frozen=True)
class Scenario:
    """A training that one process can do too.

    Attributes:
        name: for the table.
        method: "lora" or "vera".
        setup: fields of a Setup.
        seconds: that a run of it may take.
        lacks: why it cannot run; it gets what `probe` gave, and the version of FSDP.
    """

    name: str
    method: str
    setup: dict[str, Any] = field(default_factory=dict)
    seconds: float = 120.0
    lacks: Callable[[dict[str, Any], int], str] = lambda found, fsdp: ""

    def of(self, fsdp: int, kind: str) -> Setup:
        """The set-up under a version of FSDP, 0 for one process.

        Args:
            fsdp: the version.
            kind: type of the device.
        """
        given = {"attention": "sdpa", **self.setup}
        if kind == "cpu" and "compiled" in given:
            # The others need a compiler, which a machine may lack.
            given["compiled"] = "aot_eager"
        if not fsdp:
            given.pop("offload", None)
        return Setup(self.name, fsdp=fsdp, **given)

    def configure(self, model: Any) -> Any:
        """Put the adapter on a base."""
        import peft

        if self.method == "vera":
            settings = peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=1, d_initial=0.1)
        else:
            settings = peft.LoraConfig(r=8, target_modules=TARGETS)
        return peft.get_peft_model(model, settings)


def _on_cpu(why: str) -> Callable[[dict[str, Any], int], str]:
    return lambda found, fsdp: why if found["kind"] == "cpu" else ""


def _bitsandbytes(found: dict[str, Any], fsdp: int) -> str:
    return "" if found["packages"]["bitsandbytes"] else "bitsandbytes is not installed"


def _flash(found: dict[str, Any], fsdp: int) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    return _on_cpu("it has no kernels for a CPU")(found, fsdp)


def _offload(found: dict[str, Any], fsdp: int) -> str:
    return "FSDP1 offloads from an accelerator" if found["kind"] == "cpu" and fsdp == 1 else ""


BF16 = {"amp": "bf16"}
NF4 = {"dtype": "bfloat16", "storage": "uint8", **BF16}

SCENARIOS = (
    Scenario("LoRA", "lora"),
    Scenario("VeRA", "vera"),
    Scenario("QLoRA", "lora", NF4, lacks=_bitsandbytes),
    Scenario("LoRA bf16", "lora", BF16),
    Scenario("VeRA bf16", "vera", BF16),
    Scenario("LoRA fp16", "lora", {"amp": "fp16"}, lacks=_on_cpu("accelerate scales gradients on accelerators only")),
    Scenario("LoRA CPU offload", "lora", {"offload": True}, lacks=_offload),
    Scenario("QVeRA", "vera", NF4, lacks=_bitsandbytes),
    Scenario("LoRA flash attention", "lora", {**BF16, "attention": "flash_attention_2"}, lacks=_flash),
    Scenario("LoRA torch.compile", "lora", {**BF16, "compiled": "inductor"}, seconds=200.0),
)
"""In the order in which they run, for there may be no time for the last."""

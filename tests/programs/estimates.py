"""The activations that `plan` estimates next to those of real passes.

    python tests/programs/estimates.py [--markdown] [--only NAME]

Each model is built twice from one configuration. One has no data and goes through `estimating.activations`. The other
has, and runs one forward and one backward pass on the CPU. There, autograd's own hooks count what it keeps, and torch's
profiler counts every byte that is allocated and freed. Neither is the counter of the estimate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("matrix", "helpers")]
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
# Kernels of CPUs take a buffer for each thread, which the real peak has in it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from trainer_fsdp_patch import casts, versions
from trainer_fsdp_patch.estimating import activations, building
from trainer_fsdp_patch.planning.plan import SHARD, Plan, make_plan

ROWS, LENGTH, LAYERS = 2, 48, 5
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}


class Measured(NamedTuple):
    """Bytes: what autograd keeps, and the peak, estimated and real."""

    kept: int
    peak: int
    real_kept: int
    real_peak: int

    @property
    def margin(self) -> float:
        """Of the peak: by how much of the real one the estimate is above it."""
        return self.peak / self.real_peak - 1


def configurations() -> dict[str, Any]:
    """Of small models of several architectures, by name."""
    import transformers as t

    t5 = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": LAYERS}
    gpt2 = {"vocab_size": 512, "n_embd": 64, "n_head": 4, "n_layer": LAYERS, "n_positions": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    found = {
        "Llama": t.LlamaConfig(**GROUPED, architectures=["LlamaForCausalLM"]),
        "Mistral": t.MistralConfig(**GROUPED, sliding_window=16, architectures=["MistralForCausalLM"]),
        "Qwen2": t.Qwen2Config(**GROUPED, architectures=["Qwen2ForCausalLM"]),
        "GPT-2": t.GPT2Config(**gpt2, architectures=["GPT2LMHeadModel"]),
        "T5": t.T5Config(**t5, architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0),
        "BERT": t.BertConfig(**SIZES, architectures=["BertForSequenceClassification"]),
    }
    if versions.at_least("transformers", "5.0.0"):
        # Older releases ask values which expert is for whom.
        found["Qwen3-MoE"] = t.Qwen3MoeConfig(**GROUPED, **experts, architectures=["Qwen3MoeForCausalLM"])
    return found


def cases() -> Iterator[tuple[str, str, str, bool]]:
    """Architecture, method, mixed precision, and whether layers are recomputed."""
    for name in configurations():
        for method in ("lora", "vera"):
            if (name, method) != ("Qwen3-MoE", "vera"):
                yield from ((name, method, amp, again) for amp in ("no", "bf16") for again in (False, True))


def built(name: str, method: str) -> Any:
    """A model with an adapter on meta."""
    config = configurations()[name]
    adapter = building.adapter(method)
    if method == "lora" and "MoE" not in name:
        adapter.lora_dropout = 0.1
    if method == "vera":
        adapter.r = 16
    return building.adapted(building.base(config, "fp32"), adapter)


def measure(name: str, method: str, amp: str, checkpointing: bool) -> Measured:
    """One case, estimated and real."""
    batch = activations.Batch(ROWS, LENGTH)
    model = built(name, method)
    plan = make_plan(model, mixed_precision=amp, ranks=2)
    guess = activations.measure(model, plan, batch, checkpointing=checkpointing)
    return Measured(guess.kept, guess.peak, *real(built(name, method), plan, batch, checkpointing))


def real(model: Any, plan: Plan, batch: activations.Batch, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps, and the peak, of a model that gets data."""
    model = model.to_empty(device="cpu").train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    sharded = {item.tensor.name for item in plan.placements if item.placement == SHARD}
    for key, parameter in model.named_parameters():
        if plan.param_dtype and key in sharded:
            parameter.data = parameter.data.to(getattr(torch, plan.param_dtype))
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    # As every planned run does.
    casts.watch(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    given = activations.inputs(model, batch)
    one_pass(model, plan, given)
    with saved(model, given) as kept:
        one_pass(model, plan, given, kept)
    return sum(kept.values()), allocated(model, plan, given)


def one_pass(model: Any, plan: Plan, given: dict[str, Any], kept: dict[Any, int] | None = None) -> None:
    """A forward and a backward pass; what is kept is closed in between."""
    amp = None if plan.autocast is None else getattr(torch, plan.autocast)
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        loss = model(**given).loss
    casts.forget()
    if kept is not None:
        kept["closed"] = 0
    loss.backward()


@contextlib.contextmanager
def saved(model: Any, given: dict[str, Any]) -> Iterator[dict[Any, int]]:
    """Bytes of each storage that autograd saves in the forward pass, but those of the model and of the batch."""
    own = {item.untyped_storage()._cdata for item in (*model.parameters(), *model.buffers(), *given.values())}
    kept: dict[Any, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and "closed" not in kept:
            # A storage that has ended could come again under the same address.
            held.append(storage)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def allocated(model: Any, plan: Plan, given: dict[str, Any]) -> int:
    """The most that one forward and one backward pass have allocated at once, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        one_pass(model, plan, given)
    now = peak = 0
    events = seen.profiler.kineto_results.events()
    for event in sorted((item for item in events if item.name() == "[memory]"), key=lambda item: item.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/plan.md")
    parser.add_argument("--only", default="", help="architectures whose name has this")
    given = parser.parse_args()
    sizes = ("kept", "really kept", "peak", "real peak", "margin")
    heads = ("model", "adapter", "mixed precision", "checkpointing", *sizes)
    show(heads, markdown=given.markdown)
    if given.markdown:
        show(("---",) * len(heads), markdown=True)
    for name, method, amp, again in cases():
        if given.only in name:
            found = measure(name, method, amp, again)
            show(row(name, method, amp, again, found), markdown=given.markdown)


def row(name: str, method: str, amp: str, checkpointing: bool, found: Measured) -> tuple[str, ...]:
    """A line of the table."""
    numbers = (f"{value:,}" for value in (found.kept, found.real_kept, found.peak, found.real_peak))
    return (name, method, amp, "yes" if checkpointing else "no", *numbers, f"{found.margin:+.1%}")


def show(cells: tuple[str, ...], *, markdown: bool) -> None:
    """Print a line of the table."""
    print(f"| {' | '.join(cells)} |" if markdown else "  ".join(f"{cell:<15}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

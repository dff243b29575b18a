"""CPU seconds that a plan takes for models of the largest shapes; nothing of them is allocated.

    python benchmarks/planning.py [--repeat 3] [--layers 0] [--markdown]

The models are built on the meta device from their configurations, with an adapter on all linear layers. The experts of
DeepSeek-V3 are 256 modules a layer, as quantizers and releases of transformers before 5 have them. For each shape it
prints modules, distinct tensors, the median of the seconds, and seconds for 1,000 modules. The peak is that of Python's
own memory while the plan was made, in a run that is not timed. `--layers` gives all shapes as many layers instead of
their own: building the largest takes minutes. It ends with 1 where a shape takes longer than its limit.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
import tracemalloc

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tables import show

from trainer_fsdp_patch.planning.plan import make_plan

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
"""What DeepSeek-V3's attention has in place of some of these."""


def llama(layers=80):
    """Llama-3 70B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return LlamaForCausalLM(config)


def deepseek(layers=61, experts=256):
    """DeepSeek-V3, whose configuration has its numbers as defaults, with a module for each expert."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

    config = DeepseekV3Config(num_hidden_layers=layers, n_routed_experts=experts)
    model = DeepseekV3ForCausalLM(config)
    # By this name peft takes the experts for one tensor, as transformers 5 makes them.
    model.config.model_type = "experts_as_modules"
    for layer in model.model.layers[config.first_k_dense_replace :]:
        size = config.moe_intermediate_size
        parts = [DeepseekV3MLP(config, intermediate_size=size) for _ in range(experts)]
        layer.mlp.experts = torch.nn.ModuleList(parts)
    return model


def lora(model):
    """LoRA on all linear layers but the head."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules=LINEAR + LATENT))


def vera(model):
    """VeRA on all linear layers but the head."""
    from peft import VeraConfig, get_peft_model

    return get_peft_model(model, VeraConfig(r=8, target_modules=LINEAR, projection_prng_key=1))


SHAPES = {
    "Llama-3 70B, LoRA": (llama, lora, 1.0),
    "Llama-3 70B, VeRA": (llama, vera, 1.0),
    "DeepSeek-V3, LoRA": (deepseek, lora, 5.0),
}
"""How each shape is built and adapted, and how many seconds its plan may take."""
COLUMNS = ("shape", "modules", "tensors", "seconds", "seconds for 1,000 modules", "peak, MiB")


def build(shape, layers=0):
    """A model of a shape on meta, with its adapter.

    Args:
        shape: a key of `SHAPES`.
        layers: in place of the shape's own; 0 leaves these.
    """
    base, adapt, _ = SHAPES[shape]
    with torch.device("meta"):
        return adapt(base(layers) if layers else base())


def timed(model):
    """Seconds of the processor that one plan takes, whatever else runs on the machine, in one thread.

    Garbage that building has left is collected before.
    """
    gc.collect()
    start = time.process_time()
    make_plan(model)
    return time.process_time() - start


def allocated(model):
    """Bytes of Python's own memory at its peak while a plan is made."""
    tracemalloc.start()
    make_plan(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(shape, layers, repeat):
    """A line of the table, and whether the plan took longer than its limit."""
    model = build(shape, layers)
    assert all(parameter.is_meta for parameter in model.parameters())
    modules = sum(1 for _ in model.modules())
    tensors = len(make_plan(model).placements)
    seconds = statistics.median(timed(model) for _ in range(repeat))
    peak = allocated(model) / 2**20
    cells = [shape, f"{modules:,}", f"{tensors:,}", f"{seconds:.2f}", f"{seconds / modules * 1e3:.4f}", f"{peak:.0f}"]
    return cells, seconds > SHAPES[shape][2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/measured.md")
    given = parser.parse_args()
    measured = [measure(shape, given.layers, given.repeat) for shape in SHAPES]
    show(COLUMNS, [cells for cells, _ in measured], markdown=given.markdown)
    raise SystemExit(any(late for _, late in measured))


if __name__ == "__main__":
    main()

"""What it gives VeRA to cast its shared projections once for all layers, under autocast in bf16.

    python benchmarks/vera.py [--layers 32] [--width 512] [--rank 256] [--rows 64] [--steps 30]

One process: the copies do not depend on ranks. Steps with and without them are taken in turn; shown are lower quartiles
of processor time and of the bytes that autograd saves for the backward pass, each storage once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from trainer_fsdp_patch import casts


def made(layers: int, width: int, rank: int):
    """A chain of linear layers with VeRA."""
    from peft import VeraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    return get_peft_model(base, VeraConfig(r=rank, target_modules=r"\d+", projection_prng_key=1))


def step(model, batch) -> tuple[float, int]:
    """Seconds of a step, and bytes of all storages that its graph holds but for those of the model itself."""
    own = {item.untyped_storage().data_ptr() for item in (*model.parameters(), *model.buffers())}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.thread_time()
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        loss = model(batch).float().square().mean()
    loss.backward()
    spent = time.thread_time() - start
    model.zero_grad()
    casts.forget()
    return spent, sum(size for place, size in held.items() if place not in own)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("layers", 32), ("width", 512), ("rank", 256), ("rows", 64), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=number)
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = {"each layer casts": made(given.layers, given.width, given.rank)}
    models["copies are shared"] = made(given.layers, given.width, given.rank)
    casts.watch(models["copies are shared"])
    batch = torch.randn(given.rows, given.width)
    found = {name: [] for name in models}
    for _ in range(given.steps):
        for name, model in models.items():
            found[name].append(step(model, batch))
    for name, pairs in found.items():
        seconds = statistics.quantiles([pair[0] for pair in pairs[2:]], n=4)[0]
        print(f"{name:20} {seconds * 1e3:8.1f} ms a step  {pairs[-1][1] / 2**20:8.1f} MiB saved for backward")


if __name__ == "__main__":
    main()

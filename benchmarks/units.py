"""Where a step of FSDP goes, and what larger units or prefetching give: torch alone, in one run on two CPU ranks.

    python benchmarks/units.py [--repeat 8] [--steps 6] [--markdown]

No Trainer and no patch takes part: LoRA on a random Llama of 12 layers, width 512, in fp32, and its adapter ignored by
FSDP. `compute` is forward and backward of both ranks without FSDP, as DDP computes them. `gathers` are the collectives
that FSDP sends for one layer a unit, of the same sizes, with nothing else. `copies` are what FSDP2 copies into and out
of their buffers; FSDP1 gathers in place. Units of several layers are one call of `fully_shard`, and prefetching gathers
the next unit in the forward. Each round runs all in turn; shown are medians over the steps of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from adapter_step import base, lora
from tables import machine, show

from trainer_fsdp_patch.testing import forks, targets, trial
from trainer_fsdp_patch.testing.case import Outcome

LAYERS = 12
WARM = 2
"""Steps that are not counted."""
PARTS = ("compute", "gathers", "copies")
WAYS = {
    "FSDP1": (0, False),
    "FSDP2": (1, False),
    "FSDP2, 2 layers a unit": (2, False),
    "FSDP2, 3 layers a unit": (3, False),
    "FSDP2, 6 layers a unit": (6, False),
    "FSDP2, prefetched": (1, True),
    "FSDP2, 2 layers a unit, prefetched": (2, True),
}
"""Layers of one unit of FSDP2, or none, and whether the forward gathers the next one ahead."""


def computing(model) -> Callable[[], object]:
    """A step without an optimizer: forward and backward of a rank's rows."""
    rows = torch.randint(0, trial.VOCABULARY, (trial.BATCH // 2, trial.LENGTH))

    def step() -> None:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def sharded(model, layers: int, prefetched: bool):
    """The model under FSDP.

    Args:
        model: with its adapter, which stays full.
        layers: of one unit of FSDP2; 0 is FSDP1.
        prefetched: whether the forward gathers the next unit ahead.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    ignored = {item for item in model.parameters() if item.requires_grad}
    blocks = list(model.get_submodule("base_model.model.model.layers"))
    if not layers:
        wrap = ModuleWrapPolicy({type(blocks[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=wrap, ignored_states=ignored, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    units = [blocks[place : place + layers] for place in range(0, LAYERS, layers)]
    for unit in units:
        fully_shard(unit if layers > 1 else unit[0], mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    for unit, following in itertools.pairwise(units) if prefetched else ():
        unit[0].set_modules_to_forward_prefetch([following[0]])
    return model


def moving(model, sent: bool) -> Callable[[], object]:
    """What FSDP sends, or FSDP2 copies, in a step: the root's weights once, those of each layer in both passes.

    Args:
        model: whose frozen weights are of the sizes in question.
        sent: whether they are gathered by collectives, or copied into and out of the buffers of these.
    """
    ranks = dist.get_world_size()
    sizes: dict[str, int] = {}
    for name, item in model.named_parameters():
        if not item.requires_grad:
            _, layer, number = name.partition(".layers.")
            unit = layer + number.partition(".")[0]
            sizes[unit] = sizes.get(unit, 0) + -(-item.numel() // ranks)
    shards = [torch.zeros(size) for unit, size in sizes.items() for _ in range(2 if unit else 1)]
    fulls = [torch.zeros(ranks * shard.numel()) for shard in shards]

    def gather() -> None:
        for full, shard in zip(fulls, shards, strict=True):
            dist.all_gather_into_tensor(full, shard)

    def copy() -> None:
        for full, shard in zip(fulls, shards, strict=True):
            own, outside = torch.empty_like(full), torch.empty_like(full)
            own[: shard.numel()].copy_(shard)
            outside.copy_(own)

    return gather if sent else copy


def measure(way: str, steps: int, rank: int) -> Outcome:
    """Seconds of each step in one of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = lora(base())
    if way in WAYS:
        step = computing(sharded(model, *WAYS[way]))
    else:
        step = computing(model) if way == "compute" else moving(model, sent=way == "gathers")
    spent = []
    for _ in range(WARM + steps):
        dist.barrier()
        start = time.perf_counter()
        step()
        spent.append(time.perf_counter() - start)
    return Outcome(extra={"seconds": spent[WARM:]})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/measured.md")
    given = parser.parse_args()
    forks.TIMEOUT = 300.0
    targets.import_all()
    spent: dict[str, list[float]] = {way: [] for way in (*PARTS, *WAYS)}
    for _ in range(given.repeat):
        for way, seconds in spent.items():
            outcome = forks.launch(measure, way, given.steps, ranks=2)[0]
            if outcome.error:
                raise SystemExit(f"{way}: {outcome.error}")
            seconds.extend(outcome.extra["seconds"])
    medians = {way: statistics.median(seconds) * 1e3 for way, seconds in spent.items()}
    parts = sum(medians[part] for part in PARTS)
    rows = [(way, f"{value:.0f}", f"{value / parts:.2f}") for way, value in medians.items()]
    rows.insert(len(PARTS), ("these three together", f"{parts:.0f}", "1.00"))
    print(machine())
    show(("what", "ms a step", "to the three parts"), rows, markdown=given.markdown)


if __name__ == "__main__":
    main()

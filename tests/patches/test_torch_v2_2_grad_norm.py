"""The norm that gradients are clipped by differs in its last bit from rank to rank, and the adapters drift apart."""

from pathlib import Path

import torch
from cells import Bench, Setup, trial, with_a_head
from faults import canary

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def test_canary() -> None:
    canary("torch_v2_2_grad_norm")


def norms(patched: bool, folder: str, rank: int) -> Outcome:
    """Norms of one set of parameters, made anew so that its members hash otherwise each time."""
    from torch.distributed.fsdp import fully_sharded_data_parallel as target

    import trainer_fsdp_patch
    from trainer_fsdp_patch.planning import prepared

    if patched:
        trainer_fsdp_patch.patch("torch_v2_2_grad_norm")
    found, kept = set(), []
    for _ in range(200):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(7)) for _ in range(40)]
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(7, generator=generator) * 10.0 ** (index % 7 - 3)
        kept.append(parameters)
        model = torch.nn.Module()
        kept.append(model)
        prepared._PREPARED[model] = type("Plan", (), {"tensors": parameters})
        found.add(float(target._get_grad_norm(set(parameters), 2.0)))
        del prepared._PREPARED[model]
    return Outcome(norms=sorted(found))


def test_the_norm_does_not_depend_on_addresses(tmp_path: Path) -> None:
    [stock] = forks.launch(norms, False, str(tmp_path), ranks=1)
    assert len(stock.norms) > 1
    [patched] = forks.launch(norms, True, str(tmp_path), ranks=1)
    assert len(patched.norms) == 1


def test_ranks_end_alike(bench: Bench, tmp_path: Path) -> None:
    """Half of the runs ended with adapters that differed when they were saved."""
    setup = Setup("clipped", fsdp=1, amp="bf16")
    for attempt in range(6):
        outcome = trial.run(setup, with_a_head, bench.base, tmp_path / str(attempt))
        assert not outcome.error, outcome.extra

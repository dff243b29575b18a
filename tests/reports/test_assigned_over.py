"""A seam that somebody assigns over after patch(), as axolotl 0.19 does with accelerate's fsdp2_prepare_model.

https://github.com/axolotl-ai-cloud/axolotl/blob/main/src/axolotl/monkeypatch/accelerate/fsdp2.py
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup, reference_of, trial
from faults import fsdp2

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome, compare


def assigned(other: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Train after somebody has put a function of their own there, with accelerate's parameters or with others."""
    import trainer_fsdp_patch

    trainer_fsdp_patch.patch(strict=True)
    from accelerate import accelerator

    upstream = accelerator.fsdp2_prepare_model.__wrapped__

    def fsdp2_prepare_model(accelerator: Any, model: Any) -> Any:
        return upstream(accelerator, model)

    def with_another_name(accelerator: Any, module: Any) -> Any:
        return upstream(accelerator, module)

    accelerator.fsdp2_prepare_model = with_another_name if other else fsdp2_prepare_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = trial.train(setup, METHODS["vera"], base, folder, 2, True, rank)
    outcome.extra["said"] = [str(item.message) for item in caught if "has replaced it" in str(item.message)]
    return outcome


@fsdp2
def test_it_is_wrapped_again_and_said_once(bench: Bench, tmp_path: Path) -> None:
    setup = Setup("f2-assigned")
    outcomes = forks.launch(assigned, False, setup, bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    for outcome in outcomes:
        [said] = outcome.extra["said"]
        assert said.startswith("accelerate.accelerator.fsdp2_prepare_model: ")
        assert "It is wrapped again" in said
    outcomes[0].losses = [sum(step) / 2 for step in zip(*(outcome.losses for outcome in outcomes), strict=True)]
    verdict = compare(outcomes[0], bench.reference("vera", reference_of(setup)), setup)
    assert verdict.right, verdict.error


@fsdp2
@pytest.mark.parametrize("fsdp", [2])
def test_where_it_cannot_be_wrapped_the_run_is_upstreams(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    setup = Setup("f2-other", fsdp=fsdp)
    outcomes = forks.launch(assigned, True, setup, bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    for outcome in outcomes:
        assert "The patches stand back from this run" in outcome.extra["said"][0]

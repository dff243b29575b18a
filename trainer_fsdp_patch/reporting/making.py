"""From what was asked to plans and estimates; the model is built once, and each plan and pass is made once."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch.estimating import activations, building, quantizing, settings
from trainer_fsdp_patch.estimating.estimate import Estimate, estimate, optimizer_bytes
from trainer_fsdp_patch.inspecting.inventory import QUANTIZED
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning.plan import REPLICATE, Plan, make_plan
from trainer_fsdp_patch.reporting.options import Asked, refuse

if TYPE_CHECKING:
    from torch import nn

Setting = TypeVar("Setting", int, str)

RANKS = 8
"""Where neither the command nor a file says how many."""


class Maker:
    """Makes plans and estimates of one model.

    Args:
        asked: what the command was asked for.

    Attributes:
        asked: the same, with number of ranks, precision and length as they hold.
        fsdp: settings of FSDP.
        model: with its adapter, on meta.

    Raises:
        PlanError: settings contradict each other, or a file is of no use.
    """

    def __init__(self, asked: Asked) -> None:
        self.fsdp = settings.read(asked.fsdp)
        ranks = _agreed("--ranks", asked.ranks, "num_processes", self.fsdp.ranks) or RANKS
        precision = _agreed("--mixed-precision", asked.mixed_precision, "mixed_precision", self.fsdp.mixed_precision)
        with quiet():
            config = building.configuration(asked.model)
            found = building.model(config, asked.dtype, asked.quantize, asked.peft)
        self.model: nn.Module = found[0]
        self._plain: nn.Module = found[1]
        self.asked = dataclasses.replace(
            asked, ranks=ranks, mixed_precision=precision or "no", length=asked.length or _length(config)
        )
        self._passes: dict[tuple[object, ...], activations.Activations | str] = {}
        self._states: dict[tuple[object, ...], int] = {}
        self._plans: dict[tuple[object, ...], Plan] = {}

    def plan(self, version: int | None = None, base_budget: str | None = None, ranks: int | None = None) -> Plan:
        """The plan for a version of FSDP.

        Args:
            version: 1 or 2; None is what was asked for.
            base_budget: as `patch()` has it; None is what was asked for.
            ranks: number of ranks; None is what was asked for.

        Raises:
            PlanError: a setting contradicts the model.
        """
        fsdp = self.fsdp if version in (None, self.fsdp.version) else self._other(int(version or 2))
        budget, count = base_budget or self.asked.base_budget, int(ranks or self.asked.ranks or 1)
        key = (fsdp.version, budget, count)
        if key not in self._plans:
            self._plans[key] = self._planned(fsdp, budget, count)
        return self._plans[key]

    def _planned(self, fsdp: settings.Fsdp, base_budget: str | None, ranks: int) -> Plan:
        with quiet():
            return make_plan(
                self.model,
                fsdp_version=fsdp.version,
                mixed_precision=self.asked.mixed_precision or "no",
                use_orig_params=fsdp.use_orig_params,
                units=fsdp.units,
                base_budget=base_budget,
                ranks=ranks if fsdp.shards else 1,
                gathers=fsdp.gathers,
            )

    def _other(self, version: int) -> settings.Fsdp:
        return dataclasses.replace(self.fsdp, version=version, use_orig_params=None, prefetched=False)

    def estimate(self, plan: Plan, rows: int, *, checkpointing: bool) -> Estimate:
        """What a plan takes of a rank.

        Args:
            plan: of `plan`.
            rows: of a rank's micro-batch.
            checkpointing: whether layers are recomputed.

        Raises:
            PlanError: nobody knows the optimizer.
        """
        key = (plan.ranks, *(item.tensor.name for item in plan.sharded))
        if key not in self._states:
            with quiet():
                self._states[key] = optimizer_bytes(plan, self.asked.optim)
        return estimate(
            plan,
            self._states[key],
            self._scales(plan),
            self._pass(plan, rows, checkpointing=checkpointing),
            checkpointing=checkpointing,
            rows=rows,
            length=int(self.asked.length or 1),
            gathers=self.fsdp.gathers,
            prefetched=self.fsdp.prefetched and plan.fsdp_version == 1,
        )

    def _scales(self, plan: Plan) -> int:
        """Bytes that quantized layers keep next to their parameters, of those that stay full on each rank."""
        items = (item for item in plan.placements if item.placement == REPLICATE)
        full = {item.tensor.module for item in items if item.tensor.role == QUANTIZED}
        layers = (module for name, module in self.model.named_modules() if canonical(name) in full)
        return sum(map(quantizing.scales, layers))

    def _pass(self, plan: Plan, rows: int, *, checkpointing: bool) -> activations.Activations | str:
        key = (rows, checkpointing, plan.param_dtype, plan.fsdp_version)
        if key not in self._passes:
            batch = activations.Batch(rows, int(self.asked.length or 1))
            try:
                with quiet():
                    found = activations.measure(self._plain, plan, batch, checkpointing=checkpointing)
                # One layer at a time is unpacked.
                more = quantizing.unpacked(self.model)
                self._passes[key] = found._replace(forward=found.forward + more, backward=found.backward + more)
            except Exception as error:
                # Models whose forward reads values cannot run without data. The rest of the estimate holds.
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self._passes[key] = text[:200]
        return self._passes[key]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what upstream says of building and training, which nobody is about to do."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(before)


def _agreed(first: str, given: Setting | None, second: str, found: Setting | None) -> Setting | None:
    if given is not None and found is not None and given != found:
        refuse(first, f"{given} next to {second} {found} of --fsdp", "Leave one of them out")
    return given if given is not None else found


def _length(config: object) -> int:
    text = getattr(config, "get_text_config", lambda: config)()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return min(int(most), memory.LENGTH) if most else memory.LENGTH

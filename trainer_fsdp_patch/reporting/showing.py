"""The answer of `plan` as text: a tree of units, flags and why, bytes as bars; and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.estimating.estimate import PARTS, Estimate
from trainer_fsdp_patch.planning.plan import Plan
from trainer_fsdp_patch.reporting import fitting, folding
from trainer_fsdp_patch.sizes import size

if TYPE_CHECKING:
    from rich.console import Console

    from trainer_fsdp_patch.reporting.making import Maker

COLOURS = {
    "base": "blue",
    "quantized": "cyan",
    "projections": "magenta",
    "adapter": "green",
    "gradients": "yellow",
    "optimizer": "red",
    "gathered": "bright_blue",
    "activations": "white",
}
_WIDTH = 40
"""Characters of the longest bar."""


def flags(plan: Plan) -> list[tuple[str, str, str]]:
    """What is set on FSDP: the flag, its value, and why.

    Args:
        plan: of the model.
    """
    kept = sum(item.is_ignored for item in plan.placements)
    found = [("ignored tensors", str(kept), "adapters and what FSDP cannot shard stay out of its units")]
    if plan.use_orig_params is not None:
        found.append(("use_orig_params", str(plan.use_orig_params), "no unit mixes trainable and frozen parameters"))
    if plan.param_dtype is not None:
        found.append(("param_dtype", plan.param_dtype, "units compute and communicate in it"))
    if plan.autocast is not None:
        found.append(("autocast", plan.autocast, "around the forward, for what is replicated in its own dtype"))
    return [*found, *(("note", "", reason) for reason in plan.reasons)]


def traffic(plan: Plan) -> str:
    """What a step gathers and averages, in one sentence.

    Args:
        plan: of the model.
    """
    trained = plan.nbytes("replicate", "adapter")
    averaged = f"one all-reduce of {size(trained)} averages the adapter's gradients"
    if plan.ranks == 1:
        return "one rank: a step sends nothing"
    if plan.traffic is None:
        return f"units by size: nobody knows what a step gathers; {averaged}"
    times, gathered = plan.traffic
    return f"a step gathers units {times} times, {size(gathered)} in all; {averaged}"


def chosen(estimates: list[Estimate], found: fitting.Fit | None) -> Plan:
    """The plan whose units are shown: of what fits, or else of what was asked for.

    Args:
        estimates: without and with layers that are recomputed.
        found: what fits, where that was asked.
    """
    return found.estimate.plan if found is not None and found.fits else estimates[0].plan


def shown(estimates: list[Estimate], found: fitting.Fit | None) -> list[Estimate]:
    """Estimates that are shown as bars, each once.

    Args:
        estimates: without and with layers that are recomputed.
        found: what fits, where that was asked.
    """
    return [*estimates, found.estimate] if found is not None and found.estimate not in estimates else estimates


def as_json(maker: Maker, estimates: list[Estimate], found: fitting.Fit | None) -> dict[str, Any]:
    """All of the answer, in bytes.

    Args:
        maker: of the model.
        estimates: without and with layers that are recomputed.
        found: what fits, where that was asked.
    """
    plan = chosen(estimates, found)
    answer: dict[str, Any] = {
        "model": maker.asked.model,
        "peft": maker.asked.peft,
        "fsdp_version": plan.fsdp_version,
        "ranks": plan.ranks,
        "units": [
            {"name": group.name, "units": group.times, "resident": group.resident}
            | {"rows": [row._asdict() for row in group.rows]}
            for group in folding.groups(plan)
        ],
        "flags": [dict(zip(("flag", "value", "why"), row, strict=True)) for row in flags(plan)],
        "traffic": None if plan.traffic is None else dict(zip(("gathers", "bytes"), plan.traffic, strict=True)),
        "estimates": [_numbers(item) for item in estimates],
    }
    if found is not None:
        answer["memory"] = {
            "usable": found.usable,
            "fits": found.fits,
            "lacking": found.lacking,
            "fits_on_ranks": found.ranks,
            "estimate": _numbers(found.estimate),
            "base_budget": found.budget or None,
            "training_arguments": fitting.arguments(maker, found.estimate, found.accumulation),
            "accelerate": fitting.yaml(maker, found.estimate, found.budget),
        }
    return answer


def _numbers(item: Estimate) -> dict[str, Any]:
    return {
        "checkpointing": item.checkpointing,
        "batch": item.rows,
        "length": item.length,
        "bytes": item.parts,
        "resting": item.resting,
        "peak": item.peak,
        "kept_by_autograd": item.kept,
        "activations_unknown": item.unknown or None,
    }


def show(console: Console, maker: Maker, estimates: list[Estimate], found: fitting.Fit | None) -> None:
    """Print the answer.

    Args:
        console: rich's.
        maker: of the model.
        estimates: without and with layers that are recomputed.
        found: what fits, where that was asked.
    """
    plan = chosen(estimates, found)
    console.print(_tree(plan), highlight=False)
    console.print()
    for name, value, why in flags(plan):
        console.print(f"{name}{f' = {value}' if value else ''}: {why}", highlight=False, markup=False)
    console.print(traffic(plan), highlight=False)
    for item in shown(estimates, found):
        console.print()
        _bars(console, item)
    if found is not None:
        console.print()
        _fit(console, maker, found)


def _tree(plan: Plan) -> Any:
    from rich.markup import escape
    from rich.tree import Tree

    title = f"FSDP{plan.fsdp_version} over {plan.ranks} rank{'' if plan.ranks == 1 else 's'}: {plan.summary()}"
    tree = Tree(escape(title))
    for group in folding.groups(plan):
        times = f" x{group.times}" if group.times > 1 else ""
        branch = tree.add(escape(f"{group.name or 'the root'}{times}: {group.taken}"))
        for row in group.rows:
            branch.add(escape(f"{row.role}: {row.counted}, {size(row.nbytes)}, {row.placement}: {row.reason}"))
    return tree


def title(item: Estimate) -> str:
    """One line: what an estimate is of.

    Args:
        item: the estimate.
    """
    kept = f", {len(item.plan.resident)} units full" if item.plan.resident else ""
    way = "with" if item.checkpointing else "without"
    return f"FSDP{item.plan.fsdp_version}, {item.rows} x {item.length} tokens, {way} activation checkpointing{kept}"


def parts(estimates: list[Estimate]) -> list[str]:
    """Names of what at least one of some estimates has, or does not know.

    Args:
        estimates: that are shown together.
    """
    return [name for name in PARTS if any(item.parts[name] or not knows(item, name) for item in estimates)]


def knows(item: Estimate, name: str) -> bool:
    """Whether an estimate has the bytes of a part.

    Args:
        item: the estimate.
        name: of `PARTS`.
    """
    return name != "activations" or not item.unknown


def cell(item: Estimate, name: str) -> str:
    """The bytes of a part, in words.

    Args:
        item: the estimate.
        name: of `PARTS`.
    """
    return size(item.parts[name]) if knows(item, name) else "?"


def peak(item: Estimate) -> str:
    """The most bytes at once, in words.

    Args:
        item: the estimate.
    """
    return ("more than " if item.unknown else "") + size(item.peak)


def _bars(console: Console, item: Estimate) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    largest = max(*item.parts.values(), 1)
    for name in parts([item]):
        length = max(1, round(_WIDTH * item.parts[name] / largest))
        bar = "█" * length if knows(item, name) else f"not known: {item.unknown}"
        table.add_row(name, cell(item, name), f"[{COLOURS[name]}]{bar}[/]")
    table.add_row("between steps", size(item.resting), "")
    table.add_row("peak, estimated", peak(item), "")
    console.print(f"Bytes of a rank: {title(item)}", highlight=False, soft_wrap=True)
    console.print(table, highlight=False)


def _fit(console: Console, maker: Maker, found: fitting.Fit) -> None:
    item, plain = found.estimate, {"highlight": False, "markup": False, "soft_wrap": True}
    console.print(verdict(maker, found), **plain)  # type: ignore[arg-type]
    if found.fits:
        console.print()
        console.print(fitting.script(maker, item, found.accumulation, found.budget), **plain)  # type: ignore[arg-type]
        console.print("\nOr, in accelerate's YAML:\n", **plain)  # type: ignore[arg-type]
        console.print(fitting.yaml(maker, item, found.budget), **plain)  # type: ignore[arg-type]


def verdict(maker: Maker, found: fitting.Fit) -> str:
    """One line: what fits, or how much is missing.

    Args:
        maker: of the model.
        found: what was found.
    """
    item = found.estimate
    room = f"{size(found.usable)} of {size(int(maker.asked.memory or 0))}"
    way = f"FSDP{item.plan.fsdp_version}, micro-batch {item.rows}"
    way += ", activation checkpointing" if item.checkpointing else ""
    if item.unknown:
        return f"Nothing is known to fit {room}: {way} takes {size(item.peak)}, and activations that are not known."
    if not found.fits:
        more = "" if found.ranks is None else f" It fits on {found.ranks} ranks."
        return f"Nothing fits {room}: {way} takes {size(item.peak)}. {size(found.lacking)} are missing.{more}"
    kept = f", {len(item.plan.resident)} units of the base stay full" if item.plan.resident else ""
    return f"{way}{kept}: {size(item.peak)} estimated, and {room} may be used."

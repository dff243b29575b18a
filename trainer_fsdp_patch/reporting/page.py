"""The answer of `plan` as one HTML page that needs no other file, light and dark, for screens of any width."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from trainer_fsdp_patch.estimating.estimate import PARTS, Estimate
from trainer_fsdp_patch.planning.plan import SHARD, Plan
from trainer_fsdp_patch.reporting import fitting, folding, showing
from trainer_fsdp_patch.sizes import size

if TYPE_CHECKING:
    from trainer_fsdp_patch.reporting.making import Maker

_COLOURS = {
    "base": "#3b6fd4",
    "quantized": "#1a9aa8",
    "projections": "#9a55c8",
    "adapter": "#2e9e5b",
    "gradients": "#c79a10",
    "optimizer": "#d4622b",
    "gathered": "#86a8ea",
    "activations": "#8a8f98",
}
_MEANINGS = {
    "base": "this rank's shards of the frozen base, and what of it is full on each rank",
    "quantized": "the same of quantized weights",
    "projections": "frozen tensors of the adapter, full on each rank",
    "adapter": "trainable parameters",
    "gradients": "of the trainable parameters",
    "optimizer": "states of the optimizer",
    "gathered": "units that are gathered at once, at most",
    "activations": "the most that is alive at once in a forward and a backward pass",
}
_WIDTH, _HEIGHT = 640, 34
"""Of a bar, in the units of its picture."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #5b6270; --paper: #fff; --card: #f5f6f8; --line: #d9dce2;
  --fits: #1f7a45; --lacks: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --dim: #a4abb8; --paper: #14161a; --card: #1f2228;
  --line: #363b45; --fits: #5fcf8d; --lacks: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .35rem; }
p { margin: .4rem 0; } .dim { color: var(--dim); }
.answer { border-left: .3rem solid var(--lacks); background: var(--card); padding: .5rem 1rem; margin: 1rem 0; }
.fits { border-color: var(--fits); } .fits b { color: var(--fits); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.25rem; } .facts span { color: var(--dim); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.track { fill: var(--card); } .limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 4 3; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } td.n, tbody th { white-space: nowrap; }
th { overflow-wrap: normal; } svg + .scroll, svg + p { margin-top: 1.25rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .5rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; } summary code { word-break: break-all; }
details ul { margin: .5rem 0 .25rem; padding-left: 1.2rem; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto; font-size: .875rem;
  overflow-wrap: normal; }
/* The last column, which is the answer, is to be seen on a phone without scrolling. */
@media (max-width: 34rem) { table { font-size: .75rem; } th.n { font-size: .6875rem; line-height: 1.3; }
  th, td { padding-right: .2rem; } .key { width: .6rem; height: .6rem; margin-right: .25rem; } }
"""


def render(maker: Maker, estimates: list[Estimate], found: fitting.Fit | None) -> str:
    """The page.

    Args:
        maker: of the model.
        estimates: without and with layers that are recomputed.
        found: what fits, where that was asked.
    """
    plan, shown = showing.chosen(estimates, found), showing.shown(estimates, found)
    title = f"{maker.asked.model} with {maker.asked.peft} on {plan.ranks} rank{'' if plan.ranks == 1 else 's'}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">FSDP{plan.fsdp_version}. {escape(plan.summary())}.</p>',
        "" if found is None else _answer(maker, found),
        _facts(plan, shown[-1] if found is None else found.estimate),
        "<h2>Memory of a rank</h2>",
        _pictures(maker, shown, found),
        _table(shown),
        "<h2>Units</h2>",
        *map(_unit, folding.groups(plan)),
        "<h2>What is set, and why</h2>",
        _flags(plan),
        *([] if found is None or not found.fits else _paste(maker, found)),
        '<p class="dim">An estimate by <code>trainer_fsdp_patch plan</code>. Parameters, gradients and optimizer states'
        " are counted. The peak leaves out the allocator's fragments and what libraries take.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _answer(maker: Maker, found: fitting.Fit) -> str:
    fits = found.fits and not found.estimate.unknown
    head = f"<b>It fits {size(int(maker.asked.memory or 0))}.</b>" if fits else ""
    said = f'<p class="verdict">{escape(showing.verdict(maker, found))}</p>'
    return f'<div class="answer{" fits" if fits else ""}">{head}{said}</div>'


def _facts(plan: Plan, item: Estimate) -> str:
    facts = [
        (size(item.resting), "of each rank between steps"),
        (showing.peak(item), f"peak of each rank{', with checkpointing' if item.checkpointing else ''}, estimated"),
        (size(plan.nbytes(SHARD)), f"shared by {plan.ranks} ranks"),
    ]
    if plan.traffic is not None and plan.ranks > 1:
        facts.append((size(plan.traffic[1]), f"gathered in a step, by {plan.traffic[0]} gathers"))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in facts)
    return f'<div class="facts">{cells}</div>'


def _pictures(maker: Maker, shown: list[Estimate], found: fitting.Fit | None) -> str:
    """One bar for each estimate, all on one scale."""
    limit = 0 if found is None else found.usable
    longest = max(*(item.peak for item in shown), limit, 1)
    # A bar far beyond the limit would leave nothing to see of the others. It is cut, but for the last, the answer.
    longest = min(longest, max(2 * limit, shown[-1].peak)) if limit else longest
    heads = [f"<h3>{escape(showing.title(item))}: {showing.peak(item)}</h3>" for item in shown]
    bars = [f"{head}\n{_bar(item, longest, limit)}" for head, item in zip(heads, shown, strict=True)]
    cut = " Longer bars are cut." if any(item.peak > longest for item in shown) else ""
    said = f"The dashed line is what may be used, {size(limit)}.{cut}"
    return "\n".join([*bars, *([f'<p class="dim">{said}</p>'] if limit else [])])


def _bar(item: Estimate, longest: int, limit: int) -> str:
    said = ", ".join(f"{name} {size(value)}" for name, value in item.parts.items() if value)
    label = f"{size(item.peak)} estimated: {said}"
    if limit:
        label += f". {size(limit)} may be used"
    boxes, left = [], 0.0
    for name in PARTS:
        width = min(_WIDTH * item.parts[name] / longest, _WIDTH - left)
        if width > 0:
            tip = escape(f"{name}: {size(item.parts[name])}")
            box = f'x="{left:.2f}" y="0" width="{max(width, 0.5):.2f}" height="{_HEIGHT}" fill="{_COLOURS[name]}"'
            boxes.append(f"<rect {box}><title>{tip}</title></rect>")
            left += width
    line = ""
    if limit:
        place = min(_WIDTH * limit / longest, _WIDTH - 1)
        line = f'<line class="limit" x1="{place:.2f}" x2="{place:.2f}" y1="0" y2="{_HEIGHT}"/>'
    track = f'<rect class="track" x="0" y="0" width="{_WIDTH}" height="{_HEIGHT}" rx="3"/>'
    view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" style="height:{_HEIGHT}px"'
    return f'<svg role="img" aria-label="{escape(label)}" {view}>{track}{"".join(boxes)}{line}</svg>'


def _table(shown: list[Estimate]) -> str:
    heads = "".join(f'<th scope="col" class="n">{escape(_short(item))}</th>' for item in shown)
    rows, meant = [], []
    for name in showing.parts(shown):
        cells = "".join(f'<td class="n">{escape(showing.cell(item, name))}</td>' for item in shown)
        key = f'<span class="key" style="background:{_COLOURS[name]}"></span>{name}'
        rows.append(f'<tr><th scope="row">{key}</th>{cells}</tr>')
        meant.append(f"<li><b>{name}</b>: {escape(_MEANINGS[name])}</li>")
    for label, values in (("between steps", [item.resting for item in shown]), ("peak", [item.peak for item in shown])):
        cells = "".join(f'<td class="n"><b>{size(value)}</b></td>' for value in values)
        rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    table = f'<table><thead><tr><th scope="col">bytes of a rank</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
    unknown = "".join(f"<p>Activations are not known: {escape(item.unknown)}</p>" for item in shown[:1] if item.unknown)
    words = f"<details><summary>What the words mean</summary><ul>{''.join(meant)}</ul></details>"
    return f'<div class="scroll">{table}</table></div>{unknown}{words}'


def _short(item: Estimate) -> str:
    kept = f", {len(item.plan.resident)} full" if item.plan.resident else ""
    return f"batch {item.rows}{', checkpointing' if item.checkpointing else ''}{kept}"


def _unit(group: folding.Group) -> str:
    times = f" &times; {group.times}" if group.times > 1 else ""
    rows = "".join(
        f"<li><b>{escape(row.role)}</b>: {row.counted}, {size(row.nbytes)}, <b>{escape(row.placement)}</b>."
        f' <span class="dim">{escape(row.reason)}</span></li>'
        for row in group.rows
    )
    head = f"<code>{escape(group.name or 'the root')}</code>{times}: {group.taken}"
    return f"<details open><summary>{head}</summary><ul>{rows}</ul></details>"


def _flags(plan: Plan) -> str:
    rows = "".join(
        f"<li><code>{escape(name)} = {escape(value)}</code>: {escape(why)}</li>" if value else f"<li>{escape(why)}</li>"
        for name, value, why in showing.flags(plan)
    )
    return f"<ul>{rows}<li>{escape(showing.traffic(plan))}</li></ul>"


def _paste(maker: Maker, found: fitting.Fit) -> list[str]:
    script = fitting.script(maker, found.estimate, found.accumulation, found.budget)
    return [
        "<h2>To paste</h2>",
        f'<pre tabindex="0"><code>{escape(script)}</code></pre>',
        "<p>Or in accelerate's YAML:</p>",
        f'<pre tabindex="0"><code>{escape(fitting.yaml(maker, found.estimate, found.budget))}</code></pre>',
    ]

"""docs/how-it-works.md lists the wrappers in the order in which they act in a real run."""

from __future__ import annotations

from pathlib import Path

import timeline
from cells import Bench
from faults import where

from trainer_fsdp_patch import versions

newest = where(*(f"{package}=={release}" for package, release in versions.NEWEST_TESTED.items() if package != "torch"))


@newest
def test_the_page_has_the_order_of_a_real_run(bench: Bench, tmp_path: Path) -> None:
    text = timeline.PAGE.read_text()
    assert timeline.page(text, timeline.timelines(bench.base, tmp_path)) == text


def test_orders_are_merged_as_each_has_them() -> None:
    assert timeline.merged([["a", "b", "d"], ["a", "c", "d", "e"]]) == ["a", "c", "b", "d", "e"]
    assert timeline.merged([[], ["x"]]) == ["x"]

"""Without the patch the whole base's bytes are reserved on each rank's accelerator."""

from __future__ import annotations

import pytest
from cells import Bench
from faults import packed
from launched import reserved

pytestmark = packed


@pytest.mark.parametrize("patched", [False, True])
def test_no_memory_is_reserved_for_all_of_it(bench: Bench, patched: bool) -> None:
    assert (reserved(bench.base, patched) == {""}) is patched

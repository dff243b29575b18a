"""Merges adapters into a base that FSDP has sharded, as for weights handed to vLLM, and takes them out.

Upstream: https://github.com/huggingface/trl/issues/5975
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.training import merging

patch = Patch(__name__, versions="peft>=0.11.dev0", target="peft.tuners.tuners_utils")


@patch.wrap("onload_layer", "layer", only=gates.part("layer"))
@contextlib.contextmanager
def gather_the_layer(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> Iterator[None]:
    """A layer is merged inside of this, and its weights are a shard that the replicated adapter does not fit."""
    with wrapped(*args, **kwargs), merging.gathered(argument(args, kwargs, 0, "layer")):
        yield

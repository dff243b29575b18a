"""Counts the bytes that a process has allocated in tensors at once: not a program, but a meter of others.

What lies in a file that is mapped into memory is not counted, and what is on meta has none.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While it is entered, storages that operators allocate are counted until they are freed.

    Attributes:
        live: bytes of those that live now.
        peak: most bytes that lived at once.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {item._cdata for item in self._storages((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in given and storage.device.type != "meta":
                given.add(storage._cdata)
                self._take(storage.nbytes())
                weakref.finalize(storage, self._take, -storage.nbytes())
        return result

    @staticmethod
    def _storages(tree):
        tensors = [item for item in tree_leaves(tree) if isinstance(item, torch.Tensor)]
        # What is made of tensors has no storage of its own; its parts come by here themselves.
        return [item.untyped_storage() for item in tensors if not hasattr(item, "__tensor_flatten__")]

    def _take(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)

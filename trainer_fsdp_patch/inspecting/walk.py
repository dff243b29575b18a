"""One walk of a model's modules, which serves everything that a plan asks of them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import tuning
from trainer_fsdp_patch.names import WRAPPERS, canonical

if TYPE_CHECKING:
    from torch import nn

Named = tuple[str, "nn.Module"]


class Walk:
    """The modules of a model.

    The lists are as long as each other, and no list of tuples: models have hundreds of thousands of modules.

    Attributes:
        modules: each once, breadth first. What the base reaches comes first: an adapter may refer to a base module, as
            prompt learning does to embeddings.
        names: canonical ones, by which they are reached first.
        owned: whether their own tensors are the adapter's.
        places: of the modules in these lists, by identity.
        parents: places of the modules that they were reached from; that of the model itself is -1.
        holders: places of the modules that hold tensors themselves.
        by_class: the modules of each class.
        again: names by which modules are reached once more, the modules, and the places of their parents.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.names: list[str] = []
        self.owned: list[bool] = []
        self.parents: list[int] = []
        self.holders: list[int] = []
        self.by_class: tuning.ByClass = {}
        self.again: list[tuple[str, nn.Module, int]] = []
        self.places: dict[int, int] = {}
        of_base: deque[tuple[str, nn.Module, int]] = deque([("", model, -1)])
        of_adapter: deque[tuple[str, nn.Module, int]] = deque()
        place = 0
        while of_base or of_adapter:
            owned = not of_base
            name, module, parent = found = (of_adapter if owned else of_base).popleft()
            if self.places.setdefault(id(module), place) != place:
                self.again.append(found)
                continue
            base = tuning.base_child(module)
            self.modules.append(module)
            self.names.append(name)
            self.owned.append(owned or base is not None)
            self.parents.append(parent)
            self.by_class.setdefault(type(module), []).append(module)
            if module._parameters or module._buffers:
                self.holders.append(place)
            prefix = f"{name}." if name else ""
            for key, child in module._modules.items():
                if child is not None:
                    inside = owned if base is None else key != base
                    below = name if key in WRAPPERS else prefix + key
                    (of_adapter if inside else of_base).append((below, child, place))
            place += 1

    @functools.cached_property
    def further(self) -> list[Named]:
        """All modules that are reached once more, with those below them, by their further names."""
        pending = [(name, module) for name, module, _ in self.again]
        found = []
        while pending:
            name, module = pending.pop()
            found.append((name, module))
            for key, child in module._modules.items():
                if child is not None:
                    pending.append((name if key in WRAPPERS else f"{name}.{key}".lstrip("."), child))
        return found

    def named(self, wanted: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
        """Some modules by their names, each once, as `named_modules` of torch has them.

        Args:
            wanted: any modules; those that are not of the model are left out.
        """
        places = sorted({self.places[id(module)] for module in wanted if id(module) in self.places})
        found = [(self.names[place], self.modules[place]) for place in places]
        ids = {id(module) for _, module in found}
        if ids.isdisjoint(id(module) for _, module in self.further):
            return found
        # torch goes depth first, so that it may come to another of several names before.
        return [(canonical(name), module) for name, module in self.modules[0].named_modules() if id(module) in ids]

    def above(self, module: nn.Module) -> list[nn.Module]:
        """All modules that a module is below, on any way to it.

        Args:
            module: of the model.
        """
        pending = [self.places[id(module)]]
        found: set[int] = set()
        while pending:
            place = pending.pop()
            more = [parent for _, other, parent in self.again if other is self.modules[place]]
            more = [parent for parent in (self.parents[place], *more) if parent >= 0 and parent not in found]
            found.update(more)
            pending += more
        return [self.modules[place] for place in found]

    def parents_of(self, module: nn.Module) -> int:
        """How many times a module of the model is a child."""
        return sum(other is module for _, other, _ in self.again) + (module is not self.modules[0])


def take(model: nn.Module) -> Walk:
    """Walk a model.

    Args:
        model: any `torch.nn.Module`.
    """
    return Walk(model)


def below(module: nn.Module) -> Iterator[nn.Module]:
    """Each module below one, once.

    Args:
        module: is not below itself.
    """
    pending = [module]
    seen = {id(module)}
    while pending:
        for child in pending.pop()._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append(child)
                yield child

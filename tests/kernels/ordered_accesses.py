"""Whether a kernel's result could depend on which thread comes first, by Triton's interpreter.

The interpreter runs programs one after the other, each as one thread. Here every address that is
read or written is noted, with the program and the number of barriers it has passed. Two accesses,
at least one a write, have to lie

- in the same program: no launch makes programs wait for each other;
- in one program on different sides of a barrier, or be the writing of a tile and the only reading
  of it since, at the same addresses: whichever thread writes an element has its value from its own
  reading, or from others' by an exchange that all of them have come to.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from triton.runtime.interpreter import interpreter_builder

__all__ = ["Accesses"]


class Accesses:
    """A context in which launches are watched; ``conflicts``: (launch, what was found).

    without: of each program's barriers, the one to take for absent.
    """

    def __init__(self, without: int | None = None) -> None:
        self.conflicts: list[tuple[int, str]] = []
        self.launches = 0
        self._without = without

    def __enter__(self) -> Accesses:
        self._begin()
        builder = interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store
        place, barrier = builder.set_grid_idx, builder.create_barrier

        def watched_load(ptrs, mask, *rest):
            self._read(ptrs.data, mask.data)
            return load(ptrs, mask, *rest)

        def watched_store(ptrs, value, mask, *rest):
            self._write(ptrs.data, mask.data)
            return store(ptrs, value, mask, *rest)

        def watched_place(x, y, z):
            if (x, y, z) == (0, 0, 0):
                self._end()
                self._begin()
            self._program, self._barriers = (x, y, z), 0
            self._pass()
            return place(x, y, z)

        def watched_barrier():
            if self._barriers != self._without:
                self._pass()
            self._barriers += 1
            return barrier()

        builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
        builder.set_grid_idx, builder.create_barrier = watched_place, watched_barrier
        return self

    def __exit__(self, *_) -> None:
        self._end()
        for name in ("masked_load", "masked_store", "barrier"):
            delattr(interpreter_builder, f"create_{name}")
        del interpreter_builder.set_grid_idx

    def _begin(self) -> None:
        self._program = None
        self._readers: dict[int, set] = defaultdict(set)
        self._writers: dict[int, set] = defaultdict(set)
        self._pass()

    def _pass(self) -> None:
        """A barrier: what was read and written before it is settled."""
        self._written: set[int] = set()
        self._tiles: list[tuple[np.ndarray, set[int]]] = []

    def _read(self, pointers, mask) -> None:
        here = set(pointers[np.broadcast_to(mask, pointers.shape)].ravel().tolist())
        if here & self._written:
            self._conflict("reads what it wrote")
        self._tiles.append((pointers, here))
        for address in here:
            self._readers[address].add(self._program)

    def _write(self, pointers, mask) -> None:
        here = set(pointers[np.broadcast_to(mask, pointers.shape)].ravel().tolist())
        if here & self._written:
            self._conflict("writes twice")
        read = [tile for tile, addresses in self._tiles if here & addresses]
        if len(read) > 1 or not all(np.array_equal(tile, pointers) for tile in read):
            self._conflict("writes what it read")
        self._written |= here
        for address in here:
            self._writers[address].add(self._program)

    def _end(self) -> None:
        for address, writers in self._writers.items():
            if len(writers | self._readers[address]) > 1:
                self._conflict("writes where another program reads or writes")
                break
        self.launches += self._program is not None

    def _conflict(self, what: str) -> None:
        self.conflicts.append((self.launches, what))

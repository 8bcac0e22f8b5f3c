"""Anonymous primitives: blocks in segments without a name, made and given out by one process.

Only the process that made an arena ever takes a block of it, so taking and returning is a matter of one process, and a crash
leaves nothing to repair.  Other processes know a block only by inheriting the mapping in a fork, or by getting the segment's
descriptor while they are spawned.  The kernel frees the segment when its last process is gone.

A block is used again only if no other process can know it: it was never handed to a process that was being spawned, nor did
a fork happen since it was made.  Blocks that others may know go when their whole segment goes.
"""

from __future__ import annotations

import weakref
from multiprocessing import context as mp_context
from multiprocessing import reduction
from typing import Any

from . import _process
from ._arena import FIRST_BLOCKS, MOST_BLOCKS, Arena, Block, Declaration, extensions_for
from ._segment import Segment
from ._sys import SYSTEM

__all__ = ["allocate", "attach_inherited", "export", "remember"]

_own: Arena | None = None
#: What each process that is being spawned is given already: multiprocessing passes a descriptor only once.
_passed: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
_attached: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()


def allocate(declaration: Declaration) -> Block:
    """A block for a new primitive without a name.  OSError if there is no memory for a further segment."""
    global _own
    needed = 1 + extensions_for(declaration.cells)
    if needed >= MOST_BLOCKS:
        raise ValueError(f"{declaration.cells} permits or parties are more than one segment holds")
    arena = _own
    if arena is None or arena.creator is not _process.current:
        arena = _own = _new_own(FIRST_BLOCKS, needed)
    taken: list[int] = []
    zero: tuple[int, ...] = ()
    while len(taken) < needed:
        index = arena.take_block()
        if index is None:
            for unneeded in taken:
                arena.take_back(unneeded)
            taken.clear()
            # Threads that come here at the same time make one segment each; all of them are used.
            arena = _own = _new_own(min(arena.layout.blocks * 2, MOST_BLOCKS), needed)
        elif index or not taken:
            taken.append(index)
        else:
            zero = (index,)  # as the number of an extension, 0 means "none"
    for index in zero:
        arena.take_back(index)
    arena.declare(taken[0], declaration, taken[1:])
    block = arena.block(taken[0])
    block.extensions = taken[1:]
    return block


def _new_own(blocks: int, needed: int) -> Arena:
    while blocks < 2 * needed:
        blocks *= 2
    arena = Arena.create(blocks)
    remember(arena)
    return arena


def remember(arena: Arena) -> None:
    """Have one Arena for a segment in this process, also if it comes back from another one."""
    _attached[arena.identity] = arena


def export(block: Block) -> tuple[Any, ...]:
    """The arguments of ``attach_inherited`` in the process that is just being spawned."""
    block.exported = True
    return _duplicate_for_child(block.arena), block.arena.identity, block.index


def _duplicate_for_child(arena: Arena) -> Any:
    """The descriptor, wrapped for the process that is just being spawned; the same for all that refers to this arena."""
    passed = _passed.setdefault(mp_context.get_spawning_popen(), {})
    if arena.identity not in passed:
        passed[arena.identity] = reduction.DupFd(arena.segment.fd)
    return passed[arena.identity]


def attach_inherited(duplicate: Any, identity: int, index: int) -> Block:
    """Attach to an anonymous primitive in a process that is being spawned."""
    fd: int = duplicate.detach()
    arena = _attached.get(identity)
    if arena is None:
        SYSTEM.set_cloexec(fd)
        arena = Arena.over(Segment(fd))
        if arena.identity != identity:
            raise arena.damaged("it is not the segment that the parent process meant")
        _attached[identity] = arena
    elif fd != arena.segment.fd:
        SYSTEM.close(fd)
    if not 0 <= index < arena.layout.blocks:
        raise arena.damaged(f"it has no block {index}")
    block = arena.block(index)
    block.exported = True
    return block

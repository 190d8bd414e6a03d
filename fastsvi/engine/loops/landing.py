"""Products that would be copied into part of a vector are written there in the first place.

So the gradients of all weights, which are put together to one vector, are moved once and not twice.
"""

from __future__ import annotations

from fastsvi.engine.loops.index import Index
from fastsvi.engine.loops.ir import Array, Body, Indices, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.products import PRODUCTS


def land(program: Program) -> None:
    """Drop copies of products, and have these write where the copies would have been."""
    products: dict[Array, Statement] = program.shared.get(PRODUCTS, {})
    readers: dict[Array, int] = {}
    for statement in program.statements:
        for array in statement.loads:
            readers[array] = readers.get(array, 0) + 1
    kept = []
    for statement in program.statements:
        copied = None if statement.array in program.outputs else _copied(statement)
        if copied is None or copied[0] not in products or readers[copied[0]] > 1:
            kept.append(statement)
            continue
        array, start = copied
        array.order, statement.array.order = tuple(range(len(array.shape))), (0,)
        array.name = f"({statement.array.name} + {start})"
        products[array].array = statement.array
    program.statements[:] = kept


def _copied(statement: Statement) -> tuple[Array, int] | None:
    """The array that a statement copies into a vector, row after row, and from where on there."""
    is_loop = statement.call is None and statement.combine is None
    one = len(statement.domain) == len(statement.array.shape) == len(statement.loads) == 1
    if not is_loop or not one:
        return None
    ((array, places),) = statement.loads.items()
    (index,), (target,) = statement.indices, statement.store(statement.indices)
    if target.terms != index.terms or places != {_rows(index, array)}:
        return None
    body = Body()
    is_plain = statement.value(statement.indices, body) == body.read(array, *places)
    return (array, target.const) if is_plain and array.dtype == statement.array.dtype else None


def _rows(index: Index, array: Array) -> Indices:
    """Where in ``array`` the element lies that is at ``index`` if they stand row after row."""
    place: list[Index] = []
    for extent in reversed(array.shape[1:]):
        index, rest = index.divmod(extent)
        place.insert(0, rest)
    return (index, *place)

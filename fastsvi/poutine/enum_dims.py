"""Which tensor dimensions parallel enumeration may use."""

from __future__ import annotations

import math
from collections.abc import Collection

from fastsvi.poutine.errors import HandlerError


class EnumDims:
    """Hands out dimensions to the left of all plates, counted from the right: -1 - nesting, ..."""

    def __init__(self) -> None:
        self.set_first_available_dim(-1)

    def set_first_available_dim(self, first_available_dim: float) -> None:
        """Start afresh. Called once per run of a (guide, model) pair."""
        if not first_available_dim < 0:
            raise HandlerError(
                f"first_available_dim counts from the right and must be negative, found "
                f"{first_available_dim}; use -1 - max_plate_nesting"
            )
        self.next_available_dim = first_available_dim
        self.next_available_id = 0
        self.dim_to_id: dict[int, int] = {}  # global dims only

    def allocate(self, scope_dims: Collection[int] | None = None) -> tuple[int, int]:
        """A dim and a new id. Inside ``markov``, a dim not in ``scope_dims``, which later
        sites may use again; elsewhere a dim that no other site gets.
        """
        dim = self.next_available_dim
        if dim == -math.inf:
            raise HandlerError(
                "parallel enumeration needs to know how many plates are nested; give "
                "max_plate_nesting a finite value"
            )
        id_ = self.next_available_id
        self.next_available_id += 1
        if scope_dims is None:
            self.next_available_dim -= 1
            self.dim_to_id[int(dim)] = id_
        else:
            while dim in scope_dims:
                dim -= 1
        return int(dim), id_

"""What a handler knows of its caller: the principal, what they may do, and what they are lent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from fastapi import Depends, Request

from nexus.errors import Forbidden
from nexus.types import Principal

if TYPE_CHECKING:
    from deployments.gateway import Lent


def lent(request: Request) -> Lent:
    return cast("Lent", request.app.state.lent)


def permit(permission: str) -> Principal:
    """A dependency: the principal, who must have this permission."""

    def principal(request: Request) -> Principal:
        found = cast(Principal, request.state.principal)
        if permission not in found.permissions:
            raise Forbidden(f"this key may not do that; it needs the permission {permission!r}")
        return found

    return cast(Principal, Depends(cast(Callable[..., Principal], principal)))

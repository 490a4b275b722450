"""Every route of the front door as a value, read from the router: what tests of all of them are generated from."""

from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI
from starlette.types import ASGIApp

from deployments import authz, gateway

# What stands for each part of a path; none of it is there.
SAMPLES = {
    "number": "7", "version": "1", "session_id": "a-session", "job_id": "0" * 32, "document_id": "0" * 32,
    "data_id": "a-block", "interaction_id": "0" * 32, "policy": "a-policy",
}  # fmt: skip


@dataclass(frozen=True)
class Route(authz.Route):
    """The same, at an address where nothing is."""

    @property
    def nowhere(self) -> str:
        return self.address(SAMPLES)


def application_in(app: ASGIApp) -> FastAPI:
    """The FastAPI application within its layers."""
    while not isinstance(app, FastAPI):
        app = cast(Any, app).app
    return app


def routes_of(app: FastAPI) -> list[Route]:
    return [Route(r.method, r.path, r.permissions, r.has_body, r.dependant) for r in authz.routes_of(app)]


ROUTES = sorted(routes_of(gateway.application(cast(Any, None))), key=str)

"""Policies: rules over files and what they do; shown first, and carried out when asked to."""

import asyncio

from fastapi import APIRouter, Request, Response

from deployments.audited import announce
from deployments.routes.caller import demand, lent, permit
from deployments.shapes import EvaluatePolicy, Policy, Release, reply, show_evaluation, show_policy
from nexus.policy import show_file
from nexus.types import Principal

INDEX = "index"  # the action that makes documents of files

router = APIRouter(prefix="/policies", tags=["policies"])


@router.get("")
async def list_policies(request: Request, principal: Principal = permit("policies:read")) -> Response:
    rules = await lent(request).policies.policies(principal.tenant)
    return reply({"policies": [show_policy(rule) for rule in rules]})


@router.get("/{policy}")
async def get_policy(request: Request, policy: str, principal: Principal = permit("policies:read")) -> Response:
    return reply(show_policy(await lent(request).policies.policy(principal.tenant, policy)))


@router.put("/{policy}")
async def put_policy(
    request: Request, policy: str, body: Policy, principal: Principal = permit("policies:write")
) -> Response:
    """Make a policy, or replace it: 201 and 200. It changes no file before it is evaluated.

    One that indexes files needs the permission to write documents, too.
    """
    tree = body.model_dump(exclude_none=True)
    if any(isinstance(action, dict) and action.get("type") == INDEX for action in body.actions):
        demand(principal, "documents:write")
    rule, version = await lent(request).policies.put_policy(principal, policy, tree)
    return reply(show_policy(rule, version=version), 201 if version == 1 else 200)


@router.delete("/{policy}")
async def delete_policy(request: Request, policy: str, principal: Principal = permit("policies:write")) -> Response:
    """Remove a policy. What it did stays done, and files that it holds stay held."""
    await lent(request).policies.drop_policy(principal, policy)
    return reply({"deleted": policy})


@router.post("/{policy}/evaluate")
async def evaluate(
    request: Request, policy: str, body: EvaluatePolicy, principal: Principal = permit("policies:read")
) -> Response:
    """What the policy does with one file or with all: what it would do, or with `dry_run: false` what it did."""
    here = lent(request)
    if not body.dry_run:
        demand(principal, "policies:write")
        rule = await here.policies.policy(principal.tenant, policy)
        if any(action.name == INDEX for action in rule.actions):
            demand(principal, "documents:write")
        await asyncio.to_thread(announce, request, here.audit)
    evaluation = await here.policies.evaluate_policy(principal, body.to_order(policy))
    return reply(show_evaluation(evaluation, body.dry_run))


@router.post("/{policy}/release")
async def release(
    request: Request, policy: str, body: Release, principal: Principal = permit("policies:write")
) -> Response:
    """Lift the hold of a file, also of a policy that there is no more. One that still applies holds it again."""
    file = await lent(request).policies.release(principal, body.hold or policy, body.file)
    return reply({"released": body.hold or policy, "metadata": show_file(file)})

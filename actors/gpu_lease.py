"""What a replica that holds GPUs does before it takes their memory, and for as long as it lives."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.coordination import Coordination
from cluster.bootstrap import is_of_this_node
from cluster.catalog import LeaseGone
from cluster.client import Client
from cluster.gpu_leases import TTL_SECONDS, Claim, claim, declare, size
from cluster.inventory import LOCAL, NODE_LABEL, Gpu, look
from nexus.errors import OperatorError, TryAgain

log = logging.getLogger("nexus.gpu_lease")

KEEP_SECONDS = 2.0  # between two words that it lives
PATIENCE_SECONDS = 2 * TTL_SECONDS  # in which what a replica held that was killed is there no more
PAUSE_SECONDS = 1.0
GLIMPSE = 0.001  # of a GPU, for who only looks which one it is


def hold(gpu_bytes: int) -> "GpuLease | None":
    """Claim so many bytes of each of this replica's GPUs, before a model is opened; None where it takes nothing.

    Blocks. Raises OperatorError where they do not fit, Unavailable.
    """
    if not gpu_bytes:
        return None
    node, holder = ray.get_runtime_context().get_node_labels().get(NODE_LABEL, LOCAL), _own_name()
    claims = [Claim(node, gpu, holder, parts * gpu_bytes, os.getpid()) for gpu, parts in sorted(_own_gpus().items())]
    if not claims:
        raise OperatorError(f"{holder} takes {size(gpu_bytes)} of a GPU, and Ray gave it none: run `nexus up` again")
    return GpuLease(Coordination(), claims, lambda: look(node, "", is_of_this_node).gpus)


def _own_name() -> str:
    """`embedder@sark#4m1bzx7e` of a replica, whose actor is named SERVE_REPLICA::nexus#embedder@sark#4m1bzx7e."""
    here = ray.get_runtime_context()
    _, _, name = (here.get_actor_name() or "").partition("#")
    return name or str(here.get_actor_id())


def _own_gpus() -> Mapping[int, int]:
    """NVML's numbers of them, and how many parts it has of each.

    An engine has none: its workers will, in its placement group, where each bundle's GPU is settled already.
    """
    gpus, group = ray.get_gpu_ids(), ray.util.get_current_placement_group()
    if not gpus and group is not None:
        bundles = [number for number, bundle in enumerate(group.bundle_specs) if bundle.get("GPU")]
        glimpse = ray.remote(num_cpus=0, num_gpus=GLIMPSE)(ray.get_gpu_ids)
        there = [PlacementGroupSchedulingStrategy(group, number) for number in bundles]
        seen = ray.get([glimpse.options(scheduling_strategy=one).remote() for one in there])
        gpus = [gpu for some in seen for gpu in some]
    return Counter(int(gpu) for gpu in gpus)


class GpuLease:
    """Claims that were found to fit, and are held until they are released or this process ends.

    A coordinator that is away stops nobody who has them: where they ended meanwhile they are put again.
    """

    def __init__(
        self, coordination: Coordination, claims: Sequence[Claim], look: Callable[[], Sequence[Gpu]]
    ) -> None:  # fmt: skip
        """`look` tells what each GPU of this machine has. Blocks. Raises OperatorError, Unavailable."""
        self.claims = tuple(claims)
        self._coordination, self._look = coordination, look
        self._is_ended = threading.Event()
        self._lease = self._insist()
        self._keeper = threading.Thread(target=self._keep, name="gpu lease", daemon=True)
        self._keeper.start()

    def release(self) -> None:
        """Let others have them. Once, by whoever uses them no more."""
        self._is_ended.set()
        self._keeper.join()
        with suppress(TryAgain, RayError):  # then they end by themselves
            self._coordination.ask(lambda voters: voters.revoke(self._lease))
        self._coordination.close()

    def _insist(self) -> int:
        """The lease. A replica that was killed still holds for a while what this one may be there to replace."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self._coordination.ask(partial(self._claim, _room(self.claims, self._look())))
            except (OperatorError, TryAgain, LeaseGone):
                if time.monotonic() >= ends:
                    raise
            time.sleep(PAUSE_SECONDS)

    async def _claim(self, room: Mapping[int, int], voters: Client) -> int:
        lease = await voters.grant(TTL_SECONDS)
        try:
            for one in self.claims:
                await claim(voters, one, room[one.gpu], lease)
        except OperatorError:
            await voters.revoke(lease)
            raise
        return lease

    def _keep(self) -> None:
        while not self._is_ended.wait(KEEP_SECONDS):
            try:
                self._coordination.ask(self._stay)
            except (TryAgain, LeaseGone, RayError) as error:
                log.warning("what this replica holds of its GPUs will be claimed again: %s", error)

    async def _stay(self, voters: Client) -> None:
        try:
            await voters.keep_alive(self._lease)
        except LeaseGone:
            lease = await voters.grant(TTL_SECONDS)
            for one in self.claims:
                await declare(voters, one, lease)
            self._lease = lease


def _room(claims: Sequence[Claim], gpus: Sequence[Gpu]) -> Mapping[int, int]:
    """The bytes of each GPU that Nexus may use. Raises OperatorError where they are too few by themselves."""
    there = {gpu.index: gpu for gpu in gpus}
    for one in claims:
        gpu = there.get(one.gpu)
        if gpu is None:
            raise OperatorError(
                f"{one.holder} was given GPU {one.gpu} of {one.node}, and NVML shows none such there: see what"
                " `nvidia-smi` says, and start that node of Nexus again"
            )
        if gpu.free < one.bytes:
            raise OperatorError(
                f"{one.holder} takes {size(one.bytes)} of GPU {one.gpu} of {one.node}, which has {size(gpu.memory)}:"
                f" processes that are not of Nexus hold {size(gpu.taken)} of them; end these (`nvidia-smi` there lists"
                " them), or run `nexus up`, which plans around them"
            )
    return {index: gpu.free for index, gpu in there.items()}

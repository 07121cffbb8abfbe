"""A vLLM engine that has started: what it hosts, its front, and how it sleeps and wakes."""

from pathlib import Path

import ray

from cluster import logs, niceness
from cluster.config import FleetSpec
from cluster.types import Manifest
from deployments.replica.adapters import Adapters
from deployments.replica.auth import AuthMiddleware
from deployments.replica.holdings import Holdings
from deployments.replica.in_flight import InFlight
from deployments.replica.launch import Server
from deployments.replica.lifecycle import Life
from deployments.replica.load import EngineLoad
from deployments.replica.storage import Storage
from deployments.replica.swap import Swap
from deployments.replica.vllm_engine import VllmEngine

log = logs.logger(__name__)


class Hosting:
    """Everything that exists from the first start of vLLM on. `use` takes over the settings of each owner's fleet."""

    def __init__(self, spec: FleetSpec, life: Life, storage: Storage, vllm: VllmEngine, holdings: Holdings, secret: str) -> None:
        self.life = life
        self.storage = storage
        self.vllm = vllm
        self.holdings = holdings
        # A gateway may not know yet that an adapter had to make room here: it hears that another replica must answer.
        self.in_flight = InFlight(vllm, lambda version: life.admits and version in holdings.held)
        self.server = Server(AuthMiddleware(self.in_flight, secret), ray.util.get_node_ip_address())
        self.use(spec)

    @classmethod
    async def start(
        cls, spec: FleetSpec, life: Life, storage: Storage, load: EngineLoad, secret: str, manifest: Manifest, folder: Path
    ) -> "Hosting":
        """Start vLLM over the weights in ``folder``. Raises vLLM's own error where it does not start."""
        vllm = await VllmEngine.start(spec, folder, str(manifest.id), load)
        holdings = Holdings(str(manifest.id), folder, await vllm.fingerprint(), {str(manifest.id): manifest.digest})
        hosting = cls(spec, life, storage, vllm, holdings, secret)
        niceness.freeze_gc()
        return hosting

    def use(self, spec: FleetSpec) -> None:
        self.spec = spec
        self.adapters = Adapters(spec.fleet, self.storage, self.vllm, self.holdings, self.in_flight)
        self.swap = Swap(spec.fleet, self.life, self.storage, self.vllm, self.holdings, self.adapters, self.in_flight)

    async def wake(self, manifest: Manifest, folder: Path) -> bool:
        """Get ready to serve again, by other weights where those went live meanwhile. False where that needs another engine."""
        try:
            if self.holdings.base != str(manifest.id) and not await self.swap.fits(folder):
                return False
            if self.spec.sleeps:
                await self.vllm.wake_up()
            if self.holdings.base != str(manifest.id):
                await self.swap.catch_up(manifest, folder)
        except Exception:
            # Whatever vLLM raises: the replica takes another engine, which costs a start and no request.
            log.exception("did not wake")
            return False
        self.holdings.refused.clear()
        self.holdings.staged.clear()
        return True

    async def fall_asleep(self) -> None:
        self.in_flight.cut()
        if self.spec.sleeps:
            await self.vllm.sleep()

    async def shut(self) -> None:
        await self.server.close()
        self.vllm.shutdown()

"""A running vLLM engine (0.29), by what we ask of it. With `launch` and `arguments` the only files here that call vLLM."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import FleetSpec
from cluster.errors import EngineFailed, SpringtideError, VersionRefused
from cluster.redact import redact_places
from cluster.store import fitting
from deployments.replica import last_words
from deployments.replica.launch import start_engine
from deployments.replica.load import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

DO = "`springtide fit` says what a model needs; the keys of the fleet change it."


class VllmEngine:
    """One engine in vLLM's own processes, and its HTTP application. `restart` puts another engine in its place."""

    def __init__(self, spec: FleetSpec, load: EngineLoad, engine: "AsyncLLM", app: Any) -> None:
        self.spec = spec
        self.load = load
        self.engine = engine
        self.app = app

    @classmethod
    async def start(cls, spec: FleetSpec, folder: Path, name: str, load: EngineLoad) -> "VllmEngine":
        return cls(spec, load, *await start(spec, folder, name, load))

    async def restart(self, folder: Path, name: str) -> None:
        await asyncio.to_thread(self.engine.shutdown)
        self.engine, self.app = await start(self.spec, folder, name, self.load)

    async def __call__(self, *request: Any) -> None:
        """ASGI: whatever engine there is now answers."""
        await self.app(*request)

    def shutdown(self) -> None:
        self.engine.shutdown()

    @property
    def dead(self) -> bool:
        """Whether vLLM's engine process ended, or stopped after an error. It never comes back."""
        return self.engine.errored

    async def check(self) -> None:
        await self.engine.check_health()

    @property
    def context_tokens(self) -> int:
        """The longest request that it takes."""
        return self.engine.model_config.max_model_len

    @property
    def kv_cache_tokens(self) -> int:
        """The tokens for which its KV cache has room, as vLLM counts them: as many requests of the whole context at once as fit, in tokens. 0
        for a model that keeps nothing."""
        return self.engine.vllm_config.cache_config.kv_cache_size_tokens or 0

    # weights

    async def fingerprint(self) -> str:
        """The checksum of the weights in the accelerator's memory; see `deployments.replica.fingerprint`."""
        return ":".join(await self.engine.collective_rpc("fingerprint"))

    async def reload(self, folder: Path) -> str:
        """Read other tensors of the same shapes in; the checksum of what is in memory then."""
        return ":".join(await self.engine.collective_rpc("take_over", args=(str(folder),)))

    def rename(self, name: str, folder: Path) -> None:
        """Answer for the base under this name and no other."""
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        self._models.base_model_paths[:] = [BaseModelPath(name=name, model_path=str(folder))]

    async def pause(self, keep: bool) -> None:
        """Make no more tokens. ``keep``: running streams stand still and go on later; otherwise they end first."""
        await self.engine.pause_generation(mode="keep" if keep else "wait", clear_cache=not keep)

    async def resume(self, keep: bool) -> None:
        """Make tokens again, from no cached prefix: other weights would have computed another one."""
        await self.engine.reset_prefix_cache(reset_running_requests=keep)
        await self.engine.resume_generation()

    async def sleep(self) -> None:
        """Move the weights to the machine's memory and free the accelerator's."""
        await self.engine.sleep(level=1)

    async def wake_up(self) -> None:
        await self.engine.wake_up()

    # adapters

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Answer by the adapter in ``folder`` under ``name``. Raises `VersionRefused` in vLLM's words."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        answer = await self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder)))
        if isinstance(answer, ErrorResponse):
            said = redact_places(answer.error.message)
            raise VersionRefused(f"the engine says: {said}", "Check the adapter's target modules and shapes.")

    async def unload_adapter(self, name: str) -> None:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        request = self._models.lora_requests.get(name)
        await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        if request is not None:
            await self.engine.remove_lora(request.lora_int_id)

    @property
    def _models(self) -> Any:
        return self.app.state.openai_serving_models


async def start(spec: FleetSpec, folder: Path, name: str, load: EngineLoad) -> "tuple[AsyncLLM, Any]":
    """Start vLLM over ``folder`` with what the fleet leaves open fitted to it. The spec itself stays open: the next weights may be others.

    Raises `DoesNotFit` before anything is loaded, and `EngineFailed` with the last words of the process that failed.
    """
    fitted = await asyncio.to_thread(fitting.fitted, spec, folder, name)
    with last_words.kept() as said:
        try:
            return await start_engine(fitted, folder, name, load)
        except SpringtideError:
            raise
        except Exception as error:
            # vLLM raises whatever its parts do.
            words = redact_places(said() or last_words.of(error))
            raise EngineFailed(f"The engine of {spec.name} did not start on {name}: {words}", DO) from error

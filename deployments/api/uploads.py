"""``PUT /admin/uploads``: a file into the store, under the digest of its bytes.

Example: the bytes ``abc`` become the object ``uploads/ba7816bf…15ad``, and a job reads them as ``upload:ba7816bf…15ad``. The same file sent
twice is one object.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from cluster.errors import BadRequest
from cluster.store.objects import Store


class Uploads:
    def __init__(self, store: Store, limit_bytes: int) -> None:
        self.store = store
        self.limit_bytes = limit_bytes

    async def take(self, chunks: AsyncIterator[bytes]) -> dict[str, Any]:
        """``{"source", "size_bytes"}`` once every byte is in the store. A body that ends early leaves nothing."""
        digest, arriving = hashlib.sha256(), f"uploads/arriving-{uuid4().hex}"  # its name is known at its end

        async def digested() -> AsyncIterator[bytes]:
            some = False
            async for chunk in chunks:
                digest.update(chunk)
                some = some or bool(chunk)
                yield chunk
            if not some:
                raise BadRequest("The upload is empty.", "Send the file's bytes as the request's body.")

        size_bytes = await self.store.put_stream_async(arriving, digested(), self.limit_bytes)
        name = digest.hexdigest()
        await asyncio.to_thread(self.store.rename, arriving, f"uploads/{name}")
        return {"source": f"upload:{name}", "size_bytes": size_bytes}

"""A small S3 for tests: an HTTP peer with PUT (create-only too), GET, HEAD, DELETE and ListObjectsV2, that counts what it is asked."""

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from xml.sax.saxutils import escape

from aiohttp import web


class Bucket:
    """Objects in memory, under any bucket's name."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: Counter[str] = Counter()
        """Key → how often it was downloaded."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info.get("key", "")
        if request.method == "PUT":
            return self._put(request, key, await request.read())
        if request.method == "GET" and not key:
            return self._list(request.query.get("prefix", ""), request.query.get("delimiter", ""))
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return web.Response(status=204)
        if key not in self.objects:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>")
        self.reads[key] += request.method == "GET"
        headers = {"ETag": tag(self.objects[key]), "Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT"}
        return web.Response(body=self.objects[key], headers=headers)

    def _put(self, request: web.Request, key: str, body: bytes) -> web.Response:
        if request.headers.get("If-None-Match") == "*" and key in self.objects:
            return web.Response(status=412, text="<Error><Code>PreconditionFailed</Code></Error>")
        self.objects[key] = body
        return web.Response(headers={"ETag": tag(body)})

    def _list(self, prefix: str, delimiter: str) -> web.Response:
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        folders = sorted(
            {key[: key.index(delimiter, len(prefix)) + 1] for key in keys if delimiter and delimiter in key[len(prefix) :]}
        )
        plain = [key for key in keys if not any(key.startswith(folder) for folder in folders)]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size>"
            f"<LastModified>2026-11-22T00:00:00.000Z</LastModified><ETag>{tag(self.objects[key])}</ETag></Contents>"
            for key in plain
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}{common}</ListBucketResult>"
        return web.Response(text=text, content_type="application/xml")


def tag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


@contextmanager
def serving() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """The bucket, and the variables with which obstore finds it as ``s3://NAME``."""
    bucket, loop = Bucket(), asyncio.new_event_loop()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{bucket}/{key:.*}", bucket.handle)
    app.router.add_route("*", "/{bucket}", bucket.handle)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield (
            bucket,
            {
                "AWS_ENDPOINT": f"http://127.0.0.1:{runner.addresses[0][1]}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
            },
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

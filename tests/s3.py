"""A small S3 for tests: an HTTP peer with PUT (create-only, copies, parts), GET (ranges), HEAD, DELETE and ListObjectsV2, that counts
what it is asked.

Keys are kept sorted and a listing skips from one folder to the next, as S3's own index does, so that times measured here grow with the
answer and not with the bucket.
"""

import asyncio
import hashlib
import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote
from uuid import uuid4
from xml.sax.saxutils import escape, unescape

from aiohttp import web

PAGE = 1000
"""Keys and folders in one answer, as in S3."""


class Bucket:
    """Objects in memory, under any bucket's name."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.keys: list[str] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        """Upload → its parts so far."""
        self.reads: Counter[str] = Counter()
        """Key → how often it was downloaded."""
        self.asked: Counter[str] = Counter()
        """Method, or ``LIST`` → how often it was asked."""
        self.sent_bytes = 0
        """Bytes of objects that went out."""

    def store(self, key: str, body: bytes) -> None:
        if key not in self.objects:
            insort(self.keys, key)
        self.objects[key] = body

    async def handle(self, request: web.Request) -> web.StreamResponse:
        key, query = request.match_info.get("key", ""), request.query
        listing = request.method == "GET" and not key
        self.asked["LIST" if listing else request.method] += 1
        if listing:
            after = query.get("continuation-token", query.get("start-after", ""))
            return self._list(query.get("prefix", ""), query.get("delimiter", ""), after, int(query.get("max-keys", PAGE)))
        if "uploads" in query or "uploadId" in query:
            return self._part(request, key, await request.read())
        if request.method == "PUT":
            return self._put(request, key, await request.read())
        if request.method == "DELETE":
            self._drop(key)
            return web.Response(status=204)
        if request.method == "POST":
            return await self._delete_many(request)
        return self._get(request, key)

    def _get(self, request: web.Request, key: str) -> web.Response:
        if key not in self.objects:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>")
        self.reads[key] += request.method == "GET"
        body, size = self.objects[key], len(self.objects[key])
        headers = {"ETag": tag(body), "Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT"}
        if (span := request.http_range) != slice(None, None, 1):
            if span.start is not None and span.start >= size:
                return web.Response(status=416, text="<Error><Code>InvalidRange</Code></Error>")
            start, stop, _ = span.indices(size)
            body = body[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.sent_bytes += len(body) if request.method == "GET" else 0
        return web.Response(status=206 if "Content-Range" in headers else 200, body=body, headers=headers)

    def _put(self, request: web.Request, key: str, body: bytes) -> web.Response:
        if request.headers.get("If-None-Match") == "*" and key in self.objects:
            return web.Response(status=412, text="<Error><Code>PreconditionFailed</Code></Error>")
        if source := request.headers.get("x-amz-copy-source"):
            body = self.objects[unquote(source).lstrip("/").split("/", 1)[1]]
            self.store(key, body)
            return web.Response(
                text=f"<CopyObjectResult><ETag>{tag(body)}</ETag></CopyObjectResult>", content_type="application/xml"
            )
        self.store(key, body)
        return web.Response(headers={"ETag": tag(body)})

    def _part(self, request: web.Request, key: str, body: bytes) -> web.Response:
        upload = request.query.get("uploadId", "")
        if request.method == "PUT":
            self.parts[upload][int(request.query["partNumber"])] = body
            return web.Response(headers={"ETag": tag(body)})
        if request.method == "DELETE":
            self.parts.pop(upload, None)
            return web.Response(status=204)
        if not upload:
            upload = uuid4().hex
            self.parts[upload] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        else:
            parts = self.parts.pop(upload)
            self.store(key, b"".join(parts[number] for number in sorted(parts)))
            etag = tag(self.objects[key])
            text = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        return web.Response(text=text, content_type="application/xml")

    async def _delete_many(self, request: web.Request) -> web.Response:
        asked = (await request.read()).decode().split("<Key>")[1:]
        keys = [unescape(piece.split("</Key>", 1)[0]) for piece in asked]
        for key in keys:
            self._drop(key)
        gone = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return web.Response(text=f"<DeleteResult>{gone}</DeleteResult>", content_type="application/xml")

    def _drop(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            del self.keys[bisect_left(self.keys, key)]

    def _list(self, prefix: str, delimiter: str, after: str, most: int) -> web.Response:
        at = bisect_left(self.keys, prefix)
        if after:
            at = max(at, bisect_left(self.keys, f"{after}\0"))
        plain: list[str] = []
        folders: list[str] = []
        while at < len(self.keys) and self.keys[at].startswith(prefix) and len(plain) + len(folders) < most:
            key = self.keys[at]
            if delimiter and delimiter in key[len(prefix) :]:
                folders.append(key[: key.index(delimiter, len(prefix)) + 1])
                at = bisect_left(self.keys, f"{folders[-1]}\U0010ffff")
            else:
                plain.append(key)
                at += 1
        more = at < len(self.keys) and self.keys[at].startswith(prefix)
        token = f"<NextContinuationToken>{escape(self.keys[at - 1])}</NextContinuationToken>" if more else ""
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size>"
            f"<LastModified>2026-11-22T00:00:00.000Z</LastModified><ETag>{tag(self.objects[key])}</ETag></Contents>"
            for key in plain
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        head = f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        return web.Response(text=f"<ListBucketResult>{head}{entries}{common}</ListBucketResult>", content_type="application/xml")


def tag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


@contextmanager
def serving(bucket: Bucket | None = None) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """The bucket, and the variables with which obstore finds it as ``s3://NAME``."""
    bucket, loop = bucket or Bucket(), asyncio.new_event_loop()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{bucket}/{key:.*}", bucket.handle)
    app.router.add_route("*", "/{bucket}", bucket.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
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
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

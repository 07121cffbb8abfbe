"""Where a job's files may come from."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import Training, parse
from cluster.errors import BadRequest, BodyTooLarge, DataError
from cluster.jobspec import ORIGIN
from cluster.store.objects import Store
from jobs import sources
from jobs.sources import Sources, public_address, title, under
from jobs.training import recipe

LINE = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def remote(tmp_path: Path) -> Sources:
    """How a job that came over HTTP reads."""
    return Sources(Training(data_prefixes=(f"{tmp_path.as_uri()}/allowed",)), Store((tmp_path / "store").as_uri()), remote=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path.startswith("/forbidden"):
            return self.send_error(403)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers["host"].encode() if self.path == "/host" else LINE)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def web() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def refused(fetch: Sources, source: str) -> str:
    with pytest.raises(DataError) as caught:
        fetch.fetch(source)
    return str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "../secret",
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://0.0.0.0:{port}/",
        "http://2130706433:{port}/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://[64:ff9b::a9fe:a9fe]/latest/meta-data",
        "http://[64:ff9b:1::a9fe:a9fe]/latest/meta-data",
        "http://[2002:a9fe:a9fe::1]/latest/meta-data",
        "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
        "http://[::127.0.0.1]:{port}/",
        "http://[fec0::1]/",
        "s3://elsewhere/x.jsonl",
    ],
)
def test_a_job_over_http_reads_nothing_of_the_pools_network_or_machines(remote: Sources, web: int, source: str) -> None:
    """Every one of these was read, with the pool's own rights."""
    assert "A job that came over HTTP may not read" in refused(remote, source.format(port=web))


def test_a_redirect_is_checked_as_the_url_is(remote: Sources, web: int, monkeypatch: Any) -> None:
    """A public page that redirects to the machine itself: it was followed."""
    hops: list[str] = []

    def resolved(host: str, port: int) -> str:
        hops.append(host)
        return public_address(host, port) if len(hops) > 1 else "127.0.0.1"  # the first hop is public, the second is not

    monkeypatch.setattr(sources, "public_address", resolved)
    said = refused(remote, f"http://public.example:{web}/to/http://127.0.0.1:{web}/")
    assert "127.0.0.1, which is no public address" in said and hops == ["public.example", "127.0.0.1"]
    hops.clear()
    assert "leads to a file URL" in refused(remote, f"http://public.example:{web}/to/file:///etc/passwd")


def test_who_is_connected_to_is_who_was_checked(remote: Sources, web: int, monkeypatch: Any) -> None:
    """The name is not resolved twice, and the server still hears it."""
    monkeypatch.setattr(sources, "public_address", lambda host, port: "127.0.0.1")
    assert remote.fetch(f"http://public.example:{web}/host") == f"public.example:{web}".encode()
    monkeypatch.setattr(sources, "public_address", lambda host, port: "127.0.0.1")
    endless = f"http://public.example:{web}" + "/to/" * 1 + f"http://public.example:{web}/to/" * 8 + "x"
    assert "more than 5 redirects" in refused(remote, endless)


def test_what_is_too_large_is_refused_while_it_comes(web: int, tmp_path: Path) -> None:
    file, small = tmp_path / "x.jsonl", Training(max_data_bytes=1024)
    file.write_bytes(LINE * 100)
    store = Store((tmp_path / "store").as_uri())
    store.put_new("uploads/" + hashlib.sha256(LINE * 100).hexdigest(), LINE * 100)
    for source in (f"upload:{hashlib.sha256(LINE * 100).hexdigest()}", f"memory://{file}"):
        with pytest.raises((BodyTooLarge, DataError)):
            Sources(small, store).fetch(source)
    assert Sources(small).fetch(f"http://127.0.0.1:{web}/") == LINE
    with pytest.raises(BodyTooLarge):
        Sources(Training.model_construct(max_data_bytes=3)).fetch(f"http://127.0.0.1:{web}/")


def test_an_upload_is_read_by_its_digest(remote: Sources) -> None:
    digest = hashlib.sha256(LINE).hexdigest()
    assert "no such upload" in refused(remote, f"upload:{digest}")
    assert remote.store
    remote.store.put_new(f"uploads/{digest}", LINE)
    assert remote.fetch(f"upload:{digest}") == remote.fetch(f"upload:{digest}#mine.jsonl") == LINE
    for wrong in ("upload:", "upload:../versions", f"upload:{digest[:-1]}/", f"upload:{digest.upper()}"):
        assert "upload:<sha256>" in refused(remote, wrong)


def test_object_store_urls_are_read_under_the_allowed_prefixes(remote: Sources, tmp_path: Path) -> None:
    assert under("s3://b/data/x", "s3://b/data/") and not under("s3://b/data2/x", "s3://b/data")
    assert not under("s3://b/data/%2e%2e/x", "s3://b/data")


def test_a_job_from_a_shell_reads_what_it_can(tmp_path: Path, web: int, monkeypatch: Any) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINE)
    config = parse({"home": str(tmp_path)})
    for source in (str(tmp_path / "x.jsonl"), (tmp_path / "x.jsonl").as_uri(), f"http://127.0.0.1:{web}/"):
        assert sources.of(config)(source) == LINE
    monkeypatch.setenv(ORIGIN, "http")
    with pytest.raises(DataError):
        sources.of(config)(str(tmp_path / "x.jsonl"))
    assert sources.own(config)(str(tmp_path / "x.jsonl")) == LINE, "what the operator configured is the operator's"


def test_a_message_keeps_no_secret_of_a_url(remote: Sources, web: int) -> None:
    said = refused(Sources(), f"http://me:password@127.0.0.1:{web}/to/nowhere?X-Amz-Signature=0123")
    assert "password" not in said and "0123" not in said
    assert title("https://h/x?sig=1") == "https://h/x" and title("upload:ab#mine.jsonl") == "mine.jsonl"


@pytest.mark.parametrize("query", ["X-Amz-Signature=SECRET", "who='me'&X-Amz-Signature=SECRET"])
def test_a_presigned_url_that_is_refused_is_not_quoted(remote: Sources, web: int, monkeypatch: Any, query: str) -> None:
    """httpx quotes the URL that it asked, by its address and after redirects, and a job's result is kept for good."""
    monkeypatch.setattr(sources, "public_address", lambda host, port: "127.0.0.1")
    there = f"http://public.example:{web}/forbidden?{query}"
    for source in (there, f"http://public.example:{web}/to/{there}"):
        said = refused(remote, source)
        assert "403" in said and "SECRET" not in said and "Signature" not in said
    said = refused(Sources(), f"http://127.0.0.1:{web}/to/http://127.0.0.1:{web}/forbidden?{query}")
    assert "403" in said and "SECRET" not in said and "Signature" not in said


def test_a_recipe_may_be_uploaded(remote: Sources) -> None:
    text = b"epochs: 2\n"
    digest = hashlib.sha256(text).hexdigest()
    assert remote.store
    remote.store.put_new(f"uploads/{digest}", text)
    assert recipe.load(f"upload:{digest}#mine.yaml", [], None, remote.fetch).epochs == 2
    assert recipe.load("lora", [], None, remote.fetch).lora, "those that ship with Springtide"


def test_an_address_is_public_or_refused() -> None:
    for public in ("1.1.1.1", "2606:4700:4700::1111", "64:ff9b::101:101"):
        assert public_address(public, 80) == public
    with pytest.raises(sources.Denied):
        public_address("127.0.0.1", 80)
    with pytest.raises(OSError):
        public_address("no.such.host.invalid", 80)
    assert httpx.URL("http://[::1]/").host == "::1"


@pytest.mark.parametrize("proxy", ["socks9://nowhere", "socks5://127.0.0.1:9"])
def test_proxies_that_cannot_be_used_are_named(proxy: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A SOCKS proxy ended a job with a traceback about a package."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(DataError, match=r"the environment's proxies cannot be used .* HTTP_PROXY"):
        Sources().fetch("http://data.example/lines.jsonl")


def test_a_path_that_names_nobodys_home_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="knows no home for it"):
        Sources().fetch("~nobody-is-called-so/lines.jsonl")

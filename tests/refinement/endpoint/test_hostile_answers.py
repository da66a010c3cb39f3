"""What a hostile server can do to the client, over real sockets: too much, too deep, elsewhere, an echo."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
import time
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scripted_server import SETTINGS, ask

from middo_jax.config import ConfigError, RefineSettings, load
from middo_jax.data.example import Example, Message
from middo_jax.refinement.endpoint.address import Address, Secrets
from middo_jax.refinement.endpoint.batch import BatchClient, read_results
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.client import ChatClient
from middo_jax.refinement.endpoint.faults import EndpointFailed, NotAnswered, RefinerError, RequestRefused
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.preflight import preflight
from middo_jax.refinement.endpoint.receiving import answer_bytes
from middo_jax.refinement.prompts import requests
from middo_jax.refinement.rewrite import run
from middo_jax.refinement.tasks import Task
from middo_jax.rundir import RunError, json_line
from middo_jax.rundir.nesting import MAX_DEPTH, NestedTooDeep, NotUtf8, require_flat

pytest_plugins = ["support.scripted_server"]

KEY = "sk-very/secret+0123456789"
ONCE = SETTINGS.model_copy(update={"max_retries": 0})
Write = Callable[[bytes], Awaitable[None]]
Reply = Callable[[bytes, Write], Awaitable[None]]  # (head of the request, writes) -> when all is written


class RawServer:
    """Writes any bytes as an answer; counts what it could write before the client hung up."""

    def __init__(self, reply: Reply) -> None:
        self.heads: list[bytes] = []
        self.written = 0
        self._reply = reply
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1"), self._loop)
        self._server = started.result(5)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()
            self.written += len(data)

        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
                self.heads.append(head)
                await self._reply(head, write)
        writer.close()

    def stop(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], RawServer]]:
    servers: list[RawServer] = []

    def start(reply: Reply) -> RawServer:
        servers.append(RawServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def whole(body: bytes, *headers: str, status: str = "200 OK") -> Reply:
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *headers]

    async def reply(head: bytes, write: Write) -> None:
        await write("\r\n".join([*lines, "", ""]).encode())
        for start in range(0, len(body), 65_536):
            await write(body[start : start + 65_536])

    return reply


def completion(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return json.dumps({"id": "x", "model": "m", "choices": [choice]}).encode()


EMPTY_BLOCKS = b"\x00\x00\x00\xff\xff" * 10_000  # of deflate


def endless(encoding: str | None, piece: bytes) -> Reply:
    """A body without an end, of equal pieces."""

    async def reply(head: bytes, write: Write) -> None:
        lines = ["HTTP/1.1 200 OK", "content-type: application/json", "transfer-encoding: chunked"]
        lines += [f"content-encoding: {encoding}"] if encoding else []
        await write("\r\n".join([*lines, "", ""]).encode())
        packer = zlib.compressobj(9, wbits=31)
        for turn in range(20_000):
            packed = packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) if encoding else piece
            packed = packed if piece or turn == 0 else EMPTY_BLOCKS
            await write(f"{len(packed):x}\r\n".encode() + packed + b"\r\n")

    return reply


def gzip_bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    block = b" " * 1_000_000
    return b"".join([*(packer.compress(block) for _ in range(megabytes)), packer.flush()])


BOMBS: dict[str, Callable[[], Reply]] = {
    "gzip": lambda: whole(gzip_bomb(60), "content-encoding: gzip"),
    "deflate": lambda: whole(zlib.compress(b" " * 30_000_000), "content-encoding: deflate"),
    "twice": lambda: whole(gzip.compress(gzip_bomb(20)), "content-encoding: gzip, gzip"),
    "brotli": lambda: whole(b"\x00" * 100, "content-encoding: br"),
    "endless": lambda: endless(None, b" " * 60_000),
    "endless gzip": lambda: endless("gzip", b" " * 1_000_000),
    "endless and empty": lambda: endless("gzip", b""),
    "one long text": lambda: whole(completion("a" * 40_000_000)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_answer_of_any_size_is_cut_off_while_it_streams_in(
    serve: Callable[[Reply], RawServer], cache: AnswerCache, name: str
) -> None:
    server = serve(BOMBS[name]())
    tracemalloc.start()
    before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
    tracemalloc.reset_peak()
    [failure], client = ask(server.url, cache, "a", settings=ONCE)
    took, grown = time.monotonic() - began, tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert isinstance(failure, EndpointFailed)
    assert "unreadable reply: it is" in failure.reason
    assert len(cache) == 0
    assert grown < 2_000_000 + 8 * answer_bytes(100), f"{grown:,}"  # the server's sockets are in this process
    assert took < 3
    assert client.ledger.here.aside_tokens > 0  # it may be charged


def test_the_limit_follows_from_max_tokens(serve: Callable[[Reply], RawServer], cache: AnswerCache) -> None:
    """Every token may be 128 line breaks, as the longest in use; a compressed answer is read too."""
    for packed in (False, True):
        text = "\n" * 128 * 4000 + str(packed)
        body = gzip.compress(completion(text)) if packed else completion(text)
        server = serve(whole(body, *(["content-encoding: gzip"] if packed else [])))
        few, many = (ONCE.model_copy(update={"max_tokens": n}) for n in (100, 4001))
        [failure], _ = ask(server.url, cache, "a", settings=few)
        assert f"longer than {answer_bytes(100):,} bytes" in failure.reason
        [answer], _ = ask(server.url, cache, f"a {packed}", settings=many)
        assert answer.text == text
        assert all(b"accept-encoding: identity" in head.lower() for head in server.heads)


def test_endless_headers_and_refusals_are_cut_off(
    serve: Callable[[Reply], RawServer], cache: AnswerCache
) -> None:
    async def headers(head: bytes, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\n")
        for number in range(1_000_000):
            await write(f"x-{number}: {'y' * 1000}\r\n".encode())

    server = serve(headers)
    [failure], _ = ask(server.url, cache, "a", settings=ONCE)
    assert isinstance(failure, EndpointFailed)
    assert server.written < 20_000_000  # what the sockets' buffers take

    page = b"<p>the reason</p>" + b"x" * 30_000_000
    refuses = serve(whole(page, status="400 Bad Request"))
    [refusal], _ = ask(refuses.url, cache, "b", settings=ONCE)
    assert isinstance(refusal, RequestRefused)
    assert refusal.reason.startswith("request refused (400): <p>the reason</p>xxx")
    assert len(refusal.reason) < 400
    assert refuses.written < 20_000_000


def test_damaged_compression_is_no_answer(serve: Callable[[Reply], RawServer], cache: AnswerCache) -> None:
    """Also where all of the text has come, and only its check sum has not."""
    cut, wrong = gzip.compress(completion("fine"))[:-6], b"\x1f\x8b" + b"x" * 50
    for body, words in ((cut, "its compressed body ends too early"), (wrong, "its compression is damaged")):
        server = serve(whole(body, "content-encoding: gzip"))
        [failure], _ = ask(server.url, cache, "a", settings=ONCE)
        assert isinstance(failure, EndpointFailed)
        assert words in failure.reason


def nested(depth: int, kind: str) -> bytes:
    opening, closing = {"list": ("[", "]"), "object": ('{"a":', "}")}[kind]
    deep = opening * depth + "1" + closing * depth
    return completion("fine").replace(b'"model": "m"', f'"model": {deep}'.encode())


@pytest.mark.parametrize("kind", ["list", "object"])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 20_000])
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "500 Oops"])
def test_nested_json_fails_its_request_and_no_other(
    serve: Callable[[Reply], RawServer], cache: AnswerCache, kind: str, depth: int, status: str
) -> None:
    body = nested(depth, kind)
    if status != "200 OK":
        body = body.replace(b'"model"', b'"message"').replace(b'"choices"', b'"others"')
    calls = 0

    async def reply(head: bytes, write: Write) -> None:
        nonlocal calls
        calls += 1
        await (whole(body, status=status) if calls == 1 else whole(completion("fine")))(head, write)

    server = serve(reply)
    one = ONCE.model_copy(update={"concurrency": 1})
    [failure, answer], _ = ask(server.url, cache, "a", "b", settings=one)
    assert isinstance(failure, RequestRefused if status.startswith("400") else EndpointFailed)
    assert not failure.stops_stage
    assert len(failure.reason) < 400
    assert answer.text == "fine"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
def test_nested_json_in_another_encoding_fails_its_request(
    serve: Callable[[Reply], RawServer], cache: AnswerCache, encoding: str, status: str
) -> None:
    # In UTF-16, the first character's bytes are those of quotation marks.
    body = ('{"\u0122":' + "[" * 5000 + "]" * 5000 + "}").encode(encoding)
    [failure], _ = ask(serve(whole(body, status=status)).url, cache, "a", settings=ONCE)
    assert isinstance(failure, RequestRefused if status.startswith("400") else EndpointFailed)
    assert status.startswith("400") or f"JSON in {encoding[:6].upper()}" in failure.reason


def test_a_deep_text_is_a_text(serve: Callable[[Reply], RawServer], cache: AnswerCache) -> None:
    deep = '{"prompt": ' * 50_000
    server = serve(whole(completion(deep)))
    [answer], _ = ask(server.url, cache, "a", settings=ONCE.model_copy(update={"max_tokens": 4000}))
    assert answer.text == deep


def test_depth_is_counted_outside_of_texts() -> None:
    require_flat(json.dumps(["[" * 999, '"[' * 999, "\\[" * 999]).encode())
    require_flat(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    require_flat(b'{"a": [1]}' * 999)
    for text in (b"[" * (MAX_DEPTH + 1), b'{"a":' * (MAX_DEPTH + 1), b'"\\"",' + b"[" * (MAX_DEPTH + 1)):
        with pytest.raises(NestedTooDeep):
            require_flat(text)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"):
        with pytest.raises(NotUtf8, match=f"JSON in {encoding[:6].upper()}"):
            require_flat('{"\u0122": "a"}'.encode(encoding))
    require_flat('{"\u0122": "a"}'.encode("utf-8-sig"))
    began = time.monotonic()
    require_flat(b"[" * 60 + b'"' + b'\\"[' * 300_000)  # cut within a text: not searched again and again
    require_flat(b"[" * 60 + b'"' + b"\\" * 300_001)  # ends within an escape
    assert time.monotonic() - began < 1


def test_batch_files_may_contain_anything(tmp_path: Path) -> None:
    def line(number: int, body: str) -> str:
        return f'{{"custom_id": "{number:064x}", "response": {{"status_code": 200, "body": {body}}}}}\n'

    path = tmp_path / "out.jsonl"
    good = completion("fine").decode()
    deep = good.replace('"model": "m"', f'"model": {"[" * 30_000}{"]" * 30_000}')
    long = good.replace("fine", "x" * 2_000_000)
    others = ['"text"', "[1]", "null", '{"choices": 3}', '{"choices": [{"message": "no"}]}']
    path.write_text("".join(line(n, body) for n, body in enumerate([deep, long, good, *others])))
    results = read_results([path], most_bytes=1_000_000)
    found = [results[f"{n:064x}"] for n in range(3 + len(others))]
    assert [result.answer is not None for result in found] == [False, False, True, *(False for _ in others)]
    assert "nested deeper" in found[0].said
    assert "longer than 1,000,000 bytes" in found[1].said
    assert not any(result.is_final for result in found)  # these requests are written again
    for wrong in ("[" * 30_000, '{"custom_id": ["a"]}', "[1]", "\xff"):
        path.write_bytes(wrong.encode("latin-1") + b"\n")
        with pytest.raises(RunError, match=r"out\.jsonl:1: not a result"):
            read_results([path])
    path.write_text(line(0, completion(f"it is {KEY}").decode()))
    [result] = read_results([path], Secrets([KEY])).values()
    assert result.answer is not None
    assert result.answer.text == "it is ***"


@pytest.mark.parametrize("letter", ["v", r"\u0076", r"\\u0076", r"\/"])
def test_a_secret_in_escapes_of_json_is_found(letter: str) -> None:
    """The reply is parsed later, and a prompt in it must not have the secret."""
    secret = f"sk-li{'/' if letter.endswith('/') else 'v'}e-abcdefghij0123456789"
    echoed = f'{{"prompt": "Name a bird sk-li{letter}e-abcdefghij0123456789 now."}}'
    hidden = Secrets([secret]).hidden_in_answer(echoed)
    assert hidden == '{"prompt": "Name a bird *** now."}'
    every = "".join(f"\\u{ord(c):04X}" for c in secret)
    assert Secrets([secret]).hidden(f"a {every} b") == "a *** b"
    assert Secrets([secret]).hidden(r"sk-li\u0077e-abcdefghij0123456789").startswith("sk-")
    assert Secrets([secret]).hidden("\\" * 100_000) == "\\" * 100_000  # and soon


async def dripping(head: bytes, write: Write) -> None:
    """A byte now and then, so that no wait for the next one is long."""
    await write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99999\r\n\r\n")
    while True:
        await write(b" ")
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (whole(b"<html>"), "cannot be used: unreadable reply: Expecting value"),
        (whole(b"[" * 100_000), "nested deeper than 64"),
        (whole(b" " * 1_000_000), "it is longer than"),
        (whole('{"a": 1}'.encode("utf-16")), "JSON in UTF-16"),
        (dripping, r"no answer within 0\.3 s"),
    ],
)
def test_the_preflight_names_the_server_that_it_cannot_read(
    serve: Callable[[Reply], RawServer], reply: Reply, message: str
) -> None:
    url = serve(reply).url
    with pytest.raises(RefinerError, match=message) as raised:
        preflight(url, "m", ONCE.model_copy(update={"timeout": 0.3}))
    assert f"the refiner at {url} cannot be used" in str(raised.value)
    assert "refine.preflight=false" in str(raised.value)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Elsewhere", "308 Elsewhere"])
def test_a_redirect_elsewhere_is_refused(
    serve: Callable[[Reply], RawServer], cache: AnswerCache, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    thief = serve(whole(completion("stolen")))
    location = f"location: http://127.0.0.1:{thief.port}/v1/chat/completions?echo={KEY}"
    server = serve(whole(b"", location, status=status))
    answers, _ = ask(server.url, cache, "a", "b")
    assert thief.heads == []
    for refusal in answers:
        assert isinstance(refusal, RequestRefused)
        assert refusal.stops_stage
        assert f"redirects to http://127.0.0.1:{thief.port}/v1/chat/completions;" in str(refusal)
        assert "secret" not in str(refusal)


def test_a_redirect_within_the_server_is_followed(
    serve: Callable[[Reply], RawServer], cache: AnswerCache
) -> None:
    async def reply(head: bytes, write: Write) -> None:
        if head.startswith(b"POST /v2/"):
            await whole(completion("here"))(head, write)
        elif head.startswith(b"POST /v1/"):
            target = head.split()[1].replace(b"/v1/", b"/v2/").decode()
            await whole(b"", f"location: {target}", status="307 Elsewhere")(head, write)
        else:
            await whole(b"", "location: /loop/x", status="308 Elsewhere")(head, write)

    server = serve(reply)
    [answer], _ = ask(server.url, cache, "a")
    assert answer.text == "here"
    [refusal], _ = ask(server.url.replace("/v1", "/loop"), cache, "b")
    assert "redirects more than 3 times" in refusal.reason


def test_cookies_do_not_pile_up(serve: Callable[[Reply], RawServer], cache: AnswerCache) -> None:
    server = serve(whole(completion("fine"), "set-cookie: a=b; path=/"))
    ask(server.url, cache, "a", "b", settings=ONCE.model_copy(update={"concurrency": 1}))
    assert not any(b"cookie" in head.lower() for head in server.heads)


ECHOES: dict[str, Reply] = {
    "text": whole(completion(f"your key is {KEY}.")),
    "escaped text": whole(completion(f"your key is {KEY}.").replace(b"/", b"\\/")),
    "finish reason": whole(completion("fine", finish_reason=KEY)),
    "other fields": whole(completion("fine").replace(b'"x"', f'"{KEY}"'.encode()), f"x-key: {KEY}"),
    "refusal": whole(json.dumps({"error": {"message": f"bad {KEY}"}}).encode(), status="400 Bad"),
    "page": whole(f"<p>{KEY}\x1b[31m".encode(), f"retry-after: {KEY}", status="500 Oops"),
    "nested": whole(b"[" * 99 + KEY.encode(), status="400 Bad"),
    "no choices": whole(json.dumps({"key": KEY}).encode()),
    "escaped page": whole(KEY.replace("/", "\\/").encode(), status="400 Bad"),
    "as a URL": whole(b"see ?k=sk-very%2Fsecret%2B0123456789", status="400 Bad"),
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_key_echoed_in_any_field_is_masked(
    serve: Callable[[Reply], RawServer],
    cache: AnswerCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(ECHOES[name])
    [found], client = ask(server.url, cache, "a", settings=ONCE)
    assert any(f"bearer {KEY}".encode() in head.lower() for head in server.heads)
    shown = [repr(found), getattr(found, "reason", ""), repr(client.ledger.to_json()), caplog.text]
    stored = [file.read_bytes().decode("latin-1") for file in cache.path.parent.glob("llm_cache.sqlite*")]
    assert not any("secret" in text for text in [*shown, *stored])
    assert "\x1b" not in str(found)


def test_a_password_in_the_url_is_sent_and_shown_nowhere(
    serve: Callable[[Reply], RawServer], cache: AnswerCache
) -> None:
    async def reply(head: bytes, write: Write) -> None:
        await whole(completion(head.decode()), status="200 OK")(head, write)

    server = serve(reply)
    url = server.url.replace("//", "//me:hid%2Fden-password@") + "?api-version=2&api_key=0123456789abcdef"
    [answer], client = ask(url, cache, "a")
    [head] = server.heads
    assert head.startswith(b"POST /v1/chat/completions?api-version=2&api_key=0123456789abcdef HTTP/1.1")
    assert b"Basic bWU6aGlkL2Rlbi1wYXNzd29yZA==" in head
    assert "/v1/chat/completions?api-version=2&api_key=*** HTTP/1.1" in answer.text
    assert "Basic ***" in answer.text
    assert client.endpoints.all[0].url == server.url
    stored = b"".join(file.read_bytes() for file in cache.path.parent.glob("llm_cache.sqlite*"))
    assert b"bWU6" not in stored
    assert b"abcdef" not in stored


SECRET_URLS = [
    "http://me:hidden@127.0.0.1:9/v1",
    "http://hidden@127.0.0.1:9/v1",
    "https://h/v1?api_key=hidden",
    "https://h/v1?api-version=1&sig=hidden",
    "https://me:hid/hidden@h/v1",
    "https://[me:hidden@h/v1",
    "https://h/v1#api_key=hidden",
    "https://h/v1;api_key=hidden",
]


@pytest.mark.parametrize(
    "key", ["sk-proj-hidden", "hf_hidden7890123456789", "hidden KEY", "", "7HIDDEN", "$hidden", "KEY\n"]
)
def test_settings_take_no_key_in_the_place_of_its_variable(key: str) -> None:
    with pytest.raises(ConfigError, match=r"refine\.api_key_env: must be the name of an env") as caught:
        load(None, [{"model.path": "m", "data.path": "d", "refine.api_key_env": key}])
    assert "hidden" not in str(caught.value)
    assert "hidden" not in str(caught.value.__cause__)
    for name in ("OPENAI_API_KEY", "_key", "MY_COMPANYS_LONG_KEY_2"):
        assert RefineSettings(api_key_env=name).api_key_env == name


@pytest.mark.parametrize("url", SECRET_URLS)
def test_settings_take_no_secret_in_a_url(url: str) -> None:
    """Settings go to config.yaml and the manifest, so that these URLs are for the environment only."""
    given = [{"model.path": "m", "data.path": "d", "refine.base_url": [url, "http://h/v1"]}]
    for wrong in (given, ["model.path=m", "data.path=d", f"refine.base_url={url}"], [url]):
        with pytest.raises(ConfigError) as caught:
            load(None, wrong)
        assert "hidden" not in str(caught.value)
        assert "hidden" not in str(caught.value.__cause__)
    assert "OPENAI_BASE_URL" in str(caught.value) or wrong == [url]
    with pytest.raises(ValueError, match="OPENAI_BASE_URL") as refused:
        RefineSettings(base_url=url)
    assert "hidden" not in str(refused.value)


def test_a_version_in_a_url_is_a_setting() -> None:
    url = "https://h/openai/v1?api-version=2024-02-01"
    assert RefineSettings(base_url=url).base_url == url
    assert Address.of(url) == Address("https://h/openai/v1", "h", {"api-version": "2024-02-01"}, {}, ())


def test_a_url_that_cannot_be_read_is_not_shown(cache: AnswerCache) -> None:
    for url in (
        "http://me:hid/den@h/v1",
        "http://[hidden/v1",
        "http://me:hidden@h:port/v1",
        "http://",
        "http://h/v1;k=hidden",
    ):
        with pytest.raises(ConfigError, match="%40") as caught:
            ChatClient(requests("m", SETTINGS), url, cache)
        assert "hid" not in str(caught.value)


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\ud83d"])
def test_hidden_characters_enter_by_no_way(
    serve: Callable[[Reply], RawServer], cache: AnswerCache, tmp_path: Path, character: str
) -> None:
    """Asked, replayed from the cache, or read from a batch's results: the gate is the same."""
    hidden = json.dumps({"prompt": f"Name {character} a heron."})
    server = serve(whole(completion(hidden)))
    settings = ONCE.model_copy(update={"accept": "none", "max_corrections": 0})
    task = Task("rewrite", ("quality",), Example((Message("user", "Q"), Message("assistant", "A"))))
    asked = run([task], ChatClient(requests("m", settings), server.url, cache), settings, 0)
    elsewhere = ChatClient(requests("m", settings), "http://127.0.0.1:9/v1", cache)
    replayed = run([task], elsewhere, settings, 0)

    other = AnswerCache(tmp_path / "other.sqlite")
    batch = BatchClient(requests("m", settings), other, Ledger(other))
    with pytest.raises(NotAnswered):
        run([task], batch, settings, 0)
    [key] = batch.waiting
    body = completion(hidden).decode()
    (tmp_path / "out.jsonl").write_text(f'{{"custom_id": "{key}", "response": {{"body": {body}}}}}')
    assert batch.take(read_results([tmp_path / "out.jsonl"])) == {key}
    read = run([task], batch, settings, 0)
    other.close()
    for [outcome] in (asked, replayed, read):
        assert outcome.example is None
        assert outcome.verdict is not None
        assert outcome.verdict.gate == "readable"
        assert f"U+{ord(character):04X} in the prompt" in outcome.verdict.detail
        json_line(outcome.to_json()).encode()

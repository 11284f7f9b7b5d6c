"""Access control and hostile requests, many of them against real servers.

The tests of each line of attack. A test without a module is in this one:

    | attack | test |
    |-|-|
    | path, link or URL in ``batch_inputs`` | test_attacks_on_inputs::test_no_file_is_read_and_no_url_is_fetched |
    | | test_uploads::test_no_other_file_is_read_or_disclosed |
    | decompression bomb | test_bad_input::test_a_compressed_body_is_415_and_is_not_read |
    | | test_uploads::test_a_body_that_is_too_large_or_cannot_be_decompressed_is_refused |
    | amplification | test_uploads::test_static_inputs_count_toward_the_size_limit_in_every_row |
    | | test_uploads::test_a_long_row_in_tiny_chunks_is_read_in_linear_time |
    | formulas in a spreadsheet | test_uploads::test_formulas_are_escaped_in_csv |
    | deep JSON | test_jsontype::test_the_depth_check_takes_linear_time |
    | | test_bad_input::test_malformed_json_is_400_with_line_and_column |
    | huge numbers | test_attacks_on_inputs::test_numbers_of_any_size_are_answered |
    | duplicate names | test_attacks_on_inputs::test_the_last_of_duplicate_names_counts |
    | header injection | test_api::test_a_request_id_with_invalid_characters_is_replaced |
    | | test_http_lifecycle::test_an_invalid_idempotency_key_is_refused |
    | | test_an_ambiguous_request_head_is_refused |
    | log injection | test_log_lines_cannot_be_forged |
    | timing attack on keys | test_keys_are_hashed_and_compared_in_constant_time |
    | DNS rebinding | test_a_loopback_server_answers_only_to_its_own_names |
    | cross-site request forgery | test_a_page_of_another_origin_cannot_change_anything |
    | forged content type | test_content_types_that_a_form_can_send_are_refused |
    | | test_bad_input::test_another_content_type_is_415_and_the_error_says_what_to_send |
    | unguarded routes and methods | test_customising::test_a_route_that_is_added_later_requires_a_key |
    | | test_customising::test_only_open_routes_are_open_with_any_method |
    | smuggling | test_an_ambiguous_request_head_is_refused |
    | | test_bytes_after_an_unread_body_are_not_a_request |
    | slow head, slow body | test_our_server_does_not_wait_forever_for_a_request_head |
    | | test_a_body_that_trickles_is_answered_408 |
    | | test_uploads::test_a_stalled_upload_is_dropped |
    | event stream that is never read | test_http_lifecycle::test_an_event_stream_that_is_not_read_blocks_nothing |
    | too many connections, streams, requests | test_connections_beyond_the_limit_are_refused |
    | | test_event_streams_are_limited_for_each_principal |
    | | test_simultaneous_requests_for_event_streams_do_not_exceed_the_limit |
    | | test_requests_are_rate_limited_for_each_principal |
    | crowds of silent or waiting clients | test_crowds::test_silent_clients_delay_no_request_and_are_disconnected |
    | | test_crowds::test_clients_that_wait_for_a_run_take_little_more_memory_than_in_a_bare_app |
    | ids of another principal | test_records_of_another_principal_are_not_found |
    | | test_uploads::test_batches_of_other_principals_are_not_found |
    | ``current_agent`` and the like in the inputs | test_attacks_on_inputs::test_inputs_cannot_choose_the_agent |
    | secrets of the environment | test_attacks_on_inputs::test_server_secrets_are_in_no_response_and_no_record |
    | | test_keys_and_inputs_are_not_logged |
    | texts of exceptions, paths | test_attacks_on_inputs::test_server_secrets_are_in_no_response_and_no_record |
    | | test_attacks_on_inputs::test_the_path_of_the_store_is_only_in_the_log |
    | | test_bad_input::test_a_bug_is_a_500_without_its_text |
    | inputs | test_attacks_on_inputs::test_an_invalid_value_is_not_repeated_in_the_error |
"""

import contextlib
import functools
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flock.core import Flock
from flock.errors import DefinitionError, TooManyRequests
from flock.runs import Principal, Run
from flock.web.auth import KeyRing, RateLimit, ScopedEngine, new_key, read_keys
from flock.web.body import DRAIN_TIMEOUT_S
from flock.web.metrics import Metrics
from flockapi import FlockAPI, create_app, principal_of
from tests.support import PATIENCE_S, ROOT
from tests.support.engines import until
from tests.support.flocks import sample_flock
from tests.support.http import wait_for
from tests.support.servers import Served, flockapi_command, running
from tests.support.spec import SPEC, check_described

KEYS = {"ann": new_key(), "bob": new_key(), "ops:admin": new_key()}
ADD = {"agent_name": "add", "inputs": {"a": 1}}


def client_of(app: FlockAPI, name: str = "", **headers: str) -> httpx.AsyncClient:
    if name:
        headers["Authorization"] = f"Bearer {KEYS[name]}"
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers)


@pytest.fixture
def guarded() -> FlockAPI:
    return create_app(sample_flock(), store="guarded.db", api_keys=KEYS)


# Keys


@pytest.mark.anyio
async def test_a_key_may_be_a_bearer_token_or_in_its_own_header(guarded: FlockAPI) -> None:
    async with client_of(guarded) as client:
        for headers in (
            {"Authorization": f"Bearer {KEYS['ann']}"},
            {"Authorization": f"bearer   {KEYS['ann']} "},
            {"X-API-Key": KEYS["ann"]},
            {"X-API-Key": KEYS["ann"], "Authorization": "Basic YTpi"},
        ):
            assert (await client.post("/run/flock", json=ADD, headers=headers)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": KEYS["ann"]},
        {"Authorization": f"Basic {KEYS['ann']}"},
        {"Authorization": f"Bearer {KEYS['ann']}x"},
        {"Authorization": f"Bearer {KEYS['ann'][:-1]}"},
        {"Authorization": f"Bearer {KEYS['ann'].upper()}"},
        {"Authorization": "Bearer ann"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-API-Key": ""},
    ],
)
async def test_a_request_without_a_valid_key_is_401_and_its_body_is_not_read(headers: Any, guarded: FlockAPI) -> None:
    """The response says how to send a key, and the connection is closed after it."""
    was_read = False

    async def body() -> Any:
        nonlocal was_read
        was_read = True
        yield b"{}"

    async with client_of(guarded) as client:
        for method, path in (("POST", "/run/flock"), ("GET", "/run/1"), ("DELETE", "/run/1"), ("GET", "/agents")):
            answer = await client.request(method, path, headers=headers, content=body())
            assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="Flock Server"'
            assert answer.headers["Connection"] == "close"
            assert "-H 'Authorization: Bearer YOUR_KEY'" in answer.json()["detail"]
    assert not was_read


def test_keys_are_hashed_and_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    ring = KeyRing(KEYS)
    monkeypatch.setattr("flock.web.auth.hmac.compare_digest", compare_digest)
    assert ring.find(KEYS["ann"]) == Principal(name="ann")
    assert ring.find(KEYS["ops:admin"]) == Principal(name="ops", admin=True)
    assert ring.find("wrong") is None
    assert compared == [(32, 32)] * 9, "each key is compared with every hash"
    assert not any(key in repr(vars(ring)) for key in KEYS.values())


def test_the_key_command_prints_a_new_random_key() -> None:
    keys = {subprocess.run(flockapi_command("key"), capture_output=True, text=True, check=True).stdout for _ in "12"}
    assert len(keys) == 2
    assert all(re.fullmatch(r"fk_[\w-]{43}\n", key) for key in keys), "256 bits"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("alice=k1,bob=k2", {"alice": "k1", "bob": "k2"}),
        ("# the team\nalice = k1\n\n bob=k=2 \n", {"alice": "k1", "bob": "k=2"}),
        (" , ", {}),
    ],
)
def test_keys_are_read_from_text(text: str, keys: dict[str, str]) -> None:
    assert read_keys(text) == keys


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: read_keys("alice=secret-1,just-a-secret-2"), "Entry 2 .* not NAME=KEY"),
        (lambda: read_keys("alice=secret-1,alice=secret-2"), "'alice' is used twice"),
        (lambda: KeyRing({"ann": "secret-short"}), "at least 16 visible ASCII characters"),
        (lambda: KeyRing({"ann": "secret with spaces in it"}), "no spaces"),
        (lambda: KeyRing({"an n": KEYS["ann"]}), "is not a valid name for a key"),
        (lambda: KeyRing({"ann": KEYS["ann"], "ben": KEYS["ann"]}), "'ben' has the same key as another name"),
        (lambda: KeyRing({}), "api_keys is empty"),
        (lambda: create_app(Flock(), api_keys=KEYS, auth=lambda _: None), "auth= and api_keys= cannot be combined"),
        (lambda: create_app(Flock(), api_keys=KEYS, auth="host"), "auth= and api_keys= cannot be combined"),
    ],
)
def test_unusable_keys_are_refused_and_not_shown(make: Any, words: str) -> None:
    with pytest.raises(DefinitionError, match=words) as caught:
        make()
    assert "secret" not in str(caught.value)
    assert KEYS["ann"] not in str(caught.value)


@pytest.mark.anyio
async def test_create_app_does_not_read_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are for our own server, which may run beside the host."""
    monkeypatch.setenv("FLOCK_API_KEYS", "not even of the right form")
    async with client_of(create_app(sample_flock(), store=":memory:")) as client:
        assert (await client.get("/runs")).status_code == 200
    async with client_of(create_app(sample_flock(), store=":memory:", api_keys={"bob": KEYS["bob"]}), "ann") as ann:
        assert (await ann.get("/runs")).status_code == 401


def test_start_api_reads_keys_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("from tests.support.flocks import sample_flock\nsample_flock().start_api(port=0)\n")
    keys = f"ann={KEYS['ann']}"
    with running(sys.executable, str(path), PYTHONPATH=str(ROOT), FLOCK_API_KEYS=keys) as server:
        assert httpx.get(f"{server.url}/runs").status_code == 401
        assert httpx.get(f"{server.url}/runs", headers={"X-API-Key": KEYS["ann"]}).status_code == 200


# Ownership


@pytest.mark.anyio
async def test_records_of_another_principal_are_not_found(guarded: FlockAPI) -> None:
    """Runs, items, batches, lists, events and idempotency keys are tried with every method. An admin sees them all."""
    async with (
        client_of(guarded, "ann") as ann,
        client_of(guarded, "bob") as bob,
        client_of(guarded, "ops:admin") as ops,
    ):
        run = (await ann.post("/run/flock", json=ADD, headers={"Idempotency-Key": "k"})).json()
        items = {"agent_name": "add", "batch_inputs": [{"a": 1}]}
        batch = (await ann.post("/run/batch", json=items, headers={"Idempotency-Key": "b"})).json()
        await wait_for(ann, f"/batch/{batch['batch_id']}")
        run_id, unknown = run["run_id"], "01a20e41-e4ec-74f9-8450-7dd74efe56ba"
        for method, path in (
            ("GET", "/run/{}"),
            ("GET", "/run/{}?wait=1"),
            ("GET", "/run/{}/events"),
            ("POST", "/run/{}/cancel"),
            ("POST", "/run/{}/retry"),
            ("DELETE", "/run/{}"),
        ):
            foreign = await bob.request(method, path.format(run_id))
            missing = await bob.request(method, path.format(unknown))
            assert (foreign.status_code, missing.status_code) == (404, 404)
            assert foreign.text.replace(run_id, "").replace(foreign.json()["request_id"], "") == missing.text.replace(
                unknown, ""
            ).replace(missing.json()["request_id"], ""), "the two responses are the same"
        assert (await bob.get(f"/batch/{batch['batch_id']}")).status_code == 404
        assert (await bob.get("/runs")).json()["runs"] == []
        assert [found["run_id"] for found in (await ann.get("/runs?agent_name=add")).json()["runs"]] == [run_id]
        assert [found["run_id"] for found in (await ops.get("/runs")).json()["runs"]] == [run_id]
        assert (await ops.get(f"/batch/{batch['batch_id']}")).status_code == 200
        # The same idempotency key of another principal is a different key.
        other = await bob.post("/run/flock", json={**ADD, "inputs": {"a": 5}}, headers={"Idempotency-Key": "k"})
        assert (other.status_code, other.json()["result"]) == (200, {"result": 7})
        again = await ann.post("/run/flock", json=ADD, headers={"Idempotency-Key": "k"})
        assert (again.json()["run_id"], again.headers["Idempotency-Replayed"]) == (run_id, "true")
        reused = await ann.post("/run/flock", json={**ADD, "inputs": {"a": 5}}, headers={"Idempotency-Key": "k"})
        assert (reused.status_code, "ann" in reused.json()["detail"]) == (422, False)
        assert (await ops.delete(f"/run/{run_id}")).status_code == 204


@pytest.mark.anyio
async def test_metrics_require_an_admin(guarded: FlockAPI) -> None:
    async with client_of(guarded, "ann") as ann, client_of(guarded, "ops:admin") as ops:
        await ann.post("/run/flock", json=ADD)
        refused = await ann.get("/metrics")
        assert (refused.status_code, refused.json()["title"]) == (403, "Forbidden")
        shown = (await ops.get("/metrics")).text
        assert "flock_runs_total" in shown
        assert "ann" not in re.findall(r'"(.*?)"', shown), "principals are not labels"


@pytest.mark.anyio
async def test_runs_from_before_api_keys_are_visible_only_to_admins(tmp_path: Path) -> None:
    flock = sample_flock()
    async with client_of(create_app(flock, store="old.db")) as client:
        run_id = (await client.post("/run/flock", json=ADD)).json()["run_id"]
        app = create_app(flock, store="old.db", api_keys=KEYS)
        async with client_of(app, "ann") as ann, client_of(app, "ops:admin") as ops:
            assert (await ann.get(f"/run/{run_id}")).status_code == 404
            assert (await ops.get(f"/run/{run_id}")).status_code == 200


@pytest.mark.anyio
async def test_a_scoped_engine_can_be_used_as_an_engine() -> None:
    flock, seen = sample_flock(), []

    class Counter(Metrics):
        def run_ended(self, run: Run) -> None:
            seen.append(run.principal)

    async with ScopedEngine(flock.engine(), Principal(name="ann")) as ann:
        await ann.check_ready()
        observer = Counter([])
        ann.observe(observer)
        run = await ann.wait((await ann.submit("add", {"a": 1})).run_id)
        assert [event.name async for event in ann.events(run.run_id) if event] != []
        assert (ann.health().engine, (await ann.queue()).depth, seen) == ("running", 0, ["ann"])
        await ann.drain(0)
        assert ann.is_draining


# Protected by default: our own server


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text("from tests.support.flocks import sample_flock\nflock = sample_flock()\n")
    return path


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_others_can_reach_creates_and_requires_a_key(workers: str, script: Path) -> None:
    command = flockapi_command("serve", str(script), "--host", "0.0.0.0", "--port", "0", "--workers", workers)
    with running(*command, PYTHONPATH=str(ROOT)) as server:
        server.wait_for_line("Application startup complete", times=int(workers))
        url = re.sub(r"//.*:", "//127.0.0.1:", server.url)
        (key,) = [line.split()[-1] for line in server.lines if "Authorization: Bearer fk_" in line]
        for _ in range(6):  # any worker may answer
            assert httpx.post(f"{url}/run/flock", json=ADD).status_code == 401
            answer = httpx.post(f"{url}/run/flock", json=ADD, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        assert httpx.get(f"{url}/metrics", headers={"X-API-Key": key}).status_code == 200, "the new key is an admin's"
        assert httpx.get(f"{url}/docs").status_code == httpx.get(f"{url}/healthz").status_code == 200
        server.stop()
    assert "\n".join(server.lines).count(key) == 1
    assert not any("without API keys" in line for line in server.lines)


def test_keys_from_a_file_and_from_the_environment_are_combined(script: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# who may\nann={KEYS['ann']}\n")
    command = flockapi_command("serve", str(script), "--port", "0", "--api-keys-file", str(tmp_path / "keys"))
    with running(*command, PYTHONPATH=str(ROOT), FLOCK_API_KEYS=f"bob={KEYS['bob']}") as server:
        statuses = [
            httpx.get(f"{server.url}/runs", headers={"X-API-Key": key}).status_code
            for key in (KEYS["ann"], KEYS["bob"], new_key())
        ]
        assert statuses == [200, 200, 401]
        foreign = httpx.get(f"{server.url}/runs", headers={"X-API-Key": KEYS["ann"], "Host": "agents.example"})
        assert foreign.status_code == 200, "with a key any host name is accepted"
    (tmp_path / "keys").write_text("ann\n")
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 1
    assert "Entry 1 of the API keys is invalid" in done.stderr


def test_a_loopback_server_answers_only_to_its_own_names(script: Path) -> None:
    """A page whose host name was made to resolve to this machine is refused, whatever it requests."""
    with running(*flockapi_command("serve", str(script), "--port", "0"), PYTHONPATH=str(ROOT)) as server:
        port = server.url.rpartition(":")[2]
        assert any("Programs on this machine need no API key. Set FLOCK_API_KEYS" in line for line in server.lines)
        assert not any("WARNING" in line for line in server.lines), "other machines cannot connect"
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", f"[::1]:{port}"):
            assert httpx.get(f"{server.url}/agents", headers={"Host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", ""):
            for method, path in (("GET", "/runs"), ("POST", "/run/flock"), ("GET", "/docs"), ("GET", "/healthz")):
                answer = httpx.request(method, server.url + path, headers={"Host": host})
                assert (answer.status_code, answer.json()["title"]) == (421, "Misdirected Request")
                assert "start the server with --allowed-host NAME" in answer.json()["detail"]


@pytest.mark.parametrize(
    "options",
    [["--allowed-host", "agents.example"], ["--root-path", "/ai"], ["--forwarded-allow-ips", "127.0.0.1"]],
    ids=lambda options: options[0],
)
def test_a_server_behind_a_proxy_creates_and_requires_a_key(options: list[str], script: Path) -> None:
    """It does so on the loopback too, because the proxy lets others connect."""
    with running(*flockapi_command("serve", str(script), "--port", "0", *options), PYTHONPATH=str(ROOT)) as server:
        (key,) = [line.split()[-1] for line in server.lines if "Authorization: Bearer fk_" in line]
        assert httpx.get(f"{server.url}/runs").status_code == 401
        assert httpx.get(f"{server.url}/runs", headers={"X-API-Key": key}).status_code == 200


# Pages of other origins


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://t"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://t"}, 200),
        ({"Origin": "http://ours.example"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://ours.example"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://evil.t"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://t.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://t:81"}, 403),
    ],
)
async def test_a_page_of_another_origin_cannot_change_anything(headers: dict[str, str], status: int) -> None:
    app = create_app(sample_flock(), store=":memory:", auth="host", cors_origins=["http://ours.example"])
    async with client_of(app) as client:
        run_id = (await client.post("/run/flock", json=ADD)).json()["run_id"]
        assert (await client.post("/run/flock", json=ADD, headers=headers)).status_code == status
        count = len((await client.get("/runs")).json()["runs"])
        assert count == (2 if status == 200 else 1)
        assert (await client.delete(f"/run/{run_id}", headers=headers)).status_code == (204 if status == 200 else 403)
        assert (await client.get("/agents", headers=headers)).status_code == 200


@pytest.mark.anyio
async def test_only_pages_of_allowed_origins_may_read_responses() -> None:
    app = create_app(sample_flock(), store=":memory:", api_keys=KEYS, cors_origins=["http://ours.example"])
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    async with client_of(app) as client:
        ours = await client.options("/run/flock", headers={"Origin": "http://ours.example", **preflight})
        assert (ours.status_code, ours.headers["Access-Control-Allow-Origin"]) == (200, "http://ours.example")
        theirs = await client.options("/run/flock", headers={"Origin": "http://evil.example", **preflight})
        assert "Access-Control-Allow-Origin" not in theirs.headers
        refused = await client.get("/runs", headers={"Origin": "http://ours.example"})
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, "http://ours.example")
    async with client_of(create_app(sample_flock(), store=":memory:")) as client:
        assert "Access-Control-Allow-Origin" not in (await client.get("/runs", headers={"Origin": "http://t"})).headers


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content_type",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", ""),
        *("text/plain; application/json", "text/plain, application/json", "application/json+x", "application/json\\"),
    ],
)
async def test_content_types_that_a_form_can_send_are_refused(content_type: str) -> None:
    async with client_of(create_app(sample_flock(), store=":memory:")) as client:
        for path in ("/run/flock", "/run/batch"):
            answer = await client.post(path, content=json.dumps(ADD), headers={"Content-Type": content_type})
            assert answer.status_code == 415


@pytest.mark.anyio
async def test_an_open_app_warns_once_at_startup(caplog: pytest.LogCaptureFixture) -> None:
    """The warning says what is open and how to close it. Allowed hosts do not protect it: clients choose ``Host``."""
    app = create_app(sample_flock(), store=":memory:", allowed_hosts=["t"])
    assert caplog.records == []
    for _ in range(2):
        async with app.lifespan(), client_of(app) as client:
            assert [(await client.get("/agents")).status_code for _ in range(2)] == [200, 200]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Flock Server has no authentication. Every client that can reach it can run its agents" in record.message
    for remedy in ("api_keys=", "auth=", 'auth="host"'):
        assert remedy in record.message


CLOSED: dict[str, dict[str, Any]] = {
    "by keys": {"api_keys": KEYS},
    "by a function": {"auth": lambda connection: Principal(name="ann")},
    "by the host": {"auth": "host"},
}


@pytest.mark.anyio
@pytest.mark.parametrize("options", CLOSED.values(), ids=CLOSED)
async def test_a_closed_app_does_not_warn(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(create_app(sample_flock(), store=":memory:", **options), "ann") as client:
        assert (await client.get("/agents")).status_code == 200
    assert caplog.records == []


@pytest.mark.anyio
async def test_an_app_with_auth_host_has_no_principals() -> None:
    """All users of the host share the runs, and routes see no principal."""

    async def whoami(request: Request) -> Response:
        return Response(str(principal_of(request)))

    app = create_app(sample_flock(), store=":memory:", auth="host", routes=[Route("/whoami", whoami)])
    async with client_of(app) as client:
        run_id = (await client.post("/run/flock", json=ADD)).json()["run_id"]
        assert (await client.get("/whoami")).text == "None"
        assert (await client.get(f"/run/{run_id}")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


# Limits


@pytest.mark.anyio
async def test_headers_are_limited_in_size(guarded: FlockAPI) -> None:
    async with client_of(guarded, "ann") as client:
        assert (await client.get("/agents", headers={"X-Long": "x" * 60_000})).status_code == 200
        refused = await client.get("/agents", headers={"X-Long": "x" * 70_000})
        assert (refused.status_code, refused.headers["Connection"]) == (431, "close")


@pytest.mark.anyio
async def test_a_result_that_is_too_long_fails_its_run_and_is_not_truncated() -> None:
    flock = Flock()

    @flock.agent
    def repeat(times: int) -> str:
        return "x" * times

    app = create_app(flock, engine=flock.engine(max_result_bytes=1000, max_input_bytes=1000))
    async with client_of(app) as client:
        for times, status in ((900, "completed"), (1000, "failed")):
            run = (await client.post("/run/flock", json={"agent_name": "repeat", "inputs": {"times": times}})).json()
            assert run["status"] == status
        assert (run["error_type"], run["result"]) == ("result_too_large", None)
        body = '{"agent_name": "repeat", "inputs": {"times": 1%s}}' % (" " * 1000)
        refused = await client.post("/run/flock", content=body, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["title"]) == (413, "Content too large")


@pytest.mark.anyio
async def test_waits_are_capped_at_max_wait_s() -> None:
    flock = Flock()

    @flock.agent
    async def nap() -> None:
        await anyio.sleep(600)

    async with client_of(create_app(flock, store=":memory:", max_wait_s=0)) as client:
        body = {"agent_name": "nap", "async_run": True}
        run_id = (await client.post("/run/flock", json=body)).json()["run_id"]
        with anyio.fail_after(PATIENCE_S):
            assert (await client.get(f"/run/{run_id}?wait=60")).json()["status"] in ("starting", "running")
            waiting = await client.post("/run/flock", json=body, headers={"Prefer": "respond-async, wait=60"})
        assert waiting.headers["Preference-Applied"] == "respond-async, wait=0"


@pytest.mark.anyio
async def test_event_streams_are_limited_for_each_principal() -> None:
    flock = Flock()

    @flock.agent
    async def nap() -> None:
        await anyio.sleep(600)

    app = create_app(flock, store=":memory:", api_keys=KEYS, max_event_streams=2)
    body = {"agent_name": "nap", "async_run": True}
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url) as client:
        of_ann, of_bob = ({"X-API-Key": KEYS[name]} for name in ("ann", "bob"))
        path = f"/run/{(await client.post('/run/flock', json=body, headers=of_ann)).json()['run_id']}/events"
        other = f"/run/{(await client.post('/run/flock', json=body, headers=of_bob)).json()['run_id']}/events"
        read = []  # holds the iterators, since one that is dropped closes its stream
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(2):
                stream = await streams.enter_async_context(client.stream("GET", path, headers=of_ann))
                read.append(stream.aiter_raw())
                await anext(read[-1])
            refused = await client.get(path, headers=of_ann)
            assert (refused.status_code, refused.json()["title"]) == (429, "Too many requests")
            assert int(refused.headers["Retry-After"]) >= 1
            stream = await streams.enter_async_context(client.stream("GET", other, headers=of_bob))
            assert stream.status_code == 200
        with anyio.fail_after(PATIENCE_S):
            while True:  # until their slots are free again
                async with client.stream("GET", path, headers=of_ann) as stream:
                    if stream.status_code == 200:
                        break
                await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_simultaneous_requests_for_event_streams_do_not_exceed_the_limit() -> None:
    """All requests arrive before the server reads the first."""
    flock = Flock()

    @flock.agent
    async def nap() -> None:
        await anyio.sleep(600)

    async with (
        Served(create_app(flock, store=":memory:", max_event_streams=1)) as served,
        httpx.AsyncClient(base_url=served.url) as client,
    ):
        run_id = (await client.post("/run/flock", json={"agent_name": "nap", "async_run": True})).json()["run_id"]
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 20)) for _ in range(20)
            ]
            await until(lambda: len(served.server.server_state.connections) > 20)
            for connection in connections:
                connection.sendall(f"GET /run/{run_id}/events HTTP/1.1\r\nHost: t\r\n\r\n".encode())
            heads = [await anyio.to_thread.run_sync(connection.recv, 12) for connection in connections]
        assert sorted(heads) == [b"HTTP/1.1 200", *[b"HTTP/1.1 429"] * 19]


@pytest.mark.anyio
async def test_the_slot_of_an_event_stream_is_freed_if_its_response_never_starts() -> None:
    """Neither a response to HEAD nor a request that is cancelled before its first byte keeps a slot."""
    flock = Flock()

    @flock.agent
    async def nap() -> None:
        await anyio.sleep(600)

    app = create_app(flock, store=":memory:", max_event_streams=1)
    async with client_of(app) as client:
        run_id = (await client.post("/run/flock", json={"agent_name": "nap", "async_run": True})).json()["run_id"]
        path, statuses = f"/run/{run_id}/events", list[int]()
        assert [(await client.head(path)).status_code for _ in range(2)] == [200, 200]
        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        scope["client"] = ("127.0.0.1", 1)

        async def receive() -> Any:
            await anyio.sleep_forever()

        async def send(message: Any) -> None:
            statuses.append(message["status"])
            await anyio.sleep_forever()

        for sent in ([200], [200, 200]):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(app, scope, receive, send)
                await until(lambda: len(statuses) == len(sent))  # noqa: B023 - called before the next round
                assert (await client.get(path)).status_code == 429, "the slot is taken at once"
                tasks.cancel_scope.cancel()
            assert statuses == sent


@pytest.mark.anyio
async def test_requests_are_rate_limited_for_each_principal() -> None:
    """This also holds if middleware of the host copies the scope."""

    def copying(app: ASGIApp) -> ASGIApp:
        async def copy(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope}, receive, send)

        return copy

    middleware = [Middleware(copying)]
    app = create_app(sample_flock(), store=":memory:", api_keys=KEYS, max_requests_per_minute=3, middleware=middleware)
    async with client_of(app, "ann") as ann, client_of(app, "bob") as bob:
        answers = [await ann.get("/agents") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [answer.headers["RateLimit"] for answer in answers[:3]] == [f'"minute";r={r};t=20' for r in (2, 1, 0)]
        refused = answers[3]
        assert {answer.headers["RateLimit-Policy"] for answer in answers} == {'"minute";q=3;w=60'}
        assert refused.headers["RateLimit"].startswith('"minute";r=0;t=')
        assert 15 <= int(refused.headers["Retry-After"]) <= 20
        assert (await ann.get("/healthz")).status_code == 200, "open routes are not counted"
        assert (await bob.get("/agents")).status_code == 200


@pytest.mark.anyio
async def test_requests_without_a_principal_are_rate_limited_for_each_address() -> None:
    """One client cannot use up the requests of the others."""
    app = create_app(sample_flock(), store=":memory:", auth="host", max_requests_per_minute=2)
    assert await statuses_from(app, "192.0.2.1", 3, {}) == [200, 200, 429]
    assert await statuses_from(app, "192.0.2.2", 1, {}) == [200]


@pytest.mark.anyio
@pytest.mark.parametrize("auth", [None, lambda connection: None], ids=["keys", "function"])
async def test_wrong_credentials_are_rate_limited_for_each_address(auth: Any) -> None:
    """A guess is answered with 429, and the clients with right credentials are not affected."""
    access = {"api_keys": KEYS} if auth is None else {"auth": auth}
    app = create_app(sample_flock(), store=":memory:", max_requests_per_minute=2, **access)
    guess = {"Authorization": "Bearer fk_guess"}
    assert await statuses_from(app, "192.0.2.1", 4, guess) == [401, 401, 429, 429]
    assert await statuses_from(app, "192.0.2.2", 1, guess) == [401]
    if auth is None:
        right = {"Authorization": f"Bearer {KEYS['ann']}"}
        assert await statuses_from(app, "192.0.2.1", 3, right) == [200, 200, 429]


async def statuses_from(app: Any, address: str, number: int, headers: dict[str, str]) -> list[int]:
    """Return the statuses of *number* requests of a client with this *address*."""
    transport = httpx.ASGITransport(app, client=(address, 1))
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers) as client:
        return [(await client.get("/agents")).status_code for _ in range(number)]


def test_keys_of_one_name_have_one_budget() -> None:
    """With different ones, each request would replace the budget that the other key has set."""
    budget = "ann:max_cost_per_day:5"
    with pytest.raises(DefinitionError, match="The keys of 'ann' have different budgets"):
        KeyRing({"ann": new_key(), budget: new_key()})
    keys = {f"{budget}:admin": new_key(), budget: new_key(), "bob": new_key()}
    assert [principal.max_cost_per_day for principal in map(KeyRing(keys).find, keys.values()) if principal] == [
        5,
        5,
        None,
    ]


def test_a_rate_limit_refills_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 1000.0
    monkeypatch.setattr("flock.web.auth.time.monotonic", lambda: at)
    rate, caller = RateLimit(2), ("address", "192.0.2.1")
    for later, left in ((0, 1), (0, 0), (30, 0), (3000, 1)):
        at += later
        assert rate.take(caller)["RateLimit"].startswith(f'"minute";r={left};')
    rate.take(caller)
    with pytest.raises(TooManyRequests):
        rate.take(caller)
    for number in range(20_000):
        at += 0.01
        rate.take(("principal", str(number)))
    assert len(rate._full_at) <= 10_001, "memory does not grow with the number of principals"
    with pytest.raises(DefinitionError):
        RateLimit(0)


# Over real sockets


async def answer_to(port: int, *chunks: bytes, pause_s: float = 0) -> bytes:
    """Return what the server sends until it closes, or for 30 seconds."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        received = b""
        with anyio.move_on_after(30), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            for chunk in chunks:
                await stream.send(chunk)
                await anyio.sleep(pause_s)
            while True:
                received += await stream.receive()
        return received


HEAD = b"POST /run/flock HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.anyio
async def test_a_body_that_trickles_is_answered_408() -> None:
    app = create_app(sample_flock(), store=":memory:", body_timeout_s=0.2)
    async with Served(app) as served:
        answer = await answer_to(served.port, HEAD + b"Content-Length: 100\r\n\r\n{", b" ", b" ", pause_s=0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()
    assert b"The body did not arrive within 0.2 s." in answer


@pytest.mark.anyio
async def test_bytes_after_an_unread_body_are_not_a_request() -> None:
    """The smuggled request follows a body that was refused for its length or for a missing key."""
    smuggled = b"GET /agents HTTP/1.1\r\nHost: localhost\r\n\r\n"
    app = create_app(sample_flock(), store=":memory:", max_body_bytes=10, api_keys=KEYS)
    with_key = b"X-API-Key: " + KEYS["ann"].encode() + b"\r\n"
    async with Served(app) as served:
        for head, status in ((HEAD, b"401"), (HEAD + with_key, b"413")):
            length = b"Content-Length: %d\r\n\r\n" % len(smuggled)
            answer = await answer_to(served.port, head + length + smuggled + smuggled)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.anyio
@pytest.mark.parametrize("content", ["application/json", "text/csv"])
async def test_under_every_server_a_client_that_first_sends_its_whole_body_can_read_its_413(content: str) -> None:
    """nginx is such a client. If the server closes the connection while nginx is sending, nginx responds with 502."""
    app = create_app(sample_flock(), store=":memory:", max_body_bytes=10, max_upload_bytes=10)
    path, length = b"/run/batch?agent_name=summarise" if content == "text/csv" else b"/run/flock", 4 * 1024 * 1024
    head = b"POST %s HTTP/1.1\r\nHost: t\r\nContent-Type: %s\r\n" % (path, content.encode())
    async with Served(app) as served:
        chunks = [b"x" * 65_536] * (length // 65_536)
        answer = await answer_to(served.port, head + b"Content-Length: %d\r\n\r\n" % length, *chunks, pause_s=0.001)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"The body is longer than 10 bytes" in answer
        waits = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % length
        with anyio.fail_after(DRAIN_TIMEOUT_S - 1):
            answer = await answer_to(served.port, head + waits)
        assert answer.startswith(b"HTTP/1.1 413 "), "a client that waits for 100 Continue sends nothing"


def test_a_response_sent_during_the_request_body_can_be_read(script: Path) -> None:
    """The server reads and discards the rest of the body, because the kernel would otherwise reset the connection."""
    command = flockapi_command("serve", str(script), "--port", "0", "--store", ":memory:")
    smuggled = b"GET /agents HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100_000
    head = HEAD + b"Content-Length: %d\r\n" % len(smuggled)
    with running(*command, PYTHONPATH=str(ROOT), FLOCK_API_KEYS=f"ann={KEYS['ann']}") as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for more, status in ((b"", b"401"), (b"X-API-Key: " + KEYS["ann"].encode() + b"\r\n", b"413")) * 10:
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(head + more + b"\r\n" + smuggled)
                answer = b"".join(iter(lambda: connection.recv(65_536), b""))
            assert (answer[:12], answer.count(b"HTTP/1.1")) == (b"HTTP/1.1 " + status, 1)
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head + b"\r\n")
            began = time.monotonic()
            answer = b"".join(iter(lambda: connection.recv(65_536), b""))
            assert answer.startswith(b"HTTP/1.1 401")
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < 30:
                    connection.sendall(b"x")
                    time.sleep(0.1)
            assert time.monotonic() - began < 10, "the server does not wait for the rest"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked", id="a length and chunks"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5", id="chunks and a length"),
        pytest.param(b"Transfer-Encoding : chunked\r\nContent-Length: 5", id="chunks with a space"),
        pytest.param(b"Transfer-Encoding: xchunked", id="almost chunks"),
        pytest.param(b"Transfer-Encoding: chunked, identity", id="chunks not last"),
        pytest.param(b"Content-Length: 5\r\nContent-Length: 0", id="two lengths"),
        pytest.param(b"Content-Length: 5, 0", id="two lengths in one"),
        pytest.param(b"Content-Length: +5", id="a length with a sign"),
        pytest.param(b"Content-Length: 5\r\nX-Request-ID: a\nX: y", id="a bare LF"),
        pytest.param(b"Content-Length: 5\r\nX-Request-ID: a\rX: y", id="a bare CR"),
        pytest.param(b"Content-Length: 5\r\nX-Request-ID: a\r\n b", id="a folded line"),
        pytest.param(b"Content-Length: 5\r\nX-Request-ID: a\0b", id="NUL"),
    ],
)
async def test_an_ambiguous_request_head_is_refused(headers: bytes) -> None:
    """RFC 9112, sections 5 and 6: a proxy that reads it differently would take the rest for another request."""
    app = create_app(sample_flock(), store=":memory:")
    async with Served(app) as served:
        rest = b"0\r\n\r\nGET /agents HTTP/1.1\r\nHost: a\r\n\r\n"
        answer = await answer_to(served.port, HEAD + headers + b"\r\n\r\n" + rest)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_our_server_does_not_wait_forever_for_a_request_head(script: Path) -> None:
    """Connections that are silent, trickle or never end their head are closed. Others are answered meanwhile."""
    command = [sys.executable, "-c", IMPATIENT, str(script)]
    with running(*command, PYTHONPATH=str(ROOT)) as server:
        port = int(server.url.rpartition(":")[2])

        async def attack() -> list[bytes]:
            answers: list[bytes] = []

            async def send(*chunks: bytes, pause_s: float) -> None:
                answers.append(await answer_to(port, *chunks, pause_s=pause_s))

            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(functools.partial(send, pause_s=0))
                    tasks.start_soon(functools.partial(send, *[b"G", b"E", b"T"] * 10, pause_s=0.1))
                tasks.start_soon(functools.partial(send, HEAD, *[b"X: " + b"x" * 65_000] * 10, pause_s=0))
                assert (await anyio.to_thread.run_sync(httpx.get, f"{server.url}/agents")).status_code == 200
            return answers

        before = time.monotonic()
        answers = anyio.run(attack)
        assert time.monotonic() - before < 20
        assert all(answer == b"" or answer.startswith(b"HTTP/1.1 400") for answer in answers)
        assert httpx.get(f"{server.url}/agents").status_code == 200


IMPATIENT = """
import sys
from flock.command import connection
from flock.command.cli import main
connection.HEAD_TIMEOUT_S = 1
main(["serve", sys.argv[1], "--port", "0", "--store", ":memory:"])
"""


def test_connections_beyond_the_limit_are_refused(script: Path) -> None:
    """The response is a problem like any other, and earlier connections are still answered."""
    command = flockapi_command("serve", str(script), "--port", "0", "--max-connections", "5", "--store", ":memory:")
    with (
        running(*command, PYTHONPATH=str(ROOT)) as server,
        httpx.Client(base_url=server.url, headers={"X-Request-ID": "mine"}) as known,
        contextlib.ExitStack() as held,
    ):
        assert known.get("/agents").status_code == 200
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for _ in range(4):
            held.enter_context(socket.create_connection(address))
        for method, path, body in (("GET", "/agents", None), ("POST", "/run/flock", ADD), ("GET", "/healthz", None)):
            refused = httpx.request(method, server.url + path, json=body, headers={"X-Request-ID": "mine"})
            check_described(SPEC["paths"][path][method.lower()], refused)
            problem = refused.json()
            assert (problem["status"], problem["title"], problem["instance"]) == (503, "Service Unavailable", path)
            assert problem["request_id"] == refused.headers["X-Request-ID"] == "mine"
            assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("1", "close")
            assert known.post("/run/flock", json=ADD).status_code == 200
        held.close()
        deadline = time.monotonic() + 20
        while httpx.get(f"{server.url}/agents").status_code == 503:
            assert time.monotonic() < deadline, "their slots are not free again"


# Logs


FORGED = "x\nINFO:     run 0000: completed, agent add, 1 ms (request 1)\r\n\x1b[2J"


@pytest.mark.parametrize("agent_name", ["refuse", "explode"])
def test_log_lines_cannot_be_forged(agent_name: str, script: Path) -> None:
    """Neither the error of an agent, an exception, a name nor a path can start a new line."""
    command = flockapi_command("serve", str(script), "--port", "0", "--store", ":memory:", "--access-log")
    with running(*command, PYTHONPATH=str(ROOT)) as server:
        httpx.post(f"{server.url}/run/flock", json={"agent_name": agent_name, "inputs": {"text": FORGED}})
        assert "\n" not in httpx.post(f"{server.url}/run/flock", json={"agent_name": FORGED}).json()["detail"]
        httpx.get(f"{server.url}/run/x%0AINFO:%20forged")
        server.wait_for_line("forged")
        server.wait_for_line("run 0000")
        server.stop()
    assert not any(line.startswith(("INFO:     run 0000", "INFO: forged")) for line in server.lines)
    assert "\x1b[2J" not in "".join(server.lines)


def test_keys_and_inputs_are_not_logged(script: Path) -> None:
    command = flockapi_command("serve", str(script), "--port", "0", "--store", ":memory:")
    with running(*command, PYTHONPATH=str(ROOT), FLOCK_API_KEYS=f"ann={KEYS['ann']}") as server:
        for key in (KEYS["ann"], KEYS["bob"]):
            for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                body = {"agent_name": "summarise", "inputs": {"text": "a secret of mine"}}
                answer = httpx.post(f"{server.url}/run/flock", json=body, headers=headers)
                httpx.post(f"{server.url}/run/flock", json={**body, "inputs": {"txt": "a secret"}}, headers=headers)
        assert answer.status_code == 401
        server.stop()
    log = "\n".join(server.lines)
    assert "secret" not in log
    assert KEYS["ann"] not in log
    assert KEYS["bob"] not in log


# The table above


def test_every_test_in_the_table_exists() -> None:
    named = re.findall(r"(?:(\w+)::)?(test_\w+) \|$", __doc__ or "", re.MULTILINE)
    assert len(named) > 25
    for module, name in named:
        text = (Path(__file__).with_name(f"{module}.py") if module else Path(__file__)).read_text("utf-8")
        assert f"def {name}(" in text

"""``openapi.yaml`` describes exactly what the server does: routes, fields, statuses, examples."""

import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import anyio
import httpx
import msgspec
import pytest
import yaml
from openapi_spec_validator import validate
from starlette.requests import HTTPConnection
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

import flock as flock_package
import flockapi
from flock.agents.agent import Handoff
from flock.core import Flock, FlockFactory
from flock.errors import AgentError, FieldError
from flock.files import FileReference
from flock.protocols import a2a, agui, mcp, openai, openai_responses, vercel
from flock.runs import BatchOptions, Event, Principal, Progress, Run, RunContext, RunStatus, Usage, Webhook
from flock.testing import FakeModel, Reply
from flock.web import wire
from flock.web.problems import PROBLEMS
from flock.web.responses import events_of_new_run
from flockapi import ROUTES, FlockAPI, create_app
from tests.made_pages import PLAIN
from tests.support import PATIENCE_S, ROOT
from tests.support.flocks import sample_flock
from tests.support.http import check_problem, client_of, post_run, wait_for
from tests.support.spec import NDJSON, SPEC, TWIN, check_described, operations, resolve, validator

SCHEMAS = SPEC["components"]["schemas"]

#: The names that programs import from ``flockapi``.
PUBLIC = {*flockapi.__all__, *wire.__all__}

#: The struct of each schema.
STRUCTS: dict[str, type[msgspec.Struct]] = {name: getattr(flockapi, name) for name in SCHEMAS if name in PUBLIC} | {
    "Usage": wire.Usage,
    "Progress": Progress,
    "Webhook": Webhook,
    "Wait": wire.Wait,
    "FieldError": FieldError,
    "Handoff": Handoff,
    "FileReference": FileReference,
}

#: What other protocols define, of which only a part is described.
OF_OTHERS = {
    *("OpenAIError", "ChatRequest", "ChatCompletion", "ChatChunk", "ResponseRequest", "Response", "ResponseEvent"),
    *("ItemList", "ConversationRequest", "Conversation", "Deleted", "MCPMessage", "MCPEvent", "MCPResponse"),
    *("FrontEndError", "UIMessage", "UIChatRequest", "UIMessageChunk", "RunAgentInput", "AGUIEvent"),
    *("A2AResponse", "A2AEvent", "AgentCard"),
    *("Model", "ModelList"),
}

ALL_ROUTES = [*ROUTES, *openai.routes(), *mcp.routes(), *vercel.routes(), *agui.routes(), *a2a.routes()]


#: The operations that take the query of each struct.
QUERIES = {
    "WaitQuery": ["getRun", "cancelRun", "answerCall", "cancelBatch"],
    "EventsQuery": ["getBatchEvents"],
    "RunEventsQuery": ["getRunEvents"],
    "StreamQuery": ["runFlock"],
    "RunsQuery": ["listRuns"],
    "QuestionsQuery": ["listQuestions"],
    "QuestionEventsQuery": ["getQuestionEvents"],
    "UploadQuery": ["runBatch"],
    "BatchQuery": ["getBatch"],
    "ResultsQuery": ["getBatchResults"],
    "BatchesQuery": ["listBatches"],
    "UsageQuery": ["getUsage"],
    "WebhooksQuery": ["listWebhooks"],
    "ResponseQuery": ["getResponse"],
    "PageQuery": ["listInputItems", "listConversationItems"],
}


# The document


def test_the_document_is_valid_openapi() -> None:
    validate(SPEC)


def test_the_json_document_equals_the_yaml_document() -> None:
    """If this fails, run ``python -m tests.openapi_twin``."""
    assert json.loads(TWIN.read_text("utf-8")) == SPEC


def test_the_document_has_the_version_of_the_package() -> None:
    assert SPEC["info"]["version"] == flock_package.__version__


def test_everything_is_described() -> None:
    for method, path, operation in operations():
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"], where
        for parameter in map(resolve, operation.get("parameters", [])):
            assert parameter["description"], where
        for response in map(resolve, operation["responses"].values()):
            assert response["description"], where
            assert "X-Request-ID" in response["headers"], where
            for content in response.get("content", {}).values():
                assert content.get("examples") or content.get("example"), where
        for content in operation.get("requestBody", {}).get("content", {}).values():
            assert content["examples"], where
    for name, schema in SCHEMAS.items():
        assert schema["description"], name


def test_no_component_is_unused() -> None:
    text = (ROOT / "openapi.yaml").read_text("utf-8")
    for kind, members in SPEC["components"].items():
        for name in members:
            used = f"- {name}: []" if kind == "securitySchemes" else f"#/components/{kind}/{name}"
            assert used in text, f"{kind}/{name}"


# Routes, both ways


def test_every_route_is_documented_and_every_path_is_a_route() -> None:
    routed = {
        (method, route.path_format)
        for route in ALL_ROUTES
        if isinstance(route, Route) and route.include_in_schema
        for method in (route.methods or ())
        if method != "HEAD"
    }
    assert routed == {(method, path) for method, path, _ in operations()}


def test_a_route_requires_the_access_in_the_document() -> None:
    """A route is open if its operation has no security. Only metrics and webhooks require an admin."""
    needs = {getattr(route, "path_format", route.path): route.needs for route in ALL_ROUTES}
    described = {path: operation.get("security", SPEC["security"]) for _, path, operation in operations()}
    assert {path for path in described if needs[path] == "nothing"} == {
        path for path in described if not described[path]
    }
    admin = ["/metrics", "/webhooks", "/webhooks/{webhook_id}/retry"]
    assert [path for path in needs if needs[path] == "admin"] == admin


def test_only_the_docs_pages_are_undocumented() -> None:
    hidden = {route.path for route in ROUTES if isinstance(route, Route) and not route.include_in_schema}
    assert hidden == {"/docs", "/redoc"}


def test_every_status_of_the_error_table_is_documented() -> None:
    statuses = {status for _, _, operation in operations() for status in operation["responses"]}
    no_operation = {"405"}  # of a method that a path does not have
    assert {*map(str, PLAIN), *(str(kind.status) for kind in PROBLEMS.values())} - no_operation <= statuses


# Structs, both ways


def test_every_public_struct_has_a_schema() -> None:
    public = {name for name in PUBLIC if isinstance(getattr(flockapi, name), type)} - {*QUERIES, "AppOptions"}
    structs = {name for name in public if issubclass(getattr(flockapi, name), msgspec.Struct)}
    assert structs <= SCHEMAS.keys()
    assert SCHEMAS.keys() - STRUCTS.keys() == {"RunStatus", *EVENTS, *OF_OTHERS}


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_a_struct_and_its_schema_have_the_same_fields(name: str) -> None:
    _, components = msgspec.json.schema_components([STRUCTS[name]], ref_template="#/components/schemas/{name}")
    ours, theirs = components[name], SCHEMAS[name]
    assert list(ours["properties"]) == list(theirs["properties"])
    assert ours.get("required", []) == theirs.get("required", [])
    assert ours.get("additionalProperties") == theirs.get("additionalProperties")
    for field, ours_here in ours["properties"].items():
        theirs_here = theirs["properties"][field]
        if (name, field) not in RAW:
            assert _shape(ours_here) == _shape(theirs_here), field
            assert ours_here.get("default", ...) == _default_of(name, theirs_here), field
            assert ours_here.get("deprecated") == theirs_here.get("deprecated"), field


#: The fields of a run that each response leaves out.
LEFT_OUT: dict[type[msgspec.Struct], str] = {
    wire.FlockAPIResponse: "flock inputs is_async recoveries deaths timeout_s extra owner cancel_requested "
    "worked_s spent spent_by call_ids call_key journal dropped earlier_error retried_by caller client digest "
    "first_span files version_number",
    wire.RunSummary: "flock traceparent is_async recoveries deaths timeout_s extra owner cancel_requested "
    "worked_s spent spent_by batch_id position progress steps max_cost call_ids call_key journal dropped "
    "earlier_error retried_by caller client digest first_span files version_number",
    flockapi.BatchItem: "flock agent_name created_at request_id batch_id traceparent principal is_async attempt "
    "recoveries deaths timeout_s owner cancel_requested progress waiting_for worked_s steps session_id spent spent_by "
    "max_cost call_ids call_key journal dropped earlier_error retried_by caller client digest first_span files "
    "version_number",
}


@pytest.mark.parametrize("response", LEFT_OUT)
def test_each_field_of_a_run_is_in_a_response_or_left_out_on_purpose(response: type[msgspec.Struct]) -> None:
    """If this fails for a new field, see CONTRIBUTING.md."""
    assert {*Run.__struct_fields__} - {*response.__struct_fields__} == {*LEFT_OUT[response].split()}


def test_the_docs_name_each_member_of_a_run() -> None:
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))
    members = wire.FlockAPIResponse.__struct_fields__
    assert [name for name in members if not re.search(rf"[`\"]{name}[`\"]", pages)] == []


def _default_of(name: str, schema: Any) -> Any:
    """Return the default of a member; ``...`` if it has none.

    In a request, the description says it: clients that are generated from ``default`` require the member, or send it.
    A member that may be null and says nothing is null by default.
    """
    if "additionalProperties" not in SCHEMAS[name]:
        return schema.get("default", ...)
    assert "default" not in schema
    said = re.search(r"Default: `(.*)`\.$", schema["description"])
    if said is not None:
        return json.loads(said[1])
    return None if "null" in str(_shape(schema)) or schema.get("deprecated") else ...


def test_every_object_says_which_members_it_has() -> None:
    """Generated clients take an object without ``additionalProperties`` for an empty one."""
    silent: list[str] = []

    def look(node: Any, path: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if key not in ("example", "examples"):
                look(value, f"{path}/{key}")
        if isinstance(node, dict) and "object" in node.get("type", ()) and not node.keys() & {"properties", MEMBERS}:
            silent.append(path)

    look(SPEC, "")
    assert silent == []


MEMBERS = "additionalProperties"


# Events


class Drawing(TypedDict):
    text: str
    words: list[str]


@pytest.mark.anyio
async def test_every_event_of_a_run_is_documented(model: FakeModel) -> None:
    """With all of its members, and no event is documented that does not exist."""
    flock, may_go, seen = Flock(model="openai/gpt-4o"), [anyio.Event(), anyio.Event()], dict[str, list[Event]]()
    flock.add_agent(FlockFactory.create_default_agent("see", input="text", output="mood"))

    @flock.agent
    async def draw(end: str, context: RunContext) -> Drawing:
        if end == "completed":
            context.progress(1, 2, "half")
            context.emit_reasoning("Hm.")
            context.emit("A dra")
            await may_go[0].wait()
            context.reset_output()
            context.emit("A text")
            context.emit_value("words", ["a"])
            await may_go[1].wait()
            await context.run_agent("see", {"text": "me"})
        elif end == "failed":
            raise AgentError("no")
        elif await context.ask("Go on?", bool, default=True, expires_s=60):
            await anyio.sleep_forever()
        return {"text": "A text", "words": ["a"]}

    def note(event: Event | None) -> None:
        if event is not None:
            seen.setdefault(event.name, []).append(event)

    async def join_late(run_id: str) -> None:
        async for event in engine.events(run_id, reasoning=True):
            note(event)
            if event is not None and event.name == "output.snapshot":
                may_go[1].set()

    model.replies = [Reply({"mood": "calm"})]
    async with flock.engine(transport=model.transport) as engine, anyio.create_task_group() as tasks:
        for end in ("completed", "failed", "cancelled"):
            run = await engine.submit("draw", {"end": end}, watch=True)
            with anyio.fail_after(PATIENCE_S):
                async for event in events_of_new_run(engine, run, reasoning=True):
                    note(event)
                    if seen.keys() >= {"output.delta", "reasoning.delta", "run.progress"}:
                        may_go[0].set()
                    if event is not None and event.name == "output.value":
                        tasks.start_soon(join_late, run.run_id)
        (question,) = (await engine.get_run(run.run_id)).questions
        await engine.answer_call(run.run_id, question.call_id, msgspec.Raw(b"true"))
        await engine.cancel_run(run.run_id)
        async for event in engine.events(run.run_id):
            note(event)
    check_events("RunEvent", seen)


@pytest.mark.anyio
async def test_every_event_of_a_batch_is_documented() -> None:
    flock, seen = Flock(), dict[str, list[Event]]()

    @flock.agent
    async def work(end: str, context: RunContext) -> int:
        if end == "failed":
            raise AgentError("no")
        if end == "cancelled":
            await anyio.sleep_forever()
        context.spend(Usage(input_tokens=1))
        return 1

    async with flock.engine() as engine:
        for end in ("completed", "failed", "cancelled"):
            batch = await engine.submit_batch("work", [{"end": end}] * 3, BatchOptions())
            with anyio.fail_after(PATIENCE_S):
                async for event in engine.batch_events(batch.batch_id):
                    assert event is not None
                    seen.setdefault(event.name, []).append(event)
                    if end == "cancelled" and event.name == "batch.progress":
                        await engine.cancel_batch(batch.batch_id)
    check_events("BatchEvent", seen)


#: The schemas of events, and members that these tests do not see.
UNIONS = ("RunEvent", "BatchEvent", "QuestionEvent")
EACH_EVENT = {each["$ref"].rpartition("/")[2] for union in UNIONS for each in SCHEMAS[union]["oneOf"]}
EVENTS = {*UNIONS, *EACH_EVENT, "DataOfRun", "DataOfStep", "DataOfBatch"}
NOT_SENT = {"RunEvent": {"call_id"}, "BatchEvent": {"usage", "cost", "estimated_cost", "max_cost", "error_type"}}


def check_events(schema_name: str, seen: Mapping[str, Sequence[Event]]) -> None:
    """Check events with these names against a schema, and that it has no other names, and no other members."""
    schema = {"$ref": f"#/components/schemas/{schema_name}"}
    each_schema = list(map(resolve, SCHEMAS[schema_name]["oneOf"]))
    schema_of = {name: each for each in each_schema for name in each["properties"]["event"]["enum"]}
    assert schema_of.keys() == seen.keys()
    for name, events in seen.items():
        members, required = members_of(schema_of[name]["properties"]["data"])
        for event in events:
            data = msgspec.json.decode(msgspec.json.encode(event.data))
            encoded = {"event": name, "data": data} | ({} if event.id is None else {"id": event.id})
            assert list(validator(schema).iter_errors(encoded)) == [], name
            assert data.keys() <= members, name
            assert (data.get("usage") or {}).keys() <= SCHEMAS["Usage"]["properties"].keys(), name
            assert ("id" in schema_of[name]["required"]) == (event.id is not None), name
        assert required <= set.intersection(*(set(event.data) for event in events)), name
        assert members - set().union(*(event.data for event in events)) <= NOT_SENT[schema_name], name


def members_of(schema: Any) -> tuple[set[str], set[str]]:
    """Return the names of all members of an object, and of those that are required."""
    schema = resolve(schema)
    parts = [members_of(part) for part in schema.get("allOf", ())]
    own = (set(schema.get("properties", ())), set(schema.get("required", ())))
    return set().union(own[0], *(part[0] for part in parts)), set().union(own[1], *(part[1] for part in parts))


def test_the_examples_of_streams_have_documented_events() -> None:
    for _, path, operation in operations():
        content = operation["responses"].get("200", {}).get("content", {}).get("text/event-stream")
        if content is not None:
            assert content["schema"]["contentMediaType"] == "text/event-stream"
            for block in content["example"].strip().split("\n\n"):
                fields = dict(line.split(": ", 1) for line in block.splitlines())
                event = {**fields, "data": json.loads(fields["data"])}
                if "id" in fields:
                    event["id"] = int(fields["id"])
                assert list(validator(content["schema"]["contentSchema"]).iter_errors(event)) == [], path


#: JSON that is stored as it was sent, so the struct does not describe it.
RAW = {
    ("FlockAPIRequest", "inputs"),
    ("FlockAPIResponse", "result"),
    ("RunCall", "arguments"),
    ("RunCall", "result"),
    ("RunStep", "result"),
    ("RunSummary", "inputs"),
    ("RunSummary", "result"),
    ("FlockBatchCheckRow", "inputs"),
    ("FlockBatchCheckRow", "extra"),
    *(("AskedQuestion", name) for name in ("schema", "arguments", "default", "output")),
    ("Question", "schema"),
    ("Question", "arguments"),
    ("Question", "default"),
    ("BatchItem", "extra"),
    ("BatchItem", "inputs"),
    ("BatchItem", "result"),
}


def _shape(schema: Any) -> Any:
    """Return what a schema allows, in the same form for both spellings of a union."""
    if "$ref" in schema:
        return schema["$ref"]
    if "anyOf" in schema:
        return {json.dumps(_shape(member), default=sorted) for member in schema["anyOf"]}
    if isinstance(schema.get("type"), list):
        return {json.dumps(_shape({**schema, "type": type_}), default=sorted) for type_ in schema["type"]}
    bounds = ("minimum", "maximum", "exclusiveMinimum") if schema.get("type") in ("integer", "number") else ()
    shape = {key: schema[key] for key in ("type", *bounds) if key in schema}
    if "enum" in schema:
        shape["enum"] = sorted(schema["enum"])
    if schema.get("format") in ("date-time", "uuid") and schema["type"] == "string":
        shape["format"] = schema["format"]
    if schema.get("type") == "array" and schema.get("items"):
        shape["items"] = _shape(schema["items"])
    return shape


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_struct_and_its_parameters_are_the_same(name: str) -> None:
    """``include``, a list with commas, is an exception. JSON in the query is a string in the struct."""
    _, components = msgspec.json.schema_components([getattr(flockapi, name, None) or getattr(openai_responses, name)])
    ours = components[name]["properties"]
    found = {operation["operationId"]: operation["parameters"] for _, _, operation in operations()}
    for operation_id in QUERIES[name]:
        theirs = {p["name"]: _text_of(p) for p in map(resolve, found[operation_id]) if p["in"] == "query"}
        assert list(theirs) == list(ours)
        for parameter, schema in ours.items():
            if parameter != "include":
                optional = _shape(schema)
                allowed = optional if isinstance(optional, set) else {json.dumps(optional, default=sorted)}
                assert json.dumps(_shape(resolve(theirs[parameter])), default=sorted) in allowed or "$ref" in str(
                    schema
                )
                assert (schema.get("default") or None) == (theirs[parameter].get("default") or None)


def test_each_parameter_of_a_query_belongs_to_a_struct() -> None:
    found = [operation for _, _, operation in operations()]
    have = {each["operationId"] for each in found for p in map(resolve, each["parameters"]) if p["in"] == "query"}
    assert have == {operation_id for taken in QUERIES.values() for operation_id in taken}
    queries = {name for module in (wire, openai_responses) for name in vars(module) if name.endswith("Query")}
    assert queries - {"Query", *QUERIES} == set()


def _text_of(parameter: Any) -> Any:
    return {"type": "string"} if list(parameter.get("content", ())) == ["application/json"] else parameter["schema"]


@pytest.mark.anyio
async def test_the_query_of_a_run_is_checked_without_a_stream_too(client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {"a": 1}}
    for query, word in (("reasoning=", "'reasoning' in the query"), ("reasonng=true", "Did you mean 'reasoning'?")):
        problem = check_problem(await client.post(f"/run/flock?{query}", json=body), 422)
        assert word in problem["detail"]


@pytest.mark.anyio
async def test_an_auth_function_may_read_parameters_of_its_own() -> None:
    """A browser's EventSource sends no headers, so its token is in the query."""

    async def auth(connection: HTTPConnection) -> Principal | None:
        return Principal(name="ann") if connection.query_params.get("token") == "t" else None

    app = create_app(sample_flock(), store=":memory:", auth=auth, ignore_query=["token"])
    async with client_of(app) as client:
        sent = {"agent_name": "add", "inputs": {"a": 1}}
        run = (await client.post("/run/flock", params={"token": "t"}, json=sent)).json()
        for path in (f"/run/{run['run_id']}", f"/run/{run['run_id']}/events", "/runs"):
            assert (await client.get(path, params={"token": "t"})).status_code == 200
            assert (await client.get(path, params={"token": "x"})).status_code == 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    "auth", [lambda connection: Principal(name="ann"), None, "host"], ids=["function", "none", "host"]
)
async def test_a_misspelled_parameter_is_rejected_however_clients_are_identified(auth: Any) -> None:
    """A filter that is ignored would return all runs."""
    async with client_of(create_app(sample_flock(), store=":memory:", auth=auth)) as client:
        for path in ("/runs", "/batches", "/questions", "/questions/events", "/usage"):
            problem = check_problem(await client.get(path, params={"stauts": "failed"}), 422)
            assert "'stauts'" in problem["detail"], path


def test_the_statuses_of_a_run_are_the_same() -> None:
    assert SCHEMAS["RunStatus"]["enum"] == list(RunStatus)


# Examples


def examples() -> Iterator[Any]:
    for method, path, operation in operations():
        parts = {"request": operation["requestBody"]} if "requestBody" in operation else {}
        for part, holder in (parts | operation["responses"]).items():
            for media_type, content in resolve(holder).get("content", {}).items():
                for name, example in content.get("examples", {}).items():
                    where = f"{method} {path} {part} {name}"
                    yield pytest.param(media_type, content["schema"], resolve(example)["value"], id=where)


@pytest.mark.parametrize(("media_type", "schema", "value"), list(examples()))
def test_an_example_fits_its_schema(media_type: str, schema: Any, value: Any) -> None:
    assert list(validator(schema).iter_errors(value)) == []


def examples_of_requests() -> Iterator[Any]:
    """Yield the examples of request bodies. The query of an example is in its description."""
    for method, path, operation in operations():
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            if "contentMediaType" in content["schema"]:  # the example is no file
                continue
            for name, example in content["examples"].items():
                query = re.fullmatch(r"`(\?.*)`", example.get("description", "``"))
                body = example["value"] if isinstance(example["value"], str) else json.dumps(example["value"])
                sent = (method, path + (query[1] if query else ""), media_type, body)
                yield pytest.param(operation, *sent, id=f"{method} {path} {media_type} {name}")


@pytest.mark.anyio
@pytest.mark.parametrize(("operation", "method", "path", "media_type", "body"), list(examples_of_requests()))
async def test_an_example_of_a_request_gets_a_documented_response(
    operation: Any, method: str, path: str, media_type: str, body: str, client: httpx.AsyncClient, model: FakeModel
) -> None:
    run_id, call_id = await waiting_run(client)
    if operation["operationId"] == "retryRun":
        run_id = (await post_run(client, "explode", {"text": "x"})).json()["run_id"]
    names = {"run_id": run_id, "call_id": call_id, "name": "payment", "response_id": f"resp_{run_id}_0"}
    names |= {"agent": "text_analyzer", "chat_id": "chat-1"}
    path = path.format(batch_id=await ended_batch(client, "explode"), **names)
    model.replies = [Reply({"sentiment": "positive", "keywords": ["great"]})] * 3
    if media_type == "multipart/form-data":
        response = await client.post(path, files={name: (None, value) for name, value in json.loads(body).items()})
    else:
        response = await client.request(method, path, content=body, headers={"Content-Type": media_type})
    check_described(operation, response)
    assert response.is_success, response.text
    if response.status_code == 202 and operation["operationId"] != "sendMessage":  # the run waits for an answer
        ended = await wait_for(client, response.headers["Location"])
        assert ended["completed_at"] is not None
    model.replies = []


async def waiting_run(client: httpx.AsyncClient) -> tuple[str, str]:
    """Return the id of a run that waits for an answer, and of its question."""
    response = await client.post("/run/flock", json={"agent_name": "approve", "inputs": {"text": "it"}})
    assert response.status_code == 202
    return response.json()["run_id"], response.json()["waiting_for"][0]["call_id"]


async def ended_batch(client: httpx.AsyncClient, agent_name: str) -> str:
    """Return the id of an ended batch of one item with a text."""
    body = {"agent_name": agent_name, "batch_inputs": [{"text": "=1+1"}]}
    batch_id: str = (await client.post("/run/batch", json=body)).json()["batch_id"]
    assert (await client.get(f"/batch/{batch_id}?wait=60")).json()["completed_items"] == 1
    return batch_id


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "content", "template"),
    [
        ("GET", "/agents", None, "/agents"),
        ("GET", "/agents/add", None, "/agents/{name}"),
        ("GET", "/agents/x", None, "/agents/{name}"),
        ("GET", "/run/42", None, "/run/{run_id}"),
        ("POST", "/run/flock", "{", "/run/flock"),
        ("POST", "/run/flock", '{"agent_name": "x"}', "/run/flock"),
        ("POST", "/run/flock", '{"agent_name": "add", "inputs": {"a": "x"}}', "/run/flock"),
        ("POST", "/run/flock", '{"agent_name": "explode", "inputs": {"text": "x"}}', "/run/flock"),
        ("POST", "/run/flock", " " * 1024 * 1025, "/run/flock"),
        ("GET", "/openapi.json", None, "/openapi.json"),
        ("GET", "/healthz", None, "/healthz"),
        ("GET", "/readyz", None, "/readyz"),
        ("GET", "/runs?include=inputs,result", None, "/runs"),
        ("GET", "/runs?limit=1", None, "/runs"),
        ("GET", "/runs?limit=0", None, "/runs"),
        ("GET", "/usage", None, "/usage"),
        ("GET", "/usage?by=cost", None, "/usage"),
        ("GET", "/run/{run_id}?wait=1", None, "/run/{run_id}"),
        ("GET", "/run/{run_id}?wait=x", None, "/run/{run_id}"),
        ("GET", "/run/{run_id}/events", None, "/run/{run_id}/events"),
        ("GET", "/run/{run_id}/events?after=9999999", None, "/run/{run_id}/events"),
        ("GET", "/run/42/events", None, "/run/{run_id}/events"),
        ("POST", "/run/{run_id}/cancel", None, "/run/{run_id}/cancel"),
        ("POST", "/run/42/cancel", None, "/run/{run_id}/cancel"),
        ("POST", "/run/{run_id}/retry", None, "/run/{run_id}/retry"),
        ("POST", "/run/42/retry", None, "/run/{run_id}/retry"),
        ("POST", "/run/{run_id}/calls/ask:1", '{"output": 1}', "/run/{run_id}/calls/{call_id}"),
        ("POST", "/run/42/calls/ask:1", '{"output": 1}', "/run/{run_id}/calls/{call_id}"),
        ("POST", "/run/{run_id}/messages/a", '{"message": 1}', "/run/{run_id}/messages/{name}"),
        ("POST", "/run/42/messages/a", '{"message": 1}', "/run/{run_id}/messages/{name}"),
        ("POST", "/run/42/messages/a", '{"messag": 1}', "/run/{run_id}/messages/{name}"),
        ("POST", "/run/42/calls/ask:1", "{}", "/run/{run_id}/calls/{call_id}"),
        ("POST", "/run/42/calls/ask:1", "{", "/run/{run_id}/calls/{call_id}"),
        ("DELETE", "/run/{run_id}", None, "/run/{run_id}"),
        ("DELETE", "/run/42", None, "/run/{run_id}"),
    ],
)
async def test_a_response_is_documented(
    method: str, path: str, content: str | None, template: str, client: httpx.AsyncClient
) -> None:
    for text in ("first", "second"):
        run = await client.post("/run/flock", json={"agent_name": "explode", "inputs": {"text": text}})
    path = path.format(run_id=run.json()["run_id"])
    response = await client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    check_described(SPEC["paths"][template][method.lower()], response)


CSV = {"Content-Type": "text/csv"}
LINES = {"Content-Type": NDJSON}
AS_JSON = {"Content-Type": "application/json"}
ADD = "/run/batch?agent_name=add"
gzipped = partial(gzip.compress, mtime=0)  # so that a test id is the same each time


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("POST", ADD, CSV, "a,b\r\n1,2\r\n", 202),
        ("POST", ADD, CSV | {"Content-Encoding": "gzip"}, gzipped(b"a\n1\n") + gzipped(b"2\n"), 202),
        ("POST", f"{ADD}&delimiter=%09&on_invalid=skip", CSV, "a\tb\nx\t2\n", 202),
        ("POST", f"{ADD}&static_inputs={{}}&timeout_s=1.5e1&return_errors=false&box_results=false", CSV, "a\n1", 202),
        ("POST", ADD, LINES, '{"a": 1}\n\n{"a": 2}', 202),
        ("POST", ADD, LINES | {"Content-Encoding": "GZIP"}, gzipped(b'{"a": 1}'), 202),
        ("POST", ADD, CSV | {"Idempotency-Key": ""}, "a\n1\n", 400),
        ("POST", "/run/batch", AS_JSON, '{"agent_name"', 400),
        ("POST", ADD, CSV | {"Origin": "https://evil.example"}, "a\n1\n", 403),
        ("POST", "/run/batch?agent_name=nobody", CSV, "a\n1\n", 404),
        ("POST", "/run/batch?agent_name=nobody", LINES, '{"a": 1}', 404),
        ("POST", ADD, LINES, '{"a": "%s"}' % ("x" * 1024 * 1024), 413),
        ("POST", ADD, CSV, "a\n" + ("1" * 1023 + ",") * 1030, 413),
        ("POST", ADD, {"Content-Type": "text/plain"}, "a\n1\n", 415),
        ("POST", ADD, {}, "a\n1\n", 415),
        ("POST", ADD, CSV | {"Content-Encoding": "br"}, "a\n1\n", 415),
        ("POST", "/run/batch", AS_JSON | {"Content-Encoding": "gzip"}, "{}", 415),
        ("POST", "/run/batch", AS_JSON, '{"agent_name": "add", "batch_inputs": []}', 422),
        ("POST", "/run/batch", AS_JSON, '{"agent_name": "add", "batch_inputs": "rows.csv"}', 422),
        ("POST", "/run/batch?parallel=false", AS_JSON, '{"agent_name": "add", "batch_inputs": [{"a": 1}]}', 422),
        ("POST", "/run/batch?parallel=true", AS_JSON, '{"agent_name": "add", "batch_inputs": [{"a": 1}]}', 202),
        ("POST", "/run/batch", CSV, "a\n1\n", 422),
        ("POST", f"{ADD}&max_workers=0", CSV, "a\n1\n", 422),
        ("POST", f"{ADD}&input_mapping=[]", LINES, '{"a": 1}', 422),
        ("POST", ADD, CSV, "", 422),
        ("POST", ADD, CSV, "a\n", 422),
        ("POST", ADD, CSV, "a\nx\n", 422),
        ("POST", ADD, CSV, b"a\n\xff\n", 422),
        ("POST", ADD, CSV | {"Content-Encoding": "gzip"}, "a\n1\n", 422),
        ("POST", ADD, LINES, "{", 422),
        ("GET", "/batch/42", {}, None, 404),
        ("GET", "/batch/42?limit=x", {}, None, 422),
        ("GET", "/batch/{ended}", {}, None, 200),
        ("GET", "/batch/{ended}?after=-1&limit=1&results=false&wait=1", {}, None, 200),
        ("GET", "/batch/{busy}", {}, None, 200),
        ("GET", "/batch/{ended}/results", {}, None, 200),
        ("GET", "/batch/{ended}/results", {"Accept": "text/csv, */*;q=0.1"}, None, 200),
        ("GET", "/batch/{ended}/results?format=ndjson", {"Accept": "text/html"}, None, 200),
        ("GET", "/batch/{ended}/results?format=csv&status=cancelled&after=3&escape_formulas=false", {}, None, 200),
        ("GET", "/batch/{busy}/results", {}, None, 200),
        ("GET", "/batch/42/results", {}, None, 404),
        ("GET", "/batch/{ended}/results", {"Accept": "text/html"}, None, 406),
        ("GET", "/batch/{ended}/results?format=xml", {}, None, 422),
        ("GET", "/batch/{ended}/events", {}, None, 200),
        ("GET", "/batch/{ended}/events", {"Last-Event-ID": "1"}, None, 204),
        ("GET", "/batch/{ended}/events?after=1", {}, None, 204),
        ("GET", "/batch/42/events", {}, None, 404),
        ("GET", "/batch/{ended}/events?after=x", {}, None, 422),
        ("GET", "/batch/{ended}/events?after=-1", {"Last-Event-ID": "0"}, None, 422),
        ("POST", "/batch/{busy}/cancel", {}, None, 202),
        ("POST", "/batch/{busy}/cancel?wait=60", {}, None, 200),
        ("POST", "/batch/42/cancel", {}, None, 404),
        ("POST", "/batch/{ended}/cancel", {}, None, 409),
        ("POST", "/batch/{ended}/cancel?wait=-1", {}, None, 422),
        ("POST", "/batch/{ended}/retry", {}, None, 202),
        ("POST", "/batch/{ended}/retry", AS_JSON, None, 202),
        ("POST", "/batch/{ended}/retry", AS_JSON, '{"only": null}', 202),
        ("POST", "/batch/{ended}/retry", AS_JSON, "{", 400),
        ("POST", "/batch/42/retry", {}, None, 404),
        ("POST", "/batch/{ended}/retry", AS_JSON, '{"only": "cancelled"}', 409),
        ("POST", "/batch/{busy}/retry", {}, None, 409),
        ("POST", "/batch/{ended}/retry", AS_JSON, " " * 1024 * 1025, 413),
        ("POST", "/batch/{ended}/retry", CSV, "only\nfailed\n", 415),
        ("POST", "/batch/{ended}/retry", AS_JSON, '{"only": "completed"}', 422),
        ("DELETE", "/batch/{ended}", {}, None, 204),
        ("DELETE", "/batch/{ended}", {"Origin": "https://evil.example"}, None, 403),
        ("DELETE", "/batch/42", {}, None, 404),
        ("DELETE", "/batch/{busy}", {}, None, 409),
        ("GET", "/batches", {}, None, 200),
        (
            "GET",
            "/batches?status=running&agent_name=nap&limit=1&after=ffffffff-ffff-ffff-ffff-ffffffffffff",
            {},
            None,
            200,
        ),
        ("GET", "/batches?limit=1", {}, None, 200),
        ("GET", "/batches?state=running", {}, None, 422),
    ],
)
async def test_a_response_about_batches_is_documented(
    method: str,
    path: str,
    headers: dict[str, str],
    content: str | bytes | None,
    status: int,
    client: httpx.AsyncClient,
    flock: Flock,
) -> None:
    @flock.agent
    async def nap(text: str) -> None:
        await anyio.sleep_forever()

    ended = await ended_batch(client, "explode")
    body = {"agent_name": "nap", "batch_inputs": [{"text": "a"}]}
    busy = (await client.post("/run/batch", json=body)).json()["batch_id"]
    template = re.sub(r"(?<=/batch/)[^/?]+", "{batch_id}", path).partition("?")[0]
    path = path.replace("{ended}", ended).replace("{busy}", busy)
    response = await client.request(method, path, content=content, headers=headers)
    assert response.status_code == status, response.text
    check_described(SPEC["paths"][template][method.lower()], response)


@pytest.mark.anyio
async def test_the_response_to_a_repeated_batch_is_documented(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once", **CSV}
    sent = [await client.post(ADD, content=rows, headers=headers) for rows in ("a\n1\n", "a\n1\n", "a\n2\n")]
    for response in sent:
        check_described(SPEC["paths"]["/run/batch"]["post"], response)
    assert [response.status_code for response in sent] == [202, 202, 422]
    assert sent[1].headers["Idempotency-Replayed"] == "true"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path", [path for method, path, _ in operations() if method == "GET" and path.startswith("/batch")]
)
async def test_head_of_a_batch_has_the_headers_of_get_and_streams_nothing(
    path: str, client: httpx.AsyncClient, app: FlockAPI
) -> None:
    parts: list[bytes] = []

    async def listened_to(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen(message: Message) -> None:
            parts.append(message.get("body", b""))
            await send(message)

        await app(scope, receive, listen)

    path, headers = path.format(batch_id=await ended_batch(client, "explode")), {"X-Request-ID": "same"}
    got = await client.get(path, headers=headers)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(listened_to), base_url="http://t") as asking:
        head = await asking.head(path, headers=headers)
    assert (head.status_code, head.headers) == (200, got.headers)
    # If GET has a length, the server drops the body of HEAD, and the app does not.
    assert ("content-length" in got.headers) == bool(b"".join(parts))


@pytest.mark.anyio
@pytest.mark.parametrize(("async_run", "prefer"), [(False, ""), (True, ""), (False, "respond-async, wait=5")])
async def test_responses_to_key_and_prefer_headers_are_documented(
    async_run: bool, prefer: str, client: httpx.AsyncClient
) -> None:
    for key, body in (("1", {"agent_name": "add", "inputs": {"a": 1}}), ("2", {"agent_name": "refuse", "inputs": {}})):
        headers = {"Idempotency-Key": key, **({"Prefer": prefer} if prefer else {})}
        for _ in range(2):
            response = await client.post("/run/flock", json={**body, "async_run": async_run}, headers=headers)
            check_described(SPEC["paths"]["/run/flock"]["post"], response)


# The served document


@pytest.mark.anyio
@pytest.mark.parametrize("title", ["Sample", 'A "quoted": title # with \\ and é', "yes"])
@pytest.mark.slow
async def test_the_document_is_served_with_the_name_of_the_server(title: str) -> None:
    app: FlockAPI = create_app(Flock(), server_name=title)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        as_yaml = await client.get("/openapi.yaml")
        as_json = await client.get("/openapi.json")
        page = await client.get("/docs")
    assert as_yaml.headers["Content-Type"].startswith("application/yaml")
    expected = {**SPEC, "info": {**SPEC["info"], "title": title}}
    assert yaml.safe_load(as_yaml.text) == as_json.json() == expected
    found = re.search("<title>(.*)</title>", page.text)
    assert found
    assert "<" not in found[1]


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("npx") is None and "CI" not in os.environ, reason="npm is not installed; it is in CI")
def test_the_redocly_linter_finds_no_problems(tmp_path: Path) -> None:
    command = ["npx", "--yes", "@redocly/cli@2", "lint", "--extends", "recommended", str(ROOT / "openapi.yaml")]
    env = {**os.environ, "REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower().replace("deprecation warning", "")

"""Pydantic models as inputs and results of agents, and of calls."""

import datetime
import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import anyio
import httpx
import msgspec
import pydantic
import pydantic.alias_generators
import pydantic.dataclasses
import pytest

from flock.agents.signature import Signature
from flock.core import Flock, FlockFactory
from flock.errors import DefinitionError, InvalidData, SignatureError
from flock.runs import Engine, Run, RunContext, RunStatus
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine
from tests.support.http import check_problem

pytestmark = pytest.mark.anyio


class Line(pydantic.BaseModel):
    sku: str
    count: int = pydantic.Field(ge=1, description="pieces")


class Card(pydantic.BaseModel):
    kind: Literal["card"]
    number: str


class Cash(pydantic.BaseModel):
    kind: Literal["cash"]
    given: float


class Order(pydantic.BaseModel):
    """An order of a shop."""

    model_config = pydantic.ConfigDict(alias_generator=pydantic.alias_generators.to_camel)

    order_id: int
    lines: list[Line]
    paid_by: Annotated[Card | Cash, pydantic.Field(discriminator="kind")] | None = None
    by_shelf: dict[str, Line] = {}
    ordered_at: datetime.datetime | None = None

    @pydantic.field_validator("lines")
    @classmethod
    def has_lines(cls, lines: list[Line]) -> list[Line]:
        if not lines:
            raise ValueError("An order has at least one line")
        return lines


class Receipt(pydantic.BaseModel):
    """It is written in another form than it is read in."""

    number: int = pydantic.Field(validation_alias="no", serialization_alias="receiptNumber")
    paid: Decimal
    secret: str = pydantic.Field(default="", exclude=True)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def is_free(self) -> bool:
        return not self.paid

    @pydantic.field_serializer("paid")
    def with_currency(self, paid: Decimal) -> str:
        return f"{paid} €"


class Tree(pydantic.BaseModel):
    name: str
    children: "list[Tree]" = []


class Numbers(pydantic.RootModel[list[int]]): ...


ORDER = {"orderId": 1, "lines": [{"sku": "cup", "count": 2}], "paidBy": {"kind": "cash", "given": 20}}
TYPES = {"Order": Order, "Line": Line, "Tree": Tree, "Numbers": Numbers, "Receipt": Receipt}


def errors_of(signature: Signature, value: Any, at: str = "") -> dict[str, str]:
    with pytest.raises(InvalidData) as caught:
        signature.decode(json.dumps(value).encode(), at)
    return {error.pointer: error.detail for error in caught.value.errors}


# Reading


async def test_a_function_receives_models_and_returns_one(flock: Flock, client: httpx.AsyncClient) -> None:
    received: list[Any] = []

    @flock.agent
    def ship(order: Order, spare: list[Line], by_name: dict[str, Line], gift: Line | None = None) -> Order:
        received.extend([order, spare, by_name, gift])
        return order

    inputs = {"order": ORDER, "spare": [{"sku": "lid", "count": 1}], "by_name": {"a": {"sku": "b", "count": 3}}}
    response = await client.post("/run/flock", json={"agent_name": "ship", "inputs": inputs})
    assert received == [
        Order.model_validate(ORDER),
        [Line(sku="lid", count=1)],
        {"a": Line(sku="b", count=3)},
        None,
    ]
    assert response.json()["result"] == ORDER | {"byShelf": {}, "orderedAt": None}
    shown = (await client.get("/agents/ship")).json()
    assert list(shown["output_schema"]["properties"]) == ["orderId", "lines", "paidBy", "byShelf", "orderedAt"]


async def test_each_error_of_a_model_has_its_pointer(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def ship(order: Order, note: str) -> None: ...

    order = {
        "lines": [{"sku": 1, "count": 0}, {"sku": "x"}],
        "paidBy": {"kind": "card"},
        "byShelf": {"a/b": {"sku": "x", "count": -1}},
        "orderedAt": "tomorrow",
    }
    response = await client.post("/run/flock", json={"agent_name": "ship", "inputs": {"order": order, "note": 5}})
    check_problem(response, 422)
    errors = {error["pointer"]: error["detail"] for error in response.json()["errors"]}
    assert errors == {
        "/inputs/order/orderId": "This field is required.",
        "/inputs/order/lines/0/sku": "Input should be a valid string.",
        "/inputs/order/lines/0/count": "Input should be greater than or equal to 1.",
        "/inputs/order/lines/1/count": "This field is required.",
        "/inputs/order/paidBy/number": "This field is required.",
        "/inputs/order/byShelf/a~1b/count": "Input should be greater than or equal to 1.",
        "/inputs/order/orderedAt": errors["/inputs/order/orderedAt"],
        "/inputs/note": "Expected 'str', got 'int'.",
    }
    empty = {"agent_name": "ship", "inputs": {"order": {"orderId": 1, "lines": []}, "note": ""}}
    (error,) = (await client.post("/run/flock", json=empty)).json()["errors"]
    assert error == {"pointer": "/inputs/order/lines", "detail": "An order has at least one line."}


@pytest.mark.parametrize(
    ("text", "value", "pointers"),
    [
        pytest.param("a: list[Line]", [{"sku": "x", "count": 1}, {}], ["/a/1/sku", "/a/1/count"], id="in a list"),
        pytest.param(
            "a: dict[str, Line]", {"x": {"sku": "", "count": 1}, "y": {}}, ["/a/y/sku", "/a/y/count"], id="dict"
        ),
        pytest.param("a: Line | None", {"sku": "x", "count": "many"}, ["/a/count"], id="or None"),
        pytest.param("a: list[list[Line]]", [[], [{"sku": "x"}]], ["/a/1/0/count"], id="in lists"),
        pytest.param("a: Box", {"lines": {"x": [{"count": 1}]}}, ["/a/lines/x/0/sku"], id="in a TypedDict"),
        pytest.param("a: Crate", {"box": {"lines": {}}, "line": {"sku": ""}}, ["/a/line/count"], id="in a struct"),
        pytest.param("a: Numbers", [1, "x"], ["/a/1"], id="root model"),
        pytest.param("a: Closed", {"x": 1, "y": 2}, ["/a/y"], id="extra field"),
    ],
)
def test_models_inside_other_types_are_validated(text: str, value: Any, pointers: list[str]) -> None:
    signature = Signature.of(text, TYPES | {"Box": Box, "Crate": Crate, "Closed": Closed})
    assert list(errors_of(signature, {"a": value}, "/inputs")) == [f"/inputs{pointer}" for pointer in pointers]


class Box(TypedDict):
    lines: dict[str, list[Line]]


class Crate(msgspec.Struct):
    box: Box
    line: Line


class Closed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    x: int


def test_a_model_can_be_the_whole_signature() -> None:
    signature = Signature.of(Order)
    assert [(field.name, field.type, field.required) for field in signature.fields[:2]] == [
        ("orderId", int, True),
        ("lines", list[Line], True),
    ]
    assert signature.decode(json.dumps(ORDER).encode()) == Order.model_validate(ORDER)
    assert errors_of(signature, {"lines": {}}, "/inputs") == {
        "/inputs/orderId": "This field is required.",
        "/inputs/lines": "Input should be a valid array.",
    }
    assert errors_of(signature, []) == {"": "Expected 'object', got 'array'."}
    with pytest.raises(SignatureError, match="TypedDict or pydantic model, not"):
        Signature.of(Numbers)


def test_a_value_with_very_many_errors_is_reported_as_one() -> None:
    assert errors_of(Signature.of("a: Numbers", TYPES), {"a": ["x"] * 2000}) == {
        "/a": "There are 2000 errors in this value."
    }


def test_strict_models_read_json_as_pydantic_does() -> None:
    class Strict(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(strict=True)

        day: datetime.date
        raw: bytes

    signature = Signature.of("a: Strict", {"Strict": Strict})
    assert signature.decode(b'{"a": {"day": "2026-11-26", "raw": "x"}}').a == Strict(
        day=datetime.date(2026, 11, 26), raw=b"x"
    )
    assert list(errors_of(signature, {"a": {"day": 5, "raw": 5}})) == ["/a/day", "/a/raw"]


# Schemas


def test_the_schema_is_pydantics_own_with_its_definitions_inlined() -> None:
    shown = Signature.of("order: Order | the order, more: list[Order]", TYPES).schema["properties"]
    order = shown["order"]
    assert "$defs" not in json.dumps(shown)
    assert order["description"] == "the order"
    assert shown["more"]["items"]["description"] == "An order of a shop."
    assert order["required"] == ["orderId", "lines"]
    count = order["properties"]["lines"]["items"]["properties"]["count"]
    assert (count["type"], count["minimum"], count["description"]) == ("integer", 1, "pieces")
    card, cash = order["properties"]["paidBy"]["anyOf"][0]["anyOf"]
    assert (card["properties"]["kind"]["const"], cash["properties"]["kind"]["const"]) == ("card", "cash")


def test_recursive_types_of_the_same_name_have_their_own_definitions() -> None:
    """A struct, a pydantic model, and a model of the same name from another module."""

    class Other(pydantic.BaseModel):
        weight: int
        children: "list[Other]" = []

    Other.__name__, Other.__qualname__ = "Tree", "Other.Tree"

    signature = Signature.of("a: Tree, b: list[STree], c: Tree2", {"Tree": Tree, "STree": structs.Tree, "Tree2": Other})
    definitions = signature.schema["$defs"]
    assert sorted(next(iter(definition["properties"])) for definition in definitions.values()) == [
        "leaf",
        "name",
        "weight",
    ]
    refs = re.findall(r'"\$ref": "([^"]+)"', json.dumps(signature.schema))
    assert set(refs) == {f"#/$defs/{name}" for name in definitions}
    signature.decode(b'{"a": {"name": "", "children": [{"name": ""}]}, "b": [], "c": {"weight": 1}}')


class structs:
    class Tree(msgspec.Struct):
        leaf: str
        children: "list[structs.Tree]" = []


async def test_a_model_sees_the_schema_for_reading_and_a_client_that_for_writing(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(FlockFactory.create_default_agent("till", input="total: float", output=Receipt))
    model.replies = [Reply({"no": 7}), Reply({"no": 7, "paid": "9.50"})]
    response = await client.post("/run/flock", json={"agent_name": "till", "inputs": {"total": 9.5}})
    assert response.json()["result"] == {"receiptNumber": 7, "paid": "9.50 €", "is_free": False}
    sent = model.requests[0]["response_format"]["json_schema"]
    assert sent["strict"] is True
    assert list(sent["schema"]["properties"]) == ["no", "paid", "secret"]
    assert "/paid: This field is required." in model.requests[1]["messages"][-1]["content"]
    shown = (await client.get("/agents/till")).json()["output_schema"]
    assert list(shown["properties"]) == ["receiptNumber", "paid", "is_free"]
    assert shown["properties"]["paid"] == {"title": "Paid", "type": "string"}


class Named(pydantic.BaseModel):
    name: str = pydantic.Field(pattern=r"^\p{L}+$")


async def test_an_answer_with_a_pattern_that_only_pydantic_knows_is_checked_by_its_type(flock: Flock) -> None:
    async def who(context: RunContext) -> str:
        return (await context.ask("Who?", Named)).name

    flock.agent(who)
    async with flock.engine() as engine:
        run = await engine.wait((await engine.submit("who", {})).run_id)
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw('{"name": "Zoë"}'.encode()))
        run = await engine.wait(run.run_id)
        assert (run.status, run.value) == (RunStatus.COMPLETED, {"result": "Zoë"})


@pytest.mark.parametrize("output", ["receipt: Receipt", Receipt], ids=["text", "class"])
async def test_a_validator_leaves_a_result_that_is_written_in_another_form(output: Any, model: FakeModel) -> None:
    seen = list[Any]()
    flock = Flock(model="openai/gpt-4o")
    options: dict[str, Any] = {"output": output, "types": {"Receipt": Receipt}} if isinstance(output, str) else {}
    flock.add_agent(FlockFactory.create_default_agent("till", validate=seen.append, **({"output": output} | options)))
    receipt = {"no": 7, "paid": "9.50"}
    model.replies = [Reply({"receipt": receipt} if options else receipt)]
    with model:
        result = await flock.run_async("till", {})
    shown = {"receiptNumber": 7, "paid": "9.50 €", "is_free": False}
    assert msgspec.to_builtins(result) == ({"receipt": shown} if options else shown)
    assert len(seen) == 1


async def test_a_model_that_always_violates_a_constraint_fails_with_the_reason(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    made = FlockFactory.create_default_agent("pick", output="line: Line | the best", types=TYPES, answer_retries=1)
    flock.add_agent(made)
    model.replies = [Reply({"line": {"sku": "x", "count": 0}})] * 2
    run = (await client.post("/run/flock", json={"agent_name": "pick"})).json()
    assert (run["status"], run["error_type"]) == ("failed", "invalid_output")
    assert "/line/count: Input should be greater than or equal to 1." in run["error"]
    assert model.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["line"]["properties"][
        "count"
    ] == {
        "description": "pieces",
        "minimum": 1,
        "title": "Count",
        "type": "integer",
    }


async def test_inputs_of_a_model_agent_are_written_by_their_aliases(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(
        FlockFactory.create_default_agent("sum_up", input="order: Order", output="text", types=TYPES, reasoning=True)
    )
    model.replies = [Reply({"reasoning": "…", "text": "two cups"})]
    await client.post("/run/flock", json={"agent_name": "sum_up", "inputs": {"order": ORDER}})
    assert (
        '{"order": {"orderId": 1, "lines": [{"sku": "cup", "count": 2}]' in model.requests[0]["messages"][1]["content"]
    )


def test_a_definition_that_pydantic_cannot_describe_is_refused() -> None:
    class Odd(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

        function: subprocess.Popen[bytes]

    with pytest.raises(SignatureError, match=r"In the signature 'a: Odd': .*JsonSchema"):
        Signature.of("a: Odd", {"Odd": Odd})
    with pytest.raises(SignatureError, match="Odd cannot be read from JSON"):
        Signature.of(Odd)


def test_a_dataclass_of_pydantic_is_refused_because_it_would_not_be_validated() -> None:
    @pydantic.dataclasses.dataclass
    class Point:
        x: pydantic.PositiveInt

    def draw(points: list[Point]) -> None: ...

    with pytest.raises(SignatureError, match=r"draw: 'points' .* 'Point' is a dataclass of pydantic. Use a model"):
        Signature.of_parameters(draw)


def test_a_constraint_of_pydantic_outside_of_a_model_is_refused_because_it_would_be_ignored() -> None:
    """A description is read."""

    class Cup(TypedDict):
        size: Annotated[int, pydantic.Field(gt=0)]

    def drink(cups: list[pydantic.PositiveInt]) -> None: ...
    def fill(cup: Annotated[Line, pydantic.Field(description="to fill")]) -> None: ...

    for source in ("a: Positive", "a: Cup"):
        with pytest.raises(SignatureError, match=f"In the signature '{source}': constraints of pydantic"):
            Signature.of(source, {"Positive": pydantic.PositiveInt, "Cup": Cup})
    with pytest.raises(SignatureError, match="Cup cannot be read from JSON: constraints of pydantic"):
        Signature.of(Cup)
    with pytest.raises(SignatureError, match=r"drink: 'cups' cannot .* in its models. Use msgspec.Meta here"):
        Signature.of_parameters(drink)
    assert Signature.of_parameters(fill).schema["properties"]["cup"]["description"] == "to fill"


# Writing


def test_a_result_is_checked_and_written_by_pydantic() -> None:
    signature = Signature.of("a: Receipt, by_name: dict[str, Receipt], any: Any, n: Numbers", TYPES)
    receipt = Receipt.model_validate({"no": 7, "paid": Decimal("9.50"), "secret": "x"})
    written = {"receiptNumber": 7, "paid": "9.50 €", "is_free": False}
    value = {"a": receipt, "by_name": {"x": receipt}, "any": [receipt], "n": Numbers([1])}
    assert json.loads(bytes(signature.encode(value))) == {
        "a": written,
        "by_name": {"x": written},
        "any": [written],
        "n": [1],
    }
    plain = signature.encode(value | {"a": {"no": 1, "paid": 0}, "n": [1, 2]})
    assert json.loads(bytes(plain))["a"] == {"receiptNumber": 1, "paid": "0 €", "is_free": True}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param({"a": {"sku": "x", "count": 0}}, "/a/count: Input should be greater", id="dict"),
        pytest.param({"a": Numbers([1])}, "/a: Input should be", id="another model"),
        pytest.param(
            {"a": Line.model_construct(sku=5, count=1)}, "model Line does not have its declared", id="not checked"
        ),
        pytest.param({"a": object()}, "objects of type object is unsupported", id="not a model"),
    ],
)
def test_a_result_that_does_not_match_its_model_is_invalid(value: Any, words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        Signature.of("a: Line", TYPES).encode(value)


async def test_an_example_and_a_branch_may_be_models(flock: Flock, client: httpx.AsyncClient, model: FakeModel) -> None:
    class Choice(pydantic.BaseModel):
        way: Literal["left", "right"]

    made = FlockFactory.create_default_agent(
        "choose",
        input="order: Order",
        output=Choice,
        types=TYPES,
        examples=[({"order": Order.model_validate(ORDER)}, Choice(way="left"))],
        next_agent={"left": None, "right": None},
    )
    flock.add_agent(made)
    model.replies = [Reply({"way": "right"})]
    run = (await client.post("/run/flock", json={"agent_name": "choose", "inputs": {"order": ORDER}})).json()
    assert run["result"] == {"way": "right"}
    assert model.requests[0]["messages"][2]["content"] == '{"way":"left"}'
    with pytest.raises(DefinitionError, match=r"The output in examples\[0\] of 'bad'.*/way: Input should be 'left'"):
        FlockFactory.create_default_agent("bad", output=Choice, examples=[({}, {"way": "up"})])


# Python callers, files, calls


async def test_a_python_caller_may_pass_models(flock: Flock) -> None:
    @flock.agent
    def count(order: Order, spare: Line = Line(sku="lid", count=3)) -> int:  # noqa: B008
        return order.lines[0].count + spare.count

    assert flock.agents["count"].input.schema["properties"]["spare"]["default"] == {"sku": "lid", "count": 3}
    order = Order.model_validate(ORDER)
    assert await flock.run_async("count", {"order": order}) == {"result": 5}
    rows: list[dict[str, Any]] = [{"order": order}, {"order": ORDER, "spare": Line(sku="x", count=1)}]
    assert await flock.run_batch_async("count", rows, progress=False) == [{"result": 5}, {"result": 3}]


async def test_the_cells_of_a_file_are_read_for_the_fields_of_a_model(flock: Flock, client: httpx.AsyncClient) -> None:
    class Row(pydantic.BaseModel):
        name: str
        n: int
        tags: list[str] = []
        due: datetime.date | None = None
        ok: bool = False

    flock.add_agent(FlockFactory.create_default_agent("rate", input=Row, output="x: int"))
    rows = 'name,n,tags,due,ok\n5,5,"[""a""]",2026-11-26,TRUE\nx,many,,,\n'
    check = await client.post(
        "/run/batch?agent_name=rate&dry_run=true", content=rows, headers={"Content-Type": "text/csv"}
    )
    assert check.json()["rows"][0]["inputs"] == {"name": "5", "n": 5, "tags": ["a"], "due": "2026-11-26", "ok": True}
    (error,) = check.json()["errors"]
    assert (error["line"], error["pointer"]) == (3, "/n")


def result_of(run: Run) -> Any:
    assert run.status is RunStatus.COMPLETED, run.error
    assert run.result is not None
    return msgspec.json.decode(run.result)["result"]


async def ended(engine: Engine, run_id: str) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run_id)


async def test_a_call_takes_and_returns_models(open_engine: OpenEngine) -> None:
    flock = Flock()

    class Priced(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

        order: Order
        price: Decimal

        @pydantic.computed_field  # type: ignore[prop-decorator]
        @property
        def is_free(self) -> bool:
            return not self.price

    def price(order: Order) -> Priced:
        return Priced(order=order, price=Decimal(9))

    def price_all(orders: list[Order]) -> list[Priced | None]:
        return [*map(price, orders), None]

    @flock.agent
    async def sell(order: Order, context: RunContext) -> list[str]:
        one = await context.call(price, order)
        more = await context.call(price_all, [order])
        return [repr(one), repr(more)]

    expected = Priced(order=Order.model_validate(ORDER), price=Decimal(9))
    async with open_engine(flock) as engine:
        run = await engine.submit("sell", {"order": ORDER})
        assert result_of(await ended(engine, run.run_id)) == [repr(expected), repr([expected, None])]


async def test_a_call_whose_result_is_no_such_model_fails(flock: Flock) -> None:
    def price() -> Line:
        return {"sku": "x", "count": 0}  # type: ignore[return-value]

    @flock.agent
    async def sell(context: RunContext) -> None:
        await context.call(price)

    async with flock.engine(expose_errors=True) as engine:
        run = await ended(engine, (await engine.submit("sell", {})).run_id)
    assert "does not match its return type: Input should be greater than or equal to 1" in (run.error or "")


async def test_a_call_returns_its_model_again_after_a_crash(tmp_path: Path) -> None:
    flock, executed, reached = Flock(), list[str](), anyio.Event()

    async def load() -> Order:
        executed.append("load")
        return Order.model_validate(ORDER)

    @flock.agent
    async def sell(context: RunContext) -> str:
        order = await context.call(load)
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return repr(order)

    store = tmp_path / "flock.db"
    first = flock.engine(store=store)
    async with first:
        run = await first.submit("sell", {})
        await reached.wait()
        await first.drain(0)
    async with flock.engine(store=store) as engine:
        assert result_of(await ended(engine, run.run_id)) == repr(Order.model_validate(ORDER))
    assert executed == ["load"]


def test_pydantic_is_not_imported_for_programs_without_it() -> None:
    code = (
        "import sys, flock.core, flockapi, msgspec\n"
        "class Point(msgspec.Struct):\n    x: int\n"
        "made = flock.core.FlockFactory.create_default_agent('a', input=Point, output='n: int')\n"
        "flockapi.create_app(flock.core.Flock())\n"
        "made.output.encode({'n': 1}), made.input.decode(b'{\"x\": 1}')\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

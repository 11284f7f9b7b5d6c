"""What models get of the files of an agent, and what is refused before it is paid. The table is in docs/files.md."""

import base64
import importlib.machinery
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import anyio
import pytest

from flock.core import Flock, FlockFactory, Price, data_url
from flock.errors import ModelError
from flock.files import FileReference, media_type_of
from flock.models import llm, localmodel, requests
from flock.models.completions import Message
from flock.models.pace import Pace
from flock.models.prices import Budget
from flock.models.providers import PROVIDERS
from flock.models.requests import MAX_FILE_BYTES, TAKES
from flock.runs import BatchOptions, Usage
from flock.testing import FakeModel, ModelRequest, Reply
from tests.support import EXAMPLES, ROOT
from tests.support.engines import ended
from tests.test_files import PDF, PNG, each

pytestmark = pytest.mark.anyio

WAV = b"RIFF\0\0\0\0WAVEfmt "
ANSWER = Reply({"total": "40 €"})


def receipt_flock(
    model: str = "openai/gpt-4o", input: str = "photo: File | the receipt, note: str", prices: Any = None, **more: Any
) -> Flock:
    flock = Flock("receipts", model=model, prices=prices or {})
    flock.add_agent(FlockFactory.create_default_agent("receipt", input=input, output="total: str", **more))
    return flock


async def sent_by(flock: Flock, model: FakeModel, inputs: Any, **options: Any) -> tuple[Any, list[Any]]:
    """Return the run, and the messages of the last request."""
    async with flock.engine(transport=model.transport, **options) as engine:
        run = await engine.submit("receipt", inputs)
        run = await engine.wait(run.run_id)
    return run, model.requests[-1]["messages"] if model.requests else []


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (PNG, {"type": "image_url", "image_url": {"url": data_url(PNG)}}),
        (PDF, {"type": "file", "file": {"filename": "file.pdf", "file_data": data_url(PDF)}}),
        (WAV, {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}}),
        (b"ID3", {"type": "input_audio", "input_audio": {"data": "SUQz", "format": "mp3"}}),
        (b"a text", {"type": "text", "text": ":\na text"}),
    ],
)
async def test_a_model_gets_a_file_as_its_provider_takes_it(model: FakeModel, content: bytes, part: Any) -> None:
    model.replies = [ANSWER]
    run, messages = await sent_by(receipt_flock(), model, {"photo": data_url(content), "note": "lunch"})
    assert run.value == {"total": "40 €"}, run.error
    text, sent = messages[-1]["content"]
    assert sent == part
    assert text["text"].startswith('{"photo": "file 1", "note": "lunch"}\n\nIn it:\n- photo: the receipt')


async def test_several_files_have_numbers_and_names_and_a_detail(model: FakeModel) -> None:
    model.replies = [ANSWER]
    flock = receipt_flock(input="photos: list[Image], last: Image | None")
    async with flock.engine(transport=model.transport) as engine:
        file = await engine.files().keep(each(PNG))
        photo = {"file_id": file.file_id, "name": "a b.png", "detail": "low"}
        run = await engine.submit("receipt", {"photos": [data_url(PNG), photo], "last": None})
        await engine.wait(run.run_id)
    text, first, second = model.requests[-1]["messages"][-1]["content"]
    assert text["text"].startswith('{"photos": ["file 1", "file 2 a b.png"], "last": null}')
    assert "detail" not in first["image_url"]
    assert second["image_url"]["detail"] == "low"


@pytest.mark.parametrize(("provider", "content"), [("openai", b"\0\1"), ("groq", PNG)])
async def test_an_unknown_content_and_a_file_that_is_too_long_are_errors_before_they_are_paid(
    provider: str, content: bytes, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_FILE_BYTES, "groq", 10)
    monkeypatch.setenv("GROQ_API_KEY", "key")
    run, messages = await sent_by(receipt_flock(f"{provider}/model"), model, {"photo": data_url(content), "note": ""})
    assert run.error_type == "model_bad_request"
    assert f"{provider} does not accept" in run.error
    assert messages == []


# The table of the page

PAGE = (ROOT / "docs" / "files.md").read_text("utf-8")
#: A row of the table: the names of providers, and what they take of images, PDF and audio.
TABLE = [
    (re.findall(r"`(\w+)`", names), [cell.strip() for cell in cells.split("|")])
    for names, cells in re.findall(r"\n\| ((?:`\w+`(?:, )?)+|others) \| (\w[\w, ]*(?: \| \w[\w, ]*){2}) \|", PAGE)
]
NAMED = {name for names, _ in TABLE for name in names}
OTHERS = sorted(PROVIDERS.keys() - NAMED)
KINDS = {
    "image": {"PNG": PNG, "JPEG": b"\xff\xd8\xff", "GIF": b"GIF89a", "WebP": b"RIFF\0\0\0\0WEBP"},
    "PDF": {"PDF": PDF},
    "audio": {"WAV": WAV, "MP3": b"ID3", "Ogg": b"OggS", "FLAC": b"fLaC", "M4A": b"\0\0\0\0ftypM4A "},
}


def test_the_table_of_the_page_names_each_provider_that_differs_from_the_others() -> None:
    assert NAMED == TAKES.keys()
    assert [names for names, _ in TABLE].count([]) == 1, "the row of all others"
    assert NAMED <= PROVIDERS.keys() | {"local", "litellm"}


@pytest.mark.parametrize(
    ("provider", "kind", "cell"),
    [
        pytest.param(name, kind, cell, id=f"{name} {kind} {cell}")
        for names, cells in TABLE
        for name in names or OTHERS
        for kind, cell in zip(KINDS, cells, strict=True)
    ],
)
async def test_a_provider_gets_what_the_table_says_and_is_not_asked_otherwise(
    provider: str, kind: str, cell: str, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one in this process, here without weights, and those that litellm calls, here without it."""

    async def acompletion(*, messages: Any, **options: Any) -> Any:
        assert "stream" not in options, "it has none"
        model.requests.append(ModelRequest({"messages": messages}, {}))
        return types.SimpleNamespace(model_dump=model.replies.pop().completion)

    for variable in filter(None, (known.key_variable for known in PROVIDERS.values())):
        monkeypatch.setenv(variable, "key")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://azure.example")
    server = localmodel.LocalServer(base_url="http://local/v1", key="key", server=None)
    monkeypatch.setattr(localmodel, "serve", lambda name: server)
    fake = types.ModuleType("litellm")
    fake.acompletion, fake.__spec__ = acompletion, importlib.machinery.ModuleSpec("litellm", None)  # type: ignore
    monkeypatch.setitem(sys.modules, "litellm", fake)
    name = {"litellm": "dashscope/some", "local": "local/smollm2-135m"}.get(provider, f"{provider}/some")
    taken = {"yes": [*KINDS[kind]], "no": []}.get(cell, cell.split(", "))
    assert taken == [form for form in KINDS[kind] if form in taken]
    for form, content in KINDS[kind].items():
        model.requests.clear()
        model.replies = [ANSWER] if form in taken else []
        run, messages = await sent_by(receipt_flock(name), model, {"photo": data_url(content), "note": ""})
        if form in taken:
            assert run.value == {"total": "40 €"}, run.error
            assert base64.b64encode(content).decode() in str(messages[-1]["content"][1])
            assert messages[-1]["content"][1].get("input_audio", {}).get("format", form.lower()) == form.lower()
        else:
            assert (run.error_type, messages) == ("model_bad_request", [])
            assert f"{provider} does not accept {media_type_of(content)} of" in run.error
            assert f"It takes {', '.join((*TAKES.get(provider, ['image']), 'text'))}, at most" in run.error


def test_the_sizes_of_the_page_are_those_that_providers_take() -> None:
    pattern = r"A file, also a text, may have (\d+) MB(.*?); all files of a call together (\d+) MB"
    [(usual, of_providers, most)] = re.findall(pattern, " ".join(PAGE.split()))
    sizes = {name: int(size) * 1_000_000 for name, size in re.findall(r"`(\w+)` (\d+) MB", of_providers)}
    assert (sizes, requests.MAX_ALL_BYTES) == (MAX_FILE_BYTES, int(most) * 1_000_000)
    for provider, size in {**dict.fromkeys(("openai", *OTHERS), int(usual) * 1_000_000), **sizes}.items():
        requests.check_files(with_file("image/png", size), provider)
        with pytest.raises(ModelError, match=f"{provider} does not accept image/png of {size + 1:,} bytes"):
            requests.check_files(with_file("image/png", size + 1), provider)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a" * 2000 + b"\xff", "not in UTF-8"),
        (b"a" * 1001, "openai does not accept text/plain of 1,001 bytes from here. It takes image, application/pdf, "),
        ([PNG] * 12, "800 bytes in all"),
    ],
)
async def test_a_text_that_is_too_long_or_not_utf_8_and_too_many_files_are_errors(
    model: FakeModel, content: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_FILE_BYTES, "openai", 1000 if "UTF" not in problem else 10_000)
    monkeypatch.setattr(requests, "MAX_ALL_BYTES", 800 if "all" in problem else 10_000)
    flock = receipt_flock(input="photos: list[File]")
    photos = [data_url(each) for each in (content if isinstance(content, list) else [content])]
    run, messages = await sent_by(flock, model, {"photos": photos})
    assert (run.error_type, messages) == ("model_bad_request", [])
    assert problem in run.error


async def test_a_call_that_waits_holds_no_contents(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.replies = [ANSWER]
    order: list[str] = []
    enter, encode = Pace.enter, requests.encoded

    async def entered(pace: Pace, *args: Any) -> None:
        await enter(pace, *args)
        order.append("passed")

    def encoded(*args: Any) -> bytes:
        order.append("read" if args[-1] is True else "encoded")
        return encode(*args)

    monkeypatch.setattr(Pace, "enter", entered)
    monkeypatch.setattr(llm, "encoded", encoded)
    run, _ = await sent_by(receipt_flock(), model, {"photo": data_url(PNG), "note": ""})
    assert run.value == {"total": "40 €"}, run.error
    assert order == ["passed", "encoded", "read"]


def with_file(media_type: str, size: int) -> list[Message]:
    return [Message("user", "", files=(FileReference(file_id="a" * 64, media_type=media_type, size=size),))]


def test_a_file_costs_by_its_kind_and_size() -> None:
    def cost(media_type: str, size: int) -> int:
        return requests.bytes_of_files(with_file(media_type, size))

    assert cost("text/plain", 20_000_000) == 20_000_000
    assert cost("image/png", 20_000_000) == 4000
    assert cost("application/pdf", 1_000_000) == 104_000


@pytest.mark.parametrize(("photo", "count"), [(data_url(PNG), 1), (None, 2)])
async def test_an_image_counts_for_max_cost_before_it_is_sent(
    photo: str | None, count: int, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls fit into the limit, but not with 1,000 tokens for an image each: then one waits, and is never paid."""
    expected, reserved, both = Budget._expected, list[int](), anyio.Event()

    def noted(budget: Budget, price: Price, tokens: int, max_tokens: int | None) -> float:
        reserved.append(tokens)
        if len(reserved) == 2:
            both.set()
        return expected(budget, price, tokens, max_tokens)

    async def reply(request: ModelRequest) -> Reply:
        await both.wait()
        return Reply({"total": "40 €"}, usage=Usage(input_tokens=2000))

    monkeypatch.setattr(Budget, "_expected", noted)
    model.replies = [reply] * count
    flock = receipt_flock(input="photo: Image | None", prices={"openai/gpt-4o": Price(input=1000, output=0)})
    async with flock.engine(transport=model.transport) as engine:
        options = BatchOptions(max_workers=2, max_cost=1.9)
        batch = await engine.submit_batch("receipt", [{"photo": photo}] * 2, options)
        batch = await ended(engine, batch)
    assert (len(model.requests), batch.completed_items - batch.cancelled_items) == (count, count)
    assert batch.error_type == ("cost_limit" if photo else None)
    assert reserved[0] // 1000 == (1 if photo else 0)
    assert batch.estimated_cost == 4, "the rows that have ended cost 2 dollars each"


async def test_the_estimate_of_a_call_that_is_cancelled_has_its_image(model: FakeModel) -> None:
    asked = anyio.Event()

    async def never(request: ModelRequest) -> Reply:
        asked.set()
        await anyio.sleep_forever()
        return ANSWER

    model.replies = [never, never]
    tokens = list[int]()
    async with receipt_flock(input="photo: Image | None").engine(transport=model.transport) as engine:
        for photo in (None, data_url(PNG)):
            run, asked = await engine.submit("receipt", {"photo": photo}), anyio.Event()
            await asked.wait()
            await engine.cancel_run(run.run_id)
            usage = (await engine.wait(run.run_id)).usage
            tokens.append(usage.estimated_tokens if usage else 0)
    assert 1000 <= tokens[1] - tokens[0] < 1100, tokens


async def test_the_estimate_of_a_stream_of_litellm_that_is_cancelled_has_its_image() -> None:
    usages, begun = list[Usage](), anyio.Event()

    async def send(headers: Any, **options: Any) -> Any:
        async def chunks() -> Any:
            begun.set()
            await anyio.sleep_forever()
            yield

        return chunks()

    listener: Any = types.SimpleNamespace(reset=lambda: None)
    unfinished = lambda usage, model: usages.append(usage)  # noqa: E731
    request = requests.Request(with_file("image/png", 9), {}, name="dashscope/some", on_unfinished=unfinished)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(llm._stream_of_litellm, send, request, {}, listener)
        await begun.wait()
        tasks.cancel_scope.cancel()
    assert [usage.input_tokens // 1000 for usage in usages] == [1]


async def test_nothing_of_a_content_is_in_the_store(model: FakeModel, tmp_path: Path) -> None:
    flock = receipt_flock(tools=[look_up])
    model.replies = [Reply(None, [("look_up", {"key": "a"})]), ANSWER]
    run, _ = await sent_by(flock, model, {"photo": data_url(PNG), "note": ""}, store=tmp_path / "runs.db")
    assert run.value == {"total": "40 €"}, run.error
    stored = b"".join(
        (tmp_path / name).read_bytes() for name in ("runs.db", "runs.db-wal") if (tmp_path / name).exists()
    )
    assert base64.b64encode(PNG)[:24] not in stored
    assert b"file_id" in stored


def look_up(key: str) -> str:
    return key


async def test_a_second_question_has_the_file_too(model: FakeModel) -> None:
    model.replies = [Reply({"wrong": 1}), ANSWER]
    _, messages = await sent_by(receipt_flock(), model, {"photo": data_url(PNG), "note": ""})
    assert [
        len(each["content"]) for each in messages if each["role"] == "user" and isinstance(each["content"], list)
    ] == [2]


async def test_a_conversation_has_its_files_with_the_other_inputs(model: FakeModel) -> None:
    model.replies = [ANSWER]
    chat = [{"role": "user", "content": "How much?"}]
    flock = receipt_flock(input="photo: Image, chat: Messages")
    _, messages = await sent_by(flock, model, {"photo": data_url(PNG), "chat": chat})
    assert [type(each["content"]) for each in messages] == [str, list, str]


async def test_the_receipt_of_the_example_is_read_again_until_it_adds_up(model: FakeModel) -> None:
    flock = runpy.run_path(str(EXAMPLES / "receipt.py"))["flock"]
    lines = [{"what": "tea", "price": "2.50"}, {"what": "cake", "price": "4.10"}]
    model.replies = [Reply({"shop": "Café", "lines": lines, "total": total}) for total in ("6.50", "6.60")]
    run, messages = await sent_by(flock, model, {"photo": data_url(PNG), "note": None})
    assert run.value["total"] == "6.60", run.error
    assert "add up to 6.60" in messages[-1]["content"]

"""What models get of the files of an agent, and what is refused before it is paid. The table is in docs/files.md."""

import base64
import runpy
from pathlib import Path
from typing import Any

import pytest

from flock.core import Flock, FlockFactory, data_url
from flock.files import FileReference
from flock.models import llm, requests
from flock.models.completions import Message
from flock.models.pace import Pace
from flock.models.requests import MAX_FILE_BYTES, TAKES
from flock.testing import FakeModel, Reply
from tests.support import EXAMPLES
from tests.test_files import PDF, PNG, each

pytestmark = pytest.mark.anyio

WAV = b"RIFF\0\0\0\0WAVEfmt "
ANSWER = Reply({"total": "40 €"})


def receipt_flock(
    model: str = "openai/gpt-4o", input: str = "photo: File | the receipt, note: str", **more: Any
) -> Flock:
    flock = Flock("receipts", model=model)
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


@pytest.mark.parametrize(
    ("provider", "content"),
    [("deepseek", PNG), ("anthropic", PDF), ("azure", PDF), ("mistral", WAV), ("openai", b"\0\1"), ("groq", b"big")],
)
async def test_what_a_provider_does_not_take_is_an_error_before_it_is_paid(
    provider: str, content: bytes, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_FILE_BYTES, "groq", 10)
    content = PNG if content == b"big" else content
    for variable in ("DEEPSEEK", "ANTHROPIC", "AZURE_OPENAI", "MISTRAL", "GROQ"):
        monkeypatch.setenv(f"{variable}_API_KEY", "key")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://azure.example")
    run, messages = await sent_by(receipt_flock(f"{provider}/model"), model, {"photo": data_url(content), "note": ""})
    assert run.error_type == "model_bad_request"
    assert f"{provider} does not accept" in run.error
    assert messages == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a" * 2000 + b"\xff", "not in UTF-8"),
        (b"a" * 1001, "openai does not accept text/plain of 1,001 bytes from here. The limit is "),
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


def test_a_file_costs_by_its_kind_and_size() -> None:
    def cost(media_type: str, size: int) -> int:
        file = FileReference(file_id="a" * 64, media_type=media_type, size=size)
        return requests.bytes_of_files([Message("user", "", files=(file,))])

    assert cost("text/plain", 20_000_000) == 20_000_000
    assert cost("image/png", 20_000_000) == 4000
    assert cost("application/pdf", 1_000_000) == 104_000


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


def test_each_provider_of_the_table_is_in_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "files.md").read_text()
    assert [name for name in (*TAKES, *MAX_FILE_BYTES) if f"`{name}`" not in page] == []


async def test_the_receipt_of_the_example_is_read_again_until_it_adds_up(model: FakeModel) -> None:
    flock = runpy.run_path(str(EXAMPLES / "receipt.py"))["flock"]
    lines = [{"what": "tea", "price": "2.50"}, {"what": "cake", "price": "4.10"}]
    model.replies = [Reply({"shop": "Café", "lines": lines, "total": total}) for total in ("6.50", "6.60")]
    run, messages = await sent_by(flock, model, {"photo": data_url(PNG), "note": None})
    assert run.value["total"] == "6.60", run.error
    assert "add up to 6.60" in messages[-1]["content"]

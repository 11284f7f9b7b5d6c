"""Images, audio and documents as parts of messages of OpenAI's clients. The page is docs/openai.md."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from msgspec import Meta

from flock.agents.messages import Messages
from flock.core import Audio, Document, File, Flock, Image, data_url
from flockapi import create_app
from tests.support.http import client_of
from tests.test_files import KEYS, PDF, PNG, as_user

pytestmark = pytest.mark.anyio

WAV = b"RIFF\0\0\0\0WAVEfmt "


def described(*files: Any) -> str:
    return " ".join(f"{file.media_type},{file.name},{file.detail},{len(file.read())}" for file in files if file)


def flock_of_files() -> Flock:
    flock = Flock("parts")

    @flock.agent
    def look(photo: Image, sound: Audio | None = None, note: str | None = None, more: list[Image] = []) -> str:  # noqa: B006
        return f"{note!r} {described(photo, sound, *more)}"

    @flock.agent
    def letter(letter: Document) -> str:
        return described(letter)

    @flock.agent
    def talk(said: Messages, photo: Image | None = None) -> str:
        return f"{'+'.join(each.content for each in said)} {described(photo)}"

    @flock.agent
    def pair(
        photos: Annotated[list[Image], Meta(min_length=2, max_length=3)] | None = None,
        rest: list[File] = [],  # noqa: B006
    ) -> str:
        return f"{len(photos or [])} {len(rest)}"

    @flock.agent
    def loose(value: dict[str, Any], text: str = "") -> str:
        return text

    return flock


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(flock_of_files(), store=":memory:", protocols=["openai"], auth="host")
    async with app.lifespan(), client_of(app) as made:
        yield made


def image(content: bytes = PNG, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content), **more}}


def audio(content: bytes = WAV) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


async def chat(client: httpx.AsyncClient, model: str, *contents: Any, **more: Any) -> httpx.Response:
    """Send messages of the user and the assistant in turn."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(contents)]
    return await client.post("/v1/chat/completions", json={"model": model, "messages": messages, **more})


def answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    found: str = response.json()["choices"][0]["message"]["content"]
    return found


async def test_parts_of_the_last_message_go_to_the_inputs_that_take_them(client: httpx.AsyncClient) -> None:
    parts = [text("What is it?"), audio(), image(detail="low"), image(), image()]
    found = answer(await chat(client, "look", parts))
    one = f"image/png,,,{len(PNG)}"
    assert found == f"'What is it?' image/png,,low,{len(PNG)} audio/wav,,,{len(WAV)} {one} {one}"
    assert answer(await chat(client, "look", [image()])) == f"'' {one}"


async def test_a_list_takes_all_files_of_its_kind_and_their_number_is_checked_with_the_inputs(
    client: httpx.AsyncClient,
) -> None:
    assert answer(await chat(client, "pair", [image(), audio(), image()])) == "2 1"
    assert answer(await chat(client, "pair", [audio()] * 100)) == "0 100"
    for count in (1, 4):
        error = (await chat(client, "pair", [image()] * count)).json()["error"]
        assert (error["param"], "length" in error["message"]) == ("inputs.photos", True), error


async def test_an_optional_text_takes_the_message_only_beside_a_file(client: httpx.AsyncClient) -> None:
    said = json.dumps({"photo": data_url(PNG), "note": "What is it?"})
    assert answer(await chat(client, "look", said)) == f"'What is it?' image/png,,,{len(PNG)}"
    assert answer(await chat(client, "look", [image(), text(said)])).startswith(repr(said))


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
async def test_parts_of_others_that_are_no_text_are_dropped(client: httpx.AsyncClient, role: str) -> None:
    messages = [{"role": role, "content": [text("a"), image(b"GIF89a")]}, {"role": "user", "content": [image()]}]
    found = answer(await client.post("/v1/chat/completions", json={"model": "look", "messages": messages}))
    assert found == f"'' image/png,,,{len(PNG)}"


@pytest.mark.parametrize(
    "file",
    [
        {"filename": "a.pdf", "file_data": data_url(PDF)},
        {"filename": "a.pdf", "file_data": base64.b64encode(PDF).decode()},
        {"filename": "x/a.pdf"},
    ],
)
async def test_a_file_is_a_data_url_or_base64_or_stored_before(client: httpx.AsyncClient, file: Any) -> None:
    if "file_data" not in file:
        file["file_id"] = (await client.post("/files", content=PDF)).json()["file_id"]
    expected = f"application/pdf,a.pdf,,{len(PDF)}"
    assert answer(await chat(client, "letter", [{"type": "file", "file": file}])) == expected
    response = await client.post(
        "/v1/responses",
        json={"model": "letter", "input": [{"role": "user", "content": [{"type": "input_file", **file}]}]},
    )
    assert response.json()["output"][-1]["content"][0]["text"] == expected, response.text


async def test_a_conversation_has_the_files_of_its_last_message(client: httpx.AsyncClient) -> None:
    """Earlier turns are sent without their files, as always."""
    found = answer(await chat(client, "talk", [text("a"), image()], "b", [text("c"), image(detail="high")]))
    assert found == f"a+b+c image/png,,high,{len(PNG)}"
    assert answer(await chat(client, "talk", [text("a"), image()], "b", "c")) == "a+b+c "
    sent = {"role": "user", "content": [{"type": "input_image", "image_url": data_url(PNG), "detail": "auto"}]}
    response = (await client.post("/v1/responses", json={"model": "talk", "input": [sent]})).json()
    assert response["output"][-1]["content"][0]["text"] == f" image/png,,auto,{len(PNG)}"
    items = (await client.get(f"/v1/responses/{response['id']}/input_items")).json()
    assert "base64" not in str(items)


@pytest.mark.parametrize(
    ("model", "parts", "param", "words"),
    [
        ("look", [image(), audio(), audio()], "messages.0.content.2", "no input for this audio, or no more room"),
        ("look", [{"type": "file", "file": {"file_data": "JVBERi0="}}], "messages.0.content.0", "input for this file"),
        ("loose", [image()], "messages.0.content.0", "'loose' has no input for this image"),
        ("look", [{"type": "image_url", "image_url": {"url": "https://t/a.png"}}], "messages.0.content.0", "fetched"),
        ("look", [{"type": "image_url", "image_url": {}}], "messages.0.content.0", "This part has no file. Send"),
        ("letter", [{"type": "input_file", "file_url": "http://t"}], "messages.0.content.0", "has no file"),
        ("look", [image(b"GIF89a") | {"image_url": "data:image/png;base64,R0lGODlh"}], "inputs.photo", "is image/gif"),
        ("look", [image(detail="huge")], "inputs.photo.detail", ""),
        ("look", [text("x"), audio()], "inputs.photo", "required"),
        ("look", [image(b"GIF89a")] * 5_000, "messages.0.content.100", "at most 100 files"),
        ("letter", [text("x"), {"type": "file", "file": {"file_data": "JVBERi0="}}], "messages", "must be a JSON obj"),
        ("look", [image(), {"type": "refusal", "refusal": "no"}], "messages.0.content.1", "'refusal' is not supported"),
    ],
)
async def test_a_file_without_a_place_is_refused(
    client: httpx.AsyncClient, model: str, parts: list[Any], param: str, words: str
) -> None:
    response = await chat(client, model, parts)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert (await client.get("/runs")).json()["runs"] == []


async def test_an_agent_without_files_gets_no_earlier_ones_either(client: httpx.AsyncClient) -> None:
    response = await chat(client, "loose", [text("a"), image()], "b", "c")
    assert response.json()["error"]["param"] == "messages.0.content.1"


async def test_an_id_of_another_is_not_found() -> None:
    """It is that of a content that this principal does not have, although the server has it."""
    app = create_app(flock_of_files(), store=":memory:", protocols=["openai"], api_keys=KEYS)
    async with app.lifespan(), as_user(app) as ann, as_user(app, "bob") as bob, as_user(app, "ops:admin") as admin:
        file_id = (await ann.post("/files", content=PDF)).json()["file_id"]
        for client, sent, status in (
            (ann, file_id, 200),
            (bob, file_id, 404),
            (admin, file_id, 404),
            (ann, "f-a", 404),
        ):
            response = await chat(client, "letter", [{"type": "file", "file": {"file_id": sent}}])
            assert response.status_code == status, response.text
            said = [{"role": "user", "content": [{"type": "input_file", "file_id": sent}]}]
            response = await client.post("/v1/responses", json={"model": "letter", "input": said})
            assert response.status_code == status, response.text
        assert (await bob.get("/runs")).json()["runs"] == []

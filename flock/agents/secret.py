"""Secret arguments of tools. They can be neither read nor guessed from a call, or from what is stored of it.

A model's reply must be stored with its tool calls, so that the calls can be made after a crash. So the arguments of a
tool with secrets are encrypted in it, with a key of the run, which is stored in the record of the run only.
"""

import base64
import hashlib
import hmac
import itertools
import os
from collections.abc import Collection

import msgspec

from flock.errors import CallError

#: How an encrypted text begins.
SEALED = "sealed:"
#: How a value begins that is shown in place of a secret one.
SECRET = "secret:"
#: In bytes.
NONCE_LENGTH = TAG_LENGTH = 16
DIGEST_CHARS = 16


def hidden(arguments: msgspec.Raw, names: Collection[str], key: str) -> msgspec.Raw:
    """Return *arguments*, a JSON object, as people see it: a secret value is replaced by a digest with the *key*.

    So a question about other values has another id.
    """
    values = msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    for name in values.keys() & set(names):
        found = _mac(key, b"shown", bytes(values[name])).hex()[:DIGEST_CHARS]
        values[name] = msgspec.Raw(msgspec.json.encode(SECRET + found))
    return msgspec.Raw(msgspec.json.encode(values))


def sealed(text: str, key: str) -> str:
    """Return *text* encrypted with *key*: HMAC-SHA256 in counter mode, and authenticated by another HMAC."""
    nonce = os.urandom(NONCE_LENGTH)
    body = nonce + _xored(text.encode(), key, nonce)
    return SEALED + base64.urlsafe_b64encode(body + _mac(key, b"tag", body)[:TAG_LENGTH]).decode()


def unsealed(text: str, key: str) -> str:
    """Return what ``sealed`` was given, or *text* if it is not sealed. Raises CallError if it was changed."""
    if not text.startswith(SEALED):
        return text
    try:
        stored = base64.urlsafe_b64decode(text[len(SEALED) :])
    except ValueError:
        stored = b""
    body, tag = stored[:-TAG_LENGTH], stored[-TAG_LENGTH:]
    if not hmac.compare_digest(tag, _mac(key, b"tag", body)[:TAG_LENGTH]):
        raise CallError("The arguments of a tool with secret= cannot be read: they were changed in the store.")
    nonce = body[:NONCE_LENGTH]
    return _xored(body[NONCE_LENGTH:], key, nonce).decode()


def _xored(content: bytes, key: str, nonce: bytes) -> bytes:
    blocks = (_mac(key, b"stream", nonce + number.to_bytes(8, "big")) for number in itertools.count())
    stream = itertools.chain.from_iterable(blocks)
    return bytes(byte ^ mask for byte, mask in zip(content, stream, strict=False))


def _mac(key: str, purpose: bytes, content: bytes) -> bytes:
    return hmac.new(key.encode(), purpose + b"\0" + content, hashlib.sha256).digest()

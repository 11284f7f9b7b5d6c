"""``Messages``: the type of a conversation, for the inputs of agents."""

from typing import Annotated

import msgspec

ROLES = ["user", "assistant"]


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation, from the user or from the assistant."""

    role: Annotated[str, msgspec.Meta(extra_json_schema={"enum": ROLES})]
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError("The role of a message must be 'user' or 'assistant'. Other messages are the agent's own")


#: A conversation, oldest message first. A client can invent any of its messages, including those of the assistant.
Messages = Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]

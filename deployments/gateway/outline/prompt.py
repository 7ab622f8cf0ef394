"""The texts of a request that the engine puts into its prompt, in their order, without the chat template's own."""

from __future__ import annotations

import msgspec

from cluster.errors import RequestError
from deployments.gateway.outline.body import MAX_PARTS, Fields, nested_too_deeply, too_many_parts

# Which field of a content part is its text. Other parts are media, which engines of text models refuse.
_TEXT_OF_PART = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
    "tool_reference": "name",
}
_FIELDS_WITH_PARTS = frozenset(("content", "output", "summary"))
_FIELDS_OF_MESSAGE = frozenset(
    (
        "role", "name", "task", "reasoning", "tool_calls", "tool_call_id", "tools",  # chat
        "namespace", "arguments", "call_id", "input",  # items of the responses API
    )
)  # fmt: skip
# What the engine reads of a block of the messages API; it drops signatures, redacted thinking and cache marks.
_FIELDS_OF_BLOCK = {
    "text": ("text",),
    "thinking": ("thinking",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id", "content"),
    "image": ("source",),
    "tool_addition": ("tool",),
}
_BILLING_HEADER = "x-anthropic-billing-header"  # differs in every request: the engine drops it, for its prefix cache
_MAX_REPEATED_BYTES = 2**23
# Parts of chat messages that are text to the engine, and keys that make a part media whatever its type says.
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking", "tool_reference"))
_MEDIA_KEYS = frozenset(
    (
        "input_image", "image_url", "image_embeds", "image_pil", "audio_url", "audio_embeds", "input_audio",
        "video_url", "video_embeds", "prompt_embeds",
    )
)  # fmt: skip


def has_media(turns: object, fields: tuple[str, ...] = ("content",)) -> bool:
    """Whether one of the lists of parts in `fields` of the turns has a part that is not text, to the engine's eyes."""
    return any(
        isinstance(part, dict) and _is_media(part)
        for turn in _list(turns)
        if isinstance(turn, dict)
        for name in fields
        for part in _list(turn.get(name))
    )


def has_images(messages: object) -> bool:
    """Whether messages of the messages API have an image, alone or as the result of a tool."""
    blocks = [block for turn in _list(messages) if isinstance(turn, dict) for block in _list(turn.get("content"))]
    results = [part for block in blocks if isinstance(block, dict) for part in _list(block.get("content"))]
    return any(isinstance(one, dict) and one.get("type") == "image" for one in (*blocks, *results))


def _is_media(part: Fields) -> bool:
    kind = part.get("type", "text")
    return not isinstance(kind, str) or kind not in _TEXT_PARTS or not _MEDIA_KEYS.isdisjoint(part)


def without_billing_header(text: str) -> str:
    """The text of a system message as the engine shows it: without a first line that Claude Code puts there."""
    return text.partition("\n")[2] if text.startswith(_BILLING_HEADER) else text


class PromptText:
    """Collects the pieces of one prompt. Its methods raise RequestError for more pieces than MAX_PARTS."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._last: list[bytes] = []

    def joined(self) -> bytes:
        """All pieces, one a line, as UTF-8."""
        return b"\n".join(self._pieces + self._last)

    def add_last(self, value: object) -> None:
        """Adds it behind all else, so that equal prefixes stay equal."""
        self.add(value, last=True)

    def add(self, value: object, last: bool = False) -> None:
        """Adds a text as it is, anything else as JSON. `last`: as `add_last`."""
        if value is None or value == "":
            return
        pieces = self._last if last else self._pieces
        if len(pieces) >= MAX_PARTS:
            raise too_many_parts()
        pieces.append(value.encode() if isinstance(value, str) else _json(value))

    def messages(self, messages: object) -> None:
        """Chat messages, or items of the responses API, which become chat messages."""
        for message in _list(messages):
            if isinstance(message, dict):
                self._message(message)

    def input(self, value: object) -> None:
        """Adds the input of the responses API: a text, or items."""
        if isinstance(value, str):
            self.add(value)
        self.messages(value)

    def system(self, blocks: object) -> None:
        """Adds the system prompt of the messages API."""
        self.blocks(blocks, "system")

    def conversation(self, messages: object) -> None:
        """Messages of the messages API."""
        for message in _list(messages):
            if isinstance(message, dict):
                self.add(message.get("role"))
                self.blocks(message.get("content"), message.get("role"))

    def content(self, content: object) -> None:
        """A text, or a list of parts. Fields of a part that the engine does not know reach some chat templates."""
        if not isinstance(content, list):
            self.add(content)
            return
        for part in _list(content):
            kind = part.get("type") if isinstance(part, dict) else None
            text = _TEXT_OF_PART.get(kind) if isinstance(kind, str) else None
            if text is None or not isinstance(part, dict):
                self.add(part)
                continue
            self.add(part.get(text))
            if len(part) > 2:
                self.add({name: value for name, value in part.items() if name not in ("type", text)}, last=True)

    def blocks(self, blocks: object, role: object) -> None:
        """Content of the messages API, or its `system`."""
        if not isinstance(blocks, list):
            self.add(blocks)
            return
        for block in _list(blocks):
            kind = block.get("type") if isinstance(block, dict) else None
            if not isinstance(kind, str) or not isinstance(block, dict):
                continue
            if kind == "text" and role == "system" and str(block.get("text", "")).startswith(_BILLING_HEADER):
                continue
            for name in _FIELDS_OF_BLOCK.get(kind, ()):
                if name == "content" and role == "user":
                    self._tool_result(block.get(name), block.get("tool_use_id"))
                else:
                    self.add(block.get(name))

    def tools(self, tools: object) -> None:
        """Tool definitions. The responses API puts the name of a namespace before each name in it."""
        self.add(tools or None)
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict) and tool.get("type") == "namespace":
                name, inner = tool.get("name"), tool.get("tools")
                if isinstance(name, str) and isinstance(inner, list):
                    if len(name) * len(inner) > _MAX_REPEATED_BYTES:
                        raise RequestError("a namespace in `tools` has too long a name for so many tools: shorten it")
                    self.add(name * len(inner))

    def _message(self, message: Fields) -> None:
        for name, value in message.items():
            if name in _FIELDS_WITH_PARTS:
                if name != "summary" or not message.get("content"):  # which stands in for a missing content
                    self.content(value)
            elif name in _FIELDS_OF_MESSAGE:
                self.add(value or None)
            elif name == "reasoning_content" and message.get("reasoning") is None:  # its old name
                self.add(value)

    def _tool_result(self, content: object, tool_use_id: object) -> None:
        if not isinstance(content, list):
            self.add(content)
            return
        for item in _list(content):
            if not isinstance(item, dict):
                continue
            kind = item.get("type")
            if kind == "text":
                self.add(item.get("text"))
            elif kind == "tool_reference":
                self.add(item.get("tool_name") or item.get("name"))
                self.add(tool_use_id)  # references become a message of their own
                tool_use_id = None
            elif kind == "image":
                self.add(item)


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        return []
    if len(value) > MAX_PARTS:
        raise too_many_parts()
    return value


def _json(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except RecursionError as error:
        raise nested_too_deeply() from error

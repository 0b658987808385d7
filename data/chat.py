"""Conversations laid out as the chat models were trained on them: texts, control tokens, and slots for embeddings."""

from collections.abc import Sequence

from data.prompts import BOS, EOS, Slot, Special, join_texts

Message = tuple[str, Sequence[str | Slot]]  # role: system, user or assistant; content
SYSTEM = "You are a helpful assistant."  # what Qwen2's template begins with
START, END = Special("<|im_start|>"), Special("<|im_end|>")


def chatml(messages: Sequence[Message], generate: bool = True, system: str | None = SYSTEM) -> list[str | Slot]:
    """Qwen2's layout, which opens the assistant's turn to `generate` it.

    `system` comes first where the messages begin with none of their own; None: nothing does. Literals of control
    tokens in a content stay a text.
    """
    begun = bool(messages) and messages[0][0] == "system"
    said = messages if begun or system is None else [("system", [system]), *messages]
    pieces: list[str | Slot] = []
    for role, content in said:
        pieces += [START, f"{role}\n", *content, END, "\n"]
    return join_texts([*pieces, *([START, "assistant\n"] if generate else [])])


def llama2(messages: Sequence[Message]) -> list[str | Slot]:
    """Llama 2's layout of turns of user and assistant, in whose first by the user a system message stands."""
    pieces: list[str | Slot] = [BOS]
    told: list[str | Slot] = []
    for role, content in messages:
        if role == "system":
            told = ["<<SYS>>\n", *content, "\n<</SYS>>\n\n"]
            continue
        if role == "user":
            content, told = [*told, *content], []
        pieces += ["[INST] ", *content, " [/INST]"] if role == "user" else [" ", *content, " ", EOS, BOS]
    return join_texts(pieces)

"""The history of a dialogue as MultiMood's compressor reads it: utterances, each with a mark whose state sums it up."""

from bisect import bisect_left
from collections.abc import Iterable

from data.prompts import Encode

MEM = "<MEM>"


def history_text(turns: Iterable[tuple[str, str, str]]) -> str:
    """(role, emotion, text) of utterances, oldest first -> "Client(anger) You never listen. <MEM> Therapist(...".

    The published roles are Client and Therapist. A mark inside a text is left out, for each utterance has one.
    """
    return "".join(f"{role}({emotion}) {text.replace(MEM, '')} {MEM} " for role, emotion, text in turns)


def history_ids(history: str, encode: Encode, most: int = 512) -> list[int]:
    """Ids of the newest utterances of a history that fit into `most` tokens; none where even the last one does not.

    The published code cuts at so many tokens, wherever that is.
    """
    marked = [utterance + MEM for utterance in history.split(MEM)[:-1]]  # after the last mark nothing is summed up

    def ids(dropped: int) -> list[int]:
        return encode("".join(marked[dropped:]).lstrip(), specials=(MEM,)) if dropped < len(marked) else []

    return ids(bisect_left(range(len(marked)), True, key=lambda dropped: len(ids(dropped)) <= most))

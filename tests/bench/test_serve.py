"""The benchmark of the server: how it counts, and what it refuses."""

import pytest

from bench import serve as bench
from common.config import UserError
from tests.serving import served


class Model:
    """Answers with the name of the clip's words, or with their number in the line."""

    def __init__(self, fixed):
        self.fixed, self.count = fixed, 0

    def sample(self, clip, question, turns=()):
        return clip, {}

    def answer(self, samples, question, missing, follow):
        results = []
        for clip in samples:
            self.count += 1
            said = clip.path.rpartition("/")[2] if self.fixed else str(self.count)
            results.append({"id": clip.id, "emotion": said, "available_modalities": [], "missing": {}})
        return results


@pytest.fixture
def clips(trained):
    return sorted((trained.data / "video").glob("samplenew_*.mp4"))[:3]


def test_every_request_is_asked_and_its_answer_kept(clips, tmp_path):
    names = [clip.name for clip in clips]
    with served(Model(fixed=True), tmp_path, root=clips[0].parent) as server:
        for clients in (1, 4):
            value, answers = bench.rate(server.port, names, None, 8, clients)
            assert value > 0
            assert answers == [names[i % 3] for i in range(8)]
        cfg = bench.Config(requests=4, rounds=2)
        rows = bench.measured({"alone": (server.port, 1), "many": (server.port, 3)}, names, None, cfg)
        assert [row.split("|")[1].strip() for row in rows] == ["alone", "many"]
        assert rows[0].split("|")[3].strip() == "1 (1 to 1)"
        with pytest.raises(UserError, match=r"^4 of 4 requests were refused: .*no such clip"):
            bench.rate(server.port, ["gone.mp4"], None, 4, 1)
    with served(Model(fixed=False), tmp_path, root=clips[0].parent) as server:
        with pytest.raises(UserError, match=r"^alone: answers differ from those given one at a time$"):
            bench.measured({"alone": (server.port, 1)}, names, None, cfg)

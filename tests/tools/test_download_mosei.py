import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import config
from common.config import UserError
from tools import download_mosei as tool

ROOT = Path(tool.__file__).parents[1]
NAMES = [*tool.CSD, "cmu_mosei_std_folds.py"]
CSD = b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 1200  # 300 kB
FOLDS = b"standard_train_fold = ['a']\n"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cuts` are the byte counts after which the next answers with a body break off."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server, name = self.server, self.path.rpartition("/")[2]
        server.seen.append((self.command, name, self.headers.get("Range")))
        data, start, status = server.files.get(name), 0, 200
        if server.refuse and body:
            status, data = server.refuse.pop(0), b"no"
        elif data is None:
            status, data = 404, b"not here"
        elif self.command == "HEAD" and not server.head:
            status, data = 405, b""
        elif server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(asked[1])
            status = 206 if start < len(data) else 416
        self.send_response(status)
        if status in (206, 416):
            span = f"{start}-{len(data) - 1}" if status == 206 else "*"
            self.send_header("Content-Range", f"bytes {span}/{len(data)}")
        rest = data[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if body and status < 300 and server.cuts:
            rest, self.close_connection = rest[: server.cuts.pop(0)], True
        if body:
            self.wfile.write(rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {name: CSD + name.encode() for name in tool.CSD} | {"cmu_mosei_std_folds.py": FOLDS}
    server.seen, server.cuts, server.refuse, server.ranges, server.head = [], [], [], True, True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No waits, no proxies, and a home without anything in it."""
    monkeypatch.setattr(tool, "WAIT", 0.0)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("KAGGLE")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def main(*argv):
    tool.main(config.load(tool.Config, list(map(str, argv))))


def fetch(server, folder):
    main("--mmsdk", "--data-dir", folder, "--url", server.url, "--folds-url", f"{server.url}/cmu_mosei_std_folds.py")


def got(server, name):
    """Ranges of the requests for a file's content."""
    return [asked for command, each, asked in server.seen if command == "GET" and each == name]


def test_downloads_what_the_sdk_lists(server, tmp_path, capsys):
    fetch(server, tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {*NAMES, "SHA256SUMS"}
    assert all((tmp_path / "data" / name).read_bytes() == server.files[name] for name in NAMES)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"to train: python train_mosei.py --data-dir {tmp_path / 'data'}"
    assert "CMU_MOSEI_COVAREP.csd" in said.err
    assert "B/s" in said.err
    sums = dict(line.split("  ")[::-1] for line in (tmp_path / "data" / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256(server.files[name]).hexdigest() for name in NAMES}


def test_urls_are_the_sdks():
    assert f"{tool.SERVER}/{tool.CSD['CMU_MOSEI_COVAREP.csd']}/CMU_MOSEI_COVAREP.csd" == (
        "http://immortal.multicomp.cs.cmu.edu/CMU-MOSEI/acoustic/CMU_MOSEI_COVAREP.csd"
    )


def test_later_runs_check_and_need_no_network(server, tmp_path, capsys):
    fetch(server, tmp_path)
    server.seen.clear()
    fetch(server, tmp_path)
    assert server.seen == []
    assert "was here" in capsys.readouterr().out
    (tmp_path / NAMES[1]).write_bytes(CSD)
    with pytest.raises(UserError, match=rf"{NAMES[1]}: its SHA-256 .* delete it"):
        fetch(server, tmp_path)
    assert (tmp_path / NAMES[1]).exists()  # it is the user's file


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_resumed(server, tmp_path, ranges):
    server.cuts, server.ranges = [150_000], ranges
    fetch(server, tmp_path)
    assert got(server, NAMES[0]) == [None, "bytes=150000-"]
    assert (tmp_path / NAMES[0]).read_bytes() == server.files[NAMES[0]]
    assert not list(tmp_path.glob("*.part"))


def test_a_part_of_an_earlier_run_is_resumed(server, tmp_path):
    whole = server.files[NAMES[2]]
    (tmp_path / f"{NAMES[2]}.part").write_bytes(whole[:1000])
    (tmp_path / f"{NAMES[3]}.part").write_bytes(server.files[NAMES[3]])  # complete, but for its name
    fetch(server, tmp_path)
    assert got(server, NAMES[2]) == ["bytes=1000-"]
    assert (tmp_path / NAMES[2]).read_bytes() == whole
    assert (tmp_path / NAMES[3]).read_bytes() == server.files[NAMES[3]]


def test_a_part_larger_than_the_file_starts_again(server, tmp_path):
    (tmp_path / f"{NAMES[0]}.part").write_bytes(CSD * 2)
    fetch(server, tmp_path)
    assert got(server, NAMES[0]) == [f"bytes={2 * len(CSD)}-", None]
    assert (tmp_path / NAMES[0]).read_bytes() == server.files[NAMES[0]]


def test_gives_up_after_three_retries_and_keeps_what_came(server, tmp_path):
    server.cuts = [100_000, 50_000, 0, 0]
    with pytest.raises(UserError, match=r"CMU_MOSEI_Labels.csd: unreachable .* 3 retries.*--url URL.*--manual"):
        fetch(server, tmp_path)
    assert (tmp_path / f"{NAMES[0]}.part").read_bytes() == server.files[NAMES[0]][:150_000]
    fetch(server, tmp_path)
    assert (tmp_path / NAMES[0]).read_bytes() == server.files[NAMES[0]]


def test_a_busy_server_is_tried_again(server, tmp_path):
    server.refuse = [503, 429]
    fetch(server, tmp_path)
    assert len(got(server, NAMES[0])) == 3


@pytest.mark.parametrize("head", [True, False])
def test_404_is_not_tried_again(server, tmp_path, head):
    server.head = head
    del server.files[NAMES[3]]
    with pytest.raises(UserError, match=r"CMU_MOSEI_VisualFacet42.csd: HTTP 404"):
        fetch(server, tmp_path)
    assert [name for _, name, _ in server.seen].count(NAMES[3]) == 1


@pytest.mark.parametrize("head", [True, False])
def test_a_file_that_goes_missing(server, tmp_path, head):
    server.head, server.refuse = head, [404]
    with pytest.raises(UserError, match=r"CMU_MOSEI_Labels.csd: HTTP 404 Not Found; try a mirror"):
        fetch(server, tmp_path)
    assert len(got(server, NAMES[0])) == 1


def test_nobody_listens(server, tmp_path):
    server.url = "http://127.0.0.1:9"  # the discard port
    with pytest.raises(UserError, match=r"unreachable \(no answer .*--url URL.*--manual"):
        fetch(server, tmp_path)


def test_a_wrong_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SHA256", {NAMES[0]: "0" * 64})
    with pytest.raises(UserError, match=r"CMU_MOSEI_Labels.csd: its SHA-256 .* is not the known 000000000000"):
        fetch(server, tmp_path)
    assert not list(tmp_path.glob("*Labels*"))


def test_a_right_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SHA256", {NAMES[0]: hashlib.sha256(server.files[NAMES[0]]).hexdigest()})
    fetch(server, tmp_path)
    assert (tmp_path / NAMES[0]).exists()


def test_a_web_page_is_not_data(server, tmp_path):
    server.files[NAMES[0]] = b"<html>Log in to the hotel's network</html>"
    with pytest.raises(UserError, match=r"not a .csd file \(it starts with b'<html>"):
        fetch(server, tmp_path)
    assert not list(tmp_path.glob("*Labels*"))


def test_a_file_put_there_by_hand_must_be_whole(server, tmp_path):
    (tmp_path / NAMES[4]).write_bytes(CSD[:500])
    with pytest.raises(UserError, match=r"COVAREP.csd: 500 bytes, but 307,"):
        fetch(server, tmp_path)
    assert not any(command == "GET" for command, _, _ in server.seen)


def test_too_small_a_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"GB needed, 0\.0 GB free"):
        fetch(server, tmp_path)
    assert not any(command == "GET" for command, _, _ in server.seen)


def test_other_addresses_are_refused(tmp_path):
    with pytest.raises(UserError, match="only http and https"):
        main("--mmsdk", "--data-dir", tmp_path, "--url", "file:///etc")


def test_mock(tmp_path, capsys):
    main("--mock", "--num-samples", 30, "--data-dir", tmp_path / "new", "--seed", 3)
    assert len(json.loads((tmp_path / "new" / "mosei_index.json").read_text())) == 30
    assert capsys.readouterr().out.endswith(f"python train_mosei.py --data-dir {tmp_path / 'new'}\n")


def test_mock_leaves_other_data_alone(tmp_path):
    (tmp_path / "aligned_50.pkl").write_bytes(b"1")
    with pytest.raises(UserError, match=r"aligned_50\.pkl"):
        main("--mock", "--data-dir", tmp_path)


def test_the_default_folder_needs_no_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main("--mock", "--num-samples", 9)
    assert (tmp_path / "datasets" / "mosei" / "mosei_index.json").exists()
    assert capsys.readouterr().out.endswith("to train: python train_mosei.py\n")


@pytest.mark.parametrize("modes", [[], ["--mock", "--manual"]])
def test_one_mode(modes):
    with pytest.raises(UserError, match="--mock, --mmsdk, --kaggle and --manual"):
        main(*modes)


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "mosei").write_text("")
    with pytest.raises(UserError, match="is a file"):
        main("--mock", "--data-dir", tmp_path / "mosei")


@pytest.mark.parametrize("start", [["-m", "tools.download_mosei"], [str(ROOT / "tools" / "download_mosei.py")]])
def test_both_ways_to_start_it(tmp_path, start):
    cwd = ROOT if start[0] == "-m" else tmp_path
    done = subprocess.run([sys.executable, *start], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "download_mosei.py: error: name one of --mock, --mmsdk, --kaggle and --manual (none was given)\n"
    )
    done = subprocess.run(
        [sys.executable, *start, "--mock", "--num-samples", "5", "--data-dir", str(tmp_path / "x")], cwd=cwd, check=True
    )
    assert (tmp_path / "x" / "mosei_index.json").exists()


def test_started_by_path_it_takes_relative_folders_from_here(tmp_path):
    (tmp_path / "common.py").write_text("raise RuntimeError('not this one')")
    script = str(ROOT / "tools" / "download_mosei.py")
    command = [sys.executable, script, "--mock", "--num-samples", "5", "--data-dir", "here"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "here" / "mosei_index.json").exists()


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A kaggle program that notes its arguments and copies answer.zip; the user's key is in place."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kaggle"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, shutil, sys\n"
        f"json.dump(sys.argv[1:], open({str(folder / 'args.json')!r}, 'w'))\n"
        f"answer = {str(folder / 'answer.zip')!r}\n"
        "if not os.path.exists(answer): sys.exit(3)\n"
        "out = sys.argv[sys.argv.index('-p') + 1]\n"
        "os.makedirs(out, exist_ok=True)\nshutil.copy(answer, os.path.join(out, 'set.zip'))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    (tmp_path / "home" / ".kaggle").mkdir()
    (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text("{}")
    return folder


def archive(folder, members):
    with zipfile.ZipFile(folder / "answer.zip", "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def test_kaggle(kaggle, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "KAGGLE_SIZE", 1000)
    archive(kaggle, {"CMU-MOSEI/labels/CMU_MOSEI_Labels.csd": CSD, "notes/readme.txt": b"hello"})
    main("--kaggle", "--data-dir", tmp_path / "data", "--folds-url", f"{server.url}/cmu_mosei_std_folds.py")
    args = json.loads((kaggle / "args.json").read_text())
    assert args[:4] == ["datasets", "download", "-d", "samarwarsi/cmu-mosei"]
    found = {str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert found == {"CMU_MOSEI_Labels.csd", "notes/readme.txt", "cmu_mosei_std_folds.py", "SHA256SUMS"}
    assert (tmp_path / "data" / "CMU_MOSEI_Labels.csd").read_bytes() == CSD
    assert "to train: python train_mosei.py" in capsys.readouterr().out


def test_kaggle_with_another_set(kaggle, tmp_path):
    archive(kaggle, {"aligned_50.pkl": b"pickle"})
    main("--kaggle", "--data-dir", tmp_path / "data", "--kaggle-slug", "https://www.kaggle.com/datasets/some/one")
    assert json.loads((kaggle / "args.json").read_text())[3] == "some/one"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["aligned_50.pkl"]


@pytest.mark.parametrize("name", ["../out.csd", "/abs.csd", "a/../../b.csd", "C:\\x.csd", "..\\x.csd", "\\x.csd"])
def test_members_that_lead_outside(tmp_path, name):
    archive(tmp_path, {"fine.txt": b"1", name: b"2"})
    with pytest.raises(UserError, match="would be unpacked outside"):
        tool.unzip(tmp_path / "answer.zip", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_archive(tmp_path, damage):
    archive(tmp_path, {"a.csd": CSD})
    data = bytearray((tmp_path / "answer.zip").read_bytes())
    data[5000] ^= 1
    (tmp_path / "answer.zip").write_bytes(data if damage == "flipped" else data[:5000])
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="not a whole zip file"):
        tool.unzip(tmp_path / "answer.zip", tmp_path / "data")
    assert not (tmp_path / "data" / "a.csd").exists()


def test_kaggle_fails(kaggle, tmp_path):
    with pytest.raises(UserError, match=r"kaggle failed with exit code 3.*some/one"):
        main("--kaggle", "--data-dir", tmp_path / "data", "--kaggle-slug", "some/one")


def test_kaggle_slug(kaggle, tmp_path):
    with pytest.raises(UserError, match="owner/name"):
        main("--kaggle", "--data-dir", tmp_path / "data", "--kaggle-slug", "cmu-mosei")
    assert not (tmp_path / "data").exists()


def test_no_kaggle_credentials(kaggle, tmp_path):
    (tmp_path / "home" / ".kaggle" / "kaggle.json").unlink()
    with pytest.raises(UserError, match=r"1\. open https://.*/settings 2\. .*kaggle\.json 3\. .*~/\.kaggle"):
        main("--kaggle", "--data-dir", tmp_path / "data")
    assert not (kaggle / "args.json").exists()


def test_kaggle_credentials_in_the_environment(kaggle, tmp_path, monkeypatch):
    (tmp_path / "home" / ".kaggle" / "kaggle.json").unlink()
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    monkeypatch.setenv("KAGGLE_KEY", "k")
    archive(kaggle, {"aligned_50.pkl": b"pickle"})
    main("--kaggle", "--data-dir", tmp_path / "data", "--kaggle-slug", "some/one")
    assert (tmp_path / "data" / "aligned_50.pkl").exists()


def test_no_kaggle_program(kaggle, tmp_path):
    (kaggle / "kaggle").unlink()
    with pytest.raises(UserError, match="pip install kaggle"):
        main("--kaggle", "--data-dir", tmp_path / "data")


def test_manual(tmp_path, capsys):
    main("--manual", "--data-dir", tmp_path / "data")
    said = capsys.readouterr().out
    assert all(name in said for name in (*NAMES, "aligned_50.pkl", "mosei_senti_data.pkl", "github.com/thuiar/MMSA"))
    assert f"to check: python -m data.mosei --data-dir {tmp_path / 'data'}" in said
    assert "nothing there yet" in said
    assert not (tmp_path / "data").exists()


def test_manual_says_what_is_there(tmp_path, capsys):
    main("--mock", "--num-samples", 9, "--data-dir", tmp_path / "mock")
    main("--manual", "--data-dir", tmp_path / "mock")
    assert "recognised as: json" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no data")
    main("--manual", "--data-dir", tmp_path / "other")
    assert "not recognised: " in capsys.readouterr().out

"""Get CMU-MOSEI, or make a small stand-in for it, where train_mosei.py looks for it. Exactly one of four modes:

--mock    writes a synthetic set with a planted signal, in the layout of the training guide; needs no network
--mmsdk   downloads the CMU Multimodal SDK's files from CMU's server, or from a mirror of it (--url); resumable
--kaggle  downloads a copy of those files with the `kaggle` program and the user's Kaggle account
--manual  says which files work, where to get them and where to put them

$ python tools/download_mosei.py --mock --num-samples 100
"""

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not tools/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "tools.download_mosei", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

from common.config import UserError, opt, run
from data.mock_mosei import make_mock

DATA_DIR = "datasets/mosei"
# The SDK's own table (CMU-MultiComp-Lab/CMU-MultimodalSDK, standard_datasets/CMU_MOSEI), at its last commit.
SERVER = "http://immortal.multicomp.cs.cmu.edu"
CSD = {
    "CMU_MOSEI_Labels.csd": "CMU-MOSEI/labels",
    "CMU_MOSEI_TimestampedWords.csd": "CMU-MOSEI/language",
    "CMU_MOSEI_TimestampedWordVectors.csd": "CMU-MOSEI/language",
    "CMU_MOSEI_VisualFacet42.csd": "CMU-MOSEI/visual",
    "CMU_MOSEI_COVAREP.csd": "CMU-MOSEI/acoustic",
}
FOLDS = (
    "https://raw.githubusercontent.com/CMU-MultiComp-Lab/CMU-MultimodalSDK/3e27d3781fe38b660432c7edfa7912bd0d256ee1/"
    "mmsdk/mmdatasdk/dataset/standard_datasets/CMU_MOSEI/cmu_mosei_std_folds.py"
)
# what each kind of file must hold at or near its start, as servers answer with web pages too
MAGIC = {".csd": b"\x89HDF\r\n\x1a\n", ".py": b"standard_"}
# SHA-256 by file name where its publisher states it; CMU states none, so SUMS keeps those of the first download
SHA256: dict[str, str] = {}
SUMS = "SHA256SUMS"
KAGGLE, KAGGLE_SIZE = "samarwarsi/cmu-mosei", 31_201_301_641  # a user's copy of all computational sequences, bytes
BIG = 1e9  # bytes; what is larger is left to the check command
RETRIES, WAIT, TIMEOUT = 3, 2.0, 30.0  # seconds; the wait doubles at each retry
MANUAL = """\
Any one of these, unpacked into {folder}:

MMSA feature files: BERT words, COVAREP, FACET; ready to train on. Links: https://github.com/thuiar/MMSA (README)
  aligned_50.pkl     4.7 GB   sha256 45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791
  unaligned_50.pkl  13.7 GB   sha256 ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f
MulT and MultiBench pickles: GloVe words, COVAREP, FACET. Links: https://github.com/yaohungt/Multimodal-Transformer and
https://github.com/pliang279/MultiBench (READMEs)
  mosei_senti_data.pkl          about  3.5 GB
  mosei_senti_data_noalign.pkl  about 12 GB
CMU Multimodal SDK, computational sequences: all five files and the fold list
  {server}/CMU-MOSEI/ (often unreachable; a copy: https://www.kaggle.com/datasets/{kaggle})
  CMU_MOSEI_Labels.csd, CMU_MOSEI_TimestampedWords.csd, CMU_MOSEI_TimestampedWordVectors.csd,
  CMU_MOSEI_VisualFacet42.csd (1.7 GB), CMU_MOSEI_COVAREP.csd (11.6 GB)
  cmu_mosei_std_folds.py from {folds}
"""


@dataclass
class Config:
    mock: bool = opt(False, "make a synthetic set")
    mmsdk: bool = opt(False, "download from the CMU Multimodal SDK's server")
    kaggle: bool = opt(False, "download with the kaggle program")
    manual: bool = opt(False, "say where to get the files by hand, and which are there")
    data_dir: str = opt(DATA_DIR, "folder to fill; train_mosei.py looks into data/mosei too, as the guide has it")
    num_samples: int = opt(600, "--mock: utterances of all three splits")
    seed: int = opt(42, "--mock: seed of everything drawn")
    url: str = opt(SERVER, "--mmsdk: server or mirror that has the folder CMU-MOSEI")
    folds_url: str = opt(FOLDS, "--mmsdk, --kaggle: where the standard folds are")
    kaggle_slug: str = opt(KAGGLE, "--kaggle: data set, as owner/name")


class Unreachable(Exception):
    """A download that stopped and may go on when tried again."""


def download(urls: dict[str, str], folder: Path) -> None:
    """Fetch {file name: URL} into `folder`, keeping what is there; SHA256SUMS then holds the sum of every file.

    UserError: a server that does not answer, too little disk space, a file that is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = _read_sums(folder / SUMS)
    _check_sizes(folder, {url: folder / name for name, url in urls.items() if name not in kept})
    for name, url in urls.items():
        path = folder / name
        fresh = not path.exists()
        source = _fetch(url, path) if fresh else path
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        expected = SHA256.get(name) or kept.get(name) or digest
        if digest != expected:
            if fresh:
                source.unlink()
            fate = "deleted, try again" if fresh else "delete it to download it again"
            raise UserError(f"{path}: its SHA-256 {digest[:12]}... is not the known {expected[:12]}...; {fate}")
        if fresh:
            os.replace(source, path)
        if name not in kept:
            with (folder / SUMS).open("a", encoding="utf-8") as file:
                file.write(f"{digest}  {name}\n")
        print(f"{path}: {_size(path):,} bytes, {'downloaded' if fresh else 'was here'}, SHA-256 as in {SUMS}")


def unzip(archive: Path, folder: Path) -> None:
    """Unpack into `folder`, the SDK's files at its top whatever their place; UserError if a member leads outside."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            targets = [_target(member, archive, folder) for member in members]
            _need(folder, sum(member.file_size for member in members))
            for member, target in zip(members, targets, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                with file.open(member) as source, part.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                os.replace(part, target)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a whole zip file ({error}); delete it and try again") from None


def main(cfg: Config) -> None:
    modes = {"mock": _mock, "mmsdk": _mmsdk, "kaggle": _kaggle, "manual": _manual}
    chosen = [name for name in modes if getattr(cfg, name)]
    if len(chosen) != 1:
        given = " and ".join(f"--{name}" for name in chosen) or "none was given"
        raise UserError(f"name one of --mock, --mmsdk, --kaggle and --manual ({given})")
    if Path(cfg.data_dir).exists() and not Path(cfg.data_dir).is_dir():
        raise UserError(f"--data-dir: {cfg.data_dir} is a file; name a folder")
    modes[chosen[0]](cfg, Path(cfg.data_dir))
    print(f"to train: python train_mosei.py{_option(cfg.data_dir)}")


def _mock(cfg: Config, folder: Path) -> None:
    print(f"{make_mock(folder, cfg.num_samples, cfg.seed)}: {cfg.num_samples} synthetic utterances")


def _mmsdk(cfg: Config, folder: Path) -> None:
    urls = {name: f"{cfg.url.rstrip('/')}/{place}/{name}" for name, place in CSD.items()}
    download(urls | _folds(cfg), folder)


def _kaggle(cfg: Config, folder: Path) -> None:
    _check_kaggle()
    slug = cfg.kaggle_slug.strip("/").removeprefix("https://www.kaggle.com/datasets/")
    if slug.count("/") != 1:
        raise UserError(f"--kaggle-slug: {cfg.kaggle_slug!r} is not owner/name, the end of the data set's web address")
    folder.mkdir(parents=True, exist_ok=True)
    arrived = folder / ".kaggle"  # its archives do not mix with archives that the user keeps here
    if slug == KAGGLE:
        _need(folder, 2 * KAGGLE_SIZE - sum(map(_size, arrived.glob("*"))))
    command = ["kaggle", "datasets", "download", "-d", slug, "-p", str(arrived)]
    print(" ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        raise UserError(f"kaggle failed with exit code {code}, see its message above (data set: {slug})")
    archives = sorted(arrived.glob("*.zip"))
    if not archives:
        raise UserError(f"kaggle left no zip file in {arrived}")
    for archive in archives:
        unzip(archive, folder)
        archive.unlink()
        print(f"{archive.name}: unpacked into {folder}")
    shutil.rmtree(arrived)
    if any((folder / name).exists() for name in CSD):
        download(_folds(cfg), folder)


def _manual(cfg: Config, folder: Path) -> None:
    print(MANUAL.format(folder=folder, server=cfg.url, kaggle=cfg.kaggle_slug, folds=cfg.folds_url))
    print(f"to check: python -m data.mosei --data-dir {folder}")
    files = sorted(path for path in folder.glob("[!.]*") if path.is_file())
    there = [f"{path.name} ({_size(path) / 1e6:,.1f} MB)" for path in files]
    print(f"{folder}: {', '.join(there) or 'nothing there yet'}")
    # a pickle is recognised by its content, all of which must be read for that
    if files and max(map(_size, files)) < BIG:
        from data.layouts import detect

        try:
            print(f"recognised as: {detect(folder)}")
        except UserError as error:
            print(f"not recognised: {error}")


def _folds(cfg: Config) -> dict[str, str]:
    return {"cmu_mosei_std_folds.py": cfg.folds_url}


def _option(folder: str) -> str:
    return "" if Path(folder) == Path(DATA_DIR) else f" --data-dir {folder}"


def _check_kaggle() -> None:
    """UserError unless the user has told the kaggle program who they are and has installed it."""
    keys = os.environ.keys()
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    files = [Path(folder, "kaggle.json").expanduser() for folder in folders if folder]
    if not ({"KAGGLE_USERNAME", "KAGGLE_KEY"} <= keys or any(file.is_file() for file in files)):
        steps = "1. open https://www.kaggle.com/settings 2. download kaggle.json 3. put it into ~/.kaggle/"
        raise UserError(f"no Kaggle credentials: {steps} (or set KAGGLE_USERNAME and KAGGLE_KEY)")
    if not shutil.which("kaggle"):
        raise UserError("the kaggle program is not installed: pip install kaggle")


def _target(member: zipfile.ZipInfo, archive: Path, folder: Path) -> Path:
    """Where a member of an archive goes; UserError if that is outside `folder`."""
    name = PureWindowsPath(member.filename)  # takes both kinds of slash, and drives
    if name.drive or name.root or ".." in name.parts:
        raise UserError(f"{archive}: member {member.filename!r} would be unpacked outside {folder}; nothing was")
    return folder / name.name if name.name in CSD else folder.joinpath(*name.parts)


def _check_sizes(folder: Path, files: dict[str, Path]) -> None:
    """UserError unless the disk has room for what {URL: path} lacks, and what is there is as large as the server's."""
    need = 0
    for url, path in files.items():
        size = _retried(_announced, url)
        if path.exists() and size and _size(path) != size:
            raise UserError(f"{path}: {_size(path):,} bytes, but {size:,} at {url}; delete it to download it again")
        need += 0 if path.exists() else max(0, size - _size(_part(path)))
    _need(folder, need)


def _need(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on its disk")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(url: str, path: Path) -> Path:
    """Download to `path`.part, going on where an earlier try stopped; returns that file, whole."""
    part = _part(path)
    _retried(_stream, url, part)
    with part.open("rb") as file:
        start = file.read(4096)
    if MAGIC.get(path.suffix, b"") not in start:
        part.unlink()
        raise UserError(f"{url}: what came is not a {path.suffix} file (it starts with {start[:20]!r}); it was deleted")
    return part


def _retried(step: Callable[..., Any], *args: Any) -> Any:
    """step(url, ...), tried again after a wait if the server cannot be reached or breaks off."""
    for attempt in range(RETRIES + 1):
        try:
            return step(*args)
        except Unreachable as error:
            if attempt == RETRIES:
                advice = "CMU's server often is: try later (what came is kept), a mirror (--url URL), or --manual"
                raise UserError(f"{args[0]}: unreachable ({error}, {RETRIES} retries); {advice}") from None
            time.sleep(WAIT * 2**attempt)


def _announced(url: str) -> int:
    """The size that the server states, in bytes; 0 if it does not."""
    try:
        with _open(urllib.request.Request(url, method="HEAD")) as response:
            return int(response.headers.get("Content-Length", 0))
    except urllib.error.HTTPError as error:
        if error.code in (405, 501):  # a server that does not do HEAD
            return 0
        raise _refusal(url, error) from None


def _stream(url: str, part: Path) -> None:
    """One try at the rest of `part`; Unreachable if it stays incomplete."""
    from tqdm import tqdm

    done = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = _open(request)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise _refusal(url, error) from None
        if error.headers.get("Content-Range") == f"bytes */{done}":  # all was there
            return
        part.unlink()
        raise Unreachable("the partial file does not fit the server's") from None
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            done = 0  # the server sends the file from its start
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        _need(part.parent, int(length or 0))
        bar = tqdm(total=total, initial=done, desc=part.stem, unit="B", unit_scale=True, mininterval=0.5)
        with bar, part.open("ab" if done else "wb") as file:
            _copy(response, file, bar)
    if total is not None and _size(part) != total:
        raise Unreachable(f"broke off after {_size(part):,} of {total:,} bytes")


def _copy(response: Any, file: Any, bar: Any) -> None:
    """Write what comes; a connection that is cut is Unreachable."""
    while True:
        try:
            block = response.read(1 << 20)
        except (http.client.HTTPException, OSError) as error:
            raise Unreachable(f"broke off ({error or type(error).__name__})") from None
        if not block:
            return
        file.write(block)
        bar.update(len(block))


def _open(request: urllib.request.Request) -> Any:
    """The response to a request; Unreachable if none comes, HTTPError if it is a refusal."""
    if request.type not in ("http", "https"):
        raise UserError(f"{request.full_url}: only http and https addresses are downloaded")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
        raise Unreachable(f"no answer ({getattr(error, 'reason', error) or type(error).__name__})") from None


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """What a status that is not success means: worth another try or not."""
    if error.code in (408, 429) or error.code >= 500:
        return Unreachable(f"HTTP {error.code} {error.reason}")
    return UserError(f"{url}: HTTP {error.code} {error.reason}; try a mirror (--url URL), or see --manual")


def _read_sums(path: Path) -> dict[str, str]:
    """{file name: SHA-256} of a file as sha256sum writes it; empty if there is none."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


if __name__ == "__main__":
    run(Config, main)

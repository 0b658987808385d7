import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.config import UserError
from common.weights import (
    find_weights,
    full_sha256,
    identity,
    load_strict,
    model_files,
    read_folder,
    read_tensors,
    tensor_files,
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder and an empty Hugging Face home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def snapshot(cache, commit, name="models--org--net"):
    folder = cache / name / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_find_weights_order(home):
    cached = snapshot(home / "hf" / "hub", "c1")
    assert find_weights("org/net") == cached
    for place in ("weights/net", "weights/org/net", "org/net"):  # each wins over the ones before
        os.makedirs(place)
        assert str(find_weights("org/net")) == place


def test_find_weights_prefers_ref_main_then_the_newest_snapshot(home, monkeypatch):
    cache = home / "elsewhere"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    old, new = snapshot(cache, "old"), snapshot(cache, "new")
    os.utime(old, (1, 1))
    assert find_weights("org/net") == new
    (cache / "models--org--net" / "refs").mkdir()
    (cache / "models--org--net" / "refs" / "main").write_text("old\n")
    assert find_weights("org/net") == old


def test_find_weights_names_the_download(home):
    with pytest.raises(UserError) as error:
        find_weights("meta-llama/Llama-2-7b-chat-hf", "llama weights")
    name = "meta-llama/Llama-2-7b-chat-hf"
    assert str(error.value) == (
        f"llama weights '{name}' not found (looked in {name}, weights/{name}, weights/Llama-2-7b-chat-hf, "
        f"{home}/hf/hub); get them with: hf download {name} --local-dir weights/{name} "
        "(gated: accept the licence first)"
    )


def test_find_weights_of_a_path_offers_no_download(home):
    with pytest.raises(UserError) as error:
        find_weights("./nets/mine")
    assert str(error.value) == "weights './nets/mine' not found (looked in nets/mine, weights/nets/mine, weights/mine)"


def test_load_strict_from_shards_to_dtype_and_off_meta(tmp_path):
    weight, bias = torch.randn(3, 2), torch.randn(3)
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    save_file({"bias": bias, "rotary.inv_freq": torch.ones(2)}, tmp_path / "b.safetensors")
    shards = {"weight": "a.safetensors", "bias": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with torch.device("meta"):
        linear = nn.Linear(2, 3).requires_grad_(False)
    load_strict(linear, tmp_path, torch.bfloat16, ignore=("inv_freq",))
    assert torch.equal(linear.weight, weight.bfloat16())
    assert torch.equal(linear.bias, bias.bfloat16())
    assert not linear.weight.requires_grad


def test_load_strict_under_other_names(tmp_path):
    weight, bias = torch.randn(3, 2), torch.randn(3)
    save_file({"net.w": weight, "net.bias": bias, "net.head": torch.ones(2)}, tmp_path / "model.safetensors")
    linear, found = nn.Linear(2, 3), []
    names = {"net.w": "weight", "net.bias": "bias"}
    covered = load_strict(linear, tmp_path, None, "cpu", ("head",), found.append, lambda name: names.get(name, name))
    assert covered == "2/2 tensors, 1 not used"
    assert found == ["weight", "bias"]
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)


def test_load_strict_from_pytorch_files(tmp_path):
    """The same checks and conversions, with tensors mapped from the file."""
    weight, bias = torch.randn(3, 2), torch.randn(3)
    torch.save({"weight": weight}, tmp_path / "1.bin")
    torch.save({"bias": bias, "eye.a": torch.ones(1)}, tmp_path / "2.bin")
    index = {"weight_map": {"weight": "1.bin", "bias": "2.bin", "eye.a": "2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        linear = nn.Linear(2, 3)
    assert load_strict(linear, tmp_path, torch.bfloat16, aside=("eye.",)) == "2/2 tensors, left aside: 1 of eye"
    assert torch.equal(linear.weight, weight.bfloat16())
    assert torch.equal(linear.bias, bias.bfloat16())
    load_strict(linear, tmp_path, mapped=True, aside=("eye.",))
    assert torch.equal(linear.weight, weight)
    assert in_file(linear.weight, tmp_path / "1.bin")
    with pytest.raises(UserError, match=r"1 unexpected: eye\.a$"):
        load_strict(linear, tmp_path)
    with pytest.raises(UserError, match=r"wrong shape: weight is \(3, 2\), not \(2, 3\)"):
        load_strict(nn.Linear(3, 2, bias=False), tmp_path, ignore=("bias",), aside=("eye.",))


def test_load_strict_leaves_named_parts_aside(tmp_path):
    weight, bias = torch.randn(3, 2), torch.randn(3)
    parts = {"eye.a": torch.ones(1), "eye.b": torch.ones(1), "eyes.a": torch.ones(1)}
    save_file({"weight": weight, "bias": bias, "inv_freq": torch.ones(1), **parts}, tmp_path / "model.safetensors")
    linear = nn.Linear(2, 3)
    covered = load_strict(linear, tmp_path, ignore=("inv_freq",), aside=("ear.", "eye.", "eyes."))
    assert covered == "2/2 tensors, 1 not used, left aside: 2 of eye, 1 of eyes"
    assert torch.equal(linear.weight, weight)
    with pytest.raises(UserError, match=r"1 unexpected: eyes\.a$"):
        load_strict(linear, tmp_path, ignore=("inv_freq",), aside=("eye.",))


def in_file(tensor, path):
    """Whether a tensor lies in this process's mapping of a file."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in spans)


def test_load_strict_leaves_mapped_tensors_in_their_file(tmp_path):
    path, weight = tmp_path / "model.safetensors", torch.randn(3, 2, dtype=torch.bfloat16)
    save_file({"weight": weight, "bias": torch.zeros(3)}, path)
    for mapped in (True, False):
        net = nn.Linear(2, 3, device="meta").requires_grad_(False)
        load_strict(net, tmp_path, mapped=mapped)
        assert in_file(net.weight, path) == mapped
        assert torch.equal(net.weight, weight)
    load_strict(net, tmp_path, torch.float32, mapped=True)  # one of them is changed on its way
    assert (net.weight.dtype, in_file(net.weight, path), in_file(net.bias, path)) == (torch.float32, False, True)


def test_load_strict_keeps_integer_buffers(tmp_path):
    norm = nn.BatchNorm1d(2)
    norm.num_batches_tracked.fill_(2**40 + 1)
    save_file(norm.state_dict(), tmp_path / "model.safetensors")
    loaded = nn.BatchNorm1d(2)
    load_strict(loaded, tmp_path, torch.float16)
    assert loaded.num_batches_tracked == 2**40 + 1
    assert loaded.running_mean is not None
    assert loaded.running_mean.dtype == torch.float16


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(3, 2)}, "1/2 tensors match the model; 1 missing: bias"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), **{n: torch.zeros(1) for n in "pqrs"}},
            "2/2 tensors match the model; 4 unexpected: p, q, r, ...",
        ),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)},
            "1 tensors of the wrong shape: weight is (2, 3), not (3, 2)",
        ),
    ],
)
def test_load_strict_mismatch(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "model.safetensors")
    linear = nn.Linear(2, 3)
    before = linear.weight.clone()
    with pytest.raises(UserError) as error:
        load_strict(linear, tmp_path)
    assert str(error.value) == f"{tmp_path}: {message}"
    assert torch.equal(linear.weight, before)


def test_read_folder_takes_pytorch_files_where_there_are_no_safetensors(tmp_path):
    with pytest.raises(UserError, match=r"no model.safetensors and no pytorch_model.bin, nor an index of either$"):
        read_folder(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "one.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert sorted(read_folder(tmp_path)) == ["a", "b"]
    (tmp_path / "two.bin").unlink()
    with pytest.raises(UserError, match=r"two.bin: missing, but pytorch_model.bin.index.json names it$"):
        read_folder(tmp_path)
    save_file({"c": torch.ones(3)}, tmp_path / "model.safetensors")
    assert list(read_folder(tmp_path)) == ["c"]


def test_tensor_files_errors(tmp_path):
    with pytest.raises(UserError, match=r"no model.safetensors and no pytorch_model.bin, nor an index of either$"):
        tensor_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        tensor_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"gone.safetensors: missing, but model.safetensors.index.json names it"):
        tensor_files(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json: not JSON"):
        tensor_files(tmp_path)


def test_model_files_of_wanted_names(tmp_path):
    """Of those that the index names; a file that is not wanted may be missing."""
    index = {"weight_map": {"a.w": "1.bin", "a.v": "2.bin", "b.w": "2.bin", "c.w": "3.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("1.bin", "2.bin"):
        torch.save({}, tmp_path / name)
    assert model_files(tmp_path, lambda name: name.startswith("b.")) == [tmp_path / "2.bin"]
    assert model_files(tmp_path, lambda name: "w" in name and name < "c") == [tmp_path / "1.bin", tmp_path / "2.bin"]
    assert model_files(tmp_path, lambda name: False) == []
    with pytest.raises(UserError, match=r"3.bin: missing, but pytorch_model.bin.index.json names it"):
        model_files(tmp_path)


def test_read_tensors_of_any_kind_of_file(tmp_path):
    tensors = {"a": torch.randn(2), "b": torch.arange(3)}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.bin")
    torch.save({"model": tensors | {"note": "x"}, "epoch": 3}, tmp_path / "t.pth")
    for name in ("t.safetensors", "t.bin", "t.pth"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    with pytest.raises(UserError, match=r"gone.pt: not readable as tensors only \(.*No such file"):
        read_tensors(tmp_path / "gone.pt")


def test_identity_tells_header_size_and_content_apart(tmp_path):
    folder = tmp_path / "weights" / "org" / "net"
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    save_file({"w": torch.zeros(200_000)}, file)
    first = identity(folder)
    assert first["name"] == "org/net"
    assert first["files"]["model.safetensors"]["size"] == file.stat().st_size
    assert identity(folder) == first
    save_file({"v": torch.zeros(200_000)}, file)
    assert (
        identity(folder)["files"]["model.safetensors"]["header_sha256"]
        != (first["files"]["model.safetensors"]["header_sha256"])
    )
    save_file({"w": torch.cat((torch.zeros(199_999), torch.ones(1)))}, file)
    last = identity(folder)["files"]["model.safetensors"]
    assert last["header_sha256"] == first["files"]["model.safetensors"]["header_sha256"]
    assert last["blocks_sha256"] != first["files"]["model.safetensors"]["blocks_sha256"]


def test_identity_of_the_hub_cache_and_of_one_file(tmp_path):
    folder = snapshot(tmp_path, "c1")
    torch.save({"w": torch.zeros(3)}, folder / "net.pth")
    assert identity(folder)["name"] == "org/net"
    alone = tmp_path / "net.pth"
    alone.write_bytes((folder / "net.pth").read_bytes())
    assert identity(alone) == {"name": "net.pth", "files": identity(folder)["files"]}


def test_full_sha256(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "old.bin").write_bytes(b"not read beside safetensors")
    whole = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert full_sha256(tmp_path) == {"model.safetensors": whole}

"""The audio encoders with small random weights, in folders as the published ones are laid out."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.encoders.auristream import AuriStreamConfig, Gpt
from model.encoders.wavcoch import Chain, WavCochConfig

CHAIN = WavCochConfig([(24, 3), (16, 1), (13, 1)], window=201, rows=40)
GPT = AuriStreamConfig(n_embd=32, n_layer=4, n_head=2, n_inner=64)


def write(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


@pytest.fixture(scope="session", name="write")
def write_fixture():
    """Tensors and a config.json into a folder, whose name comes back."""
    return write


@pytest.fixture(scope="session")
def chain():
    torch.manual_seed(0)
    chain = Chain(CHAIN)
    for layer in (chain.fourier, *chain.encoder):
        torch.nn.init.normal_(layer.weight, std=(layer.weight[0].numel()) ** -0.5)
        torch.nn.init.normal_(layer.bias, std=0.01)
    return chain.requires_grad_(False)


@pytest.fixture(scope="session")
def gpt():
    torch.manual_seed(1)
    gpt = Gpt(GPT)
    for name, parameter in gpt.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "wte" in name else 1.5 * parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return gpt.requires_grad_(False)


@pytest.fixture(scope="session")
def weights(tmp_path_factory, chain, gpt):
    """Folders of an AuriStream and of its WavCoch."""
    root = tmp_path_factory.mktemp("weights")
    write(root / "auristream", gpt.state_dict())
    write(root / "wavcoch", chain.state_dict())
    return root


def sound(seconds, seed=0):
    """Noise whose colour and level change over time."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(int(16000 * seconds), generator=generator)
    time = torch.arange(len(noise)) / 16000
    return 0.1 * noise * (1.2 + torch.sin(7 * time)) + 0.2 * torch.sin(
        2 * torch.pi * (200 + 90 * torch.sin(3 * time)) * time
    )


@pytest.fixture(scope="session", name="sound")
def sound_fixture():
    return sound

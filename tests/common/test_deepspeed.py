"""DeepSpeed's files: what they set, what they leave to the command, and where the two disagree."""

import json
from dataclasses import dataclass, field

import pytest

from common import config, deepspeed
from common.config import UserError, opt
from common.optim import OptimConfig


@dataclass
class Config:
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = opt(1, "samples", "--batch-size")
    accum: int = opt(1, "micro-batches", "--accum")
    precision: str = opt("bf16", "arithmetic", choices=("fp32", "bf16", "fp16"))
    shard: str | None = opt(None, "parts", "--shard", choices=("grads", "full"), bare="full")
    offload: bool = opt(False, "to the host", "--offload")
    deepspeed: str | None = opt(None, "file", "--deepspeed")


# the two files of MultiMood
ZERO3 = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 2000, "initial_scale_power": 12},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "auto", "pin_memory": True},
        "offload_param": {"device": "auto", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 11569550,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
ZERO2 = {
    "gradient_clipping": 5.0,
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 500000},
}
LEFT = {"shard": None, "offload": False, "precision": "bf16", "batch_size": 1, "accum": 1}


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """A command line with a file of that content: the config that it makes, and what was printed."""
    monkeypatch.chdir(tmp_path)

    def apply(content, *argv, world=1):
        said = []
        (tmp_path / "ds.json").write_text(json.dumps(content))
        cfg = config.load(Config, ["--deepspeed", "ds.json", *map(str, argv)])
        return deepspeed.apply(cfg, world, said.append), said

    return apply


def changed(cfg):
    """{path: value} of what is not by default."""
    found = {name: getattr(cfg, name) for name in LEFT if getattr(cfg, name) != LEFT[name]}
    return found | {name: value for name, value in vars(cfg.optim).items() if value != getattr(OptimConfig(), name)}


def test_the_published_stage_3(follow):
    cfg, said = follow(ZERO3, "--bf16", "True", "--fp16", "False", "--max_grad_norm", 1.0, "--batch-size", 8)
    assert changed(cfg) == {"shard": "full", "batch_size": 8}
    assert said == [
        "ds.json: stage 3 -> --shard full, gradient_clipping 1.0 -> --grad-clip 1",
        "ds.json: not needed here: fp16.loss_scale_window, fp16.initial_scale_power, offload_optimizer.pin_memory, "
        "offload_param.pin_memory, overlap_comm, sub_group_size, reduce_bucket_size, stage3_prefetch_bucket_size, "
        "stage3_gather_16bit_weights_on_model_save",
    ]


def test_the_published_stage_2_clips_at_5(follow):
    cfg, said = follow(ZERO2)
    assert changed(cfg) == {"shard": "grads", "grad_clip": 5.0}
    assert said[0] == "ds.json: stage 2 -> --shard grads, gradient_clipping 5.0 -> --grad-clip 5"
    with pytest.raises(UserError) as error:
        follow(ZERO2, "--max_grad_norm", 1.0)
    assert str(error.value) == (
        "--max_grad_norm 1.0 and ds.json: gradient_clipping 5.0 give optim.grad_clip different values"
    )


def test_the_settings_of_a_yaml_count_as_the_commands(follow, tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {grad_clip: 2.0}")
    with pytest.raises(UserError, match=r"^run\.yaml: optim\.grad_clip 2\.0 and ds\.json: gradient_clipping 5\.0 give"):
        follow(ZERO2, "--cfg", "run.yaml")
    assert follow(ZERO2, "--cfg", "run.yaml", "--grad-clip", 5)[0].optim.grad_clip == 5.0  # a flag over it


@pytest.mark.parametrize(
    ("content", "argv", "expected"),
    [
        ({}, "--shard --grad-clip 3", {"shard": "full", "grad_clip": 3.0}),
        ({"zero_optimization": {"stage": 0}}, "", {}),
        ({"zero_optimization": {"stage": 1}}, "", {}),
        ({"zero_optimization": {"stage": "auto"}}, "--shard grads", {"shard": "grads"}),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}}, "",
         {"offload": True}),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "auto"}}}, "", {}),
        ({"bf16": {"enabled": True}}, "", {}),
        ({"bf16": {"enabled": False}}, "", {"precision": "fp32"}),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "", {"precision": "fp16"}),
        ({"fp16": {"enabled": False}}, "", {}),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "", {"precision": "fp32"}),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, "--accum 4",
         {"batch_size": 2, "accum": 4}),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.3, "betas": [0.9, 0.95],
                                                    "eps": 1e-8}}}, "--lr 2e-5",
         {"lr": 2e-5, "weight_decay": 0.3, "beta2": 0.95}),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "warmup_min_lr": 0,
                                                            "warmup_max_lr": 1e-3, "total_num_steps": "auto"}}}, "",
         {"schedule": "linear", "warmup_steps": 7, "warmup_lr": 0.0, "lr": 1e-3}),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "--warmup-steps 3",
         {"schedule": "constant_with_warmup", "warmup_steps": 3}),
    ],
)  # fmt: skip
def test_what_a_file_sets(follow, content, argv, expected):
    assert changed(follow(content, *argv.split())[0]) == expected


@pytest.mark.parametrize(
    ("content", "argv", "line"),
    [
        ({"zero_optimization": {"stage": 3}}, "--shard grads",
         "--shard grads and ds.json: zero_optimization.stage 3 give shard different values"),
        ({"zero_optimization": {"stage": 1}}, "--shard",
         "--shard full and ds.json: zero_optimization.stage 1 give shard different values"),
        ({"zero_optimization": {"offload_param": {"device": "none"}}}, "--offload",
         "--offload true and ds.json: zero_optimization.offload_param.device none give offload different values"),
        ({"bf16": {"enabled": False}}, "--bf16",
         "--bf16 bf16 and ds.json: bf16.enabled false give precision different values"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "",
         "ds.json: bf16.enabled true and ds.json: fp16.enabled true give precision different values"),
        ({"train_micro_batch_size_per_gpu": 2}, "--per_device_train_batch_size 8",
         "--per_device_train_batch_size 8 and ds.json: train_micro_batch_size_per_gpu 2 give batch_size different "
         "values"),
        ({"optimizer": {"params": {"lr": 1e-4}}}, "--learning_rate 2e-5",
         "--learning_rate 2e-05 and ds.json: optimizer.params.lr 0.0001 give optim.lr different values"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type cosine",
         "--lr_scheduler_type cosine and ds.json: scheduler.type WarmupLR give optim.schedule different values"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "",
         "ds.json: zero_optimization.offload_optimizer.device 'nvme' is not offered here (only 'none', 'cpu', 'auto')"),
        ({"zero_optimization": {"stage": 4}}, "",
         "ds.json: zero_optimization.stage 4 is not offered here (only 0, 1, 2, 3, 'auto')"),
        ({"optimizer": {"type": "Lamb"}}, "",
         "ds.json: optimizer.type 'Lamb' is not offered here (only 'Adam', 'AdamW', 'auto')"),
        ({"fp16": {"loss_scale": 128}}, "", "ds.json: fp16.loss_scale 128 is not offered here (only 0, 'auto')"),
        ({"gradient_clip": "auto"}, "", "ds.json: unknown key 'gradient_clip' (nearest: gradient_clipping)"),
        ({"zero_optimization": {"overlap_com": True}}, "",
         "ds.json: unknown key 'zero_optimization.overlap_com' (nearest: zero_optimization.overlap_comm)"),
        ({"q": 1}, "", "ds.json: unknown key 'q'"),
        ({"gradient_clipping": "no"}, "", "ds.json: gradient_clipping no: 'no' is not a float"),
        ({"train_batch_size": 16}, "--batch-size 8",
         "ds.json: train_batch_size 16, but the batch is 8 x 1 processes x 1 accumulated = 8"),
    ],
)  # fmt: skip
def test_what_cannot_be(follow, content, argv, line):
    with pytest.raises(UserError) as error:
        follow(content, *argv.split())
    assert str(error.value) == line


def test_the_batch_of_all_processes(follow):
    content = {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 4}
    assert follow(content, "--accum", 3, world=4)[0].batch_size == 4


def test_a_file_that_is_none(follow, tmp_path):
    with pytest.raises(UserError, match=r"^--deepspeed: zero\.json not found$"):
        deepspeed.apply(Config(deepspeed="zero.json"), 1, print)
    (tmp_path / "zero.json").write_text('{"gradient_clipping": 1.0,  // as before\n}')
    with pytest.raises(UserError, match=r"^zero\.json: not JSON"):
        deepspeed.apply(Config(deepspeed="zero.json"), 1, print)


def test_without_a_file_nothing_is_said(capsys):
    cfg = Config()
    assert deepspeed.apply(cfg, 1, print) is cfg
    assert capsys.readouterr().out == ""


def test_a_resumed_run_hears_what_its_command_names(follow):
    first, _ = follow(ZERO2)
    saved = config.to_dict(first)
    assert saved["deepspeed"] == "ds.json"
    same, changes = config.resume(config.load(Config, []), saved)  # the file is not asked again
    assert (same.shard, same.optim.grad_clip, changes) == ("grads", 5.0, [])
    now, changes = config.resume(follow(ZERO3)[0], saved)
    assert (now.shard, now.optim.grad_clip) == ("full", 1.0)
    assert changes == ["optim.grad_clip: 5.0 -> 1.0", "shard: grads -> full"]

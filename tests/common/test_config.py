"""Defaults, YAML and flags: precedence, types, names, error texts, round trips."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from common import config
from common.config import UserError, opt

ROOT = Path(__file__).parents[2]


@dataclass
class Optim:
    lr: float = opt(1e-5, "peak learning rate", "--lr", span=(1e-6, 1e-4))
    min_lr: float = opt(1e-6, "last learning rate")
    schedule: str = opt("constant", "shape", choices=("constant", "linear_warmup_cosine"))
    grad_clip: float = opt(1.0, "largest gradient norm", "--grad-clip")
    size: int = opt(1, "a name that model has too")


@dataclass
class Model:
    llm: str = opt("org/name", "decoder weights", "--llm")
    lora_r: int = opt(64, "adapter rank", "--lora-r")
    image_size: int = opt(448, "pixels")
    grad_checkpoint: bool = opt(False, "recompute activations")
    size: int = opt(1, "a name that optim has too")


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=lambda: Optim(min_lr=2e-6))
    epochs: int = opt(30, "epochs in all", "--epochs")
    batch_size: int = opt(1, "clips a step")
    precision: str = opt("bf16", "arithmetic", choices=("fp32", "bf16", "fp16"))
    out: str | None = opt(None, "run folder", "--out")
    resume: str | None = opt(None, "go on", "--resume", bare="last")
    ckpt: list[str] = opt([], "checkpoints")
    ratios: list[float] = opt([0.5], "ratios")
    tasks: dict[str, float] = opt({"emotion": 1.0}, "tasks", "--task-pool")
    renames: dict[str, str] = opt({}, "renames")
    long: list[str] = opt(["happy", "sad", "neutral", "surprised"], "labels")
    mode: Literal["a", "b"] = "a"
    evaluate: bool = opt(False, "score while training")


def load(*argv: str) -> Config:
    return config.load(Config, list(argv))


def load_yaml(tmp_path: Path, text: str, *argv: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load("--cfg", str(path), *argv)


def error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv)
    return str(caught.value)


def test_defaults_are_the_script_s_and_not_shared() -> None:
    first, second = load(), load()
    assert first == Config()
    assert first.optim.min_lr == 2e-6
    first.ckpt.append("x")
    first.tasks["y"] = 1.0
    assert (second.ckpt, second.tasks, load().ckpt) == ([], {"emotion": 1.0}, [])


@pytest.mark.parametrize(
    "argv",
    ["--optim.lr 2e-5", "--optim.lr=2e-5", "--lr 2e-5", "--init-lr 2e-5", "--init_lr=2e-5", "--learning-rate 2e-5"],
)
def test_names_of_an_option(argv: str) -> None:
    assert load(*argv.split()).optim.lr == 2e-5


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--epochs 1e1", "epochs", 10),
        ("--epochs=-3", "epochs", -3),
        ("--epochs 9007199254740993", "epochs", 2**53 + 1),
        ("--out none", "out", None),
        ("--out a=b", "out", "a=b"),
        ("--out=a=b", "out", "a=b"),
        ("--out=", "out", ""),
        ("--evaluate", "evaluate", True),
        ("--evaluate true", "evaluate", True),
        ("--evaluate off", "evaluate", False),
        ("--evaluate=No", "evaluate", False),
        ("--evaluate --no-evaluate", "evaluate", False),
        ("--ckpt A B C", "ckpt", ["A", "B", "C"]),
        ("--ckpt A,B", "ckpt", ["A", "B"]),
        ("--ckpt A,1 B", "ckpt", ["A,1", "B"]),
        ("--ckpt [A,B]", "ckpt", ["A", "B"]),
        ("--ckpt=", "ckpt", []),
        ("--checkpoint A", "ckpt", ["A"]),
        ("--ratios 1,1e-3", "ratios", [1.0, 0.001]),
        ("--tasks emotion=0.3,reason=7e-1", "tasks", {"emotion": 0.3, "reason": 0.7}),
        ("--task_pool=emotion=1", "tasks", {"emotion": 1.0}),
        ("--task-pool emotion,reason,reason", "tasks", {"emotion": 1.0, "reason": 2.0}),
        ("--task-pool emotion reason=2", "tasks", {"emotion": 1.0, "reason": 2.0}),
        ("--renames a=b=c,d=e", "renames", {"a": "b=c", "d": "e"}),
        ("--resume", "resume", "last"),
        ("--resume --evaluate", "resume", "last"),
        ("--resume out/x", "resume", "out/x"),
        ("--mode b", "mode", "b"),
    ],
)
def test_values_of_flags(argv: str, name: str, value: object) -> None:
    got = getattr(load(*argv.split()), name)
    assert got == value
    assert type(got) is type(value)


def test_braces_on_the_command_line() -> None:
    assert load("--tasks", "{emotion: 1, reason: 2}").tasks == {"emotion": 1.0, "reason": 2.0}


def test_flags_over_yaml_over_defaults(tmp_path: Path) -> None:
    cfg = load_yaml(tmp_path, "optim: {lr: 3e-5, grad_clip: 0.5}\nepochs: 7\nmodel.lora_r: 8", "--lr", "4e-5")
    assert (cfg.optim.lr, cfg.optim.grad_clip, cfg.optim.min_lr) == (4e-5, 0.5, 2e-6)
    assert (cfg.epochs, cfg.model.lora_r) == (7, 8)


def test_yaml_values(tmp_path: Path) -> None:
    cfg = load_yaml(tmp_path, "tasks: [emotion, reason, reason]\nckpt: [1, b]\nresume: true\nout: null\nevaluate: yes")
    assert (cfg.tasks, cfg.ckpt, cfg.resume) == ({"emotion": 1.0, "reason": 2.0}, ["1", "b"], "last")
    assert (cfg.out, cfg.evaluate) == (None, True)
    assert load_yaml(tmp_path, "tasks: {emotion: 0.3}\nratios: 2").tasks == {"emotion": 0.3}
    assert load_yaml(tmp_path, "") == Config()


def test_published_recipe_loads_unchanged(tmp_path: Path) -> None:
    cfg = load_yaml(
        tmp_path,
        """
        model:
          arch: minigpt_v2
          model_type: pretrain
          end_sym: "</s>"
          low_resource: False
          llama_model: "/weights/Llama-2-7b-chat-hf"
          ckpt: "/stage1/checkpoint_29.pth"
          use_grad_checkpoint: True
          lora_r: 32
        datasets:
          feature_face_caption:
            batch_size: 2
            vis_processor: {train: {name: blip2_image_train, image_size: 224}}
            text_processor: {train: {name: blip_caption}}
            sample_ratio: 30
        run:
          task: image_text_pretrain
          lr_sched: "linear_warmup_cosine_lr"
          init_lr: 1e-6
          max_epoch: 20
          output_dir: out/here
          amp: True
          evaluate: True
          train_splits: ["train"]
          resume_ckpt_path: null
          world_size: 2
          distributed: True
          dist_url: "env://"
          wandb_log: False
        """,
    )
    assert (cfg.model.llm, cfg.model.lora_r, cfg.model.image_size) == ("/weights/Llama-2-7b-chat-hf", 32, 224)
    assert (cfg.optim.lr, cfg.optim.schedule, cfg.precision) == (1e-6, "linear_warmup_cosine", "bf16")
    assert (cfg.epochs, cfg.batch_size, cfg.ckpt, cfg.out) == (20, 2, ["/stage1/checkpoint_29.pth"], "out/here")
    assert (cfg.model.grad_checkpoint, cfg.evaluate, cfg.resume) == (True, True, None)


@pytest.mark.parametrize(
    ("argv", "precision"),
    [
        ("--bf16", "bf16"),
        ("--fp16", "fp16"),
        ("--bf16 True --fp16 False", "bf16"),
        ("--bf16 False --fp16 True", "fp16"),
        ("--no-bf16", "fp32"),
        ("--no-fp16", "bf16"),
        ("--amp", "bf16"),
        ("--no-amp", "fp32"),
        ("--amp --precision fp16", "fp16"),
        ("--amp --no-bf16", "fp16"),
    ],
)
def test_precision_switches(argv: str, precision: str) -> None:
    assert load(*argv.split()).precision == precision


def test_amp_keeps_a_mixed_precision_and_lifts_fp32(tmp_path: Path) -> None:
    assert load_yaml(tmp_path, "precision: fp16", "--amp").precision == "fp16"
    assert load_yaml(tmp_path, "precision: fp32", "--amp").precision == "bf16"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim.lrr 3", "unknown option --optim.lrr (nearest: --optim.lr)"),
        ("--batchsize 3", "unknown option --batchsize (nearest: --batch-size)"),
        ("--qqqq", "unknown option --qqqq (--help lists them all)"),
        ("--size 3", "--size is ambiguous: model.size or optim.size"),
        ("--data-path x", "unknown option --data-path"),  # an alias of a field that this script has not
        ("--no-epochs", "unknown option --no-epochs (nearest: --epochs)"),
        ("--epochs two", "--epochs: 'two' is not an int"),
        ("--epochs 1.5", "--epochs: '1.5' is not an int"),
        ("--max-epoch inf", "--max-epoch: 'inf' is not an int"),
        ("--lr fast", "--lr: 'fast' is not a float"),
        ("--evaluate=maybe", "--evaluate: 'maybe' is not a bool"),
        ("--ratios 1,x", "--ratios: 'x' is not a float"),
        ("--tasks emotion=x", "--tasks: 'x' is not a float"),
        ("--renames a", "--renames: 'a' is not name=value"),
        ("--ckpt [a", "--ckpt: '[a' is not a list or a mapping"),
        ("--epochs", "--epochs: needs a value"),
        ("--epochs --evaluate", "--epochs: needs a value"),
        ("--ckpt", "--ckpt: needs a value"),
        ("--precision fp8", "--precision: 'fp8' is not one of fp32, bf16, fp16"),
        ("--mode c", "--mode: 'c' is not one of a, b"),
        ("--lr 1e-5 --learning-rate 2e-5", "--lr and --learning-rate give optim.lr different values"),
        ("--bf16 --fp16", "--bf16 and --fp16 give precision different values"),
        ("--no-amp --bf16", "--amp and --bf16 give precision different values"),
        ("--amp --no-bf16 --no-fp16", "--amp and --bf16 and --fp16 give precision different values"),
        ("--report_to wandb", "--report_to: 'wandb' (only tensorboard here)"),
        ("--run-name", "--run-name: needs a value"),
        ("--arch minigpt_v2", "unknown option --arch"),  # a key of YAML files only
        ("train", "unexpected argument 'train' (options start with --)"),
        ("--evaluate train", "unexpected argument 'train' (options start with --)"),
        ("--cfg no/such.yaml", "--cfg: no/such.yaml not found"),
        ("--cfg .", "--cfg: . cannot be read (Is a directory)"),
        ("--cfg", "--cfg: needs a value"),
    ],
)
def test_flag_errors(argv: str, message: str) -> None:
    assert error(*argv.split()).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 3}", "unknown key 'optim.lrr' (nearest: optim.lr)"),
        ("optim: {epochs: 3}", "unknown key 'optim.epochs' (nearest: epochs)"),
        ("run: {init_lrr: 3}", "unknown key 'run.init_lrr' (nearest: init_lr)"),
        ("modle: {lora_r: 3}", "unknown key 'modle' (nearest: mode)"),
        ("run: {max_epoch: two}", "run.max_epoch: 'two' is not an int"),
        ("epochs: null", "epochs: None is not an int"),
        ("epochs: true", "epochs: True is not an int"),
        ("out: [a]", "out: ['a'] is not a str"),
        ("epochs: 2\nrun: {max_epoch: 3}", "epochs and run.max_epoch give epochs different values"),
        ("model: {arch: blip2}", "arch: 'blip2' (only minigpt_v2 here)"),
        ("run: {train_splits: [train, valid]}", "train_splits: ['train', 'valid'] (only ['train'] here)"),
        ("run: {wandb_log: true}", "wandb_log: True is not offered here"),
        ("optim: {arch: minigpt_v2}", "unknown key 'optim.arch'"),
        ("- a", "holds a list, not settings"),
        ("a: 1\nb: [", "not YAML (expected the node content, but found '<stream end>')"),
    ],
)
def test_yaml_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_yaml(tmp_path, text)
    where, _, rest = str(caught.value).partition(": ")
    assert where.startswith(str(tmp_path / "x.yaml"))
    assert rest.startswith(message)


def test_flags_that_leave_no_choice() -> None:
    assert load("--report_to", "tensorboard", "--run_name=first") == Config()


def test_same_value_by_two_names_and_a_repeated_flag() -> None:
    assert load("--lr", "2e-5", "--learning-rate", "0.00002").optim.lr == 2e-5
    assert load("--lr", "2e-5", "--lr", "3e-5").optim.lr == 3e-5


def test_warning_outside_the_guide_s_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("--lr", "0.1")
    assert capsys.readouterr().err == "warning: --lr 0.1 is outside the guide's range 1e-06 to 0.0001\n"
    load_yaml(tmp_path, "run: {init_lr: 0.1}", "--lr", "1e-4")
    load()
    assert capsys.readouterr().err == ""


def test_round_trips(tmp_path: Path) -> None:
    cfg = load("--lr", "1e-5", "--ckpt", "A", "B", "--tasks", "a=0.5", "--renames", "b=c", "--resume", "--no-amp")
    saved = config.to_dict(cfg)
    assert saved["optim"]["lr"] == 1e-5
    assert config.from_dict(Config, saved) == cfg
    assert load_yaml(tmp_path, yaml.safe_dump(saved)) == cfg


def test_from_dict_is_strict() -> None:
    with pytest.raises(UserError, match=r"saved config: unknown key 'optim\.lrr' \(nearest: optim\.lr\)"):
        config.from_dict(Config, {"optim": {"lrr": 1.0}})
    with pytest.raises(UserError, match="saved config: unknown key 'lr'"):
        config.from_dict(Config, {"lr": 1.0})
    with pytest.raises(UserError, match="saved config: epochs: 'two' is not an int"):
        config.from_dict(Config, {"epochs": "two"})


def test_resume_takes_the_saved_config_under_explicit_flags(tmp_path: Path) -> None:
    saved = config.to_dict(load("--lr", "2e-5", "--epochs", "5", "--precision", "fp32", "--resume", "old"))
    now = load_yaml(tmp_path, "epochs: 99\noptim: {lr: 9e-5}", "--resume", "--max-epoch", "6", "--batch-size", "1")
    cfg, changes = config.resume(now, saved)
    assert (cfg.epochs, cfg.optim.lr, cfg.precision, cfg.resume) == (6, 2e-5, "fp32", "last")
    assert changes == ["epochs: 5 -> 6"]
    assert config.resume(load("--amp"), saved)[1] == ["precision: fp32 -> bf16"]


def test_preset_yields_to_yaml_and_flags(tmp_path: Path) -> None:
    cfg = load_yaml(tmp_path, "epochs: 9", "--lr", "2e-5")
    cfg = config.preset(cfg, {"epochs": 1, "optim.lr": 1.0, "batch_size": 8})
    assert (cfg.epochs, cfg.optim.lr, cfg.batch_size) == (9, 2e-5, 8)
    assert config.resume(cfg, config.to_dict(Config()))[1] == ["optim.lr: 1e-05 -> 2e-05"]


def test_what_a_command_said_itself(tmp_path: Path) -> None:
    cfg = load_yaml(tmp_path, "epochs: 9", "--learning-rate", "2e-5")
    assert config.source(cfg) == str(tmp_path / "x.yaml")
    assert config.source(load()) is None
    assert config.flagged(cfg, "optim.lr")
    assert not config.flagged(cfg, "epochs")


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    """By its own name, whether flag or YAML; what a preset sets is nobody's choice, a default asks for nothing."""
    file = tmp_path / "x.yaml"
    file.write_text("model:\n  lora_r: 8\n")
    cfg = config.preset(config.load(Config, ["--cfg", str(file), "--lr", "1"]), {"epochs": 3, "model.image_size": 14})
    config.only(cfg, ["model", "optim"], "clips")
    with pytest.raises(UserError, match=r"^--lr: not read by clips$"):
        config.only(cfg, ["model"], "clips")
    config.without(cfg, ["epochs", "model.image_size", "optim.l", "optim.min_lr"], "clips")
    with pytest.raises(UserError, match=r"^--lr: not read by clips$"):
        config.without(cfg, ["optim.lr"], "clips")
    with pytest.raises(UserError, match=r"lora_r: not read by clips$"):
        config.without(cfg, ["model"], "clips")
    config.without(config.load(Config, ["--lr", "1e-5"]), ["optim"], "clips")


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--epochs", "two", "--help")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines]
    cells = {row[1]: [cell.strip() for cell in row[2:] if cell] for row in rows if row[0] == "" and len(row) > 2}
    assert cells["--lr, --optim.lr"] == ["float", "1e-05", "peak learning rate (guide: 1e-06 to 0.0001)"]
    assert cells["--task-pool, --tasks"] == ["dict[str, float]", "emotion=1.0", "tasks"]
    assert cells["--precision"] == ["str", "bf16", "arithmetic (one of fp32, bf16, fp16)"]
    assert cells["--long"] == ["list[str]", "...", "labels (default: happy,sad,neutral,surprised)"]
    assert cells["--resume"] == ["str", "none", "go on (alone: last)"]
    assert {"general:", "optim:", "model:", "  --init-lr = --lr", "  --amp sets --precision"} <= set(lines)
    assert not any("--data-path" in line for line in lines)  # no field of this script
    assert len({line.index("  float  ") for line in lines if "  float  " in line}) == 1  # aligned


SCRIPT = """
import sys
from dataclasses import dataclass
from common.config import UserError, opt, run

@dataclass
class Config:
    epochs: int = opt(1, "epochs")

def main(cfg):
    if cfg.epochs == 2:
        raise UserError("two\\nlines")
    if cfg.epochs == 3:
        raise KeyboardInterrupt
    assert "torch" not in sys.modules
    print(cfg.epochs)

run(Config, main)
"""


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        ("--epochs 1", 0, "1\n", ""),
        ("--epochs two", 2, "", "toy.py: error: --epochs: 'two' is not an int\n"),
        ("--epochs 2", 2, "", "toy.py: error: two lines\n"),
        ("--epochs 3", 130, "", ""),
    ],
)
def test_run_exit_codes(tmp_path: Path, argv: str, code: int, out: str, err: str) -> None:
    (tmp_path / "toy.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "toy.py"), *argv.split()]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_only_rank_0_reports_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "toy.py"), "--epochs", "two"]
    env = {"PYTHONPATH": str(ROOT), "RANK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")

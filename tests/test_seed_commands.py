"""The guides of Emotion-LLaMA, MultiMood, MOSEI and the speech pipeline: every YAML block and command works here."""

import json
import math
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

import demo
import eval as evaluation
import extract
import meld_train
import predict
import train_clap
import train_llm
import train_mosei
import train_slm
from common import config, optim
from common.options import options
from data import mock_speech
from data.features import StoreWriter
from model.lora import LoRALinear
from tests.training import error, make_lines, run
from tools import export

ROOT = Path(train_llm.__file__).parent
SCRIPTS = {
    "train_llm": train_llm,
    "train_mosei": train_mosei,
    "train_clap": train_clap,
    "train_slm": train_slm,
    "meld_train": meld_train,
    "eval": evaluation,
    "predict": predict,
    "demo": demo,
    "extract": extract,
}

STAGE1 = """
model:
  arch: minigpt_v2
  llama_model: "/path/to/checkpoints/Llama-2-7b-chat-hf"
  ckpt: "/path/to/checkpoints/minigptv2_checkpoint.pth"
  lora_r: 64
  lora_alpha: 16
datasets:
  feature_face_caption:
    batch_size: 1
run:
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 1e-5
  min_lr: 1e-6
  warmup_lr: 1e-6
  weight_decay: 0.05
  max_epoch: 30
  num_workers: 6
  iters_per_epoch: 1000
  warmup_steps: 1000
  seed: 42
  amp: True
"""
STAGE2 = """
model:
  arch: minigpt_v2
  llama_model: "/path/to/checkpoints/Llama-2-7b-chat-hf"
  ckpt: "/path/to/stage1/checkpoint_29.pth"
  use_grad_checkpoint: True
  chat_template: True
  lora_r: 64
  lora_alpha: 16
datasets:
  feature_face_caption:
    batch_size: 1
run:
  task: image_text_pretrain
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 1e-6
  min_lr: 1e-6
  warmup_lr: 1e-6
  weight_decay: 0.05
  max_epoch: 30
  num_workers: 6
  iters_per_epoch: 1000
  warmup_steps: 1000
  seed: 42
  amp: True
"""
RECIPE = {
    "model.llm": "/path/to/checkpoints/Llama-2-7b-chat-hf", "model.lora_r": 64, "model.lora_alpha": 16,
    "batch_size": 1, "optim.schedule": "linear_warmup_cosine", "optim.min_lr": 1e-6, "optim.warmup_lr": 1e-6,
    "optim.weight_decay": 0.05, "epochs": 30, "num_workers": 6, "iters_per_epoch": 1000, "optim.warmup_steps": 1000,
    "seed": 42, "precision": "bf16", "model.grad_checkpoint": True, "data.chat_template": True,
}  # fmt: skip
OF_STAGE1 = {"optim.lr": 1e-5, "ckpt": "/path/to/checkpoints/minigptv2_checkpoint.pth"}
OF_STAGE2 = {"optim.lr": 1e-6, "ckpt": "/path/to/stage1/checkpoint_29.pth"}
VIDEOS = "/path/to/datasets/Emotion/MER2023/video"
LAST = "/path/to/Emotion-LLaMA/checkpoints/save_checkpoint/2024xxxx-v1/checkpoint_29.pth"
DEMO = "/path/to/Emotion-LLaMA/checkpoints/save_checkpoint/Emotion_LLaMA.pth"
EMER = """
llama_model: "/path/to/checkpoints/Llama-2-7b-chat-hf"
ckpt: "/path/to/save_checkpoint/2024xxxx-v2/checkpoint_29.pth"
"""
BLOCKS = [
    (f"image_path: {VIDEOS}", {"data.image_path": VIDEOS}),
    ("annotation_file: MERR_coarse_grained.txt", {"data.annotation_file": "MERR_coarse_grained.txt"}),
    (STAGE1, RECIPE | OF_STAGE1),
    ("amp: True", {"precision": "bf16"}),
    ("use_grad_checkpoint: True", {"model.grad_checkpoint": True}),
    ("image_size: 224", {"model.image_size": 224}),
    ('resume_ckpt_path: "checkpoints/save_checkpoint/checkpoint_15.pth"',
     {"resume": "checkpoints/save_checkpoint/checkpoint_15.pth"}),
    ("run:\n  evaluate: true\n  eval_epoch_interval: 5", {"evaluate": True, "eval_every": 5}),
    (f'ckpt: "{LAST}"', {"ckpt": LAST}),
    (f'ckpt: "{DEMO}"', {"ckpt": DEMO}),
    ("annotation_file: MERR_fine_grained.txt", {"data.annotation_file": "MERR_fine_grained.txt"}),
    (STAGE2, RECIPE | OF_STAGE2),
    ("# Stage 1: init_lr: 1e-5\n# Stage 2: init_lr: 1e-6", {}),
    ("batch_size: 1", {"batch_size": 1}),
    ("model:\n  arch: minigpt_v2\n  model_type: pretrain", {}),
    ("enable_augmentation: true\naugmentation_prob: 0.5",
     {"data.enable_augmentation": True, "data.augmentation_prob": 0.5}),
    ("weight_decay: 0.05\ndropout: 0.1", {"optim.weight_decay": 0.05, "model.lora_dropout": 0.1}),
    (EMER, {"model.llm": RECIPE["model.llm"], "ckpt": "/path/to/save_checkpoint/2024xxxx-v2/checkpoint_29.pth"}),
    ('run:\n  save_best: true\n  metric: "clue_overlap"', {"save_best": True, "metric": "clue_overlap"}),
]  # fmt: skip
FLAGS = {
    "train_llm": """
        model.llm --llm, model.model_type --model-type, model.tokenizer --tokenizer,
        model.lora_r --lora-r, model.lora_alpha --lora-alpha,
        model.lora_dropout --lora-dropout --dropout, model.lora_targets, model.full --full, model.features,
        model.feature_tokens, model.feature_dropout, model.end_sym, model.normalize,
        model.visual, model.visual_encoder --visual-encoder, model.visual_weights, model.visual_options,
        model.visual_width, model.image_size --image-size, model.merge,
        model.max_txt_len, model.quant --quant, model.max_len, model.grad_checkpoint --grad-checkpoint,
        model.checkpointed_layers --checkpointed-layers,
        model.towers.vision_tower --vision-tower, model.towers.mm_projector_type --mm-projector-type,
        model.towers.num_frames --num-frames, model.towers.mm_vision_select_layer, model.towers.image_aspect_ratio,
        model.towers.patches, model.towers.vision_width, model.towers.audio_tower --audio-tower,
        model.towers.mm_projector_a_type, model.towers.audio_seconds, model.towers.audio_windows,
        model.towers.audio_tokens, model.towers.audio_width, model.towers.mamba_compressor --mamba-compressor,
        model.towers.freeze_mamba_compressor, model.towers.pretrain_projectors_repo,
        support.num_k_vid --num-k-vid, support.memory_tokens, support.answer_room, support.prompt.layout,
        support.prompt.system, support.prompt.k_turn_history, support.prompt.history_labels --history-labels,
        support.prompt.context --context, support.prompt.modalities --modalities, support.prompt.emotions,
        support.prompt.fields --fields,
        support.prompt.strategies, support.reconstruct --reconstruct,
        data.data_root --data-root, data.image_path --image-path, data.annotation_file --annotation-file,
        data.manifest --manifest, data.fold --fold, data.valid_file --valid-file, data.valid_share,
        data.test_file --test-file, data.features_root, data.task_pool --task-pool, data.labels, data.question,
        data.prompt_layout, data.chat_template, data.frame, data.streams, data.curriculum, data.curriculum_epochs,
        data.curriculum_share, data.replay, data.replay_ratio, data.replay_tasks, data.enable_augmentation,
        data.augmentation_prob, data.augmentations, data.shuffle_labels, data.max_bad,
        data.speaker_norm --speaker-norm, data.speaker_swap,
        optim.lr --lr, optim.mm_projector_lr --mm-projector-lr, optim.min_lr --min-lr, optim.warmup_lr --warmup-lr,
        optim.warmup_steps --warmup-steps, optim.warmup_ratio --warmup-ratio,
        optim.schedule --schedule, optim.lr_stages, optim.weight_decay --weight-decay, optim.beta2,
        optim.grad_clip --grad-clip,
        decode.decode --decode, decode.balance --balance, decode.extract, decode.max_new_tokens --max-new-tokens,
        decode.num_beams --num-beams,
        decode.temperature --temperature, decode.top_p --top-p, decode.repetition_penalty,
        decode.cuda_graphs --cuda-graphs, decode.compile_steps --compile-steps,
        ckpt --ckpt, out --out, epochs --epochs, iters_per_epoch --iters-per-epoch, batch_size --batch-size,
        accum --accum, tokens_per_batch --tokens-per-batch, precision --precision, device --device,
        compile --compile, shard --shard, offload --offload, deepspeed --deepspeed, tf32 --tf32, seed --seed,
        num_workers --num-workers,
        log_every --log-every, evaluate --evaluate, eval_every --eval-every, eval_batch_size --eval-batch-size,
        eval_limit, save_every --save-every, save_steps --save-steps, save_strategy --save-strategy,
        save_best --save-best, metric --metric,
        patience --patience, keep --keep, keep_best --keep-best, test --test, resume --resume, overwrite --overwrite,
        fast --fast, dry_run --dry-run""",
    "train_mosei": """
        model.model --model, model.head --head, model.fusion_dim --fusion-dim, model.layers --layers,
        model.dropout --dropout, model.modality_dropout --modality-dropout, model.latents, model.rank, model.unimodal,
        model.context --context, model.context_dropout, model.normalize --normalize, model.clip_sigma,
        data_root --data-root, stores --stores,
        label_scheme --label-scheme, valid_share --valid-share, split_seed, max_frames --max-frames,
        feature_noise --feature-noise, class_weights, label_smoothing --label-smoothing,
        shuffle_labels --shuffle-labels, lr --lr, min_lr --min-lr, warmup_steps --warmup-steps, schedule --schedule,
        plateau_patience, plateau_factor, weight_decay --weight-decay, grad_clip --grad-clip, epochs --epochs,
        batch_size --batch-size, patience --patience, min_delta, metric --metric, seed --seed, seeds --seeds,
        precision --precision, device --device, resident --resident, num_workers --num-workers,
        log_every --log-every, histograms --histograms, save_every --save-every, test --test, keep --keep,
        ckpt --ckpt, out --out, resume --resume, overwrite --overwrite, mock --mock, inspect --inspect, fast --fast""",
    "train_clap": """
        model.proj_dim --proj-dim, model.dropout, model.temperature --temperature, model.max_scale, model.bag_dim,
        model.normalize --normalize, model.one_scale --one-scale, data.data_root --data-root,
        data.manifest --manifest, data.stores --stores,
        data.fold --fold, data.valid_share --valid-share, data.test_share, data.split_seed,
        data.max_frames --max-frames, data.limit --limit, data.speaker_norm --speaker-norm,
        shuffle_labels --shuffle-labels, lr --lr, min_lr --min-lr, warmup_steps --warmup-steps, schedule --schedule,
        weight_decay --weight-decay, grad_clip --grad-clip, epochs --epochs, batch_size --batch-size,
        patience --patience, metric --metric, seed --seed, seeds --seeds, precision --precision, device --device,
        num_workers --num-workers, log_every --log-every, save_every --save-every, test --test, keep --keep,
        ckpt --ckpt, out --out, resume --resume, overwrite --overwrite, fast --fast""",
    "train_slm": """
        model.clap.proj_dim --proj-dim, model.clap.dropout, model.clap.temperature --temperature,
        model.clap.max_scale, model.clap.bag_dim, model.clap.normalize --normalize,
        model.clap.one_scale --one-scale, model.form --form,
        model.hidden_dim --hidden-dim, model.dropout --dropout, model.input_dropout --input-dropout,
        model.modality_dropout --modality-dropout, data.data_root --data-root, data.manifest --manifest,
        data.stores --stores, data.fold --fold, data.valid_share --valid-share, data.test_share, data.split_seed,
        data.max_frames --max-frames, data.limit --limit, data.speaker_norm --speaker-norm,
        num_emotions --num-emotions, clap_ckpt --clap-ckpt, shuffle_labels --shuffle-labels,
        label_smoothing --label-smoothing, ema --ema, lr --lr, min_lr --min-lr, warmup_steps --warmup-steps,
        schedule_epochs --schedule-epochs, weight_decay --weight-decay, direct_decay --direct-decay,
        grad_clip --grad-clip, epochs --epochs, batch_size --batch-size, patience --patience, metric --metric,
        seed --seed, seeds --seeds, precision --precision, device --device, resident --resident,
        num_workers --num-workers, log_every --log-every, save_every --save-every, test --test, keep --keep,
        ckpt --ckpt, out --out, resume --resume, overwrite --overwrite, fast --fast""",
    "meld_train": """
        model.mode --mode, model.finetune --finetune, model.hidden_dim --hidden-dim, model.dropout --dropout,
        model.context --context, model.bag_dim, data.data_root --data-root, data.stores --stores,
        data.encoders --encoders, data.features_root, data.max_frames --max-frames, data.limit --limit,
        stage3_ckpt --stage3-ckpt, clap_ckpt --clap-ckpt, class_weights --class-weights,
        shuffle_labels --shuffle-labels, label_smoothing --label-smoothing, lr --lr, min_lr --min-lr,
        warmup_steps --warmup-steps, schedule --schedule, weight_decay --weight-decay, table_decay --table-decay,
        table_lr --table-lr, table_eps --table-eps,
        grad_clip --grad-clip, epochs --epochs, batch_size --batch-size, patience --patience, metric --metric,
        seed --seed, seeds --seeds, precision --precision, device --device, num_workers --num-workers,
        log_every --log-every, save_every --save-every, test --test, keep --keep, ckpt --ckpt, out --out,
        resume --resume, overwrite --overwrite, fast --fast""",
    "eval": """
        ckpt --ckpt, combine --combine, bench --bench, decode.decode --decode, decode.balance --balance, decode.extract,
        decode.max_new_tokens --max-new-tokens,
        decode.num_beams --num-beams, decode.temperature --temperature, decode.top_p --top-p,
        decode.repetition_penalty,
        decode.cuda_graphs --cuda-graphs, decode.compile_steps --compile-steps,
        judge.kind --judge, judge.url --judge-url, judge.model --judge-model,
        judge.workers --judge-workers, judge.timeout --judge-timeout, judge.cache --judge-cache,
        judge.price_in --judge-price-in, judge.price_out --judge-price-out, answers --answers, truth --truth,
        synonyms --synonyms, text_metrics --text-metrics, out --out, limit --limit, batch_size --batch-size,
        device --device, seed --seed, llm --llm, data_root --data-root, features_root,
        feature_folders --feature-folders, manifest --manifest, fold --fold, test_file --test-file,
        streams --streams, prompt_layout, question, image_path --image-path, modalities --modalities,
        num_workers --num-workers, compare --compare,
        published --published, model.lora_r, model.lora_alpha, model.features, model.visual,
        model.visual_encoder, model.visual_weights, model.visual_options, model.visual_width, model.image_size""",
    "predict": """
        ckpt --ckpt, combine --combine, input --input, text --text, question --question, chat --chat,
        llm --llm, out --out, device --device, batch_size --batch-size, prompt_layout, decode.decode --decode,
        decode.balance --balance, decode.extract,
        decode.max_new_tokens --max-new-tokens, decode.num_beams --num-beams, decode.temperature --temperature,
        decode.top_p --top-p, decode.repetition_penalty,
        decode.cuda_graphs --cuda-graphs, decode.compile_steps --compile-steps,
        model.lora_r, model.lora_alpha, model.features, model.visual,
        model.visual_encoder, model.visual_weights, model.visual_options, model.visual_width, model.image_size""",
    "demo": """
        ckpt --ckpt, combine --combine, fast --fast, llm --llm, device --device, prompt_layout, host --host,
        port --port, root --root, token --token, max_upload_mb --max-upload-mb, max_seconds --max-seconds,
        queue --queue, batch_size --batch-size, page --page, decode.decode --decode, decode.balance --balance,
        decode.extract,
        decode.max_new_tokens --max-new-tokens, decode.num_beams --num-beams, decode.temperature --temperature,
        decode.top_p --top-p, decode.repetition_penalty,
        decode.cuda_graphs --cuda-graphs, decode.compile_steps --compile-steps,
        model.lora_r, model.lora_alpha, model.features, model.visual,
        model.visual_encoder, model.visual_weights, model.visual_options, model.visual_width, model.image_size""",
    "extract": """
        encoder, weights, options, pooling, manifest, data_root, annotation_file, image_path, out, frame, image_size,
        device, tokens_per_batch, num_workers, npy, max_bad, resume, overwrite""",
}  # fmt: skip


def load(*argv, script=train_llm):
    return config.load(script.Config, list(map(str, argv)))


def values(cfg):
    """{dotted path: value} of a config."""
    return {option.path: option.default for option in options(cfg)}


@pytest.fixture
def as_file(tmp_path):
    """A YAML text saved as a file."""

    def save(text):
        path = tmp_path / "block.yaml"
        path.write_text(text)
        return path

    return save


# ---- configuration


@pytest.mark.parametrize(("text", "expected"), BLOCKS)
def test_a_yaml_block_of_the_guides_loads_and_sets_nothing_else(as_file, text, expected):
    assert values(load("--cfg-path", as_file(text))) == values(train_llm.Config()) | expected


@pytest.mark.parametrize(
    ("section", "key", "value", "path"),
    [
        ("model", "lora_r", 32, "model.lora_r"),
        ("model", "lora_alpha", 8, "model.lora_alpha"),
        ("model", "use_grad_checkpoint", False, "model.grad_checkpoint"),
        ("model", "chat_template", False, "data.chat_template"),
        ("datasets", "batch_size", 2, "batch_size"),
        ("run", "init_lr", 1e-4, "optim.lr"),
        ("run", "lr_sched", "constant", "optim.schedule"),
        ("run", "min_lr", 2e-6, "optim.min_lr"),
        ("run", "warmup_lr", 2e-6, "optim.warmup_lr"),
        ("run", "weight_decay", 0.1, "optim.weight_decay"),
        ("run", "max_epoch", 20, "epochs"),
        ("run", "num_workers", 2, "num_workers"),
        ("run", "iters_per_epoch", 5000, "iters_per_epoch"),
        ("run", "warmup_steps", 500, "optim.warmup_steps"),
        ("run", "seed", 17, "seed"),
        ("run", "amp", False, "precision"),
    ],
)
def test_a_key_of_the_recipes_does_what_it_says(as_file, section, key, value, path):
    """Most published values are our defaults: here each key gets another one."""
    tree = yaml.safe_load(STAGE2)
    part = tree["datasets"]["feature_face_caption"] if section == "datasets" else tree[section]
    assert part[key] != value
    part[key] = value
    expected = {"amp": "fp32"}.get(key, value)
    assert values(load("--cfg-path", as_file(yaml.safe_dump(tree)))) == values(train_llm.Config()) | (
        RECIPE | OF_STAGE2 | {path: expected}
    )


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("emotion,reason", {"emotion": 1.0, "reason": 1.0}),
        ("reason_v2", {"reason_v2": 1.0}),
        ("reason=0.3,reason_v2=0.7", {"reason": 0.3, "reason_v2": 0.7}),
    ],
)
def test_task_pools_of_the_guides(pool, expected):
    assert load("--task-pool", pool).data.task_pool == expected


@pytest.mark.parametrize(
    ("stage", "text", "own", "more"),
    [
        ("stage1", STAGE1, {"ckpt": None}, {
            "data.annotation_file": "MERR_coarse_grained.txt", "data.task_pool": {"emotion": 1.0, "reason": 1.0},
            "metric": "weighted_f1",
        }),
        ("stage2", STAGE2, {"ckpt": "out/stage1/checkpoints/last"}, {
            "data.annotation_file": "MERR_fine_grained.txt", "data.task_pool": {"reason_v2": 1.0},
            "metric": "clue_overlap",
        }),
    ],
)  # fmt: skip
def test_our_stage_recipes_are_the_guides(as_file, stage, text, own, more):
    recipe = values(load("--cfg-path", ROOT / "configs" / f"{stage}.yaml"))
    guide = values(load("--cfg", as_file(text))) | {"model.llm": "meta-llama/Llama-2-7b-chat-hf"} | own | more
    assert recipe == guide | {"evaluate": True, "eval_every": 5, "save_best": True}


def test_every_config_loads_and_names_no_place_of_one_machine():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert {"stage1.yaml", "stage2.yaml"} <= {file.name for file in files}
    scripts = {"mos": train_mosei, "clap": train_clap, "slm": train_slm, "meld": meld_train, "": train_llm}
    for file in files:
        load("--cfg", file, script=next(script for word, script in scripts.items() if word in file.stem))
        assert not [word for word in ("/home", "/mnt", "/tmp", "/work") if word in file.read_text()], file


def test_the_evaluation_block_loads_into_the_script_that_took_its_place(as_file):
    cfg = load("--cfg-path", as_file(EMER), script=evaluation)
    assert (cfg.llm, cfg.ckpt) == (RECIPE["model.llm"], ["/path/to/save_checkpoint/2024xxxx-v2/checkpoint_29.pth"])


# ---- command lines


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_flags_of_a_script(name):
    found = sorted(" ".join([option.path, *option.flags]) for option in options(SCRIPTS[name].Config()))
    assert found == sorted(" ".join(entry.split()) for entry in FLAGS[name].split(","))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_exits_0_and_names_every_field(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        config.run(SCRIPTS[name].Config, SCRIPTS[name].main)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name}.py ")
    words = set(shown.replace(",", " ").split())
    for option in options(SCRIPTS[name].Config()):
        assert {f"--{option.path.replace('_', '-')}", *option.flags} <= words
        assert option.help in shown


# ---- MultiMood's command

FINETUNE = """
    --deepspeed scripts/zero3.json --model_type videollama2_qwen2 --model_path Qwen/Qwen2-1.5B-Instruct
    --vision_tower google/siglip-so400m-patch14-384 --mamba_compressor state-spaces/mamba-370m-hf
    --audio_tower audio_tower.bin --pretrain_projectors_repo DAMO-NLP-SG/VideoLLaMA2.1-7B-AV
    --mm_projector_type stc_connector_v35 --data_path ./data/mesc/train.jsonl --vid_folder ./data/mesc/video_data/
    --num_k_vid 5 --mm_vision_select_layer -2 --image_aspect_ratio pad --num_frames 16 --bf16 True --tf32 True
    --fp16 False --output_dir work_dirs/sft/finetune_multimood --num_train_epochs 1 --tune_adapter_llm true
    --per_device_train_batch_size 8 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --save_strategy steps
    --save_steps 1 --save_total_limit 99 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --max_grad_norm 1.0
    --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048 --gradient_checkpointing True
    --dataloader_num_workers 4 --report_to tensorboard --run_name multimood
"""


def test_multimoods_command():
    expected = {
        "deepspeed": "scripts/zero3.json", "model.model_type": "videollama2_qwen2",
        "model.llm": "Qwen/Qwen2-1.5B-Instruct", "model.towers.vision_tower": "google/siglip-so400m-patch14-384",
        "model.towers.mamba_compressor": "state-spaces/mamba-370m-hf", "model.towers.audio_tower": "audio_tower.bin",
        "model.towers.pretrain_projectors_repo": "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV",
        "model.towers.mm_projector_type": "stc_connector_v35", "data.data_root": "./data/mesc/train.jsonl",
        "data.image_path": "./data/mesc/video_data/", "support.num_k_vid": 5,
        "model.towers.mm_vision_select_layer": "-2", "model.towers.image_aspect_ratio": "pad",
        "model.towers.num_frames": 16, "precision": "bf16", "tf32": True, "out": "work_dirs/sft/finetune_multimood",
        "epochs": 1, "model.full": True, "batch_size": 8, "eval_batch_size": 4, "accum": 1, "save_strategy": "steps",
        "save_steps": 1, "keep": 99, "optim.lr": 2e-5, "optim.weight_decay": 0.0, "optim.warmup_ratio": 0.03,
        "optim.grad_clip": 1.0, "optim.schedule": "cosine", "log_every": 1, "model.max_len": 2048,
        "model.grad_checkpoint": True, "num_workers": 4,
    }  # fmt: skip
    cfg = load(*FINETUNE.split())
    assert values(cfg) == values(train_llm.Config()) | expected
    # 100 steps: three of them warm up from 0, the last is next to 0
    rates = [optim.lr_at(step, 100, cfg.optim) for step in (0, 1, 3, 99)]
    assert rates == pytest.approx([0, 2e-5 / 3, 2e-5, 1e-5 * (1 + math.cos(math.pi * 96 / 97))])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gradient_accumulation_steps 4", {"accum": 4}),
        ("--max_grad_norm 5.0", {"optim.grad_clip": 5.0}),
        ("--gradient_checkpointing False", {"model.grad_checkpoint": False}),
        ("--bf16 False --fp16 True", {"precision": "fp16"}),
        ("--bf16 False", {"precision": "fp32"}),
        ("--tf32", {"tf32": True}),
        ("--tf32 False", {}),
        ("--mm_projector_lr 2e-5", {"optim.mm_projector_lr": 2e-5}),
        ("--lr_scheduler_type linear", {"optim.schedule": "linear"}),
        ("--lr_scheduler_type constant", {"optim.schedule": "constant"}),
        ("--lr_scheduler_type constant_with_warmup", {"optim.schedule": "constant_with_warmup"}),
        ("--warmup_steps 10", {"optim.warmup_steps": 10}),
        ("--save_strategy no", {"save_strategy": "no"}),
        ("--save_strategy epoch", {"save_strategy": "epoch"}),
        ("--model_type qwen2", {"model.model_type": "qwen2"}),
        ("--freeze_mamba_compressor true", {"model.towers.freeze_mamba_compressor": True}),
        ("--num_k_vid 3", {"support.num_k_vid": 3}),
        ("--image_aspect_ratio square", {"model.towers.image_aspect_ratio": "square"}),
        ("--mm_vision_select_layer -1", {"model.towers.mm_vision_select_layer": "-1"}),
        ("--mm_projector_type mlp2x_gelu", {"model.towers.mm_projector_type": "mlp2x_gelu"}),
    ],
)
def test_other_values_of_multimoods_flags(flags, expected):
    assert values(load(*flags.split())) == values(train_llm.Config()) | expected


def test_the_same_settings_as_a_yaml_file(as_file):
    """As transformers' trainer names them; no is False in YAML."""
    given = "save_strategy: no\nlr_scheduler_type: cosine\nwarmup_ratio: 0.03\nreport_to: tensorboard\nrun_name: one"
    expected = {"save_strategy": "no", "optim.schedule": "cosine", "optim.warmup_ratio": 0.03}
    assert values(load("--cfg", as_file(given))) == values(train_llm.Config()) | expected


# ---- the MOSEI guide


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("fast", {"batch_size": 8, "epochs": 5, "patience": 2, "lr": 1e-4}),
        ("standard", {"batch_size": 16, "epochs": 50, "patience": 5, "lr": 1e-4, "weight_decay": 1e-5}),
        ("large", {"batch_size": 32, "epochs": 100, "patience": 10, "lr": 1e-4, "weight_decay": 1e-4}),
    ],
)
def test_presets_of_the_mosei_guide(preset, expected):
    cfg = load("--cfg", ROOT / "configs" / f"mosei_{preset}.yaml", script=train_mosei)
    assert values(cfg) == values(train_mosei.Config()) | expected
    if preset == "standard":
        assert values(cfg) == values(train_mosei.Config())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("", {}),
        ("--batch-size 32 --lr 1e-3", {"batch_size": 32, "lr": 1e-3}),
        ("--epochs 100", {"epochs": 100}),
        ("--data-dir /path/to/mosei", {"data_root": "/path/to/mosei"}),
        ("--device cuda", {"device": "cuda"}),
        ("--fast", {"fast": True}),
        ("--resume checkpoints/checkpoint_epoch_10.pth", {"resume": "checkpoints/checkpoint_epoch_10.pth"}),
        ("--batch-size 8", {"batch_size": 8}),
        ("--device cpu", {"device": "cpu"}),
        ("--lr 1e-5", {"lr": 1e-5}),
    ],
)
def test_commands_of_the_mosei_guide(command, expected):
    assert values(load(*command.split(), script=train_mosei)) == values(train_mosei.Config()) | expected


def test_the_mosei_guides_evaluation_command():
    assert load("--checkpoint", "checkpoints/best", script=evaluation).ckpt == ["checkpoints/best"]


# ---- both stages


def test_stage_1_then_stage_2(merr, tmp_path, signals, capsys):
    """The recipes with other paths and sizes, on 24 clips; a stage 2 that does not move ends where stage 1 did."""
    fine = tmp_path / "MERR_fine_grained.txt"
    fine.write_text((merr.root / "MERR_coarse_grained.txt").read_text())
    toy = [
        "--data-root", merr.root, "--llm", merr.root / "base", "--model.features", "voice=5",
        "--model.visual", "patches", "--visual-width", 3, "--image-size", 56, "--valid-share", 0.25,
        "--device", "cpu", "--num-workers", 0, "--iters-per-epoch", 2, "--warmup-steps", 1, "--log-every", 1,
        "--eval-every", 1, "--max-new-tokens", 4,
    ]  # fmt: skip
    still = ["--lr", 0, "--min-lr", 0, "--warmup-lr", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    train_llm.main(load("--cfg-path", ROOT / "configs/stage1.yaml", *toy, "--epochs", 2, "--out", one))
    fine_tune = ["--annotation-file", fine, "--ckpt", one / "checkpoints/last", "--epochs", 1, "--out", two]
    train_llm.main(load("--cfg-path", ROOT / "configs/stage2.yaml", *toy, *still, *fine_tune))

    said = capsys.readouterr().out
    assert f"weights of {one}/checkpoints/epoch_002: 4/4 LoRA tensors, 6/6 projection tensors" in said
    first, last, after = (load_file(folder / "model.safetensors") for folder in (
        one / "checkpoints/epoch_001", one / "checkpoints/epoch_002", two / "checkpoints/epoch_001"))  # fmt: skip
    assert not all(torch.equal(first[name], last[name]) for name in last)
    assert all(torch.equal(after[name], last[name]) for name in last)
    for out, metric in ((one, "weighted_f1"), (two, "clue_overlap")):
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        scores = [record[f"valid/{metric}"] for record in records if f"valid/{metric}" in record]
        best = json.loads((out / "results.json").read_text())["best"]
        assert (best["metric"], best["value"]) == (metric, max(scores))
    assert yaml.safe_load((two / "config.yaml").read_text())["data"]["task_pool"] == {"reason_v2": 1.0}


GUIDE = """
model:
  arch: minigpt_v2
  image_size: 224
  lora_r: 4
  lora_alpha: 8
  dropout: 0.1
datasets:
  feature_face_caption:
    batch_size: 2
    annotation_file: MERR_coarse_grained.txt
    task_pool: {reason: 0.3, reason_v2: 0.7}
    enable_augmentation: true
    augmentation_prob: 0.5
run:
  weight_decay: 0.05
  max_epoch: 4
  iters_per_epoch: 2
  evaluate: true
  eval_epoch_interval: 2
  save_best: true
  metric: "clue_overlap"
  resume_ckpt_path: null
"""


def test_the_keys_of_the_guides_do_what_they_say(merr, tmp_path, as_file, signals, capsys):
    """Every key that the guides show beside the two recipes, in one YAML as they write it, and the run it makes."""
    root = tmp_path / "data"
    shutil.copytree(merr.root, root)
    shutil.rmtree(root / "patches")
    store = StoreWriter(root / "patches", {"encoder": "drawn", "image_size": 224, "pooling": "patches", "dim": 3})
    for id in merr.ids:
        store.add(id, torch.randn(1 + 16 * 16, 3))
    store.finish()
    toy = ["--data-root", root, "--llm", root / "base", "--model.features", "voice=5", "--model.visual", "patches",
           "--visual-width", 3, "--labels", ",".join(merr.labels), "--valid-share", 0.25, "--device", "cpu",
           "--num-workers", 0, "--warmup-steps", 0, "--log-every", 1, "--max-new-tokens", 4]  # fmt: skip
    built, build = [], train_llm.build
    with mock.patch.object(train_llm, "build", lambda *args: built.append(build(*args)) or built[-1]):
        train_llm.main(load("--cfg-path", as_file(GUIDE), *toy, "--out", tmp_path / "run"))
    said = capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert "augmentation: question 0.5, frame 0.5, noise 0.5, dropout 0.5, streams 0.5, words 0.5\n" in said
    [(model, _)] = built
    assert model.cfg.places("image") == 64  # of 224 / 14 = 16 patches a side, four joined
    drops = {part.dropout.p for part in model.llm.modules() if isinstance(part, LoRALinear)}
    assert drops == {0.1}
    scored = {record["step"]: record["valid/clue_overlap"] for record in log if "valid/clue_overlap" in record}
    assert list(scored) == [4, 8]  # every second epoch of two steps
    best = max(scored, key=lambda step: (scored[step], -step)) // 2
    assert (tmp_path / "run/checkpoints/best").resolve().name == f"epoch_{best:03d}"

    going_on = GUIDE.replace("null", f'"{tmp_path}/run/checkpoints/epoch_002"')
    train_llm.main(load("--cfg-path", as_file(going_on), *toy, "--epochs", 3, "--out", tmp_path / "again"))
    assert f"resumed from {tmp_path}/run/checkpoints/epoch_002: " in capsys.readouterr().out


def test_the_guides_sub_stages_are_stage_2_with_two_rates():
    """Sub-stage 2.1: 1e-5 in epochs 0 to 15; 2.2: 5e-6 in epochs 15 to 30."""
    cfg, stages = load("--cfg", ROOT / "configs/stage2_substages.yaml"), {"0": 1e-5, "15": 5e-6}
    assert values(cfg) == values(load("--cfg", ROOT / "configs/stage2.yaml")) | {"optim.lr_stages": stages}
    assert load("--optim.lr-stages", "0=1e-5,15=5e-6").optim.lr_stages == stages
    rates = [optim.lr_at(epoch * 1000, 30_000, cfg.optim, 1000) for epoch in range(30)]
    assert rates[1:] == [1e-5] * 14 + [5e-6] * 15  # epoch 0 warms up


# ---- the speech pipeline's guide

STAGE3 = "--num-emotions 36 --data-root datasets/LAION --clap-ckpt checkpoints/clap_projectors.pt --batch-size 512"
STAGE4 = """
    --data-root datasets/MELD --stage3-ckpt models/slm_stage3_epoch149_best.pt --clap-ckpt models/clap_projectors.pt
    --mode A --epochs 60 --batch-size 128 --lr 0.001 --weight-decay 0.01 --num-workers 4
    --save-dir checkpointA_balanced --resume checkpointA_balanced/meld_slm_A_best.pt --seed 17
"""


@pytest.mark.parametrize(
    ("script", "command", "expected"),
    [
        (train_clap, "", {}),
        (train_slm, f"{STAGE3} --epochs 50", {"epochs": 50}),
        (train_slm, f"{STAGE3} --epochs 100 --checkpoint checkpoints/slm_stage3_epoch049_with_splits.pt --resume",
         {"epochs": 100, "ckpt": "checkpoints/slm_stage3_epoch049_with_splits.pt", "resume": "last"}),
        (train_slm, f"{STAGE3} --epochs 150 --checkpoint checkpoints/slm_stage3_epoch099_best.pt --resume",
         {"epochs": 150, "ckpt": "checkpoints/slm_stage3_epoch099_best.pt", "resume": "last"}),
        (meld_train, STAGE4, {
            "data.data_root": "datasets/MELD", "stage3_ckpt": "models/slm_stage3_epoch149_best.pt",
            "clap_ckpt": "models/clap_projectors.pt", "model.mode": "A", "epochs": 60, "batch_size": 128, "lr": 1e-3,
            "weight_decay": 0.01, "num_workers": 4, "out": "checkpointA_balanced",
            "resume": "checkpointA_balanced/meld_slm_A_best.pt", "seed": 17,
        }),
    ],
)  # fmt: skip
def test_commands_of_the_speech_guide(script, command, expected):
    if STAGE3 in command:
        expected |= {"num_emotions": 36, "data.data_root": "datasets/LAION", "batch_size": 512,
                     "clap_ckpt": "checkpoints/clap_projectors.pt"}  # fmt: skip
    assert values(load(*command.split(), script=script)) == values(script.Config()) | expected


def test_the_speech_guide_from_stage_2_to_4(tmp_path, monkeypatch, capsys):
    """Its commands in its order and places, on 147 lines of 12 emotions and a MELD of 100 utterances."""
    monkeypatch.chdir(tmp_path)
    make_lines(Path("datasets/LAION"))
    monkeypatch.setattr(mock_speech, "DIM", 32)
    monkeypatch.setitem(mock_speech.SIZES, "meld", {"train": 60, "valid": 20, "test": 20})
    mock_speech.make_mock("datasets/MELD", "meld")
    toy, small = ["--device", "cpu"], ["--proj-dim", 16, "--hidden-dim", 16]

    assert run(train_clap, [*toy, "--epochs", 2, "--proj-dim", 16]) == 0
    assert run(export, ["--format", "projectors", "--ckpt", "out/clap", "--out", "checkpoints/clap_projectors.pt"]) == 0

    stage3 = [*STAGE3.replace("36", "12").split(), *toy, *small]
    assert run(train_slm, [*stage3, "--epochs", 2]) == 0
    for epochs, name in ((4, "slm_stage3_epoch001_with_splits"), (6, "slm_stage3_epoch003_best")):
        Path(f"out/slm/checkpoints/epoch_00{epochs - 2}").rename(f"checkpoints/{name}")
        assert run(train_slm, [*stage3, "--epochs", epochs, "--checkpoint", f"checkpoints/{name}", "--resume"]) == 0
        assert f"resumed from {tmp_path}/checkpoints/{name}: " in capsys.readouterr().out
    slm = json.loads(Path("out/slm/results.json").read_text())
    assert [point["epoch"] for point in slm["history"]] == [1, 2, 3, 4, 5, 6]

    shutil.copytree(Path("out/slm/checkpoints/best").resolve(), "models/slm_stage3_epoch149_best")
    shutil.copy("checkpoints/clap_projectors.pt", "models")
    given = [word.removesuffix(".pt") if "slm" in word else word for word in STAGE4.split()]
    given[given.index("60")] = "2"
    line = error(meld_train, [*given, *toy], capsys)
    assert line == "--resume checkpointA_balanced/meld_slm_A_best: not found (first run: leave --resume out)"
    first = [word for i, word in enumerate(given) if "--resume" not in given[max(i - 1, 0) : i + 1]]
    assert run(meld_train, [*first, *toy]) == 0
    best = Path("checkpointA_balanced/checkpoints/best").resolve()
    shutil.copytree(best, "checkpointA_balanced/meld_slm_A_best")
    assert run(meld_train, [*given, *toy, "--epochs", 3]) == 0
    assert f"resumed from {tmp_path}/checkpointA_balanced/meld_slm_A_best: " in capsys.readouterr().out
    meld = json.loads(Path("checkpointA_balanced/results.json").read_text())
    assert [point["epoch"] for point in meld["history"]] == [1, 2, 3]

    capsys.readouterr()
    for out, bench in (("out/clap", "clap"), ("out/slm", "slm"), ("checkpointA_balanced", "meld")):
        assert run(evaluation, ["--ckpt", out, "--device", "cpu"]) == 0
        place = Path(tmp_path, out, "eval", bench, Path(out, "checkpoints/best").resolve().name)
        assert f"written to {place}\n" in capsys.readouterr().out
        assert (place / "metrics.json").is_file()

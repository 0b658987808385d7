"""What a configuration of the multimodal language model costs, from shapes alone: parameters, tokens, memory, disk."""

from collections.abc import Callable, Collection

import torch

from common.config import UserError
from common.weights import find_weights
from data.clips import DataConfig, make_sample
from data.manifest import Clip
from data.prompts import pick_question, target
from model.llm import Llama, LlamaConfig
from model.mllm import Mllm, MllmConfig
from model.quant import BITS
from model.tokenizer import load_tokenizer

# shapes of published models, for an estimate before their weights are here
PUBLISHED = {
    "meta-llama/Llama-2-7b-chat-hf": LlamaConfig(
        32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
}
STAND_IN = Clip(
    "stand_in", text="I really did not expect to see you here.", label="surprise",
    captions={
        "reason": "The raised brows and the open mouth in the video show surprise, and the voice goes up at the end.",
        "reason_v2": "Raised brows, an open mouth and a rising voice: the person did not expect this, it is surprise.",
    },
)  # fmt: skip
CONTEXT = 0.7e9  # bytes: CUDA context and allocator slack
CARDS = (12, 24, 80)


def shape(name: str) -> tuple[LlamaConfig, str]:
    """The language model's shape, and where it is known from."""
    try:
        folder = find_weights(name, "language model")
        return LlamaConfig.from_json(folder / "config.json"), str(folder)
    except UserError:
        if name not in PUBLISHED:
            raise
        return PUBLISHED[name], "its published shape (the weights are not here)"


def report(cfg: MllmConfig, data: DataConfig, batch_size: int, clip: Clip | None, say: Callable[[str], None]) -> None:
    """Prints the sizes of a run of this configuration; allocates no weights."""
    llm_config, source = shape(cfg.llm)
    with torch.device("meta"):
        mllm = Mllm(cfg, Llama(llm_config))
    base = sum(p.numel() for n, p in mllm.named_parameters() if n.startswith("llm.") and "lora_" not in n)
    groups = {"language model" if cfg.full else "LoRA": sum(
        p.numel() for n, p in mllm.named_parameters() if n.startswith("llm.") and p.requires_grad)}  # fmt: skip
    for name, module in mllm.projections.items():
        groups[f"projection {name}"] = sum(p.numel() for p in module.parameters())
    trained = sum(groups.values())
    say(f"language model {cfg.llm}: {base:,} parameters ({source})")
    say(f"trainable: {trained:,} of {base + (0 if cfg.full else trained):,}")
    for name, count in groups.items():
        say(f"  {name:<28} {count:>13,}")

    tokens = _sample(cfg, data, clip, say)
    for row in _memory(cfg, llm_config, base, trained, tokens * batch_size):
        say(row)
    say(f"checkpoint on disk: weights {4 * trained / 1e9:.2f} GB + optimiser {8 * trained / 1e9:.2f} GB")


def _quarter(text: str, specials: Collection[str] = ()) -> list[int]:
    """As many ids as a tokenizer would give, roughly."""
    return [0] * -(-len(text) // 4)


def _sample(cfg: MllmConfig, data: DataConfig, clip: Clip | None, say: Callable[[str], None]) -> int:
    """Shows one sample and returns its length in tokens."""
    try:
        encode = load_tokenizer(cfg.tokenizer or find_weights(cfg.llm, "tokenizer")).encode
        counted = ""
    except UserError:
        encode = _quarter
        counted = " (text estimated at 4 characters a token: the tokenizer is not here)"
    source = f"clip {clip.id}" if clip else "a stand-in clip (the data are not here)"
    clip = clip or STAND_IN
    task = next((t for t in data.task_pool if t == "emotion" or t in clip.captions), "emotion")
    raw = clip.label if task == "emotion" else clip.captions[task]
    values = {name: torch.empty(rows, device="meta") for name, rows in cfg.rows().items()}
    question = pick_question(task, None, data.labels, data.question)
    answer = target(raw or "", data.prompt_layout)
    sample = make_sample(clip, values, data, encode, task, question, list(values), answer)
    text = sum(len(piece) for piece in sample.pieces if isinstance(piece, list))
    embedded = sum(cfg.places(piece) for piece in sample.pieces if isinstance(piece, str))
    say(f"tokens a sample: {embedded} embedded + {text} prompt text + {len(sample.answer)} answer = "
        f"{embedded + text + len(sample.answer)}{counted}")  # fmt: skip
    say(f"sample: {source}, task {task}")
    say(f"  prompt: {sample.prompt}")
    say(f"  target: >>>{sample.target}</s><<<")
    return embedded + text + len(sample.answer)


def _memory(cfg: MllmConfig, llm: LlamaConfig, base: int, trained: int, tokens: int) -> list[str]:
    """Estimated peak on one GPU beside common cards.

    The base in bf16 or in few bits, fp32 adapters with Adam's moments, activations: a frozen linear keeps nothing for
    its backward, so a layer stores 7 hidden and 3 MLP rows a token (2 bytes each), one hidden row where recomputed.
    """
    ends = llm.vocab_size * llm.hidden_size * (1 if llm.tie_word_embeddings else 2)  # embeddings and head: never packed
    packed = (base - ends) * BITS[cfg.quant] / 8 + 2 * ends if cfg.quant in BITS else 2 * base
    weights = (4 * base if cfg.full else packed) + (12 if cfg.full else 16) * trained
    layer = 2 * (7 * llm.hidden_size + 3 * llm.intermediate_size)
    again = cfg.recomputed(llm.num_hidden_layers)
    kept = 2 * llm.hidden_size * again + layer * max(llm.num_hidden_layers - again, 1)
    total = (weights + tokens * kept + CONTEXT) / 1e9
    line = (
        f"memory, estimated: {weights / 1e9:.1f} GB weights and optimiser + {tokens * kept / 1e9:.1f} GB activations "
        f"({tokens} tokens a micro-batch) + {CONTEXT / 1e9:.1f} GB context = {total:.1f} GB"
    )
    return [line, *(f"  {card} GB card: {'fits' if total < 0.92 * card else 'does not fit'}" for card in CARDS)]

"""What a configuration of the multimodal language model costs, from shapes alone: parameters, tokens, memory, disk."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from common.config import UserError
from common.weights import find_weights
from model.llm import Llama, LlamaConfig
from model.mamba import MEM, Compressor, Mamba, MambaConfig
from model.mllm import Mllm, MllmConfig
from model.quant import BITS
from model.tokenizer import load_tokenizer

# shapes of published models, for an estimate before their weights are here
PUBLISHED = {
    "meta-llama/Llama-2-7b-chat-hf": LlamaConfig(
        32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
    **dict.fromkeys(
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        LlamaConfig(
            152064,
            3584,
            18944,
            28,
            28,
            4,
            128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_position_embeddings=32768,
            attention_bias=True,
        ),
    ),
    "Qwen/Qwen2-1.5B-Instruct": LlamaConfig(
        151936,
        1536,
        8960,
        28,
        12,
        2,
        128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
}
MAMBA = MambaConfig(50280, 1024, 48, 2048, 16, 64)  # state-spaces/mamba-370m-hf
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


def report(
    cfg: MllmConfig, batch_size: int, sample: Callable[[Callable[..., list[int]]], Any], source: str,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Prints the sizes of a run of this configuration; allocates no weights.

    `sample` makes a sample of `source` by a tokenizer's encode().
    """
    llm_config, where = shape(cfg.llm)
    with torch.device("meta"):
        mllm = Mllm(cfg, Llama(llm_config), _compressor(cfg, llm_config))
    parts = [(name, p.numel()) for name, p in mllm.named_parameters()]
    base = sum(count for name, count in parts if name.startswith("llm.") and "lora_" not in name)
    groups = {"language model" if cfg.full else "LoRA": sum(
        p.numel() for n, p in mllm.named_parameters() if n.startswith("llm.") and p.requires_grad)}  # fmt: skip
    for name, module in mllm.projections.items():
        groups[f"projection {name}"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    trained = sum(groups.values())
    frozen = sum(count for _, count in parts) - base - trained + (groups["language model"] if cfg.full else 0)
    say(f"language model {cfg.llm}: {base:,} parameters ({where})")
    say(f"trainable: {trained:,} of {base + frozen + (trained - groups['language model'] if cfg.full else trained):,}")
    for name, count in groups.items():
        say(f"  {name:<28} {count:>13,}")

    tokens = _shown(cfg, sample, source, say)
    for row in _memory(cfg, llm_config, base, trained, tokens * batch_size):
        say(row)
    say(f"checkpoint on disk: weights {4 * trained / 1e9:.2f} GB + optimiser {8 * trained / 1e9:.2f} GB")


def _compressor(cfg: MllmConfig, llm: LlamaConfig) -> Compressor | None:
    """The compressor of histories for the language model's vocabulary, of the published shape if it is not here."""
    name = cfg.towers.mamba_compressor
    if name is None:
        return None
    try:
        mamba = MambaConfig.from_json(find_weights(name) / "config.json")
    except UserError:
        mamba = MAMBA
    mamba = replace(mamba, vocab_size=max(mamba.vocab_size, llm.vocab_size))
    return Compressor(Mamba(mamba), llm.hidden_size, 0)


def _quarter(text: str, specials: Collection[str] = ()) -> list[int]:
    """As many ids as a tokenizer would give, roughly; 1 for each mark of a history."""
    if MEM in specials:
        return [id for said in text.split(MEM)[:-1] for id in (*_quarter(said), 1)]
    return [0] * -(-len(text) // 4)


def _shown(cfg: MllmConfig, sample: Callable[..., Any], source: str, say: Callable[[str], None]) -> int:
    """Shows one sample and returns its length in tokens."""
    try:
        tokenizer = load_tokenizer(cfg.tokenizer or find_weights(cfg.llm, "tokenizer"))
        tokenizer.add(MEM)
        encode, counted = tokenizer.encode, ""
    except UserError:
        encode, counted = _quarter, " (text estimated at 4 characters a token: the tokenizer is not here)"
    made = sample(encode)
    text = sum(len(piece) for piece in made.pieces if isinstance(piece, list))
    slots = [piece for piece in made.pieces if isinstance(piece, str)]
    embedded = {name: cfg.places(name, made.values[name]) for name in slots}
    total = sum(embedded.values()) + text + len(made.answer)
    apart = f" ({', '.join(f'{name} {count}' for name, count in embedded.items())})" if embedded else ""
    say(f"tokens a sample: {sum(embedded.values())} embedded{apart} + {text} prompt text + {len(made.answer)} answer = "
        f"{total}{counted}")  # fmt: skip
    say(f"sample: {source}")
    say(f"  prompt: {made.prompt}")
    say(f"  target: >>>{made.target}</s><<<")
    return total


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

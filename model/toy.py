"""Tiny random models and tokenizers fitted to given sentences, in the published layouts: runs without any download."""

import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.llm import Llama, LlamaConfig
from model.mamba import Mamba, MambaConfig
from model.tokenizer import CHATML, byte_level

PIECES = 1000  # of a vocabulary at most
SPARE = 8  # rows of embeddings beyond the vocabulary, of which Qwen2 has hundreds


def make_toy_llm(folder: Path, sentences: Iterable[str], seed: int = 0, hidden: int = 96, layers: int = 3) -> None:
    """Writes config.json, model.safetensors and tokenizer.model (SentencePiece BPE with byte fallback) to `folder`."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=PIECES,
        hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name="identity", num_threads=1, minloglevel=2, bos_id=1, eos_id=2, unk_id=0, pad_id=-1,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = LlamaConfig(
        vocab_size=size, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4, tie_word_embeddings=True,
    )  # fmt: skip
    _save_random(config, folder, seed)


def make_toy_qwen2(
    folder: Path, sentences: Iterable[str], seed: int = 0, hidden: int = 96, layers: int = 3, pieces: int = PIECES,
    heads: int = 4,
) -> None:  # fmt: skip
    """Writes config.json, model.safetensors and tokenizer.json (byte-level BPE, then ChatML's tokens) to `folder`."""
    from tokenizers import models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    backend = byte_level(models.BPE())
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(sentences, trainer)
    backend.add_special_tokens([*CHATML])
    backend.save(str(folder / "tokenizer.json"))
    start, _, end = map(backend.token_to_id, CHATML)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size() + SPARE, hidden_size=hidden, intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=hidden // heads,
        rope_theta=1e6, tie_word_embeddings=True, attention_bias=True, bos_token_id=start, eos_token_id=end,
    )  # fmt: skip
    _save_random(config, folder, seed)


def make_toy_mamba(folder: Path, vocab: int, width: int = 64, layers: int = 1, seed: int = 0) -> None:
    """Writes config.json and model.safetensors of a Mamba that reads `vocab` tokens, under a hub file's names."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rank = math.ceil(width / 16)
    mamba = Mamba(MambaConfig(vocab, width, layers, intermediate_size=2 * width, state_size=16, time_step_rank=rank))
    for name, parameter in mamba.named_parameters():
        if parameter.ndim > 1 and not name.endswith("A_log"):  # else <MEM> says little of what came before it
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    told = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", **asdict(mamba.config)}
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    tensors = {f"backbone.{name}": tensor for name, tensor in mamba.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _save_random(config: LlamaConfig, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    llm = Llama(config)
    for parameter in llm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=config.hidden_size**-0.5)
    llm.save_pretrained(folder)

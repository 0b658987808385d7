"""A tiny random Llama and a tokenizer fitted to given sentences, in the published layout: runs without any download."""

import io
from collections.abc import Iterable
from pathlib import Path

import torch

from model.llm import Llama, LlamaConfig


def make_toy_llm(folder: Path, sentences: Iterable[str], seed: int = 0, hidden: int = 96, layers: int = 3) -> None:
    """Writes config.json, model.safetensors and tokenizer.model (SentencePiece BPE with byte fallback) to `folder`."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=1000,
        hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name="identity", num_threads=1, minloglevel=2, bos_id=1, eos_id=2, unk_id=0, pad_id=-1,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = LlamaConfig(
        vocab_size=size, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    llm = Llama(config)
    for parameter in llm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=hidden**-0.5)
    llm.save_pretrained(folder)

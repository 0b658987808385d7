"""EmbeddingGemma, Google's text encoder of 300 M parameters: Gemma 3 with bidirectional attention, and a dense head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from common.weights import find_weights, load_strict, read_json
from model.encoders import Encoder, portable, sha256
from model.llm import rope, rotate

# what the model card puts before a text; the vectors of one text under two prompts are not comparable
PROMPTS = {
    "none": "",
    "classification": "task: classification | query: ",
    "similarity": "task: sentence similarity | query: ",
    "clustering": "task: clustering | query: ",
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
}
SIZES = (768, 512, 256, 128)  # leading parts of a vector that were trained to stand for it
DENSE = ("2_Dense", "3_Dense")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass
class GemmaConfig:
    """The shape of a Gemma 3 text encoder, by the field names of its config.json; the defaults are EmbeddingGemma's."""

    vocab_size: int = 262144
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 24
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    sliding_window: int = 512
    bos_token_id: int = 2
    eos_token_id: int = 1
    layer_types: list[str] = field(default_factory=lambda: _pattern(24, 6))
    theta: dict[str, float] = field(default_factory=lambda: {FULL: 1e6, SLIDING: 1e4})
    dense_size: int = 3072

    @classmethod
    def from_json(cls, file: Path) -> "GemmaConfig":
        """From a config.json of any transformers generation. UserError on what this encoder does not compute."""
        given = read_json(file)
        scaling = [given.get("rope_scaling"), *(given.get("rope_parameters") or {}).values()]
        kinds = [each.get("rope_type", each.get("type", "default")) for each in scaling if isinstance(each, dict)]
        for key, value, allowed in (
            ("model_type", given.get("model_type"), "gemma3_text"),
            ("use_bidirectional_attention", given.get("use_bidirectional_attention", False), True),
            ("hidden_activation", given.get("hidden_activation", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
            ("attention_bias", given.get("attention_bias", False), False),
            ("attn_logit_softcapping", given.get("attn_logit_softcapping"), None),
            ("rope type", next((kind for kind in kinds if kind != "default"), "default"), "default"),
        ):
            if value != allowed:
                raise UserError(f"{file}: {key} {value!r} is not supported (only {allowed!r})")
        fields: dict[str, Any] = {key: given[key] for key in cls.__dataclass_fields__ if given.get(key) is not None}
        sizes = [key for key in cls.__dataclass_fields__ if key.endswith("_size") or key.startswith("num_")]
        missing = [key for key in sizes if key not in fields and key != "dense_size"]
        if missing:
            raise UserError(f"{file}: incomplete config, no {', '.join(missing)}")
        pattern = given.get("sliding_window_pattern", given.get("_sliding_window_pattern", 6))
        types = fields.setdefault("layer_types", _pattern(fields["num_hidden_layers"], pattern))
        if not {FULL, SLIDING} >= {*types}:
            raise UserError(f"{file}: layer_types other than {FULL} and {SLIDING} are not supported")
        theta = {FULL: given.get("rope_theta", 1e6), SLIDING: given.get("rope_local_base_freq", 1e4)}
        for kind, each in (given.get("rope_parameters") or {}).items():
            if isinstance(each, dict) and "rope_theta" in each:
                theta[kind] = each["rope_theta"]
        return cls(**{**fields, "theta": theta})


def _pattern(layers: int, every: int) -> list[str]:
    return [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]


class Norm(nn.Module):
    """Root-mean-square norm whose stored weight is the gain less one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        dim, self.head_dim = config.hidden_size, config.head_dim
        queries, keys = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(dim, queries, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, dim, bias=False)
        self.q_norm = Norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = Norm(self.head_dim, config.rms_norm_eps)
        self.scale = config.query_pre_attn_scalar**-0.5

    def forward(self, x: Tensor, sees: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)  # (B, T, H, Dh)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, sees, scale=self.scale, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, H * Dh)


class MLP(nn.Module):
    """Gated by GELU."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, sees: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), sees, cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Body(nn.Module):
    """What model.safetensors holds: ids (B, T), mask (B, T) -> last hidden states (B, T, D)."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in config.layer_types)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        config, at = self.config, torch.arange(ids.shape[1], device=ids.device)
        distance = (at[:, None] - at).abs()
        # a token sees itself even if it is padding, for a row without any key has no softmax
        keys = (mask[:, None] | (distance == 0))[:, None]  # (B, 1, T, T)
        near = distance < config.sliding_window // 2 + 1
        seen = {kind: None if sees.all() else sees for kind, sees in ((FULL, keys), (SLIDING, keys & near))}
        turns = {kind: rope(at[None], config.head_dim, theta) for kind, theta in config.theta.items()}
        x = self.embed_tokens(ids) * config.hidden_size**0.5
        for kind, layer in zip(config.layer_types, self.layers, strict=True):
            x = layer(x, seen[kind], *turns[kind])
        return self.norm(x) * mask[..., None]


class Gemma(nn.Module):
    """The whole published model: the body, and the two dense maps behind the mean of its states."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.body = Body(config)
        self.dense = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(*sizes, bias=False)})
            for sizes in ((config.hidden_size, config.dense_size), (config.dense_size, config.hidden_size))
        )

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Gemma":
        """From a folder in the published layout, names with or without "model." before them."""
        config = GemmaConfig.from_json(folder / "config.json")
        config.dense_size = _dense_size(folder, config)
        with torch.device("meta"):
            gemma = cls(config)
        load_strict(gemma.body, folder, torch.float32, rename=lambda name: name.removeprefix("model."))
        for part, dense in zip(DENSE, gemma.dense, strict=True):
            load_strict(dense, folder / part, torch.float32)
        return gemma

    def folded(self) -> Tensor:
        """Both dense maps as one (D, D), for there is nothing between them."""
        first, second = (dense.get_parameter("linear.weight").double() for dense in self.dense)
        return (second @ first).float()


def _dense_size(folder: Path, config: GemmaConfig) -> int:
    """Width between the dense maps, 4 D where no config says so. UserError where they are more than one product."""
    given: dict[str, Any] = {}
    for part in DENSE:
        if (folder / part / "config.json").is_file():
            given[part] = read_json(folder / part / "config.json")
            activation = str(given[part].get("activation_function", "Identity"))
            if not activation.endswith("Identity"):
                raise UserError(f"{folder / part / 'config.json'}: activation {activation} is not supported")
    return given.get(DENSE[0], {}).get("out_features", 4 * config.hidden_size)


class EmbeddingGemma(Encoder):
    """Text -> one vector of unit length, or the last hidden state of every token.

    `prompt` is one of PROMPTS; "none" leaves the text as it is. `dim` keeps the leading 512, 256 or 128 values only.
    """

    name, modality = "embeddinggemma", "text"
    hub = "google/embeddinggemma-300m"
    poolings = ("sentence", "tokens")
    head: Tensor

    def __init__(self, folder: str, prompt: str = "classification", dim: int | None = None) -> None:
        found = find_weights(folder, "embeddinggemma weights")
        super().__init__(folder=portable(folder, found), prompt=prompt, dim=dim)
        if prompt not in PROMPTS:
            raise UserError(f"embeddinggemma: prompt '{prompt}' is not one of {', '.join(PROMPTS)}")
        gemma = Gemma.from_pretrained(found)
        self.config, self.body = gemma.body.config, gemma.body
        self.dim = self.config.hidden_size
        if dim is not None and not (dim in SIZES and dim <= self.dim):
            sizes = ", ".join(str(size) for size in SIZES if size <= self.dim)
            raise UserError(f"embeddinggemma: dim {dim} is not one of {sizes or 'none'}")
        self.register_buffer("head", gemma.folded()[:dim])  # (dim, D)
        self.split = _splitter(found)
        dense = [f"{part}/model.safetensors" for part in DENSE]
        self.weights_sha256 = sha256(found, "config.json", "tokenizer.model", "tokenizer.json", *dense)

    def out_dim(self, pooling: str) -> int:
        """768, or `dim` of a sentence."""
        return self.dim if pooling == "tokens" else len(self.head)

    def ids(self, text: str) -> list[int]:
        """Ids of the prompt and a text between BOS and EOS; the end of a text beyond the model's 2,048 is cut off."""
        ids = self.split(PROMPTS[self.options["prompt"]] + text)
        if (last := max(ids, default=0)) >= self.config.vocab_size:
            raise UserError(f"embeddinggemma: the tokenizer gives id {last}, the model has {self.config.vocab_size}")
        return [self.config.bos_token_id, *ids[: self.config.max_position_embeddings - 2], self.config.eos_token_id]

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded ids (B, T) of texts, and mask (B, T) of their own tokens."""
        rows = [torch.tensor(self.ids(text), device=self.head.device) for text in texts]
        lengths = torch.tensor([len(row) for row in rows], device=self.head.device)
        ids = pad_sequence(rows, batch_first=True)
        return ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]

    def forward(self, x: Sequence[str] | Tensor, mask: Tensor | None = None) -> Tensor:
        """Texts, or ids (B, T) with mask (B, T) -> last hidden states (B, T, 768), zero where the mask is false."""
        if not isinstance(x, Tensor):
            x, mask = self.batch(x)
        return self.body(x, torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool())

    def embed(self, x: Sequence[str] | Tensor, mask: Tensor | None = None) -> Tensor:
        """Texts, or ids (B, T) with mask (B, T) -> unit vectors (B, dim)."""
        if not isinstance(x, Tensor):
            x, mask = self.batch(x)
        counts = x.shape[1] if mask is None else mask.sum(1, keepdim=True)
        mean = self(x, mask).sum(1) / counts  # the prompt, BOS and EOS count, as in training
        return F.normalize(mean @ self.head.T, dim=-1)

    def encode(self, x: str, pooling: str = "sentence") -> Tensor:
        """One text -> (dim,) or (T, 768)."""
        return (self([x]) if pooling == "tokens" else self.embed([x]))[0]


def _splitter(folder: Path) -> Callable[[str], list[int]]:
    """Text -> ids without BOS and EOS, as the folder's tokenizer cuts it."""
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(model)).encode
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model}: not a SentencePiece model ({error})") from None
    if not fast.is_file():
        raise UserError(f"{folder}: no tokenizer.model and no tokenizer.json")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(fast))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{fast}: not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids

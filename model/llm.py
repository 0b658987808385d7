"""Pre-norm decoder of Llama-2 and Qwen2, speaking the published Hugging Face checkpoints."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from common.config import UserError
from common.weights import find_weights, load_strict, read_json
from model.quant import quantize

SHARD = 5 * 10**9  # bytes of weights in one file, as the Hub's own models have them
# a VideoLLaMA2's own parts beside its language model, which other modules read
PARTS = ("model.mm_projector.", "model.mm_projector_a.", "model.vision_tower.", "model.audio_tower.",
         "model.mamba_compressor.")  # fmt: skip
SOME = 16, 48  # least and most rows of a product that Linear lays out for a CPU
MANY = 2**13  # outputs from which, as for a vocabulary, half as many rows are enough
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class LlamaConfig:
    """The shape of a decoder, by the field names of its published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # Qwen2: biases on q, k and v, none on o
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def from_json(cls, source: str | os.PathLike | dict[str, Any]) -> "LlamaConfig":
        """From a config.json of any transformers generation. UserError on what this decoder does not compute."""
        where, given = ("config", source) if isinstance(source, dict) else (source, read_json(source))
        rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})
        for key, value, allowed in (
            ("model_type", given.get("model_type"), ("llama", "qwen2", "videollama2_qwen2")),
            ("hidden_act", given.get("hidden_act", "silu"), ("silu",)),
            ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
            ("use_sliding_window", given.get("use_sliding_window", False), (False,)),
            ("attention_bias", given.get("attention_bias", False), (False,)),
            ("mlp_bias", given.get("mlp_bias", False), (False,)),
        ):
            if value not in allowed:
                raise UserError(f"{where}: {key} {value!r} is not supported (only {', '.join(map(repr, allowed))})")
        required = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        missing = [key for key in required if given.get(key) is None]
        if missing:
            raise UserError(f"{where}: incomplete config, no {', '.join(missing)}")
        llama, heads = given["model_type"] == "llama", given["num_attention_heads"]
        defaults = {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads}
        fields = defaults | {key: given[key] for key in cls.__dataclass_fields__ if given.get(key) is not None}
        fields["attention_bias"] = not llama
        fields["rope_theta"] = float(rope.get("rope_theta", given.get("rope_theta", 10000.0)))
        fields["bos_token_id"] = given.get("bos_token_id", 1 if llama else None)
        fields["eos_token_id"] = given.get("eos_token_id", 2 if llama else None)
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """The config.json of this shape; from_json and transformers read it."""
        kind, architecture = ("qwen2", "Qwen2ForCausalLM") if self.attention_bias else ("llama", "LlamaForCausalLM")
        shape = {key: value for key, value in asdict(self).items() if key != "attention_bias"}
        return {"architectures": [architecture], "model_type": kind, "hidden_act": "silu", **shape}


class Causal:
    """Attention of a batch of whole sequences."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Packed:
    """Causal attention inside each of the documents that lie back to back in one row."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.bounds: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
            return self._varlen(q, k, v)
        # cut and joined along the outermost dimension in memory, so that neither takes its rows apart
        documents = zip(*(x.transpose(1, 2).split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
        ys = [Causal()(layer, *(x.transpose(1, 2) for x in document)) for document in documents]
        return torch.cat([y.transpose(1, 2) for y in ys], dim=1).transpose(1, 2)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.bounds is None:  # once for all layers
            self.bounds = torch.tensor([0, *self.lengths]).cumsum(0).to(q.device, torch.int32)
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H, Dh)
        longest = max(self.lengths)
        y = varlen_attn(q, k, v, self.bounds, self.bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(y, Tensor)
        return y.transpose(0, 1)[None]


class Branched:
    """Causal attention inside documents that lie back to back in one row, behind a beginning that all of them share."""

    def __init__(self, shared: int, lengths: list[int], device: torch.device):
        """`shared` positions, then documents of the given lengths without it."""
        owner = torch.arange(1 + len(lengths), device=device).repeat_interleave(
            torch.tensor([shared, *lengths], device=device)
        )
        self.mask = ((owner[:, None] == owner) | (owner == 0)).tril()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])


def worth_sharing(shared: int, lengths: Sequence[int]) -> bool:
    """Whether most of the work on sequences of these lengths is their common beginning, which Branched reads once."""
    return 2 * shared * (len(lengths) - 1) > sum(lengths)


class RMSNorm(nn.Module):
    """Root-mean-square norm, in fp32 whatever the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.epsilon = torch.tensor(eps, device="cpu")  # eps for a kernel that takes tensors

    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        if x.dtype != torch.float32 or x.device.type != "cpu" or (training and torch.compiler.is_compiling()):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        # a CPU has no kernel for it
        return Normed.apply(x, self.weight, self.epsilon) if training else normed(x, self.weight, self.epsilon)[0]


def normed(x: Tensor, weight: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (..., D), and what its rows were multiplied by (..., 1).

    For a row these five operations take .76 of the time of those that rms_norm() calls on a CPU.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight), scale


class Normed(torch.autograd.Function):
    """normed() with its gradients, forward and backward in half the time of what autograd makes of rms_norm()."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:  # pyright: ignore
        y, scale = normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore
        x, weight, scale = ctx.saved_tensors
        of_weight = (grad * x).mul_(scale).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        share = torch.linalg.vecdot(grad, x)[..., None] * scale**3 / -x.shape[-1]
        return grad.mul_(scale).addcmul_(x, share), of_weight, None


def rope(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin, fp32 (B, T, 1, Dh), of rotary positions (RoFormer), halves split as Hugging Face does."""
    # a compiler keeps no cache of its own tensors, and warns of one that it passes by
    table = signed_wavelengths.__wrapped__ if torch.compiler.is_compiling() else signed_wavelengths
    angles = positions[..., None, None] / table(head_dim, theta, positions.device)
    return angles.cos(), angles.sin()


@lru_cache
def signed_wavelengths(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Positions per radian (Dh,) of each dimension of a head, negative in its first half."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return torch.cat((-(theta**exponents), theta**exponents))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, T, H, Dh); rolling by half a head swaps its halves, whose sign `sin` carries."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Linear(nn.Linear):
    """A linear whose products of some rows, as decoding a batch has them, are up to twice as fast on a CPU.

    oneMKL is faster on them with the weight on the left, which leaves the outputs of a row apart in memory; with fewer
    rows, or more, it is not.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        few = rows < (SOME[0] if self.out_features < MANY else SOME[0] // 2)
        if few or rows > SOME[1] or torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        y = (self.weight @ x.reshape(rows, -1).T).T
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Projections and rotary positions around an attention strategy."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        dim, bias = config.hidden_size, config.attention_bias
        self.layer, self.head_dim, self.rotate = layer, config.head_dim, rotate
        self.q_proj = Linear(dim, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(dim, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(dim, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, dim, bias=False)

    def forward(self, x: Tensor, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        # together in memory, which Linear does not promise: attention has no fast kernel for anything else
        q, k, v = (proj(x).contiguous().unflatten(-1, (-1, self.head_dim)) for proj in projections)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)  # (B, T, H, Dh)
        y = attend(self.layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, H * Dh)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs for the backward pass and nothing else: autograd would keep three."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """Products around SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # a compiler finds out itself what to keep, and would get the gradients of SwiGLU's products in place wrong
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return self.down_proj(F.silu(gate) * up if plain else SwiGLU.apply(gate, up))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), attend, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What lies under the `model.` prefix of the checkpoints."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        # an empty weight: drawing one would import torch._dynamo where its device is meta
        size = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*size, _weight=torch.empty(size))
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Causal language model: ids or embeddings in, fp32 logits out."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.coverage = ""  # of the files it was loaded from
        self.grad_checkpoint = 0  # how many layers, from the first, are computed again in the backward pass
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if self.lm_head.weight.device.type != "meta":  # shapes only; the weights come from a file
            self.apply(_init)
        self.tie()

    def tie(self) -> None:
        """Makes the head the embeddings where the config says so; needed again after to_empty()."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quant: str | None = None,
        mapped: bool = False,
    ) -> "Llama":
        """A published or saved model, from a folder or a hub name (see find_weights), in eval mode.

        Of a VideoLLaMA2 or a MultiMood, whose towers and connectors lie in the same files, the language model alone.
        With `quant` (int8 or nf4) the linears of its layers are put into few bits as they are read. With `mapped` the
        weights stay in their files, and in the files' dtype, until they are moved.
        """
        folder = find_weights(folder, "llama weights")
        config = LlamaConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            llm = cls(config)
        tied = ("lm_head.weight",) if config.tie_word_embeddings else ()

        def shrink(name: str) -> None:
            if quant is not None and name.endswith("_proj.weight"):
                quantize(llm, name.removesuffix(".weight"), quant)

        ignore = ("rotary_emb.inv_freq", *tied)
        kept = None if mapped else dtype
        llm.coverage = load_strict(llm, folder, kept, device, ignore, then=shrink, mapped=mapped, aside=PARTS)
        llm.tie()
        return llm.eval()

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compiles norms, rotations and MLPs, each once for all layers and lengths; attention has its own kernels."""
        turn = torch.compile(rotate, dynamic=True, backend=backend)
        for module in self.modules():
            if isinstance(module, RMSNorm | MLP):
                module.compile(dynamic=True, backend=backend)
            elif isinstance(module, Attention):
                module.rotate = turn

    def save_pretrained(
        self, folder: str | os.PathLike, dtype: torch.dtype | None = None, shard_bytes: int = SHARD
    ) -> None:
        """config.json and weights as Hugging Face lays them out, in shards with an index where one would be too large.

        Merged adapters are part of the weights. `dtype`: None keeps the weights' own.
        """
        if any(getattr(module, "merged", True) is False for module in self.modules()):
            raise ValueError("merge the LoRA adapters before saving the whole model")
        state = {name.replace(".base.", "."): t for name, t in self.state_dict().items() if ".lora_" not in name}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        dtype = dtype or self.lm_head.weight.dtype
        config = self.config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        os.makedirs(folder, exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shards: list[list[str]] = [[]]
        left = shard_bytes
        for name, tensor in state.items():
            size = tensor.numel() * dtype.itemsize
            if size > left and shards[-1]:
                shards.append([])
                left = shard_bytes
            shards[-1].append(name)
            left -= size
        files = ["model.safetensors"]
        if len(shards) > 1:
            files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
            sizes = {"total_size": sum(tensor.numel() for tensor in state.values()) * dtype.itemsize}
            places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = json.dumps({"metadata": sizes, "weight_map": places}, indent=2)
            Path(folder, "model.safetensors.index.json").write_text(index + "\n")
        for file, names in zip(files, shards, strict=True):  # one shard in memory beside the model
            part = {name: state[name].to("cpu", dtype).contiguous() for name in names}
            save_file(part, Path(folder, file), {"format": "pt"})

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings (..., D)."""
        return self.model.embed_tokens(input_ids)

    def hidden(self, x: Tensor, attend: Attend, positions: Tensor) -> Tensor:
        """Embeddings x (B, T, D) at positions (B, T) -> states (B, T, D) after the final norm."""
        cos, sin = rope(positions, self.config.head_dim, self.config.rope_theta)
        again = self.grad_checkpoint if self.training and torch.is_grad_enabled() else 0
        for i, layer in enumerate(self.model.layers):
            run: Any = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False) if i < again else layer
            x = run(x, attend, cos, sin)
        return self.model.norm(x)

    def head(self, h: Tensor) -> Tensor:
        """States (..., D) -> fp32 logits (..., V)."""
        return self.lm_head(h).float()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T) or embeddings (B, T, D) -> fp32 logits (B, T, V).

        With `lengths` the one row is packed: documents back to back, blind to each other, positions restarting.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids)
        if inputs_embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        rows, width = inputs_embeds.shape[:2]
        if lengths is not None and (rows, width) != (1, sum(lengths)):
            raise ValueError(f"lengths sum to {sum(lengths)}, but the packed input is {rows} x {width}")
        if positions is None:
            positions = document_positions(lengths or [width], inputs_embeds.device).expand(rows, -1)
        attend = Causal() if lengths is None else Packed(lengths)
        return self.head(self.hidden(inputs_embeds, attend, positions))

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())


def document_positions(lengths: list[int], device: torch.device | str) -> Tensor:
    """Positions (1, T) of documents back to back: 0 .. n-1 for each."""
    return torch.cat([torch.arange(n) for n in lengths])[None].to(device)


def _init(module: nn.Module) -> None:
    """GPT-2's initialisation, which Llama's trainers share: normal, standard deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

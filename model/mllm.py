"""The multimodal language model: text and projected embeddings in one packed sequence, for training and inference."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint
from common.config import UserError, from_dict, opt
from common.weights import find_weights, identity
from model import encoders, stc
from model.generate import generate, score_labels
from model.llm import Branched, Llama, LlamaConfig, Packed, worth_sharing
from model.lora import add_lora
from model.mamba import MEM, Compressor, Mamba, MambaConfig, compressor_identity
from model.tokenizer import FILES, Tokenizer, load_tokenizer
from model.towers import TowerConfig

IGNORE_INDEX = -100
PATCH = 14  # pixels: EVA ViT-g's patch
COMPRESSOR = "compressor_config.json"  # in a checkpoint: the shape of the compressor that it holds
CHUNK = 512  # labelled positions whose logits exist at one time


@dataclass
class MllmConfig:
    llm: str = opt("meta-llama/Llama-2-7b-chat-hf", "language model: folder or hub name", "--llm")
    model_type: str = opt(
        "auto", "what the language model must be; auto: what its config.json says", "--model-type",
        choices=("auto", "llama", "qwen2", "videollama2_qwen2"),
    )  # fmt: skip
    tokenizer: str | None = opt(None, "tokenizer: file or folder; default: beside the language model", "--tokenizer")
    lora_r: int = opt(64, "LoRA rank", "--lora-r", span=(32, 128))
    lora_alpha: int = opt(16, "LoRA alpha; the update is scaled by alpha / r", "--lora-alpha", span=(8, 32))
    lora_dropout: float = opt(
        0.05, "dropout on the input of every LoRA adapter", "--lora-dropout", "--dropout", share=True
    )
    lora_targets: list[str] = opt(["q_proj", "v_proj"], "linears that get an adapter; [] for none")
    full: bool = opt(False, "train the whole (small) language model instead of LoRA", "--full")
    features: dict[str, int] = opt(
        {"mae_340_UTT": 1024, "maeV_399_UTT": 1024, "HL-UTT": 1024}, "utterance features in prompt order: name=width"
    )
    feature_tokens: int = opt(1, "tokens that each utterance feature becomes")
    feature_dropout: float = opt(0.0, "dropout on the features themselves", share=True)
    normalize: bool = opt(False, "standardise features by train-split statistics kept in the checkpoint")
    visual: str | None = opt("eva_vit_g", "store of visual tokens (a CLS row, then patches); none: no picture")
    visual_encoder: str | None = opt(
        None, "make visual tokens from the videos whenever a clip is read, with this encoder, in place of a store",
        "--visual-encoder",
    )  # fmt: skip
    visual_weights: str | None = opt(
        None, "folder or hub name of the visual encoder's weights; default: where they are published"
    )
    visual_options: dict[str, str] = opt({}, "options of the visual encoder, a=1,b=2 (dtype=bf16 on a GPU)")
    visual_width: int = opt(1408, "width of a visual token")
    image_size: int = opt(448, "side of the picture in pixels, one visual token per 14 x 14", "--image-size")
    merge: int = opt(4, "neighbouring patches (in raster order) joined to one token")
    towers: TowerConfig = field(default_factory=TowerConfig)
    end_sym: str = opt("</s>", "the special token that ends an answer; </s>: the tokenizer's own (Qwen2: <|im_end|>)")
    max_txt_len: int = opt(1024, "longest answer in tokens")
    quant: str = opt(
        "none", "hold the frozen base in few bits a weight: half or a quarter of bf16's memory", "--quant",
        choices=("none", "int8", "nf4"),
    )  # fmt: skip
    max_len: int = opt(3800, "longest sequence; cut on the right")
    grad_checkpoint: bool = opt(True, "recompute a layer's activations in the backward pass", "--grad-checkpoint")
    checkpointed_layers: int = opt(
        0, "with --grad-checkpoint: of so many layers, from the first; 0: of all", "--checkpointed-layers"
    )

    @property
    def patches(self) -> int:
        return (self.image_size // PATCH) ** 2

    def recomputed(self, layers: int) -> int:
        """How many of so many layers are computed again in the backward pass. UserError: there are not as many."""
        if not 0 <= self.checkpointed_layers <= layers:
            raise UserError(f"--checkpointed-layers: {self.checkpointed_layers} of a language model of {layers} layers")
        return (self.checkpointed_layers or layers) if self.grad_checkpoint else 0

    def rows(self) -> dict[str, tuple[int, int]]:
        """Slot -> (rows, width) of its raw value; "image" and "cls" come from the same visual tokens."""
        visual = {"image": (self.patches, self.visual_width), "cls": (1, self.visual_width)} if self.visual else {}
        return visual | {name: (1, width) for name, width in self.features.items()}

    def places(self, slot: str, value: Tensor | None = None) -> int:
        """Positions that a slot takes in the sequence; those of a history depend on its `value`."""
        if slot in self.features:
            return self.feature_tokens
        if slot == "image":
            return self.patches // self.merge
        if slot == "video":
            towers = self.towers
            return stc.tokens(towers.mm_projector_type, towers.num_frames, towers.patches)
        if slot == "audio":
            return self.towers.audio_tokens
        if slot == "history":
            return 0 if value is None else int((value == value[-1]).sum())  # the last id is a mark, as are its equals
        return 1  # "cls"


class Sample(Protocol):
    """What pack() reads: a clip's id, its pieces (token ids, or the name of a slot), its answer, its slots' values."""

    id: str
    pieces: list[list[int] | str]
    answer: list[int]
    values: dict[str, Tensor]


@dataclass
class Batch:
    """Samples back to back: T positions in all, no padding."""

    ids: list[str]
    input_ids: Tensor  # (T,) zero at slots
    labels: Tensor  # (T,) IGNORE_INDEX but at answers
    positions: Tensor  # (T,) restart at every sample
    lengths: list[int]
    # name -> ((n,) places, (m, ...) values of the samples that have it); histories differ in length: a list of (t,) ids
    slots: dict[str, tuple[Tensor, Tensor | list[Tensor]]] = field(default_factory=dict)
    shared: int = 0  # tokens with which all samples begin: before any slot, and before the last token of a prompt

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "Batch":
        move = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if torch.is_tensor(getattr(self, f.name))
        }
        slots = {
            name: (at.to(device), value.to(device) if torch.is_tensor(value) else value)
            for name, (at, value) in self.slots.items()
        }
        return Batch(self.ids, lengths=self.lengths, slots=slots, shared=self.shared, **move)


def pack(samples: Sequence[Sample], cfg: MllmConfig, answers: bool = True) -> Batch:
    """Lays samples out back to back; with `answers` off only their prompts, as generating and scoring need them."""
    input_ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    places: dict[str, list[int]] = {}
    values: dict[str, list[Tensor]] = {}
    heads: list[list[int]] = []
    for sample in samples:
        start = len(input_ids)
        for piece in sample.pieces:
            if isinstance(piece, list):
                input_ids += piece
                continue
            rows = cfg.places(piece, sample.values[piece])
            places.setdefault(piece, []).extend(range(len(input_ids), len(input_ids) + rows))
            values.setdefault(piece, []).append(sample.values[piece])
            input_ids += [0] * rows
        prompt = len(input_ids) - start
        head = takewhile(lambda piece: isinstance(piece, list), sample.pieces)
        heads.append([token for piece in head if isinstance(piece, list) for token in piece][: prompt - 1])
        answer = sample.answer[: cfg.max_txt_len][: max(cfg.max_len - prompt, 0)] if answers else []
        if prompt > cfg.max_len:
            raise UserError(f"clip {sample.id}: its prompt has {prompt} tokens, --max-len is {cfg.max_len}")
        input_ids += answer
        labels += [IGNORE_INDEX] * prompt + answer
        lengths.append(prompt + len(answer))
    return Batch(
        ids=[sample.id for sample in samples],
        input_ids=torch.tensor(input_ids),
        labels=torch.tensor(labels),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        lengths=lengths,
        slots={
            name: (torch.tensor(at), values[name] if values[name][0].ndim == 1 else torch.stack(values[name]))
            for name, at in places.items()
        },
        shared=alike(heads),
    )


def alike(heads: list[list[int]]) -> int:
    """With how many tokens all begin."""
    different = (i for i, tokens in enumerate(zip(*heads, strict=False)) if len(set(tokens)) > 1)
    return next(different, min(map(len, heads)))


class Projection(nn.Linear):
    """Raw rows of a slot -> language model width, `merge` neighbours at a time, `tokens` for each.

    With `normalize` a row is first standardised and divided by the root of its width: of length 1 on average, so that
    one learning rate suits rows of any width.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        merge: int = 1,
        tokens: int = 1,
        normalize: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width * merge, hidden * tokens)
        self.hidden, self.normalize = hidden, normalize
        self.dropout = nn.Dropout(dropout)
        if normalize:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def start_at(self, token: Tensor) -> None:
        """Starts as that token's embedding (hidden,) plus a third of its size of features.

        With <s>, on which most heads rest, a frozen language model finds the features sooner.
        """
        token = token.to(self.weight)
        self.bias.copy_(token.repeat(len(self.bias) // self.hidden))
        nn.init.normal_(self.weight).mul_(0.3 * token.std())

    def forward(self, value: Tensor) -> Tensor:
        """(m, rows, width) -> (m * rows / merge * tokens, hidden), computed in float32."""
        value = value.float()
        if self.normalize:
            value = standardised(value, self.mean, self.std)
        value = self.dropout(value).reshape(-1, self.in_features)  # 4 raster patches: a 1 x 4 strip of the picture
        return super().forward(value).view(-1, self.hidden)


class Standardised(nn.Module):
    """A connector of rows that are standardised before it, as those of a Projection are."""

    mean: Tensor
    std: Tensor

    def __init__(self, connector: nn.Module, width: int) -> None:
        super().__init__()
        self.connector = connector
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, value: Tensor) -> Tensor:
        """(m, ..., width) -> what the connector makes of it."""
        return self.connector(standardised(value.float(), self.mean, self.std))


def standardised(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Rows of mean 0 whose length is 1 on average."""
    return (value - mean) / (std * value.shape[-1] ** 0.5)


class Mllm(nn.Module):
    """A language model with adapters, and what makes embeddings of each slot's values: a projection, or MultiMood's
    connectors of video and sound and its `compressor` of the history.
    """

    def __init__(self, cfg: MllmConfig, llm: Llama, compressor: Compressor | None = None) -> None:
        super().__init__()
        if cfg.visual and (cfg.image_size % PATCH or cfg.patches % cfg.merge):
            raise UserError(
                f"--image-size {cfg.image_size}: needs a multiple of 14 whose patches divide by {cfg.merge}"
            )
        if cfg.full and cfg.quant != "none":
            raise UserError(f"--quant {cfg.quant} is for a frozen base; --full trains all of it")
        self.cfg = cfg
        self.llm = llm.requires_grad_(cfg.full)
        if not cfg.full:
            add_lora(llm, cfg.lora_targets, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
        llm.grad_checkpoint = cfg.recomputed(llm.config.num_hidden_layers)
        hidden = llm.config.hidden_size
        self.projections = nn.ModuleDict()
        for name, (_, width) in cfg.rows().items():
            merge, tokens = (cfg.merge, 1) if name == "image" else (1, cfg.places(name))
            projection = Projection(width, hidden, merge, tokens, cfg.normalize, cfg.feature_dropout)
            if cfg.normalize:
                projection.start_at(llm.model.embed_tokens.weight[llm.config.bos_token_id or 0])
            self.projections[name] = projection
        towers = cfg.towers
        if towers.vision_tower:
            stc.tokens(towers.mm_projector_type, towers.num_frames, towers.patches)  # may be a UserError
            self._connect("video", towers.mm_projector_type, towers.vision_width, hidden)
        if towers.audio_tower:
            self._connect("audio", towers.mm_projector_a_type, towers.audio_width, hidden)
        if compressor is not None:
            compressor.mamba.requires_grad_(not towers.freeze_mamba_compressor)
            compressor.mamba.grad_checkpoint = cfg.grad_checkpoint
            self.projections["history"] = compressor

    def _connect(self, slot: str, kind: str, width: int, hidden: int) -> None:
        made = stc.connector(kind, width, hidden)
        self.projections[slot] = Standardised(made, width) if self.cfg.normalize else made

    def embed(self, batch: Batch) -> Tensor:
        """(1, T, D) embeddings: token embeddings, with every slot's places taken by what its values become."""
        x = self.llm.embed(batch.input_ids)[None]
        for name, (places, value) in batch.slots.items():
            made = self.projections[name]([ids.tolist() for ids in value] if isinstance(value, list) else value)
            rows = torch.cat(made) if isinstance(made, list) else made.flatten(0, -2)
            x = x.index_copy(1, places, rows[None].to(x.dtype))
        return x

    def told(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (n, D) that tell the labelled tokens, which are those before them, and these tokens (n,)."""
        x, positions, labels, attend = self.embed(batch), batch.positions, batch.labels, Packed(batch.lengths)
        shared = batch.shared
        if worth_sharing(shared, batch.lengths):
            kept = positions >= shared
            kept[:shared] = True
            x, positions, labels = x[:, kept], positions[kept], labels[kept]
            attend = Branched(shared, [n - shared for n in batch.lengths], x.device)
        if torch.is_grad_enabled() and self.projections and not x.requires_grad:
            x.requires_grad_()  # a batch of words alone: layers that are sharded must all go backward on every rank
        hidden = self.llm.hidden(x, attend, positions[None])[0]
        at = (labels != IGNORE_INDEX).nonzero()[:, 0]
        return hidden.index_select(0, at - 1), labels[at]

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross entropy in nats over labelled positions (divide by the tokens of the whole step)."""
        weights = [p for p in self.llm.lm_head.parameters() if p.requires_grad and torch.is_grad_enabled()]
        loss: Any = HeadLoss.apply(self.llm.head, *self.told(batch), *weights)
        # every projection takes part in every step, as DDP and the optimiser's decay expect
        idle = [p for name, module in self.projections.items() if name not in batch.slots for p in module.parameters()]
        return loss + sum((p.sum() * 0.0 for p in idle), torch.zeros((), device=loss.device))

    @torch.no_grad()
    def tally(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum that forward() gives, and how many of the labelled tokens are the likeliest where they stand."""
        loss, hits = torch.zeros(2, device=batch.labels.device)
        for hidden, labels in zip(*(each.split(CHUNK) for each in self.told(batch)), strict=True):
            logits = self.llm.head(hidden)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(1) == labels).sum()
        return loss, hits

    def prompts(self, batch: Batch) -> list[Tensor]:
        """Embeddings of each sample's prompt, a list of (T_i, D)."""
        return list(self.embed(batch)[0].split(batch.lengths))

    def score(self, batch: Batch, candidates: list[list[int]]) -> Tensor:
        """Probability of each candidate answer to each prompt among all of them, fp32 (B, L)."""
        return score_labels(self.llm, self.prompts(batch), candidates).softmax(-1)

    def generate(self, batch: Batch, max_new_tokens: int, **settings: Any) -> list[list[int]]:
        """New tokens of each prompt; settings as model.generate.generate takes them."""
        return generate(self.llm, self.prompts(batch), max_new_tokens, **settings)

    def set_statistics(self, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Mean and standard deviation of each slot's raw rows over the train split."""
        for name, (mean, std) in statistics.items():
            projection = self.projections[name]
            assert isinstance(projection, Projection | Standardised)
            projection.mean.copy_(mean)
            projection.std.copy_(std.clamp_min(1e-5))  # a constant column stays finite

    def means(self) -> dict[str, Tensor]:
        """The means that set_statistics was given, by slot, on the CPU; empty where nothing is standardised."""
        if not self.cfg.normalize:
            return {}
        standardising = {name: each for name, each in self.projections.items() if isinstance(each, Projection)}
        return {name: projection.mean.cpu() for name, projection in standardising.items()}


class HeadLoss(torch.autograd.Function):
    """Sum of the cross entropy of head(hidden) in nats, whose gradients are computed with it.

    The logits of CHUNK rows exist at a time, once: they become the probabilities, and these the gradient, in place.
    """

    @staticmethod
    def forward(ctx, head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *weights: Tensor):  # pyright: ignore
        loss = hidden.new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(x) for x in (hidden, *weights)] if any(ctx.needs_input_grad) else []
        for i in range(0, len(hidden), CHUNK):
            h, y = hidden[i : i + CHUNK].detach(), labels[i : i + CHUNK, None]
            with torch.set_grad_enabled(bool(gradients)):
                logits = head(h.requires_grad_(bool(gradients)))
            p = logits.detach()
            torch.log_softmax(p, 1, out=p)
            loss -= p.gather(1, y).sum()
            if gradients:
                p.exp_().scatter_add_(1, y, p.new_full(y.shape, -1.0))
                with torch.enable_grad():
                    scalar = Given.apply(logits, p)
                found = torch.autograd.grad(scalar, (h, *weights))
                gradients[0][i : i + CHUNK] = found[0]
                for gradient, new in zip(gradients[1:], found[1:], strict=True):
                    gradient += new
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor):  # pyright: ignore
        hidden, *weights = (gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return None, hidden, None, *weights


class Given(torch.autograd.Function):
    """A scalar whose gradient in y is the one given.

    torch.autograd.grad(y, x, given) is the same, but imports sympy at its first call, half a second of a run's start.
    """

    @staticmethod
    def forward(ctx, y: Tensor, gradient: Tensor):  # pyright: ignore
        ctx.save_for_backward(gradient)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor):  # pyright: ignore
        return ctx.saved_tensors[0], None


def checkpoint_files(mllm: Mllm, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Small files that make a checkpoint stand alone: the language model's shape and the tokenizer."""
    shapes = {"llm_config.json": mllm.llm.config.to_json()}
    if "history" in mllm.projections:
        compressor: Any = mllm.projections["history"]
        shapes[COMPRESSOR] = compressor.mamba.config.to_json()
    files = {name: json.dumps(shape, indent=1).encode() for name, shape in shapes.items()}
    return files | tokenizer.files()


def build(
    cfg: MllmConfig, dtype: torch.dtype, device: torch.device, folder: Path | None = None, mapped: bool = False
) -> tuple[Mllm, Tokenizer]:
    """The model on its base weights, and its tokenizer; `folder` is the checkpoint it will be loaded from, if any.

    A fully trained language model comes whole from its checkpoint, so only its shape is taken from `folder` here. With
    `mapped` base weights stay in their files, as Llama.from_pretrained says.
    """
    check_type(cfg, folder)
    torch.manual_seed(0)  # adapters and projections start alike on every rank and in every run of a recipe
    if cfg.full and folder is not None:
        with torch.device("meta"):
            llm = Llama(LlamaConfig.from_json(folder / "llm_config.json")).to(dtype)
        llm.to_empty(device=device)  # the system gives its memory as the checkpoint fills it
        llm.tie()
    else:
        quant = None if cfg.quant == "none" else cfg.quant
        llm = Llama.from_pretrained(find_weights(cfg.llm, "language model"), dtype, str(device), quant, mapped)
    if folder is not None and any((folder / file).is_file() for file in FILES):
        tokenizer = load_tokenizer(folder, cfg.end_sym)
    else:
        tokenizer = load_tokenizer(cfg.tokenizer or find_weights(cfg.llm, "language model"), cfg.end_sym)
    if tokenizer.vocab_size > llm.config.vocab_size:
        raise UserError(
            f"{tokenizer.path}: {tokenizer.vocab_size:,} tokens, the language model has {llm.config.vocab_size:,}"
        )
    compressor = None
    if cfg.towers.mamba_compressor:
        compressor = build_compressor(cfg.towers, llm.config.hidden_size, tokenizer, device, folder)
    return Mllm(cfg, llm, compressor).to(device), tokenizer


def check_type(cfg: MllmConfig, folder: Path | None) -> None:
    """UserError unless the language model that build() would take is what --model-type says."""
    if cfg.full and folder is not None:
        file = folder / "llm_config.json"
    else:
        file = find_weights(cfg.llm, "language model") / "config.json"
    found = "qwen2" if LlamaConfig.from_json(file).attention_bias else "llama"
    if cfg.model_type != "auto" and not cfg.model_type.endswith(found):
        raise UserError(f"--model-type {cfg.model_type}: {file} is of a {found} (auto takes what there is)")


def build_compressor(
    cfg: TowerConfig, width: int, tokenizer: Tokenizer, device: torch.device, folder: Path | None
) -> Compressor:
    """The compressor of histories, for whose marks the tokenizer gets a token; from a checkpoint only its shape."""
    assert cfg.mamba_compressor is not None
    mark = tokenizer.add(MEM)
    if folder is not None and not cfg.freeze_mamba_compressor:
        with torch.device("meta"):
            compressor = Compressor(Mamba(MambaConfig.from_json(folder / COMPRESSOR)), width, mark)
        return compressor.to_empty(device=device)
    compressor = Compressor.from_pretrained(cfg.mamba_compressor, width, tokenizer.vocab_size, mark, device=device)
    if cfg.freeze_mamba_compressor and compressor.fresh:
        raise UserError(
            f"--freeze-mamba-compressor: {cfg.mamba_compressor} is no trained compressor: its rows for the language "
            "model's tokens are new"
        )
    return compressor


def load_visual(cfg: MllmConfig, device: torch.device) -> Any:
    """The encoder that makes visual tokens online, on the device; None where they come from a store."""
    if not (cfg.visual and cfg.visual_encoder):
        return None
    options: dict[str, Any] = {"image_size": cfg.image_size} if encoders.takes(cfg.visual_encoder, "image_size") else {}
    encoder = encoders.load(cfg.visual_encoder, cfg.visual_weights, **options | cfg.visual_options)
    if "patches" not in encoder.poolings:
        raise UserError(f"--visual-encoder {cfg.visual_encoder}: gives no tokens of a picture's patches")
    return encoder.to(device) if encoder.batched else encoder


def load(
    folder: Path,
    state: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor] | None = None,
) -> tuple[Mllm, Tokenizer, str]:
    """The trained model of a checkpoint folder whose state.json is `state`, in eval mode, with its loading coverage.

    `tensors` take the place of those that the folder holds.
    """
    cfg = from_dict(MllmConfig, state["config"]["model"])
    mllm, tokenizer = build(cfg, dtype, device, folder)
    if not cfg.full and state["base"]["files"] != identity(find_weights(cfg.llm, "language model"))["files"]:
        raise UserError(f"{folder}: was trained on other weights of {cfg.llm} than those found here")
    if tensors is None:
        tensors = checkpoint.read(folder)
    frozen = cfg.towers.frozen_compressor
    if frozen and state["compressor"]["files"] != compressor_identity(frozen)["files"]:
        raise UserError(f"{folder}: was trained with another compressor than {frozen} found here")
    covered = checkpoint.load_tensors(mllm, tensors, str(checkpoint.place(folder)))
    if not cfg.full:
        covered = f"{mllm.llm.coverage} of the language model, {covered}"
    return mllm.eval(), tokenizer, covered

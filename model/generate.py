"""Decoding with a static key/value cache: greedy, sampling, beam search, and the likelihood of given answers."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import UserError
from model.llm import Attend, Branched, Llama, Packed, document_positions, worth_sharing

Prompts = Tensor | Sequence[Tensor] | Sequence[list[int]]
Follow = Callable[[int, list[int]], bool]  # prompt, its tokens so far -> whether it goes on
NEVER = -1e9  # the score of a hypothesis that does not exist
HEAD_ROWS = 2048  # positions whose logits exist at one time while scoring
BLOCK = 256  # slots: so many more are read by the next program of Fixed


class Cache:
    """Keys and values of each layer, (B, KV, S, Dh), with attention over them.

    Prompts are right-aligned: whatever their lengths, all rows write their next token to the same slot, `end`.
    """

    def __init__(self, lengths: list[int], new: int, like: Tensor, shared: int = 0):
        """Prompts of `lengths` with room for `new` tokens each; what `shared` first tokens give is computed once."""
        self.lengths, device = lengths, like.device
        self.prompt = self.end = max(lengths)
        self.slots = self.prompt + new
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.pads = torch.tensor([self.prompt - n for n in lengths], device=device)  # empty slots before each prompt
        row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
        positions = document_positions(lengths, device)[0]
        self.place = row, positions + self.pads[row]  # of every packed prompt token
        self.computed = (positions >= shared) | (row == 0)  # of these tokens
        self.source = torch.where(self.computed, self.computed.cumsum(0) - 1, positions)  # among those computed
        rests = [n - shared for n in lengths]
        self.attend: Attend = Branched(shared, rests, device) if shared else Packed(lengths)
        self.mask: Tensor | None = None  # additive, over the slots; None where every slot is visible
        if len(set(lengths)) > 1:
            self.mask = like.new_zeros(len(lengths), 1, 1, self.slots)
            self.mask.masked_fill_(torch.arange(self.slots, device=device) < self.pads[:, None, None, None], -torch.inf)

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention inside the prompts, of which those computed are packed; all rows get their keys and values."""
        shape = len(self.lengths), k.shape[1], self.slots, k.shape[3]
        self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        for cached, new in zip(self.layers[layer], (k, v), strict=True):
            cached.transpose(1, 2)[self.place] = new[0].transpose(0, 1)[self.source]  # (T, KV, Dh)
        return self.attend(layer, q, k, v)

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of n new tokens a row over the cache and themselves; they take the next n slots."""
        end = self.end + q.shape[2]
        for cached, new in zip(self.layers[layer], (k, v), strict=True):
            cached[:, :, self.end : end] = new
        return self.read(layer, q, end, None if self.mask is None else self.mask[..., :end])

    def read(self, layer: int, q: Tensor, end: int, mask: Tensor | None) -> Tensor:
        """Attention of q (B, H, n, Dh) over the slots before `end`, of which an additive mask may hide some."""
        k, v = (cached[:, :, :end] for cached in self.layers[layer])
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, KV, G * n, Dh): no key repeated for its queries
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows."""
        for layer, (k, v) in enumerate(self.layers):  # one at a time: never two whole caches
            self.layers[layer] = k[rows], v[rows]
        self.pads = self.pads[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def reorder(self, rows: Tensor) -> None:
        """Let beams of the same prompt trade places: only what was generated moves."""
        for layer in self.layers:
            for cached in layer:
                cached[:, :, self.prompt : self.end] = cached[rows, :, self.prompt : self.end]


class Fixed:
    """The step of a batch as a program on tensors that stay where they are.

    It can be compiled, and a CUDA graph can replay it. Attention reads a multiple of BLOCK slots, of which those that
    hold nothing yet are masked. Where the next token takes a slot beyond them, or rows have left the cache, the program
    is made anew; what was compiled serves any number of slots.
    """

    def __init__(self, llm: Llama, cache: Cache, graphs: bool, compiled: bool):
        self.llm, self.cache, self.slots, self.graphs, self.compiled = llm, cache, 0, graphs, compiled

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens and their positions (B,) -> logits (B, V), which the next call overwrites."""
        if self.cache.end >= self.slots:
            self.slots = min((self.cache.end // BLOCK + 1) * BLOCK, self.cache.slots)
            self.tokens, self.positions, self.end = tokens.clone(), positions.clone(), tokens.new_tensor([0])
            self.end.fill_(self.cache.end)
            step = compiled(self.step, tokens.device) if self.compiled else self.step
            self.program = captured(step, tokens.device) if self.graphs else step
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.end.fill_(self.cache.end)
        return self.program()

    def step(self) -> Tensor:
        """Whatever differs from one step to the next lies in tensors: a graph knows no other values."""
        slot = torch.arange(self.slots, device=self.end.device)
        seen = (slot >= self.cache.pads[:, None]) & (slot <= self.end)
        mask = torch.zeros(seen.shape, device=slot.device).masked_fill_(~seen, -torch.inf)[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cached, new in zip(self.cache.layers[layer], (k, v), strict=True):
                cached.index_copy_(2, self.end, new)
            return self.cache.read(layer, q, self.slots, mask)

        h = self.llm.hidden(self.llm.embed(self.tokens)[:, None], attend, self.positions[:, None])
        return self.llm.head(h[:, 0])


def compiled(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step by torch.compile; on a CPU, where Python's time counts, what calls the kernels is compiled too."""
    return torch.compile(step, dynamic=True, options={"cpp_wrapper": True} if device.type == "cpu" else None)


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as a CUDA graph, all of whose kernels start by one call; on a CPU the step as it is."""
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # libraries allocate their workspaces now, for they may not during a capture
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class State:
    """A batch in the middle of decoding: its cache, its next positions, and the tokens a repetition penalty counts."""

    def __init__(
        self, llm: Llama, prompts: Prompts, new: int, repetition_penalty: float = 1.0, graphs: bool = False,
        compiled: bool = False,
    ):  # fmt: skip
        self.llm, self.penalty = llm, repetition_penalty
        x, ids, lengths = _embed(llm, prompts)
        self.cache = Cache(lengths, new, x, beginning(x.split(lengths)))
        self.positions = torch.tensor(lengths, device=x.device)
        computed, positions = self.cache.computed, document_positions(lengths, x.device)
        h = llm.hidden(x[None, computed], self.cache.prefill, positions[:, computed])
        self.logits = llm.head(h[0, self.cache.source[self.positions.cumsum(0) - 1]])  # (B, V)
        self.seen = torch.zeros_like(self.logits, dtype=torch.bool) if repetition_penalty != 1 else None
        if self.seen is not None and ids is not None:
            self.seen[self.cache.place[0], ids] = True
        self.fixed = Fixed(llm, self.cache, graphs, compiled) if graphs or compiled else None

    def penalized(self, scores: Tensor) -> Tensor:
        """Scores (B, V) with every token seen before made less likely (CTRL, Keskar et al. 2019)."""
        if self.seen is None:
            return scores
        return torch.where(self.seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)

    def scores(self) -> Tensor:
        """What the next tokens are chosen by: (B, V) penalized logits."""
        return self.penalized(self.logits)

    def step(self, tokens: Tensor) -> None:
        """Feed one token a row (B,) and compute the logits of the next."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.fixed is not None:
            self.logits = self.fixed(tokens, self.positions)
        else:
            h = self.llm.hidden(self.llm.embed(tokens)[:, None], self.cache.extend, self.positions[:, None])
            self.logits = self.llm.head(h[:, 0])
        self.cache.end += 1
        self.positions = self.positions + 1

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows."""
        self.cache.select(rows)
        if self.fixed is not None:
            self.fixed = Fixed(self.llm, self.cache, self.fixed.graphs, self.fixed.compiled)
        self.positions, self.logits = self.positions[rows], self.logits[rows]
        self.seen = None if self.seen is None else self.seen[rows]


class Together:
    """States of several models that are fed the same tokens, chosen by the mean of their probabilities."""

    def __init__(self, states: list[State]):
        self.states = states

    def scores(self) -> Tensor:
        """Log of the mean probability (B, V), each model's own penalty and softmax first."""
        logs = torch.stack([state.scores().log_softmax(-1) for state in self.states])
        return logs.logsumexp(0) - math.log(len(logs))

    def step(self, tokens: Tensor) -> None:
        for state in self.states:
            state.step(tokens)

    def select(self, rows: Tensor) -> None:
        for state in self.states:
            state.select(rows)


def _embed(llm: Llama, prompts: Prompts) -> tuple[Tensor, Tensor | None, list[int]]:
    """Prompts back to back: embeddings (T, D), ids (T,) where ids were given, lengths."""
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty")
    device = llm.model.embed_tokens.weight.device
    flat = torch.cat([torch.as_tensor(prompt) for prompt in prompts]).to(device)
    return (flat, None, lengths) if flat.is_floating_point() else (llm.embed(flat), flat, lengths)


def beginning(prompts: Sequence[Tensor]) -> int:
    """With how many embeddings all prompts (T_i, D) begin, less their last; 0 where that saves little of the work."""
    longest = min(map(len, prompts)) - 1
    if not worth_sharing(longest, [len(prompt) for prompt in prompts]):
        return 0
    first = prompts[0][:longest]
    same = torch.stack([(prompt[:longest] == first).all(1) for prompt in prompts[1:]]).all(0)
    shared = int(same.cumprod(0).sum())
    return shared if worth_sharing(shared, [len(prompt) for prompt in prompts]) else 0


@torch.inference_mode()
def generate(
    llm: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    length_penalty: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    follow: Follow | None = None,
    graphs: bool = False,
    compiled: bool = False,
) -> list[list[int]]:
    """New tokens of each prompt, up to the end token, which is left out.

    Prompts are ids (B, T), lists of ids or embeddings (T_i, D), of any lengths. Temperature 0 is greedy, or beam search
    over `num_beams`; above it tokens are drawn from the `top_p` nucleus with `generator`, which lives on llm's device.
    `follow` sees each token as it comes, where there are no beams. Each step (Fixed) may be
    `compiled`, which takes half a minute before the first, and with `graphs` a GPU replays it.
    """
    _check(temperature, top_p, num_beams, repetition_penalty)
    if len(prompts) == 0 or max_new_tokens <= 0:
        return [[] for _ in prompts]
    ends = llm.config.eos_token_id if eos_id is None else eos_id
    eos = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    state = State(llm, prompts, max_new_tokens, repetition_penalty, graphs, compiled)
    if num_beams > 1:
        return _beam_search(state, max_new_tokens, num_beams, length_penalty, eos)
    return _sample(state, len(prompts), max_new_tokens, temperature, top_p, eos, generator, follow)


@torch.inference_mode()
def generate_together(
    models: Sequence[tuple[Llama, Prompts]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    eos_id: int | Sequence[int] = (),
    generator: torch.Generator | None = None,
    follow: Follow | None = None,
    graphs: bool = False,
    compiled: bool = False,
) -> list[list[int]]:
    """generate() by several models, each with its own embeddings of the same prompts; there are no beams."""
    _check(temperature, top_p, num_beams, repetition_penalty)
    if num_beams > 1:
        raise UserError(f"num_beams: {num_beams}, but several models decode together greedily or by sampling only")
    rows = len(models[0][1])
    if rows == 0 or max_new_tokens <= 0:
        return [[] for _ in range(rows)]
    eos = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    states = Together(
        [State(llm, prompts, max_new_tokens, repetition_penalty, graphs, compiled) for llm, prompts in models]
    )
    return _sample(states, rows, max_new_tokens, temperature, top_p, eos, generator, follow)


def _check(temperature: float, top_p: float, num_beams: int, repetition_penalty: float) -> None:
    if temperature < 0:
        raise UserError(f"temperature: {temperature} is negative")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is not in (0, 1]")
    if num_beams < 1:
        raise UserError(f"num_beams: {num_beams} is not positive")
    if repetition_penalty <= 0:
        raise UserError(f"repetition_penalty: {repetition_penalty} is not positive")
    if num_beams > 1 and temperature > 0:
        raise UserError(f"num_beams {num_beams} needs temperature 0, not {temperature}")


def _sample(
    state: State | Together,
    count: int,
    steps: int,
    temperature: float,
    top_p: float,
    eos: list[int],
    generator: torch.Generator | None,
    follow: Follow | None,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(count)]
    rows: list[int | None] = list(range(count))  # cache row -> answer, None once it ended
    for step in range(steps):
        tokens = pick(state.scores(), temperature, top_p, generator)
        for i, token in enumerate(tokens.tolist()):  # the one wait for the device
            row = rows[i]
            if row is not None and token in eos:
                rows[i] = None
            elif row is not None:
                answers[row].append(token)
                if follow is not None and not follow(row, answers[row]):
                    rows[i] = None
        live = [i for i, row in enumerate(rows) if row is not None]
        if not live or step == steps - 1:
            break
        if len(live) <= 0.75 * len(rows):  # copying the cache costs about as much as a step
            keep = torch.tensor(live, device=tokens.device)
            state.select(keep)
            tokens, rows = tokens[keep], [rows[i] for i in live]
        state.step(tokens)
    return answers


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Next tokens (B,) from logits (B, V): the best at temperature 0, else a draw from the nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020)."""
    ordered, tokens = probabilities.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered)


def _beam_search(state: State, steps: int, beams: int, length_penalty: float, eos: list[int]) -> list[list[int]]:
    """Beam search as transformers does it: score = log-likelihood / length ** length_penalty, end token counted.

    A prompt stops when its best running beam, at its present length, cannot beat its worst finished one.
    """
    batch, vocab = state.logits.shape
    device = state.logits.device
    first = torch.arange(batch, device=device)[:, None] * beams  # a prompt's first row
    state.select(torch.arange(batch, device=device).repeat_interleave(beams))
    end_ids = torch.tensor(eos, device=device, dtype=torch.long)
    candidates = max(2, 1 + len(eos)) * beams  # enough that `beams` of them go on, however many end
    running = torch.full((batch, beams), NEVER, device=device)
    running[:, 0] = 0.0
    tokens = torch.zeros(batch, beams, steps, dtype=torch.long, device=device)
    done, done_tokens = torch.full_like(running, NEVER), tokens.clone()
    done_length = torch.zeros(batch, beams, dtype=torch.long, device=device)
    improving = torch.ones(batch, dtype=torch.bool, device=device)
    for length in range(1, steps + 1):
        scores = state.penalized(state.logits.log_softmax(-1)).view(batch, beams, vocab) + running[..., None]
        top, index = scores.flatten(1).topk(candidates)
        beam, token = index // vocab, index % vocab
        history = _take(tokens, beam)
        history[:, :, length - 1] = token
        ended = torch.isin(token, end_ids) | (length == steps)
        # of the ended, only the best `beams` candidates count: the rest are spares that keep the beam full
        closed = ended & (torch.arange(candidates, device=device) < beams) & improving[:, None]
        done, best = torch.cat((done, (top / length**length_penalty).where(closed, NEVER)), 1).topk(beams)
        done_tokens = _take(torch.cat((done_tokens, history), 1), best)
        done_length = torch.cat((done_length, torch.full_like(token, length)), 1).gather(1, best)
        running, going = (top + ended * NEVER).topk(beams)
        tokens = _take(history, going)
        improving = improving & (running[:, 0] / length**length_penalty > done.amin(1))
        if length == steps or not improving.any():  # the one wait for the device
            break
        rows = (first + beam.gather(1, going)).flatten()
        state.cache.reorder(rows)
        if state.seen is not None:
            state.seen = state.seen[rows]
        state.step(token.gather(1, going).flatten())
    answers = [row[:n] for row, n in zip(done_tokens[:, 0].tolist(), done_length[:, 0].tolist(), strict=True)]
    return [answer[:-1] if answer[-1] in eos else answer for answer in answers]


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, n) of tokens (B, m, S)."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[2]))


@torch.inference_mode()
def score_labels(llm: Llama, prompts: Prompts, candidates: list[list[int]]) -> Tensor:
    """Log-likelihood of each candidate answer after each prompt, fp32 (B, L): the sum over its tokens.

    All candidates of a prompt run in one pass over its cache; each sees the prompt and itself only.
    """
    if not all(candidates):
        raise ValueError(f"candidate {[bool(c) for c in candidates].index(False)} is empty")
    fed = [candidate[:-1] for candidate in candidates]  # a candidate's first token is scored by the prompt's own logits
    total = sum(map(len, fed))
    state = State(llm, prompts, total)
    cache, device = state.cache, state.logits.device
    firsts = torch.tensor([candidate[0] for candidate in candidates], device=device)
    result = state.logits.log_softmax(-1)[:, firsts]
    if total == 0:
        return result
    inputs = torch.tensor([token for f in fed for token in f], device=device)
    targets = torch.tensor([token for candidate in candidates for token in candidate[1:]], device=device)
    owner = torch.arange(len(fed)).repeat_interleave(torch.tensor([len(f) for f in fed])).to(device)
    offset = document_positions([len(f) for f in fed], device)[0]
    cache.mask = _candidate_mask(cache, owner, llm.config.num_attention_heads // llm.config.num_key_value_heads)
    x = llm.embed(inputs).expand(len(cache.lengths), -1, -1)
    h = llm.hidden(x, cache.extend, state.positions[:, None] + offset)  # (B, C, D)
    columns = max(1, HEAD_ROWS // len(h))
    for part, label, target in zip(h.split(columns, 1), owner.split(columns), targets.split(columns), strict=True):
        logp = llm.head(part).log_softmax(-1).gather(-1, target.expand(len(h), -1)[..., None])
        result.index_add_(1, label, logp[..., 0])
    return result


def _candidate_mask(cache: Cache, owner: Tensor, groups: int) -> Tensor:
    """Additive (B, 1, G * C, S): a candidate's tokens see the prompt, and those of their own up to themselves."""
    own = (owner[:, None] == owner).tril()  # (C, C)
    prompt = torch.arange(cache.prompt, device=owner.device) >= cache.pads[:, None]  # (B, P)
    batch, count = len(prompt), len(owner)
    seen = torch.cat((prompt[:, None].expand(-1, count, -1), own.expand(batch, -1, -1)), 2)
    return torch.zeros(seen.shape, device=owner.device).masked_fill_(~seen, -torch.inf).repeat(1, groups, 1)[:, None]

"""Bags of hashed n-grams (model/encoders/hashtext.py) to vectors, K seeds side by side."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POWER = 0.25  # counts are divided by length ** POWER: 0 is their sum, 1 their mean; a short text shall stay short
LIFT = 0.75  # of an n-gram's weight with how many texts have it


class Bag(nn.Module):
    """Ids (K, B, L) where mask (K, B, L) holds -> (K, B, dim): weighted counts / length ** POWER, times a table.

    AdamW steps as far for an n-gram of one text as for one of thousands, and learns the rare ones by heart. So `weight`
    is (texts with the n-gram) ** LIFT, the opposite of idf; all ones until `set_texts`.
    """

    weight: Tensor

    def __init__(self, k: int, buckets: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(k, buckets, dim))
        self.bias = nn.Parameter(torch.zeros(k, 1, dim))
        self.register_buffer("weight", torch.ones(buckets))
        self.lift, self.damped = LIFT, False

    def evenly(self) -> None:
        """For gradient descent, safe from rare n-grams by itself: all weigh 1, one that a text has n times 1 + ln n."""
        self.lift, self.damped = 0.0, True

    def set_texts(self, texts: Tensor) -> None:
        """`texts` (buckets,): how many texts of the train split have each n-gram; 50 of them have weight 1."""
        self.weight.copy_((texts.clamp_min(1) / 50) ** self.lift)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        length = mask.sum(-1)  # (K, B)
        scale = length.clamp_min(1) ** -POWER
        sums = []
        # padding, most of a batch of texts, is not looked up
        for table, own, there, n, size in zip(self.table.unbind(), ids, mask, length, scale, strict=True):
            weight = (self.weight[own] * size[:, None])[there]
            start, read = n.cumsum(0) - n, own[there]
            if self.damped:
                text = torch.repeat_interleave(n)  # which text an id is of
                _, place, times = torch.unique(text * len(table) + read, return_inverse=True, return_counts=True)
                times = times[place].to(weight.dtype)
                weight = weight * (1 + times.log()) / times
            sums.append(F.embedding_bag(read, table, start, mode="sum", per_sample_weights=weight))
        return torch.stack(sums) + self.bias

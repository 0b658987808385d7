"""What was felt in the previous utterances of a dialogue, K seeds side by side."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Turns(nn.Module):
    """Adds to an utterance's logits a learned map of the class probabilities of each previous utterance.

    There is one map for each distance, apart for the utterance's own speaker and for others.
    """

    def __init__(self, k: int, classes: int, reach: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.zeros(k, reach, 2, classes + 1, classes))  # the last row is a bias

    def forward(self, logits: Tensor, previous: Tensor, mask: Tensor, same: Tensor) -> Tensor:
        """Logits (K, B, C), those of the previous utterances (K, B, reach, C), nearest first, where there are any

        (mask) and where their speaker is the same (K, B, reach) -> logits (K, B, C).
        """
        if self.training:  # half of the utterances learn to do without, or the maps would take over the classes' shares
            mask = mask & (torch.rand(*mask.shape[:2], 1, device=mask.device) < 0.5)
        felt = F.pad(previous.detach().softmax(-1), (0, 1), value=1.0)
        who = torch.stack([mask & ~same, mask & same], -1).to(felt.dtype)  # (K, B, reach, 2)
        return logits + torch.einsum("kbpc,kbps,kpsco->kbo", felt, who, self.maps)

"""Linear probe of stored features on one fold: standardised multinomial logistic regression, beside the majority class.

$ python -m tools.linear_probe --features features/logmel --manifest datasets/ravdess/manifest.csv --fold 1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import UserError, opt, run
from common.metrics import classification, majority
from common.probe import fit
from data.features import open_features
from data.manifest import read_manifest


@dataclass
class Config:
    features: str = opt("features/logmel", "feature store, one vector a clip", "--features")
    manifest: str = opt("datasets/ravdess/manifest.csv", "manifest with label and fold columns", "--manifest")
    fold: str = opt("1", "the fold that is tested; all others train", "--fold")
    c: float = opt(0.03, "inverse strength of the L2 penalty; the default was chosen on RAVDESS fold 4 alone", "--c")


def probe(x: Tensor, y: Tensor, test: Tensor, classes: int, c: float) -> Tensor:
    """Predicted classes of the rows of x (N, D) where `test` holds, from a fit on the others."""
    x = x.double()
    mean, std = x[~test].mean(0), x[~test].std(0, correction=0)
    x = (x - mean) / torch.where(std > 0, std, 1.0)
    weight, bias = fit(x[~test], y[~test], classes, c)
    return (x[test] @ weight.T + bias).argmax(1)


def main(cfg: Config) -> None:
    store = open_features(cfg.features)
    clips = [clip for clip in read_manifest(cfg.manifest) if clip.label is not None and clip.id in store]
    test = torch.tensor([clip.fold == cfg.fold for clip in clips], dtype=torch.bool)
    if not test.any() or test.all():
        raise UserError(f"{cfg.manifest}: fold {cfg.fold!r} leaves {int(test.sum())} of {len(clips)} clips for testing")
    labels = sorted({str(clip.label) for clip in clips})
    x = torch.stack([store[clip.id].flatten() for clip in clips])
    y = torch.tensor([labels.index(str(clip.label)) for clip in clips])
    truth = [labels[i] for i in y[test]]
    scores = classification(truth, [labels[i] for i in probe(x, y, test, len(labels), cfg.c)], labels)
    base = majority(truth, labels)
    print(f"fold {cfg.fold}: {int((~test).sum())} clips train, {len(truth)} test, {x.shape[1]} features, C {cfg.c:g}")
    print(f"linear probe: uar {scores['uar']:.4f}  accuracy {scores['accuracy']:.4f}")
    print(f"majority:     uar {base['uar']:.4f}  accuracy {base['accuracy']:.4f}  ({base['label']})")


if __name__ == "__main__":
    run(Config, main)

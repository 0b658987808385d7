import time, sys, os, faulthandler
import torch._dynamo
import torch.utils.tensorboard
import pytest
import train_llm
from common import config
def run(*argv):
    train_llm.main(config.load(train_llm.Config, [str(a) for a in argv]))
def two(argv):
    f = open(f"/tmp/hang{os.environ['RANK']}.txt","w")
    faulthandler.dump_traceback_later(12, file=f)
    run(*argv)
    faulthandler.cancel_dump_traceback_later()
@pytest.mark.parametrize("i", range(25))
def test_b(merr, tmp_path, ranks, i):
    ranks(2, two, [*merr.argv, "--out", tmp_path/"a", "--epochs", 1, "--iters-per-epoch", 10, "--batch-size", 2, "--save-steps", 3], timeout=20)

"""
Accuracy on held-out training images, by which the best epoch is chosen.
"""
import math

import torch
import torch.nn.functional as F

import data
from attacks import attack_mode, pgd
from models import bn_branch
from support import ddp

def clean_and_pgd(model, x_val, y_val, *, eps, norm='Linf', branch=None, progress=None):
    """
    Accuracy and PGD-20 accuracy in percent, and mean clean cross-entropy, of x_val uint8 (N,H,W,3) and y_val
    (N,). In fp32 and eager: autocast starves the attack on a confident network; on a GPU with TF32, if the
    training is in bf16 or fp16 (see speed.precision). eps: in units of [0, 1]; the step is a quarter of it.
    branch: of dual BN. progress: as tqdm, with a name and a total. Under torchrun each process takes its
    share, and all get the same three numbers.
    """
    rank, world = ddp.rank(), ddp.world_size()
    batch_size = data.at_once(500 if y_val.is_cuda else 50, x_val)
    x_val, y_val, n = x_val[rank::world], y_val[rank::world], len(y_val)
    batches = data.batches(x_val, y_val, batch_size)
    if progress:
        batches = progress(batches, 'validation', total=math.ceil(len(y_val) / batch_size))

    sums = torch.zeros(3, dtype=torch.float64, device=y_val.device)
    with attack_mode(model), bn_branch(model, branch):
        for x, y in batches:
            def cross_entropy(x_adv):
                return F.cross_entropy(model(x_adv), y, reduction='none')
            x_adv = pgd(cross_entropy, x, eps=eps, step_size=eps / 4, steps=20, norm=norm)
            with torch.no_grad():
                logits, logits_adv = model(x), model(x_adv)
            sums[0] += (logits.argmax(1) == y).sum()
            sums[1] += (logits_adv.argmax(1) == y).sum()
            sums[2] += F.cross_entropy(logits, y, reduction='sum')
    ddp.average([sums])
    clean, robust, loss = (world * sums / n).tolist()
    return 100 * clean, 100 * robust, loss

"""
How the masking audit attacks a network: PGD on several objectives, and two attacks that attacks.py does
not have.
"""
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attacks import cw_margin, norms, pgd

class Subject:
    """The network under audit, and how it is attacked. Every objective: x_adv, y -> (B,)."""
    def __init__(self, model, *, eps, step_size, steps, norm):
        self.model, self.norm = model, norm
        self.settings = dict(eps=eps, step_size=step_size, steps=steps, norm=norm)

    def logits(self, x):
        # the sum: an output without a gradient has a zero one, and no error
        return self.model(x) + 0 * x.flatten(1).sum(1, keepdim=True)

    def ce(self, x_adv, y):
        return F.cross_entropy(self.logits(x_adv), y, reduction='none')

    def margin(self, x_adv, y):
        return cw_margin(self.logits(x_adv), y)

    def standardised(self, x_adv, y):
        z = self.logits(x_adv)
        return F.cross_entropy(z / z.std(1, keepdim=True).clamp_min(1e-30), y, reduction='none')

    def right(self, x_adv, y):
        """The logit of y over the mean of all."""
        z = self.logits(x_adv)
        return z.gather(1, y[:, None])[:, 0] - z.mean(1)

    def attack(self, objective, x, y, **settings):
        """-> x_adv; where the attack derails, x itself."""
        x_adv = pgd(lambda x_adv: objective(x_adv, y), x, **dict(self.settings, **settings))
        return torch.where(x_adv.isfinite().flatten(1).all(1)[:, None, None, None], x_adv, x)

    def broken(self, x_adv, y):
        return self.logits(x_adv).argmax(1) != y

    def further(self, on, x, y, craft):
        """Of the images on, (n,) bool, those that craft(x, y) -> x_adv breaks; the others are spared."""
        also = torch.zeros_like(on)
        if on.any():
            also[on] = self.broken(craft(x[on], y[on]), y[on])
        return also

def gradient(objective, x, y):
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(objective(x, y).sum(), x)[0]

class StraightThrough(TorchFunctionMode):
    """BPDA with the identity (Athalye et al.): forward as it is, backward as if nothing were rounded."""
    OPS = {getattr(owner, name) for name in ('round', 'floor', 'ceil', 'trunc', 'sign')
           for owner in (torch, torch.Tensor)}
    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.OPS and args[0].requires_grad:
            self.seen = True
            return args[0] + (out - args[0]).detach()
        return out

def random_search(objective, x, *, eps, norm, queries):
    """Patches of +-eps at random, kept where they raise the objective: after Andriushchenko et al. 2020,
    "Square Attack". Reads no gradient."""
    B, C, H, W = x.shape

    def signs(*shape):
        return 2.0 * torch.randint(2, shape, device=x.device) - 1

    def moved(delta):
        if norm == 'L2':
            delta = delta * eps / norms(delta)
        return (x + delta).clamp(0, 1)

    def covered(size, side):                # (B, size): side neighbours of a random place
        low = torch.randint(size - side + 1, (B, 1), device=x.device)
        place = torch.arange(size, device=x.device)
        return (low <= place) & (place < low + side)

    delta = eps * signs(B, C, 1, W).expand(B, C, H, W)          # stripes, as theirs
    best = objective(moved(delta))
    for q in range(queries):
        side = max(1, round(0.5 * (1 - q / queries) * min(H, W)))
        patch = covered(H, side)[:, None, :, None] & covered(W, side)[:, None, None, :]
        trial = torch.where(patch, eps * signs(B, C, 1, 1), delta)
        value = objective(moved(trial))
        delta = torch.where((value > best)[:, None, None, None], trial, delta)
        best = torch.maximum(best, value)
    return moved(delta)

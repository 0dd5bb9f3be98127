"""
Adversarial-training losses. Every loss is a pure function of what it names, and of nothing else:

    loss(<logits and labels, by name>, *, <hyper-parameters, the paper's defaults>)
        -> one value per image, (B,)

    y                 labels                                    (B,) int64
    logits            student on x                              (B, K)
    logits_adv        student on x_adv                          (B, K)
    logits_helper     student on x + h (x_adv - x)              (B, K)   HAT
    t_logits          frozen teacher on x                       (B, K)   never carries a gradient
    t_logits_adv      frozen teacher on x_adv                   (B, K)   likewise

Logits arrive in fp32. The training loop reads the names and computes those, in this order, and no others:
a loss without y sees no label. Copy any function into your own code; it needs kl, mse and ce below at
most. Divergences are summed over the classes, squared errors averaged (F.mse_loss's convention); the mean
over the batch is the caller's.
"""
import inspect
from typing import Callable, NamedTuple

import torch.nn.functional as F

# -----------------------------------------------------------------------------
# building blocks

def kl(q_logits, p_logits):
    """KL(p || q), p the target, (B,). Gradient flows into both."""
    # log_target: the form with probabilities has NaN gradients where a confident p
    # underflows (TRADES issue 30)
    return F.kl_div(F.log_softmax(q_logits, 1), F.log_softmax(p_logits, 1),
                    reduction='none', log_target=True).sum(1)

def mse(a, b):
    """Mean over the classes of (a - b)^2, (B,)."""
    return (a - b).square().mean(1)

def ce(logits, y):
    """Cross-entropy, (B,)."""
    return F.cross_entropy(logits, y, reduction='none')

# -----------------------------------------------------------------------------
# inner objectives: what the attack climbs. Same rule of names; *_adv is computed in every step, the rest once

def climb_ce(logits_adv, y):
    """CE(p', y)"""
    return ce(logits_adv, y)

def climb_kl(logits_adv, logits):
    """KL(p || p')"""
    return kl(logits_adv, logits)

def climb_mse(logits_adv, logits):
    """MSE(z, z')"""
    return mse(logits_adv, logits)

# -----------------------------------------------------------------------------
# losses. First line of a docstring: authors, title; second: the formula: z logits, p softmax, ' on x',
# v and g the teacher's logits and softmax on x

def standard(logits, y):
    """Training without an adversary.
    CE(p, y)"""
    return ce(logits, y)

def pgd_at(logits_adv, y):
    """Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", eq. 2.1.
    CE(p', y)"""
    return ce(logits_adv, y)

def trades(logits, logits_adv, y, *, beta=6.0):
    """Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", eq. 5.
    CE(p, y) + beta KL(p || p')
    As their code: the clean branch is not detached, the KL pulls p as well as p'."""
    return ce(logits, y) + beta * kl(logits_adv, logits)

def hat(logits, logits_adv, logits_helper, t_logits_adv, y, *, beta=2.5, gamma=0.5, h=2.0):
    """Rade & Moosavi-Dezfooli 2022, "Reducing Excessive Margin to Achieve a Better [...] Trade-off" (HAT).
    CE(p, y) + beta KL(p || p') + gamma CE(f(x + h (x' - x)), argmax g(x'))
    The helper lies outside the ball and possibly outside [0, 1]; its label is what a standard teacher
    sees in x'. The training loop reads h to place it. Defaults: the authors' CIFAR-10 command (with
    extra data they use beta 3.5)."""
    return ce(logits, y) + beta * kl(logits_adv, logits) + gamma * ce(logits_helper, t_logits_adv.argmax(1))

def softmax_kl(logits, logits_adv, t_logits, *, beta=0.2, reverse=False):
    """Al-Najjar et al., "Adversarial Training without Hard Labels", eq. 4. No label anywhere.
    beta [KL(g || p) + KL(g || p')] + KL(p || p')
    The paper's notation leaves the teacher terms' direction open:
    reverse takes KL(p || g) and KL(p' || g)."""
    if reverse:
        teach = kl(t_logits, logits) + kl(t_logits, logits_adv)
    else:
        teach = kl(logits, t_logits) + kl(logits_adv, t_logits)
    return beta * teach + kl(logits_adv, logits)

def logit_mse(logits, logits_adv, t_logits, *, beta=0.2):
    """Al-Najjar et al., "Adversarial Training without Hard Labels", eq. 5. No label anywhere.
    beta [MSE(z, v) + MSE(z', v)] + MSE(z, z')"""
    return beta * (mse(logits, t_logits) + mse(logits_adv, t_logits)) + mse(logits, logits_adv)

# -----------------------------------------------------------------------------
# the table: one row per method

class Method(NamedTuple):
    loss: Callable
    inner: Callable | None          # what the attack climbs; None: no attack
    attack: dict = {}               # PGD settings, where they are not the defaults of train_adv.py

BESIDE = dict(init='normal')        # at x itself KL and MSE to the clean output have no gradient

METHODS = {
    'standard':   Method(standard,   None),
    'pgd_at':     Method(pgd_at,     climb_ce),
    'trades':     Method(trades,     climb_kl,  BESIDE),
    'hat':        Method(hat,        climb_kl,  BESIDE),
    'softmax_kl': Method(softmax_kl, climb_kl,  BESIDE),
    'logit_mse':  Method(logit_mse,  climb_mse, BESIDE),
}

def needs(fn):
    """Names of the logits and labels fn asks for: its positional arguments."""
    return [p.name for p in inspect.signature(fn).parameters.values()
            if p.kind == p.POSITIONAL_OR_KEYWORD] if fn else []

def hparams(fn):
    """Hyper-parameters of fn and their defaults: its keyword-only arguments. train_adv.py
    turns each into a flag."""
    return {p.name: p.default for p in inspect.signature(fn).parameters.values()
            if p.kind == p.KEYWORD_ONLY} if fn else {}

def needs_teacher(method):
    return any(name.startswith('t_') for name in needs(method.loss) + needs(method.inner))

def table():
    """METHODS as the README shows it, made of signatures and docstrings."""
    rows = ['| `--loss` | minimises | its attack climbs | flags | labels | teacher | source |',
            '|---|---|---|---|---|---|---|']
    for name, method in METHODS.items():
        source, formula = [line.strip() for line in method.loss.__doc__.splitlines()[:2]]
        climbs = method.inner.__doc__ if method.inner else '-'
        flags = ' '.join(f'`--{k}`' if v is False else f'`--{k} {v}`'
                         for k, v in hparams(method.loss).items())
        labels = 'y' if 'y' in needs(method.loss) + needs(method.inner) else '**none**'
        cells = (f'`{name}`', formula, climbs, flags or '-', labels,
                 'standard' if needs_teacher(method) else '-', source.rstrip('.'))
        rows.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
    return '\n'.join(rows)

if __name__ == '__main__':
    print(table())

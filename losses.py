"""
Adversarial-training losses. Every loss is a pure function of what it names, and of nothing else:

    loss(<logits and labels, by name>, *, <hyper-parameters, the paper's defaults>)
        -> one value per image, (B,)

    y                 labels                                    (B,) int64, or Softened
    logits            student on x                              (B, K)
    logits_adv        student on x_adv                          (B, K)
    logits_helper     student on x + h (x_adv - x)              (B, K)   HAT
    t_logits          frozen teacher on x                       (B, K)   no gradient
    t_logits_adv      frozen teacher on x_adv                   (B, K)   no gradient, except in an attack
    s_logits_adv      second teacher, a standard one, on x_adv  (B, K)   no gradient
    guide_logits      network trained along, on x               (B, K)   carries a gradient; LBGAT
    class_p           mean softmax of the student over y's class,
                      of the epoch before                       (B, K)   DKL
    progress          share of the training that is done        float in [0, 1]

Logits arrive in fp32. The training loop reads the names and computes those, and no others: a loss without y
sees no label. Copy any function into your own code, with the few it calls. Divergences are summed over the
classes, squared errors averaged (F.mse_loss's convention); the mean over the batch is the caller's.
"""
import inspect
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# building blocks

def kl(q_logits, p_logits):
    """KL(p || q), p the target, (B,). Gradient flows into both."""
    # log_target: the form with probabilities has NaN gradients where a confident p
    # underflows (TRADES issue 30)
    log_q, log_p = [F.log_softmax(z, 1, dtype=torch.promote_types(z.dtype, torch.float32))
                    for z in (q_logits, p_logits)]          # of half-precision logits it could be negative
    return F.kl_div(log_q, log_p, reduction='none', log_target=True).sum(1)

def mse(a, b):
    """Mean over the classes of (a - b)^2, (B,)."""
    return (a - b).square().mean(1)

def ce(logits, y):
    """Cross-entropy, (B,). y: labels (B,), target probabilities (B, K), or Softened labels."""
    target = y if isinstance(y, torch.Tensor) else y.rule(logits, y.y, smoothing=y.smoothing)
    return F.cross_entropy(logits, target, reduction='none')

def hard(y):
    """The labels (B,) themselves."""
    return y if isinstance(y, torch.Tensor) else y.y

# -----------------------------------------------------------------------------
# soft targets made of labels: (logits, y) -> (B, K), no gradient. Any loss that takes y takes Softened(y,
# rule) in its place: each cross-entropy then makes its own target, and every other use of y sees hard labels

class Softened(NamedTuple):
    y: torch.Tensor
    rule: Callable
    smoothing: float = 0.1

def smooth(logits, y, *, smoothing=0.1):
    """Label smoothing as in torch: smoothing / K on every class. ("Bag of Tricks" spares the right one.)"""
    K = logits.shape[1]
    return (1 - smoothing) * F.one_hot(y, K).to(logits) + smoothing / K

def adversarial_smoothing(logits, y, *, smoothing=0.1):
    """Goibert & Dohmatob 2019, "Adversarial Robustness via Label-Smoothing" (ALS): the least likely class
    gets what the right one loses; ties share it. It may be the right one itself."""
    z = logits.detach()
    least = (z == z.amin(1, keepdim=True)).to(z)
    return (1 - smoothing) * F.one_hot(y, z.shape[1]).to(z) + smoothing * least / least.sum(1, keepdim=True)

TARGETS = {'smooth': smooth, 'als': adversarial_smoothing}

# -----------------------------------------------------------------------------
# inner objectives: what the attack climbs. Of the names above they know y, logits and t_logits, which are
# computed once, and logits_adv and t_logits_adv, in every step: see craft in train_adv.py

def climb_ce(logits_adv, y):
    """CE(p', y)"""
    return ce(logits_adv, hard(y))

def climb_kl(logits_adv, logits):
    """KL(p || p')"""
    return kl(logits_adv, logits)

def climb_mse(logits_adv, logits):
    """MSE(z, z')"""
    return mse(logits_adv, logits)

def climb_least_likely(logits_adv, logits):
    """-CE(p', argmin p)"""
    return -ce(logits_adv, logits.argmin(1))

def climb_teacher(logits_adv, t_logits):
    """KL(g || p')"""
    return kl(logits_adv, t_logits)

def climb_both(logits_adv, t_logits_adv):
    """KL(g' || p')"""
    return kl(logits_adv, t_logits_adv)

# -----------------------------------------------------------------------------
# losses. First line of a docstring: authors, title; second: the formula: z logits, p softmax, ' of x_adv,
# v and g the teacher's logits and softmax, s' the second teacher's

def standard(logits, y):
    """Training without an adversary.
    CE(p, y)"""
    return ce(logits, y)

def pgd_at(logits_adv, y):
    """Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", eq. 2.1.
    CE(p', y)"""
    return ce(logits_adv, y)

def nat_adv(logits, logits_adv, y):
    """Dallaire & David, "Mixture of techniques to improve classification accuracy and robustness", eq. 4.
    [CE(p, y) + CE(p', y)] / 2
    The mean over clean and adversarial images, as their Algorithm 1 has it; eq. 4 is the sum."""
    return (ce(logits, y) + ce(logits_adv, y)) / 2

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

def advprop(logits, logits_adv, y):
    """Xie et al. 2020, "Adversarial Examples Improve Image Recognition" (AdvProp).
    [CE(p, y) + CE(p', y)] / 2, p' through its own BN
    Their text adds the two; implementations average the concatenated batch, as here. METHODS turns on
    --dual-bn: x goes through the main BN, x' through the auxiliary one. The attack uses the auxiliary BN
    and is untargeted; theirs aims at a random class. --recipe paper is Dallaire & David's, who craft through
    the main BN."""
    return nat_adv(logits, logits_adv, y)

def als(logits, y, *, alpha=0.1):
    """Goibert & Dohmatob 2019, "Adversarial Robustness via Label-Smoothing" (ALS). No attack.
    CE(p, (1 - alpha) y + alpha argmin p)
    They sweep alpha and name no default. --targets als is the same rule in any other loss. --recipe paper is
    Dallaire & David's; Goibert & Dohmatob take SGD without momentum, lr 1e-4, 50 epochs, batches of 100."""
    return ce(logits, adversarial_smoothing(logits, hard(y), smoothing=alpha))

def alp(logits, logits_adv, y, *, beta=0.5):
    """Kannan et al. 2018, "Adversarial Logit Pairing" (ALP).
    [CE(p, y) + CE(p', y)] / 2 + beta MSE(z, z')
    Neither side is detached. The authors train on ImageNet, with --targets smooth and --inner least_likely,
    x and x' in one batch; climbing CE, and two forwards, are what its ports to CIFAR do."""
    return nat_adv(logits, logits_adv, y) + beta * mse(logits, logits_adv)

def mart(logits, logits_adv, y, *, beta=5.0):
    """Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples" (MART).
    CE(p', y) - log(1 - max_{k != y} p'_k) + beta (1 - p_y) KL(p || p')
    No side is detached, the weight 1 - p_y included. beta: their ResNet-18; 6 for a wide ResNet."""
    label = hard(y)[:, None]
    fp32 = torch.promote_types(logits.dtype, torch.float32)     # in half precision 1 - p may round to zero
    best_wrong = logits_adv.softmax(1, dtype=fp32).scatter(1, label, 0).amax(1)
    p_y = logits.softmax(1, dtype=fp32).gather(1, label)[:, 0]
    boosted = ce(logits_adv, y) - (1.0001 - best_wrong + 1e-12).log()           # their constants
    return boosted + beta * (1.0000001 - p_y) * kl(logits_adv, logits)

def dkl(logits, logits_adv, class_p, y, *, alpha=4.0, beta=20.0, T=4.0):
    """Cui et al. 2024, "Decoupled Kullback-Leibler Divergence Loss" (IKL).
    CE(p, y) - alpha sg(p) log p' + beta/4 sum_jk w_j w_k (d_j - d_k)^2, d = z - z', w = class_p
    With w = p, alpha = beta = 1 and z' fixed in d, the gradients are those of KL(p || p'); the improved form
    takes the class mean for w and lets z' move. sg: no gradient. The training loop reads T, the temperature
    of class_p. Defaults: the authors' CIFAR-10 command."""
    d = logits - logits_adv
    wmse = ((class_p * d.square()).sum(1) - (class_p * d).sum(1).square()) / 2  # the double sum in O(K)
    return ce(logits, y) + alpha * ce(logits_adv, logits.detach().softmax(1)) + beta * wmse

def lbgat(logits, logits_adv, guide_logits, y, *, beta=0.0):
    """Cui et al. 2021, "Learnable Boundary Guided Adversarial Training" (LBGAT).
    MSE(z', guide) + CE(guide, y) + beta KL(p || p')
    The guide, a standard network, trains along: the MSE pulls it too. The student sees no label itself.
    The authors report beta 0 and 6."""
    return mse(logits_adv, guide_logits) + ce(guide_logits, y) + beta * kl(logits_adv, logits)

def softmax_kl(logits, logits_adv, t_logits, *, beta=0.2, reverse=False):
    """Al-Najjar et al., "Adversarial Training without Hard Labels", eq. 4. No label anywhere.
    beta [KL(g || p) + KL(g || p')] + KL(p || p')
    reverse takes KL(p || g) and KL(p' || g): so reads eq. 4 by the notation of eq. 2 and 3. The default
    is the direction of distillation; both were measured (results/README.md)."""
    if reverse:
        teach = kl(t_logits, logits) + kl(t_logits, logits_adv)
    else:
        teach = kl(logits, t_logits) + kl(logits_adv, t_logits)
    return beta * teach + kl(logits_adv, logits)

def logit_mse(logits, logits_adv, t_logits, *, beta=0.2):
    """Al-Najjar et al., "Adversarial Training without Hard Labels", eq. 5. No label anywhere.
    beta [MSE(z, v) + MSE(z', v)] + MSE(z, z')"""
    return beta * (mse(logits, t_logits) + mse(logits_adv, t_logits)) + mse(logits, logits_adv)

def ltd(logits, logits_adv, t_logits, *, beta=6.0, tau=5.0):
    """Chen & Lee, "Low Temperature Distillation [...]" (LTD), eq. 28. No label anywhere.
    CE(p, softmax(v / tau)) + beta KL(p || p')
    The student's temperature is 1. From tau 12 on their own results show masked gradients. Their section 4.2
    attacks the label (--inner ce), their eq. 29 the divergence."""
    return ce(logits, (t_logits / tau).softmax(1)) + beta * kl(logits_adv, logits)

def ard(logits, logits_adv, t_logits, y, *, alpha=1.0, T=30.0, scale=0.1):
    """Goldblum et al. 2020, "Adversarially Robust Distillation" (ARD).
    scale alpha T^2 KL(g_T || p'_T) + (1 - alpha) CE(p, y), _T: softmax(z / T)
    scale 0.1 is their mean over ten classes; over a hundred it is 0.01, see METHODS."""
    soft = T ** 2 * kl(logits_adv / T, t_logits / T)
    return scale * alpha * soft + (1 - alpha) * ce(logits, y)

def iad1(logits, logits_adv, t_logits, t_logits_adv, y, progress, *, beta=0.1, start=0.3,
         released=False):
    """Zhu et al. 2022, "Reliable Adversarial Distillation with Unreliable Teachers" (IAD-I).
    A KL(g || p') + (1 - A) KL(p || p'), A = (g'_y)^beta; until start: KL(g || p')
    The teacher's weight is its own confidence in y at x'. --released: their code, whose first
    term is not weighted by A. p is not detached. start: epoch 60 of 200."""
    taught = kl(logits_adv, t_logits)
    if progress < start:
        return taught
    trust = t_logits_adv.softmax(1).gather(1, hard(y)[:, None])[:, 0] ** beta
    return (taught if released else trust * taught) + (1 - trust) * kl(logits_adv, logits)

def iad2(logits, logits_adv, t_logits_adv, s_logits_adv, y, progress, *, beta=0.1, start=0.2, alpha=0.5,
         gamma=0.25):
    """Zhu et al. 2022, "Reliable Adversarial Distillation with Unreliable Teachers" (IAD-II).
    (1 - alpha - gamma) CE(p', y) + alpha [A KL(g' || p') + (1 - A) KL(p || p')] + gamma KL(s' || p')
    Until start (epoch 40 of 200) A = 1, which is AKD2 (see kd_swa). Both teachers are read at x'."""
    taught = kl(logits_adv, t_logits_adv)
    if progress >= start:
        trust = t_logits_adv.softmax(1).gather(1, hard(y)[:, None])[:, 0] ** beta
        taught = trust * taught + (1 - trust) * kl(logits_adv, logits)
    return (1 - alpha - gamma) * ce(logits_adv, y) + alpha * taught + gamma * kl(logits_adv, s_logits_adv)

def rslad(logits, logits_adv, t_logits, *, alpha=5/6, scale=0.1):
    """Zi et al. 2021, "Revisiting Adversarial Robustness Distillation" (RSLAD). No label anywhere.
    scale [alpha KL(g || p') + (1 - alpha) KL(g || p)]
    scale 0.1 is their mean over ten classes, and what they use for a hundred."""
    return scale * (alpha * kl(logits_adv, t_logits) + (1 - alpha) * kl(logits, t_logits))

def adaad(logits, logits_adv, t_logits, t_logits_adv, *, alpha=1.0, scale=0.1):
    """Huang et al. 2023, "Boosting Accuracy and Robustness of Student Models via AdaAD". No label anywhere.
    scale [alpha KL(g' || p') + (1 - alpha) KL(g || p)]
    The teacher is read at x', and the attack climbs through both networks. As in their code x goes through
    the student even where alpha is 1, and moves its BN statistics. scale as in rslad; for a hundred classes
    they take the sum, 1, see METHODS."""
    return scale * (alpha * kl(logits_adv, t_logits_adv) + (1 - alpha) * kl(logits, t_logits))

def kd_swa(logits_adv, t_logits_adv, s_logits_adv, y, *, alpha=0.6, gamma=0.1, T=2.0):
    """Chen et al. 2021, "Robust Overfitting may be Mitigated by Properly Learned Smoothening" (AKD2).
    (1 - alpha - gamma) CE(p', y) + T^2 [alpha CE(p'_T, g'_T) + gamma CE(p'_T, s'_T)], _T: softmax(z / T)
    Both teachers, a robust and a standard one, are read at x'. Its paper adds --swa 0.275."""
    soft = lambda t: T ** 2 * ce(logits_adv / T, (t / T).softmax(1))
    return (1 - alpha - gamma) * ce(logits_adv, y) + alpha * soft(t_logits_adv) + gamma * soft(s_logits_adv)

# -----------------------------------------------------------------------------
# the table: one row per method

class Method(NamedTuple):
    loss: Callable
    inner: Callable | None          # what the attack climbs; None: no attack
    settings: dict = {}             # flags of train_adv.py, where the method's default is not the script's
    teacher: str | None = None      # 'standard': found or trained if none is given. 'robust': has to be given
    recipe: dict | None = None      # --recipe paper: the flags of the method's paper and code. None: unknown
    shares: tuple = ()              # hyper-parameters that are shares, at most 1 together
    datasets: dict = {}             # name: hyper-parameters, where the authors have others for it
    # In fp16 the gradient of a confident logit is 0, so the attack's objective is multiplied by this before
    # it is differentiated. MSE's gradient has no bound, and would overflow at 2^10
    fp16_scale: float = 2.0 ** 10

BESIDE = dict(init='normal')        # the attack starts beside x: at x the gradient of KL and of MSE is zero
# plain momentum and a stepwise rate, as most code before one-cycle; milestones in shares of the training. The
# attack's step is 2/255 also for those who step by .007
STEPWISE = dict(schedule='step', lr=0.1, nesterov=False, weight_decay=2e-4)

METHODS = {
    'standard':   Method(standard,   None, recipe={}),
    # als, nat_adv, advprop: Dallaire & David, who state neither alpha nor the learning rate, "decreasing"
    'als':        Method(als,        None, shares=('alpha',), recipe=dict(epochs=100, schedule='cosine')),
    # Madry: 80,000 steps of 128; every forward of the attack moves the running statistics, too
    'pgd_at':     Method(pgd_at,     climb_ce, recipe=dict(
                      STEPWISE, epochs=209, milestones=[0.5, 0.75], attack_bn='moving')),
    # two steps of 2/255 from x, short of their eps of 0.1
    'nat_adv':    Method(nat_adv,    climb_ce, recipe=dict(
                      epochs=100, schedule='cosine', steps=2, init='zero')),
    # their Algorithm 1 hands the flag of AdvProp to the prediction and not to the attack: the main BN crafts
    'advprop':    Method(advprop,    climb_ce, dict(dual_bn=True), recipe=dict(
                      epochs=100, schedule='cosine', steps=2, init='zero', craft_branch='main')),
    'alp':        Method(alp,        climb_ce),
    'trades':     Method(trades,     climb_kl,  BESIDE, recipe=dict(
                      STEPWISE, epochs=76, milestones=[74 / 76])),
    # theirs cycles momentum between .95 and .85, OneCycleLR's default; here it stays .9
    'hat':        Method(hat,        climb_kl,  BESIDE, 'standard', recipe=dict(epochs=50, lr=0.21)),
    'mart':       Method(mart,       climb_ce,  BESIDE, recipe=dict(
                      STEPWISE, epochs=120, lr=0.01, weight_decay=3.5e-3,
                      milestones=[74 / 120, 89 / 120, 99 / 120])),
    # their code: a cosine from the first step on, AWP from epoch 10, five steps of eps / 2 throughout (fewer
    # for early epochs are set and then overwritten), weights averaged by 0.9 an epoch: here, in 390 steps
    'dkl':        Method(dkl,        climb_kl,  BESIDE, recipe=dict(
                      epochs=200, schedule='cosine', nesterov=False, eps_ramp=1.0, steps=5, step_size=4.0,
                      awp=0.005, awp_warmup=9 / 200, ema=0.9 ** (1 / 390), bn_order='adv-nat')),
    # theirs begins with an epoch at a fifth of the rate, which is left out
    'lbgat':      Method(lbgat,      climb_kl,  BESIDE, recipe=dict(
                      STEPWISE, epochs=100, milestones=[0.75, 0.9], bn_order='adv-nat')),
    'softmax_kl': Method(softmax_kl, climb_kl,  BESIDE, 'standard', recipe={}),
    'logit_mse':  Method(logit_mse,  climb_mse, BESIDE, 'standard', recipe={}, fp16_scale=2.0 ** 4),
    'ltd':        Method(ltd,        climb_kl,  BESIDE, 'standard', recipe=dict(
                      STEPWISE, epochs=120, weight_decay=5e-4, nesterov=True, steps=8,
                      milestones=[0.6667, 0.8333])),
    # ARD's and IAD's code forgets its second drop of the rate; the papers have it. It attacks in train mode
    'ard':        Method(ard,        climb_ce,  {}, 'robust', shares=('alpha',),
                      datasets={'cifar100': dict(scale=0.01)}, recipe=dict(
                      STEPWISE, epochs=200, milestones=[0.5, 0.75], attack_bn='moving', bn_order='adv-nat')),
    'iad1':       Method(iad1,       climb_ce,  {}, 'robust', recipe=dict(
                      STEPWISE, epochs=200, milestones=[0.5, 0.75], attack_bn='moving', bn_order='adv-nat')),
    'iad2':       Method(iad2,       climb_ce,  {}, 'robust', shares=('alpha', 'gamma'), recipe=dict(
                      STEPWISE, epochs=200, milestones=[0.5, 0.75], attack_bn='moving')),
    'rslad':      Method(rslad,      climb_teacher, BESIDE, 'robust', shares=('alpha',), recipe=dict(
                      STEPWISE, epochs=300, milestones=[215 / 300, 260 / 300, 285 / 300],
                      bn_order='adv-nat')),
    'adaad':      Method(adaad,      climb_both, BESIDE, 'robust', shares=('alpha',),
                      datasets={'cifar100': dict(scale=1.0)}, recipe=dict(
                      STEPWISE, epochs=200, milestones=[0.5, 0.75], weight_decay=5e-4)),
    # their code: images standardised in the network, the attack in train mode, an average from epoch 56 on
    'kd_swa':     Method(kd_swa,     climb_ce,  {}, 'robust', shares=('alpha', 'gamma'), recipe=dict(
                      STEPWISE, epochs=200, milestones=[0.25, 0.75], weight_decay=5e-4, swa=0.275,
                      normalize=True, attack_bn='moving')),
}

class Inner(NamedTuple):
    objective: Callable
    init: str = 'uniform'           # where it starts
    fp16_scale: float = 2.0 ** 10

# --inner NAME: the attack of another row
INNERS = {
    'ce': Inner(climb_ce),
    'kl': Inner(climb_kl, 'normal'),
    'mse': Inner(climb_mse, 'normal', 2.0 ** 4),
    'least_likely': Inner(climb_least_likely),
    'teacher': Inner(climb_teacher, 'normal'),
    'both': Inner(climb_both, 'normal'),
}

def needs(fn):
    """Names of the inputs fn asks for: its positional arguments."""
    return [p.name for p in inspect.signature(fn).parameters.values()
            if p.kind == p.POSITIONAL_OR_KEYWORD] if fn else []

def hparams(fn):
    """Hyper-parameters of fn and their defaults: its keyword-only arguments. train_adv.py
    turns each into a flag."""
    return {p.name: p.default for p in inspect.signature(fn).parameters.values()
            if p.kind == p.KEYWORD_ONLY}

def asked_for(method):
    """Names of all that the method asks for, in its loss and in its attack."""
    return set(needs(method.loss) + needs(method.inner))

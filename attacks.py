"""
Attacks for training and for quick evaluation. Images are fp32 in [0, 1]; the model normalises them itself.

    with attack_mode(net):
        x_adv = pgd(lambda x_adv: F.cross_entropy(net(x_adv), y, reduction='none'), x, eps=8/255)

The objective returns one value per image, (B,), and pgd climbs their sum: images are independent, and the
step of one does not depend on the size of the batch.
"""
import math
import numbers
from contextlib import contextmanager

import torch

def per_image(value, x):
    """A number, or one per image (B,), as what multiplies x (B,...)."""
    if isinstance(value, numbers.Real):             # those of numpy are, too
        return float(value)
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device).detach()
    if value.dim() == 0:
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f'one value for all images, or one for each of {len(x)}, not {tuple(value.shape)}')
    return value.view(-1, *[1] * (x.dim() - 1))

def norms(d):
    """L2 norm of every image of d (B,...), as (B,1,...)."""
    return per_image(d.flatten(1).norm(dim=1).clamp_min(1e-12), d)

def farthest(x, norm):
    """The largest distance between two images of the shape of x (B,...): no radius and no step is larger."""
    return 1.0 if norm == 'Linf' else math.sqrt(math.prod(x.shape[1:]))

def check_units(name, value, x, norm):
    """Raises ValueError for a radius or step in pixels. Of CUDA tensors nothing is checked: it would wait for
    the GPU in every batch."""
    value = torch.as_tensor(value)
    if not value.is_cuda and not (0 <= value.min() and value.max() <= farthest(x, norm)):
        raise ValueError(f'{name} is {value.min():g} to {value.max():g}: in units of [0, 1], so that '
                         f'8 pixels are 8/255, and at most {farthest(x, norm):g}')

def start(x, *, eps, init, norm):
    """The first x_adv: 'uniform' in the ball, 'normal' (TRADES: x + 0.001 N(0,1), here
    within [0, 1]), or 'zero' (x itself)."""
    if init == 'normal':            # at x itself the gradient of KL(f(x), f(x')) and of MSE is exactly zero
        x_adv = x + 0.001 * torch.randn_like(x)
    elif init == 'uniform' and norm == 'Linf':
        if isinstance(eps, float):
            x_adv = x + torch.empty_like(x).uniform_(-eps, eps)
        else:
            x_adv = x + eps * torch.empty_like(x).uniform_(-1, 1)
    elif init == 'uniform':         # in the L2 ball: a direction, and the d-th root of a uniform radius
        d = torch.randn_like(x)
        radius = per_image(torch.rand(len(x), device=x.device) ** (1 / x[0].numel()), x)
        x_adv = x + eps * radius * d / norms(d)
    elif init == 'zero':
        x_adv = x.clone()
    else:
        raise ValueError(f"init is 'uniform', 'normal' or 'zero', not {init!r}")
    return x_adv.clamp(0, 1)

@torch.inference_mode(False)
def pgd(objective, x, *, eps=8/255, step_size=2/255, steps=10, init='uniform', norm='Linf', restarts=1):
    """
    Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks". Climb objective(x_adv)
    -> (B,) within the ball of radius eps around x (B,...), and within [0, 1]. eps: in units of [0, 1], one
    number or one per image (B,). step_size: likewise, a number or a tensor; or a list of one per step.
    norm: 'Linf' (signed step) or 'L2' (normalised step). Returns the last iterate or, of several restarts,
    each image's best; of x's dtype, detached. Raises ValueError for x in half precision, which near 1 has a
    spacing of up to 1/256, an eighth of eps, and for images outside [0, 1]. Of CUDA tensors x_adv becomes NaN
    instead: to raise, it would have to wait for the GPU in every batch. Within torch.inference_mode() x may
    be made there, and what else the objective takes, y for instance, may not.
    """
    if norm not in ('Linf', 'L2'):
        raise ValueError(f"norm is 'Linf' or 'L2', not {norm!r}")
    if steps < 0 or restarts < 1:
        raise ValueError(f'steps {steps}, restarts {restarts}: at least 0 steps and one start')
    if not x.is_floating_point():
        raise ValueError(f'x is {x.dtype}: images are floats in [0, 1], so divide by 255')
    if x.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f'x is {x.dtype}, too coarse for eps: keep images in fp32, and autocast the network')
    if len(x) == 0:
        return x.detach().clone()
    outside = ~((0 <= x) & (x <= 1)).all()
    if not x.is_cuda and outside:
        raise ValueError(f'x is in [{x.min():g}, {x.max():g}]: images are in [0, 1], and what standardises '
                         'them is a layer of the model')
    if isinstance(step_size, (numbers.Real, torch.Tensor)):
        sizes = [per_image(step_size, x)] * steps
    else:
        sizes = [float(size) for size in step_size]
    if len(sizes) != steps:
        raise ValueError(f'{len(sizes)} step sizes for {steps} steps')
    x = x.clone() if x.is_inference() else x.detach()       # an inference tensor takes no part in autograd
    if x.is_cuda:
        x = torch.where(outside, torch.nan, x)
    eps, best = per_image(eps, x), None
    check_units('eps', eps, x, norm)
    for size in set(sizes):
        check_units('step_size', size, x, norm)
    for _ in range(restarts):
        x_adv = start(x, eps=eps, init=init, norm=norm)
        for step_size in sizes:
            x_adv.requires_grad_()
            with torch.enable_grad():
                value = objective(x_adv)
                if value.shape != x.shape[:1]:
                    raise ValueError(f'the objective has the shape {tuple(value.shape)}: one value per '
                                     f"image, ({len(x)},), as with reduction='none'")
                grad, = torch.autograd.grad(value.sum(), x_adv)
            x_adv = x_adv.detach()
            if norm == 'Linf':
                x_adv = x_adv + step_size * grad.sign()
                x_adv = torch.clamp(x_adv, x - eps, x + eps).clamp(0, 1)
            else:       # the squares of a confident network's gradient would underflow
                grad = grad / per_image(grad.flatten(1).abs().amax(1).clamp_min(1e-37), x)
                d = x_adv + step_size * grad / norms(grad) - x
                x_adv = (x + d * (eps / norms(d)).clamp_max(1)).clamp(0, 1)
        if restarts == 1:
            return x_adv
        with torch.no_grad():
            value = objective(x_adv)
        if best is None:
            best, best_value = x_adv, value
        best = torch.where(per_image((value > best_value).to(x), x) > 0, x_adv, best)
        best_value = torch.maximum(value, best_value)
    return best

def scaled(objective, scale):
    """
    objective, for a network in fp16: the same values (B,), but their gradient is multiplied by scale on its
    way through the network, since that of a confident logit would round to zero there. An overflow, which
    GradScaler would see in the gradients of weights only, becomes a zero for this step, and the scale of its
    image is divided by 16.
    """
    scales = None

    def with_scale(x_adv):
        nonlocal scales
        if scales is None:
            scales = torch.full((len(x_adv),), float(scale), device=x_adv.device)

        def check(grad):
            finite = grad.flatten(1).isfinite().all(1)
            scales.mul_(torch.where(finite, 1.0, 1 / 16))
            return grad.nan_to_num(0.0, 0.0, 0.0)

        if x_adv.requires_grad:
            x_adv.register_hook(check)
        value = objective(x_adv)
        return value.detach() + scales * (value - value.detach())

    return with_scale

def step_sizes(first, steps, schedule):
    """One size per step, of the schedule 'constant', 'linear' or 'cosine', the first of them first. Raises
    ValueError for another schedule."""
    shapes = {'constant': lambda t: 1.0, 'linear': lambda t: 1 - t,
              'cosine': lambda t: (1 + math.cos(math.pi * t)) / 2}
    if schedule not in shapes:
        raise ValueError(f"schedule is one of {' '.join(shapes)}, not {schedule!r}")
    return [first * shapes[schedule](k / steps) for k in range(steps)]

def fgsm(objective, x, *, eps=8/255, norm='Linf'):
    """Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples":
    PGD of one full step from x."""
    return pgd(objective, x, eps=eps, step_size=eps, steps=1, init='zero', norm=norm)

def cw_margin(logits, y):
    """Carlini & Wagner 2017, the f6 objective without its clip: best wrong logit minus the right one, (B,).
    > 0: fooled."""
    right = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], float('-inf')).amax(1) - right

@contextmanager
def frozen_statistics(model):
    """BN in train mode normalises with its batch, as ever, and leaves its running statistics alone. (Those of
    InstanceNorm and of spectral_norm move.) With activation checkpointing, which runs the forward again in
    backward, backward belongs in the block."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    before = [m.track_running_stats for m in layers]
    for m in layers:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m, tracked in zip(layers, before):
            m.track_running_stats = tracked

@contextmanager
def attack_mode(model, bn='eval'):
    """
    For the time of an attack: parameters frozen (a compiled backward would otherwise compute their gradients
    in every step), and BN in 'eval' mode, its running statistics; in 'train' mode, the statistics of the
    attacked batch, while the running ones stay; or 'moving': in train mode, and every step moves the running
    statistics too (Madry, Rice, ARD, IAD, Wong). Train mode is the whole model's, dropout's too. Modes and
    flags are restored after. Raises ValueError for another bn. Under DistributedDataParallel the model is
    ddp.module, in the objective, too: with static_graph it takes the attack for its first step.
    """
    if bn not in ('eval', 'train', 'moving'):
        raise ValueError(f"bn is 'eval', 'train' or 'moving', not {bn!r}")
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.train(bn != 'eval')       # a train() of somebody's own may return nothing
        model.requires_grad_(False)
        if bn == 'moving':
            yield
        else:
            with frozen_statistics(model):
                yield
    finally:
        for m, training in modes:
            m.training = training
        for p, requires_grad in grads:
            p.requires_grad_(requires_grad)

def perturbable(model):
    """The weights that weights_perturbed perturbs, by its authors' rule: all that are called weight and have
    more than one dimension, so that biases and the usual norm layers stay; frozen ones stay, too."""
    return [p for name, p in model.named_parameters()
            if p.dim() > 1 and 'weight' in name and p.requires_grad]

@contextmanager
def weights_perturbed(model, objective, *, gamma, average=None):
    """
    Wu et al. 2020, "Adversarial Weight Perturbation Helps Robust Generalization" (AWP). For the time of the
    block every convolution's and every linear weight w is w + gamma |w| d / |d|, d the gradient of
    objective() -> scalar, one step uphill; see perturbable for what stays. Afterwards the weights are back,
    bit for bit: optimizer.step() comes after the block; within it, RuntimeError is raised.
    (The authors step before they subtract: their weight decay also acts on the perturbation.) objective runs
    in the model's own mode: in frozen_statistics, if BN is to stay. average(gradients): in place, over
    several processes. Raises ValueError where no weight is used.
    """
    weights = perturbable(model)
    gradients = torch.autograd.grad(objective(), weights, allow_unused=True) if weights else []
    weights = [w for w, d in zip(weights, gradients) if d is not None]
    if not weights:
        raise ValueError("no convolution's and no linear weight takes part in the objective")
    gradients = [d for d in gradients if d is not None]
    if average:
        average(gradients)
    saved = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, d in zip(weights, gradients):
            step = d * (gamma * w.norm() / (d.norm() + 1e-20))
            w.add_(torch.where(step.isfinite(), step, 0.0))     # in fp16 d may overflow: no step
    torch.clear_autocast_cache()        # an autocast around all of it would go on with the old weights
    versions = [w._version for w in weights]
    try:
        yield
        if versions != [w._version for w in weights]:
            raise RuntimeError('a weight was changed within the block, which puts all weights back: '
                               'optimizer.step() comes after it')
    finally:
        with torch.no_grad():
            for w, value in zip(weights, saved):
                w.copy_(value)
        torch.clear_autocast_cache()

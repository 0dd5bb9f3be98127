"""
What cannot be trained or attacked is refused before any work: one line that says what to do.
"""
import argparse
import math
import os
import sys

import torch

import models
from attacks import farthest, perturbable
from losses import METHODS, Softened, climb_kl, climb_mse, asked_for, hparams, needs, smooth
from support.files import Refused

def refuse(message):
    raise Refused(message)

def one_line(parser):
    """From here on a Refused ends the script with its line and status 2, and Ctrl-C with a line; anything
    else is a fault of ours and keeps its traceback. argparse's errors are printed without the usage line."""
    def error(message):
        print(f'{parser.prog}: error: {message}', file=sys.stderr)
        sys.exit(2)
    def hook(kind, problem, trace):
        if issubclass(kind, Refused):
            error(problem)
        if issubclass(kind, argparse.ArgumentError):        # a hyper-parameter called eps, say
            error(f'{problem}: there is such a flag already, so rename the hyper-parameter')
        if issubclass(kind, torch.OutOfMemoryError):
            error('out of memory on the GPU: try half of --batch-size')
        if issubclass(kind, KeyboardInterrupt):
            print(f'\n{parser.prog}: stopped', file=sys.stderr)
            sys.exit(130)
        sys.__excepthook__(kind, problem, trace)
    parser.error = error
    sys.excepthook = hook

def unknown(arguments, loss, hparams):
    """arguments: those that train_adv.py does not know."""
    if arguments:
        takes = ' '.join(f'--{name}' for name in hparams) or 'none'
        refuse(f'unknown argument {arguments[0]}: see --help; hyper-parameters of --loss {loss}: {takes}')

def numbers(args, low, high, *flags):
    """Refuses the flags that are not numbers from low to high; those that are None are left alone."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:          # NaN is not, either
            upto = '' if high == math.inf else f' and at most {high:g}'
            refuse(f'--{flag.replace("_", "-")} {value}: a number, at least {low:g}{upto}')

def seed(args, *flags):
    for flag in ('seed', *flags):
        value = getattr(args, flag)
        if value is not None and not 0 <= value < 2 ** 63:
            refuse(f'--{flag.replace("_", "-")} {value}: from 0 to 2^63 - 1')

def model(name, flag='--model', normalize=False, **shape):
    """Refuses what models.build cannot build; somebody else's FILE.py:FUNCTION is looked at when it is
    loaded."""
    if '.py:' in name:
        shaped = normalize or shape.get('width') or shape.get('dual_bn')
        if shaped or shape.get('activation', 'relu') != 'relu':
            refuse(f'{flag} {name} makes the whole network: leave out its width, --normalize, --activation, '
                   '--dual-bn')
        return
    if name.endswith('.py'):
        refuse(f'{flag} {name}: and the function in it that returns the network, {name}:FUNCTION')
    try:
        with torch.device('meta'):
            models.build(name, 10, **shape)
    except ValueError as e:
        refuse(f'{flag}: {e}')

# -----------------------------------------------------------------------------
# the attack. On the command line it is in pixels (0..255)

def attack(args):
    """Fills in --step-size, and refuses the classic slips. args.eps is set. L2 radii are in pixels, too: 128
    is the 0.5 of the CIFAR literature, 765 the 3.0 of ImageNet's."""
    eps = args.eps
    pixels = 'pixels, 0 to 255' if args.norm == 'Linf' else 'pixels, 255 times the usual radius'
    if args.step_size is None:
        args.step_size = eps / 4
    if not 0 < eps < math.inf:
        refuse(f'--eps {eps:g}: the radius is a positive number of {pixels}')
    if args.norm == 'L2':
        if eps < 10:                    # 0.5, 1.0, 3.0: a radius in units of [0, 1]
            refuse(f'--norm L2 --eps {eps:g}: the radius is in {pixels}; '
                   f'for {eps:g} write --eps {255 * eps:g}')
    elif eps < 1:                       # 0.03, 0.3: a fraction of the range; 0.031: somebody's 8/255
        hint = f'{eps:g} of the range is {eps * 255:g}'
        if 0.031 <= eps < 0.0315:
            hint = '0.031 is 7.9/255, not 8/255'
        refuse(f'--eps {eps:g}: eps is in {pixels}; {hint}; for 8/255 write --eps 8')
    elif eps > 255:
        refuse(f'--eps {eps:g}: {pixels}')
    # 0.007, 0.003: a fraction of the range again: the attack would hardly move
    if not eps / 100 <= args.step_size <= max(255, eps):
        refuse(f'--step-size {args.step_size:g}: in pixels, at least a hundredth of eps; 2/255 is 2, '
               '0.007 is 1.8')

def radius(norm, radii, x):
    """Refuses radii, in pixels, beyond every image of the shape of x (B,...)."""
    most = 255 * farthest(x, norm)
    if max(radii) > most:
        refuse(f'eps {max(radii):g}: in these images black is {most:.0f} from white, so that no {norm} '
               'radius is larger')

# -----------------------------------------------------------------------------
# training

def optimisation(args, default, world=1):
    """What both training scripts share. default(name): of a flag."""
    numbers(args, 0, 1e9, 'lr', 'weight_decay', 'save_minutes')
    numbers(args, 1, 1e9, 'epochs', 'accumulate', 'width', 'subset')
    numbers(args, 2, 1e9, 'batch_size')
    seed(args, 'subset_seed')
    if args.subset_seed is not None and args.subset is None:
        refuse('--subset-seed draws the images of --subset: give both')
    if not all(0 < m < 1 for m in args.milestones):
        refuse('--milestones: shares of the training, from 0 to 1')
    if args.schedule != 'step':
        unused(args, default, f'with --schedule {args.schedule}', 'milestones')
    if args.sync_bn and world == 1:
        refuse('--sync-bn does nothing in one process: leave it out')
    if args.compile and not torch.cuda.is_available() and (args.width or 64) < 8:
        refuse(f'--compile --width {args.width}: on a CPU oneDNN crashes on fewer than 8 channels')
    parts = world * args.accumulate
    if args.batch_size % parts or args.batch_size < 2 * parts:
        refuse(f'--batch-size {args.batch_size} in {world} processes times {args.accumulate} parts: '
               f'a multiple of {parts}, and at least two images in each')

def images(args, x, world=1):
    """x (N,H,W,C): the training images. Returns notes for the screen."""
    (n, size), notes = x.shape[:2], []
    if n < 2:
        refuse(f'there are {n} training images: a batch needs two')
    if n < args.batch_size:
        if world * args.accumulate > 1:
            refuse(f'--batch-size {args.batch_size}: there are {n} training images to share')
        notes.append(f'note: --batch-size {args.batch_size}, and {n} training images: every batch is all of '
                     'them')
    of_torchvision = args.model.startswith('torchvision-')
    if of_torchvision and size < 64:
        notes.append(f'note: {args.model} is made for 224 pixels, and shrinks these {size} to {size // 4} at '
                     'once (ten points of accuracy on CIFAR): resnet18 and the like are made for 32')
    if not of_torchvision and '.py:' not in args.model and size > 96:
        notes.append(f'note: {args.model} is made for 32 pixels, and slow on {size}: torchvision-resnet18?')
    return notes

def takes_soft_targets(method, hp):
    """Does --targets change anything in method.loss, that is: has it a cross-entropy to the label?"""
    if 'y' not in needs(method.loss):
        return False
    g = torch.Generator().manual_seed(0)
    values = {name: torch.randn(4, 10, generator=g) for name in needs(method.loss)}
    if 'progress' in values:
        values['progress'] = 1.0
    y = torch.randint(10, (4,), generator=g)
    hard = method.loss(**dict(values, y=y), **hp)
    soft = method.loss(**dict(values, y=Softened(y, smooth)), **hp)
    return not torch.equal(hard, soft)

def unused(args, default, without, *flags):
    """Refuses flags that are not at their default, and would change nothing but the name of the run.
    default(name): of a flag. without: why, in words."""
    for flag in flags:
        if getattr(args, flag) != default(flag):
            refuse(f'--{flag.replace("_", "-")} does nothing {without}: leave it out')

def awp(gamma, net):
    if gamma and not perturbable(net):
        refuse('--awp perturbs what is called weight, has more than one dimension and is not frozen: this '
               'network has no such parameter')

def guide_shape(args):
    """What models.build is given for the guide of lbgat. The student's flags are not for a --guide-model."""
    if args.guide_model:
        return dict(width=args.guide_width, activation='relu')
    return dict(width=args.guide_width or args.width, activation=args.activation)

def training(args, method, hp, default, world=1):
    """Flags of train_adv.py that do not go together. hp: the hyper-parameters of method.loss. default(name):
    of a flag."""
    optimisation(args, default, world)
    model(args.model, normalize=args.normalize, width=args.width, activation=args.activation,
          dual_bn=args.dual_bn)
    loss, asked = args.loss, asked_for(method)
    wants_teacher = any(name.startswith('t_') for name in asked)
    wants_second = any(name.startswith('s_') for name in asked)
    labels_extra = bool(args.extra) and 'y' in asked                # by the teacher
    both = {'logits', 'logits_adv'} <= set(needs(method.loss))

    numbers(args, 0, 1e9, 'awp', 'free')
    for name, value in hparams(method.loss).items():
        if isinstance(value, (int, float)):
            numbers(args, -1e9 if value < 0 else 0, 1e9, name)
    numbers(args, 1, 1e9, 'steps', 'guide_width')
    numbers(args, 1e-3, 1e9, *[k for k in ('tau', 'T') if k in hp])
    numbers(args, 0, 1, 'eps_ramp', 'awp_warmup', 'ema', 'swa', 'smoothing', 'extra_fraction', *method.shares)
    if sum(hp[k] for k in method.shares) > 1:
        refuse(f'--loss {loss}: {" and ".join(method.shares)} are shares, at most 1 together')

    if not args.targets:
        unused(args, default, 'without --targets', 'smoothing')
    if not args.awp:
        unused(args, default, 'without --awp', 'awp_warmup')
    if not args.extra:
        unused(args, default, 'without --extra', 'extra_fraction')
    if not (wants_teacher or labels_extra or wants_second):
        unused(args, default, f'with --loss {loss}, which has no teacher', 'teacher_model')
    if args.free:
        unused(args, default, 'with --free, which makes no PGD',
               'steps', 'step_size', 'step_schedule', 'init', 'attack_bn')
    if 'guide_logits' in asked:
        model(args.guide_model or args.model, '--guide-model', args.normalize, **guide_shape(args))

    # teachers
    if args.teacher and not wants_teacher and not labels_extra:
        refuse(f'--loss {loss} takes no --teacher')
    if args.standard_teacher and not wants_second:
        refuse(f'--loss {loss} takes no --standard-teacher')
    if args.teacher_model and not (args.teacher or args.standard_teacher):
        refuse('--teacher-model is the architecture of the file that --teacher names: give both')
    if method.teacher == 'robust' and not args.teacher:
        refuse(f'--loss {loss} learns from a robust teacher: pass --teacher, '
               'for instance the best.pt of a --loss trades run')
    if args.inner and wants_teacher and not method.teacher and not args.teacher:
        refuse(f'--inner {args.inner} needs a --teacher')
    if args.warm_start == 'teacher' and not (wants_teacher or labels_extra):
        refuse(f'--warm-start teacher: --loss {loss} has none, name a file')
    if (args.guide_model or args.guide_width) and 'guide_logits' not in asked:
        refuse(f'--loss {loss} trains no guide: leave out --guide-model and --guide-width')

    # attack
    if METHODS[loss].inner is None and (args.inner or args.free):
        refuse(f'--loss {loss} attacks nothing')
    if args.inner and args.free:
        refuse('--free has no attack for --inner to change')
    if args.free and (args.norm != 'Linf' or args.accumulate > 1):
        refuse('--free steps in Linf, and on whole batches')

    one_bn = not args.dual_bn or args.craft_branch == 'main'        # for x and for x_adv
    if args.init == 'zero' and method.inner in (climb_kl, climb_mse) and one_bn:
        refuse('--init zero: at x itself this attack has no gradient; --init normal starts beside it')

    # labels and images without them
    if args.targets and not takes_soft_targets(method, hp):
        refuse(f'--targets: --loss {loss} takes no cross-entropy to a label')
    n_extra = round(args.extra_fraction * args.batch_size)
    if args.extra and not 0 < n_extra < args.batch_size:
        refuse(f'--extra-fraction {args.extra_fraction}: {n_extra} of {args.batch_size} images without a '
               'label, and a batch needs both kinds')

    # recipes, averages, normalisation
    if args.recipe == 'paper' and METHODS[loss].recipe is None:
        refuse(f'--recipe paper: none is recorded for {loss}; leave it out and set flags')
    if args.recipe == 'paper' and args.dataset == 'imagenet':
        refuse("--recipe paper: those recorded are for CIFAR; --dataset imagenet brings LTD's for ImageNet")
    if (args.recipe == 'paper' and 'step_size' in METHODS[loss].recipe
            and (args.norm, args.eps) != ('Linf', 8)):
        refuse(f"--recipe paper: {loss}'s steps are for --eps 8 in Linf: leave it out and set flags")
    if args.compile and os.environ.get('TORCHINDUCTOR_CUDAGRAPHS') == '1' and (
            args.amp == 'off' or args.accumulate > 1):
        refuse('TORCHINDUCTOR_CUDAGRAPHS=1 goes neither with --amp off nor with --accumulate: a graph '
               'overwrites what its last run has returned')
    if args.ema and args.swa:
        refuse('--ema and --swa: one average of the weights at a time')
    if args.swa == 1:
        refuse('--swa 1: no epoch is left to average')
    if args.swa and args.dual_bn:
        refuse("--swa would need the auxiliary BN's statistics again: use --ema")
    if args.sync_bn and args.dual_bn:
        refuse('--sync-bn: not with --dual-bn')
    if not args.dual_bn and (args.craft_branch, args.eval_branch) != ('aux', 'main'):
        refuse('--craft-branch and --eval-branch are of --dual-bn')
    if (args.bn_order != 'nat-adv' or args.dual_bn) and not both:
        refuse(f'--bn-order and --dual-bn: --loss {loss} does not put both x and x_adv through the student')
    if args.dual_bn and args.bn_order in ('nat', 'adv'):
        refuse(f'--bn-order {args.bn_order} would leave one BN of --dual-bn without statistics')

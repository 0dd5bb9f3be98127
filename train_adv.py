"""
Adversarial training, with or without a teacher, with or without labels.

$ python train_adv.py --loss logit_mse --beta 0.2                      # trains its teacher first
$ python train_adv.py --loss trades --beta 5 --dataset cifar100 --awp 0.005 --ema 0.995
$ python train_adv.py --loss logit_mse --beta 0.2 --dataset digits     # no download, no GPU, three minutes

The defaults are the recipe of Al-Najjar et al., section 4: ResNet-18, SGD with Nesterov momentum 0.9, weight
decay 5e-4, one cycle with cosine annealing to 0.2, 100 epochs, batch 128, PGD-10 at 8/255 with step 2/255,
selection by PGD-20. --recipe paper takes those of the method's own paper. Numbers that came out, with
hardware and minutes: README.md and results/.
"""
import argparse, contextlib, copy, functools, itertools, os, subprocess, sys, time

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import attacks, checkpoint, data, losses, models
from attacks import attack_mode, frozen_statistics, pgd, step_sizes, weights_perturbed
from checkpoint import fingerprint, load_checkpoint, save_checkpoint
from log import Table, check_finite, environment, new_run
from losses import TARGETS, Softened, hparams, needs
from models import amp_dtype, branch

# -----------------------------------------------------------------------------
# arguments: each module owns the flags it reads
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
data.add_args(parser); models.add_args(parser); attacks.add_args(parser, training=True)
g = parser.add_argument_group('training')
g.add_argument('--teacher', metavar='PT',
               help="frozen teacher (default, if it is a standard one: this dataset and model's, "
                    'trained if need be)')
g.add_argument('--standard-teacher', metavar='PT', help='second one, of iad2 and kd_swa (default: likewise)')
g.add_argument('--teacher-model',
               help='architecture of a teacher that holds weights only (default: --model, full width)')
g.add_argument('--epochs', type=int, default=100)
g.add_argument('--batch-size', type=int, default=128)
g.add_argument('--lr', type=float, default=0.2, help='maximum of the schedule')
g.add_argument('--schedule', default='onecycle', choices=['onecycle', 'step'])
g.add_argument('--milestones', type=float, nargs='+', default=[0.5, 0.75], metavar='SHARE',
               help='of --schedule step: lr / 10 after each of these shares of the training')
g.add_argument('--nesterov', action=argparse.BooleanOptionalAction, default=True)
g.add_argument('--weight-decay', type=float, default=5e-4)
g.add_argument('--seed', type=int, default=0)
g.add_argument('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'],
               help='autocast; auto: bf16 where native')
g.add_argument('--compile', action='store_true', help='faster after a minute; needs a C++ compiler on a CPU')
g.add_argument('--out', metavar='DIR', help='default: runs/DATASET-MODEL-LOSS...')
g = parser.add_argument_group('with any loss')
g.add_argument('--awp', type=float, default=0, metavar='GAMMA', help='adversarial weights (usual: 0.005)')
g.add_argument('--awp-warmup', type=float, default=0.1, metavar='SHARE', help='of the training, without it')
g.add_argument('--ema', type=float, default=0, metavar='DECAY', help='averaged weights (usual: 0.995)')
g.add_argument('--swa', type=float, default=0, metavar='SHARE',
               help='equal average of the weights, after every epoch past this share of the training')
g.add_argument('--free', type=int, default=0, metavar='M',
               help='free adversarial training, no PGD: M updates per batch, so M times as many in an epoch; '
                    'each moves the perturbation, which is carried over')
g.add_argument('--warm-start', metavar='PT', help="start from these weights; 'teacher': from the teacher's")
g.add_argument('--dual-bn', action='store_true', help="AdvProp's auxiliary BN for adversarial images")
g.add_argument('--craft-branch', default='aux', choices=['main', 'aux'], help='of --dual-bn: crafts x_adv')
g.add_argument('--eval-branch', default='main', choices=['main', 'aux'], help='of --dual-bn: is validated')
g.add_argument('--bn-order', default='nat-adv', choices=['nat-adv', 'adv-nat', 'nat', 'adv'],
               help='order of the forwards of x and x_adv; nat, adv: only that one moves the BN statistics')
g.add_argument('--extra', metavar='NPZ', help='images without labels')
g.add_argument('--extra-fraction', type=float, default=0.5, metavar='F', help='of every batch')
defaults = data.row_asked_for(parser)
parser.set_defaults(**{k: v for k, v in defaults.items() if k in ('width', 'batch_size', 'epochs')})
method = losses.add_args(parser)
args, unknown = parser.parse_known_args()
if unknown:
    parser.error(f'unknown argument {unknown[0]}; --loss {args.loss} takes '
                 + (' '.join(f'--{k}' for k in hparams(method.loss)) or 'no hyper-parameter'))
hp = {k: getattr(args, k) for k in hparams(method.loss)}
asked = losses.inputs(method)
wants_teacher = any(name.startswith('t_') for name in asked)
labels_extra = bool(args.extra) and 'y' in asked                # by the teacher
for low, high, flags in [(0, 1e9, ['lr', 'weight_decay', 'awp', 'free', *hp]),
                         (1, 1e9, ['epochs', 'steps']), (2, 1e9, ['batch_size']),
                         (1e-3, 1e9, [k for k in ('tau', 'T') if k in hp]),
                         (0, 1, ['eps_ramp', 'awp_warmup', 'ema', 'swa', 'smoothing', 'extra_fraction'])]:
    for flag in flags:
        if not low <= getattr(args, flag) <= high:
            parser.error(f'--{flag.replace("_", "-")} {getattr(args, flag)}: a number, at least {low:g}'
                         + (f' and at most {high}' if high == 1 else ''))
n_extra = round(args.extra_fraction * args.batch_size) if args.extra else 0
shares = [hp[k] for k in ('alpha', 'gamma') if k in hp] if args.loss in losses.SHARES else []
both = {'logits', 'logits_adv'} <= set(needs(method.loss))
for wrong, message in [
        (args.teacher and not wants_teacher and not labels_extra, f'--loss {args.loss} takes no --teacher'),
        (args.standard_teacher and 's_logits_adv' not in asked,
         f'--loss {args.loss} takes no --standard-teacher'),
        (args.extra and not 0 < n_extra < args.batch_size,
         f'--extra-fraction {args.extra_fraction}: {n_extra} of {args.batch_size} images without a label, '
         'and a batch needs both kinds'),
        (not all(0 < m < 1 for m in args.milestones), '--milestones: shares of the training, from 0 to 1'),
        (method.teacher == 'robust' and not args.teacher,
         f'--loss {args.loss} learns from a robust teacher: pass --teacher, '
         'for instance the best.pt of a --loss trades run'),
        (args.inner and wants_teacher and not method.teacher and not args.teacher,
         f'--inner {args.inner} needs a --teacher'),
        (sum(shares) > 1, f'--loss {args.loss}: alpha and gamma are shares, at most 1 together'),
        (losses.METHODS[args.loss].inner is None and (args.inner or args.free),
         f'--loss {args.loss} attacks nothing'),
        (args.inner and args.free, '--free has no attack for --inner to change'),
        (args.targets and ('y' not in needs(method.loss) or args.loss in ('als', 'iad1')
                           or args.loss == 'ard' and hp['alpha'] == 1),
         f'--targets: --loss {args.loss} takes no cross-entropy to a label'),
        (args.ema and args.swa, '--ema and --swa: one average of the weights at a time'),
        (args.swa and args.dual_bn, "--swa would need the auxiliary BN's statistics again: use --ema"),
        (not args.dual_bn and (args.craft_branch, args.eval_branch) != ('aux', 'main'),
         '--craft-branch and --eval-branch are of --dual-bn'),
        (args.free and args.norm != 'Linf', '--free steps in Linf only'),
        ((args.bn_order != 'nat-adv' or args.dual_bn) and not both, f'--bn-order and --dual-bn: --loss '
         f'{args.loss} does not put both x and x_adv through the student'),
        (args.dual_bn and args.bn_order in ('nat', 'adv'),
         f'--bn-order {args.bn_order} would leave one BN of --dual-bn without statistics'),
        (args.swa == 1, '--swa 1: no epoch is left to average'),
        (args.warm_start == 'teacher' and not (wants_teacher or labels_extra),
         f'--warm-start teacher: --loss {args.loss} has none, name a file')]:
    if wrong:
        parser.error(message)

# -----------------------------------------------------------------------------
# device, precision, data, models, output: wrong input is found here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

def standard_teacher():
    """Path of this dataset and model's, trained now if need be (section 3: "it is feasible to train our own
    teacher model")."""
    folder = f'runs/{task}-teacher'
    if os.path.exists(f'{folder}/last.pt'):
        last = load_checkpoint(f'{folder}/last.pt')[1]
        if last['epoch'] < last['run']['epochs']:
            raise ValueError(f'the teacher in {folder} is at epoch {last["epoch"]} of '
                             f'{last["run"]["epochs"]}: wait for it or delete the folder, '
                             f'or pass {folder}/best.pt as it is')
        print(f'no teacher given: taking {folder}/best.pt, trained earlier', flush=True)
    else:
        print(f'no teacher given, and none in {folder}: training it first', flush=True)
        flags = [f'--{k.replace("_", "-")}={getattr(args, k)}'
                 for k in ('dataset', 'data_dir', 'model', 'amp')]
        flags += [f'--{k}={getattr(args, k)}' for k in ('width', 'subset') if getattr(args, k)]
        flags += ['--normalize'] * args.normalize + [f'--out={folder}']
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train_teacher.py')
        if status := subprocess.run([sys.executable, script, *flags]).returncode:
            sys.exit(f'no teacher, no student: train_teacher.py ended with status {status}')
    return f'{folder}/best.pt'

def frozen(path):
    """-> the network in path, on the device, and what the student's checkpoint says of it."""
    net, meta = load_checkpoint(path, args.teacher_model or args.model, d.classes)
    if net.config['num_classes'] != d.classes:
        raise ValueError(f'{path} knows {net.config["num_classes"]} classes, {args.dataset} has {d.classes}')
    if meta.get('dataset', args.dataset) != args.dataset:
        raise ValueError(f'{path} was trained on {meta["dataset"]}, not on {args.dataset}')
    for m in net.modules():                                     # of its two, the BN it was validated with
        if isinstance(m, models.DualBatchNorm2d):
            m.auxiliary = meta.get('run', {}).get('eval_branch') == 'aux'
    net = net.to(device, memory_format=models.layout(device)).requires_grad_(False)
    return net, dict(path=path, fingerprint=fingerprint(net), trained_with=meta.get('loss'))

teacher, standard, about = None, None, {}                       # about: what is known of the teachers
try:
    dtype = amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype is not None             # --amp off is fp32, not TF32
    torch.set_float32_matmul_precision('high' if dtype else 'highest')
    attacks.resolve_args(args, defaults['eps'])
    options = dict(width=args.width, activation=args.activation, dual_bn=args.dual_bn)
    with torch.device('meta'):
        models.build(args.model, 10, **options)
    for path in filter(None, (args.teacher, args.standard_teacher, args.warm_start)):
        if path != 'teacher':
            checkpoint.read(path)
    named = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k in (
        'inner', 'init', 'attack_bn', 'step_schedule', 'eps_ramp', 'free', 'recipe', 'activation',
        'awp', 'ema', 'swa', 'warm_start', 'targets', 'smoothing', 'dual_bn', 'bn_order', 'extra')}
    tags = [f'{k}{v:.4g}' for k, v in hp.items() if v]
    tags += [k if v is True else f'{k}{os.path.basename(str(v))}' for k, v in named.items()]
    task = data.task(args)
    args.out = args.out or f'runs/{"-".join([task, args.loss, *tags])}-s{args.seed}'
    new_run(args.out)
    d = data.load(args.dataset, args.data_dir, subset=args.subset, device=device)
    extra = data.open_images(args.extra, d.x_train.shape[1:]) if args.extra else None
    mean, std = d.statistics() if args.normalize else (None, None)
    torch.manual_seed(args.seed)
    student = models.build(args.model, d.classes, mean=mean, std=std, **options)
    guide = models.build(args.model, d.classes, mean=mean, std=std, width=args.width,
                         activation=args.activation) if 'guide_logits' in asked else None
    if wants_teacher or labels_extra:
        args.teacher = args.teacher or standard_teacher()
        teacher, about['teacher'] = frozen(args.teacher)
    if 's_logits_adv' in asked:
        args.standard_teacher = args.standard_teacher or standard_teacher()
        standard, about['standard_teacher'] = frozen(args.standard_teacher)
    if args.warm_start:
        path = args.teacher if args.warm_start == 'teacher' else args.warm_start
        source = load_checkpoint(path, args.model, d.classes, width=args.width)[0]
        weights = source.state_dict()           # an auxiliary BN without weights starts as its twin
        weights.update({k: weights[k.replace('.aux.', '.')] for k in student.state_dict()
                        if '.aux.' in k and k not in weights and k.replace('.aux.', '.') in weights})
        if ({k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in student.state_dict().items()}
                or (source.config['mean'], source.config['std']) != (mean, std)):
            raise ValueError(f'--warm-start: {path} is another network than the student, '
                             'or normalises its images otherwise')
        student.load_state_dict(weights)
except ValueError as e:
    parser.error(e)
except KeyboardInterrupt:
    sys.exit('\nstopped before the first epoch')
student = student.to(device, memory_format=models.layout(device))
guide = guide and guide.to(device, memory_format=models.layout(device))

# -----------------------------------------------------------------------------
# the speed block: delete it, and what is left is the same, slower. fast[net](x) computes net(x); validation
# and checkpoints stay with net. On one AVX2 core the attack is 1.7 times as fast, the update 1.6 times
fast = {}
if args.compile:
    # a graph for each network in each mode: attacked, updated, looked ahead with, and either BN of two
    torch._dynamo.config.recompile_limit = 64
    fast = {net: torch.compile(net, dynamic=False) for net in (student, guide, teacher, standard) if net}

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
parameters = [*student.parameters(), *(guide.parameters() if guide else [])]
optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, nesterov=args.nesterov,
                            weight_decay=args.weight_decay)
total_steps = args.epochs * steps_per_epoch * max(1, args.free)
if args.schedule == 'onecycle':
    # the paper states momentum 0.9: not cycled. 25 % of warm-up as in HAT's code, which the settings
    # resemble. Of four or fewer steps OneCycleLR divides by zero
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(5, total_steps),
                                                    pct_start=0.25, cycle_momentum=False)
else:
    drops = [round(m * total_steps) for m in args.milestones]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
scale = 2.0 ** 10 if dtype is torch.float16 else 1.0        # in fp16 the gradient of a confident logit is 0
# data order and augmentation: the same for every loss
generator = torch.Generator(device).manual_seed(args.seed)
extra_batches = data.image_batches(extra, n_extra, d.augment,
                                   torch.Generator(device).manual_seed(args.seed + 1))
progress, delta = 0.0, None                 # share of the training done; --free's perturbation
class_p = torch.full((d.classes, d.classes), 1 / d.classes, device=device)     # dkl: row c, of class c
class_sum = torch.zeros_like(class_p)
averaged, averages = copy.deepcopy(student) if args.ema or args.swa else None, 0

# -----------------------------------------------------------------------------
# the two halves of the min-max problem

def logits_of(net, x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return fast.get(net, net)(x).float()

def craft(x, y):
    """x_adv: PGD on method.inner. What does not depend on x_adv is computed once, *_adv in every step."""
    if method.inner is None:
        return x
    ramp = min(1.0, progress / args.eps_ramp) if args.eps_ramp else 1.0
    eps, step_size = ramp * args.eps / 255, ramp * args.step_size / 255
    if args.free:               # no attack: the last update's gradient has moved delta
        return (x + delta.clamp(-eps, eps)).clamp(0, 1).requires_grad_()
    once = dict(y=lambda: y, logits=lambda: logits_of(student, x), t_logits=lambda: logits_of(teacher, x))
    live = dict(logits_adv=lambda x_adv: logits_of(student, x_adv),
                t_logits_adv=lambda x_adv: logits_of(teacher, x_adv))
    names = needs(method.inner)
    with attack_mode(student, bn=args.attack_bn), branch(student, args.craft_branch):
        with torch.no_grad(), branch(student, 'main'):
            fixed = {k: once[k]() for k in names if k in once}
        climb = lambda x_adv: scale * method.inner(**fixed, **{k: live[k](x_adv) for k in names if k in live})
        return pgd(climb, x, eps=eps, step_size=step_sizes(step_size, args.steps, args.step_schedule),
                   steps=args.steps, init=args.init, norm=args.norm)

def loss_on(x, x_adv, y, look_ahead=False):
    """method.loss, (B,). Every name a loss may ask for is here; those it asks for are computed, in the order
    it asks. look_ahead: leave no trace, in BN statistics or otherwise."""
    def on(x, kind):            # 'nat' goes through the main BN; 'adv' through the auxiliary one, if any
        moves = kind in args.bn_order and not look_ahead
        still = contextlib.nullcontext() if moves else frozen_statistics(student)
        with still, branch(student, 'aux' if kind == 'adv' else 'main'):
            return logits_of(student, x)
    frozen = torch.no_grad()(logits_of)
    forward = dict(
        y             = lambda: Softened(y, target) if args.targets else y,
        logits        = lambda: on(x, 'nat'),
        logits_adv    = lambda: on(x_adv, 'adv'),
        logits_helper = lambda: on(x + hp['h'] * (x_adv - x), 'adv'),
        t_logits      = lambda: frozen(teacher, x),
        t_logits_adv  = lambda: frozen(teacher, x_adv),
        s_logits_adv  = lambda: frozen(standard, x_adv),
        guide_logits  = lambda: logits_of(guide, x),
        class_p       = lambda: class_p[y],
        progress      = lambda: progress,
    )
    names = needs(method.loss)
    if args.bn_order == 'adv-nat':
        names = sorted(names, key=lambda name: name == 'logits')
    values = {k: forward[k]() for k in names}
    if 'class_p' in names and not look_ahead:           # for the next epoch
        class_sum.index_add_(0, y, (values['logits'].detach() / hp['T']).softmax(1))
    return method.loss(**values, **hp)

target = functools.partial(TARGETS[args.targets], smoothing=args.smoothing) if args.targets else None

def update(x, y):
    """One step of the optimiser. -> the loss, on the device."""
    x_adv = craft(x, y)
    perturbed = contextlib.nullcontext()
    if args.awp and progress >= args.awp_warmup:
        def objective():
            with frozen_statistics(guide) if guide else contextlib.nullcontext():
                return scale * loss_on(x, x_adv.detach(), y, look_ahead=True).mean()
        perturbed = weights_perturbed(student, objective, gamma=args.awp)
    with perturbed:
        loss = loss_on(x, x_adv, y).mean()
        scaler.scale(loss).backward()
    if args.free:
        eps = args.eps / 255    # Shafahi et al. 2019: the step is eps
        delta.add_(eps * x_adv.grad.sign()).clamp_(-eps, eps)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    return loss.detach()

@torch.no_grad()
def average(weight):
    """averaged += weight (student - averaged), BN statistics and all."""
    for a, s in zip(averaged.state_dict().values(), student.state_dict().values()):
        a.lerp_(s, weight) if a.is_floating_point() else a.copy_(s)

def epoch_batches():
    """x, y of one epoch; with --extra, images without labels are the last of every batch."""
    if extra is None:
        yield from data.batches(d.x_train, d.y_train, args.batch_size, d.augment, generator)
        return
    labelled = data.batches(d.x_train, d.y_train, args.batch_size - n_extra, d.augment, generator)
    # as many steps as without them, so that an epoch costs the same
    for (x, y), x_extra in zip(itertools.islice(labelled, steps_per_epoch), extra_batches):
        y_extra = torch.full((n_extra,), -1, device=device)     # nobody looks at it, or the teacher says
        if labels_extra:
            with torch.no_grad():
                y_extra = logits_of(teacher, x_extra).argmax(1)
        yield torch.cat([x, x_extra]), torch.cat([y, y_extra])

def validate(model, n=None, bn=None):
    """Clean and PGD-20 accuracy in percent on (the first n of) the held-out training images, and the mean clean
    CE, through the BN branch bn. No autocast: it starves the attack on a confident network of gradients."""
    net = fast.get(model, model)
    hits = torch.zeros(3, device=device)
    with attack_mode(model), branch(model, bn):
        for x, y in data.batches(d.x_val[:n], d.y_val[:n], 500 if device.type == 'cuda' else 50):
            ce = lambda x: F.cross_entropy(net(x), y, reduction='none')
            x_adv = pgd(ce, x, eps=args.eps / 255, step_size=args.eps / 4 / 255, steps=20, norm=args.norm)
            with torch.no_grad():
                logits = model(x)
                clean, robust = (logits.argmax(1) == y).sum(), (model(x_adv).argmax(1) == y).sum()
                hits += torch.stack([clean, robust, F.cross_entropy(logits, y, reduction='sum')])
    clean, robust, loss = (hits / len(d.y_val[:n])).tolist()
    return 100 * clean, 100 * robust, loss

# -----------------------------------------------------------------------------
# the configuration, then the table
for net, role in ((teacher, 'teacher'), (standard, 'standard_teacher')):
    if net is not None:
        n = min(100, len(d.y_val))
        clean, robust, _ = validate(net, n)
        about[role].update(val_clean=clean, val_pgd20=robust, val_n=n)
        print(f'{role.replace("_", " ")} {about[role]["path"]} ({about[role]["fingerprint"]}): '
              f'{clean:.1f} % clean, {robust:.1f} % under PGD-20 on {n} held-out images', flush=True)
config = dict(vars(args), hparams=hp, augment=d.augment, classes=d.classes, train_images=len(d.y_train),
              val_images=len(d.y_val), teachers=about, precision=str(dtype or torch.float32),
              **environment(device))
rule = f'{"PGD-20" if method.inner else "clean accuracy"} on {len(d.y_val)} held-out training images'
epoch, steps_done, best, started = 0, 0, -1.0, time.perf_counter()
try:
    table = Table(args.out, config, epoch='d', lr='.4f', loss='.4f', val_clean='.2f', val_pgd20='.2f',
                  img_per_s='.0f', min_left='.1f')
    attack = ('no attack' if method.inner is None else f'free, {args.free} updates per batch' if args.free
              else f'PGD-{args.steps}, step {args.step_size:g}/255')
    print(f'eps {args.eps:g}/255 = {args.eps / 255:.5f}; {attack}; {len(d.y_train)} images, '
          f'{len(d.y_val)} more held out')
    if extra is not None:
        print(f'{len(extra)} more from {args.extra}, {n_extra} in every {args.batch_size}; their labels: '
              + (f"the teacher's, {args.teacher}" if labels_extra else f'--loss {args.loss} asks for none'))
    for epoch in range(1, args.epochs + 1):
        student.train()
        t0, step_losses = time.perf_counter(), []
        for x, y in tqdm(epoch_batches(), total=steps_per_epoch, leave=False, disable=None):
            delta = torch.zeros_like(x) if delta is None and args.free else delta
            for _ in range(max(1, args.free)):
                step_losses.append(update(x, y))    # no .item(): it would wait for the GPU in every step
                steps_done += 1
                progress = steps_done / total_steps
                if args.ema:                        # a short memory in the beginning
                    average(1 - min(args.ema, (1 + steps_done) / (10 + steps_done)))
        step_losses = torch.stack(step_losses).cpu()                        # one wait per epoch
        img_per_s = steps_per_epoch * len(x) / (time.perf_counter() - t0)
        if 'class_p' in asked:
            seen = class_sum.sum(1, keepdim=True)
            class_p = torch.where(seen > 0, class_sum / seen, class_p)
            class_sum.zero_()
        if args.swa and progress > args.swa:
            averages += 1
            average(1 / averages)
            again = data.batches(d.x_train, d.y_train, args.batch_size, d.augment,
                                 torch.Generator(device).manual_seed(epoch))
            update_bn(again, averaged)              # the statistics of its own activations, on clean images
        model = averaged if args.ema or averages else student               # what is judged and kept
        clean, robust, val_loss = validate(model, bn=args.eval_branch)
        check_finite(step_losses, val_loss, epoch)
        table.row(epoch=epoch, lr=scheduler.get_last_lr()[0], loss=step_losses.mean().item(), val_clean=clean,
                  val_pgd20=robust, img_per_s=img_per_s,
                  min_left=(time.perf_counter() - started) / epoch * (args.epochs - epoch) / 60)
        meta = dict(loss=args.loss, hparams=hp, dataset=args.dataset, eps=args.eps, norm=args.norm,
                    epoch=epoch, val_clean=clean, val_pgd20=robust, **about, run=config)
        score = robust if method.inner else clean   # on held-out training images: the test set takes no part
        if score >= best:                           # ties go to the later, more annealed epoch
            best = score
            save_checkpoint(f'{args.out}/best.pt', model, selected_by=rule, **meta)
        save_checkpoint(f'{args.out}/last.pt', model, selected_by='last epoch', **meta)
    table.curves('val_clean', 'val_pgd20')
except OSError as e:
    sys.exit(f'cannot write {args.out}: {e.strerror or e}. Stopped in epoch {epoch}; '
             'what was saved before is intact')
except FloatingPointError as e:
    sys.exit(f'{e}. Stopped; {args.out} holds the epochs before. Try a lower --lr, or --amp off')
except KeyboardInterrupt:
    sys.exit(f'\nstopped in epoch {epoch}; {args.out} holds the epochs before')
print(f'done in {(time.perf_counter() - started) / 60:.1f} min. Next: python evaluate.py {args.out}/best.pt')

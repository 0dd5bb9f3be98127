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
import argparse, contextlib, copy, functools, itertools, os, sys, time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import attacks, data, losses, models
from support import checkpoint, options, teachers, training
from attacks import attack_mode, frozen_statistics, pgd, step_sizes, weights_perturbed
from support.checkpoint import save_checkpoint
from support.files import Refused
from support.log import Table, check_finite, environment, new_run
from losses import TARGETS, Softened, needs
from models import branch

# -----------------------------------------------------------------------------
# arguments: each module owns the flags it reads
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
data.add_args(parser); models.add_args(parser); attacks.add_args(parser, training=True)
training.add_args(parser); teachers.add_args(parser); options.add_args(parser)
defaults = data.row_asked_for(parser)
parser.set_defaults(**defaults.get('flags', {}),
                    **{k: defaults[k] for k in ('epochs', 'steps') if k in defaults})
method = losses.add_args(parser)
args, hp = losses.parse_args(parser, method)
asked = losses.inputs(method)
wants_teacher = any(name.startswith('t_') for name in asked)
labels_extra = bool(args.extra) and 'y' in asked                # by the teacher
n_extra = round(args.extra_fraction * args.batch_size) if args.extra else 0

# -----------------------------------------------------------------------------
# device, precision, data, models, output: wrong input is found here, before any work
rank, world, device = training.ranks()

teacher, standard, about = None, None, {}                       # about: what is known of the teachers
try:
    options.check(args, method, hp)
    training.check(args, world)
    dtype = training.precision(args.amp, device)
    attacks.resolve_args(args, defaults['eps'])
    shape = dict(width=args.width, activation=args.activation, dual_bn=args.dual_bn)
    with torch.device('meta'):
        models.build(args.model, 10, **shape)
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
    lock = new_run(args.out, args.resume, args.epochs) if rank == 0 else None
    if training.anywhere(rank == 0 and lock is None)[0]:
        sys.exit()                                      # there is nothing left to do
    d = data.load(args.dataset, args.data_dir, subset=args.subset, device=device)
    extra = data.open_images(args.extra, d.x_train.shape[1:]) if args.extra else None
    training.check(args, world, len(d.y_train))
    mean, std = d.statistics() if args.normalize else (None, None)
    torch.manual_seed(args.seed)
    student = models.build(args.model, d.classes, mean=mean, std=std, **shape)
    guide = models.build(args.model, d.classes, mean=mean, std=std, width=args.width,
                         activation=args.activation) if 'guide_logits' in asked else None
    if wants_teacher or labels_extra:
        args.teacher = args.teacher or teachers.standard(args, task, world)
        teacher, about['teacher'] = teachers.frozen(args.teacher, args, d.classes, device)
    if 's_logits_adv' in asked:
        args.standard_teacher = args.standard_teacher or teachers.standard(args, task, world)
        standard, about['standard_teacher'] = teachers.frozen(
            args.standard_teacher, args, d.classes, device)
    if args.warm_start:
        path = args.teacher if args.warm_start == 'teacher' else args.warm_start
        checkpoint.warm_start(student, path, args.model, d.classes, width=args.width)
except (Refused, ValueError) as e:
    parser.error(e)
except KeyboardInterrupt:
    sys.exit('\nstopped before the first epoch')
student = student.to(device, memory_format=models.layout(device))
guide = guide and guide.to(device, memory_format=models.layout(device))
if args.sync_bn:
    for net in filter(None, (student, guide)):
        training.sync_bn(net)

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
total_steps = args.epochs * steps_per_epoch * max(1, args.free)
optimizer, scheduler = training.optimizer_and_schedule(parameters, args, total_steps)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
# in fp16 the gradient of a confident logit is 0; that of MSE, which has no bound, overflows before
scale = 1.0 if dtype is not torch.float16 else 2.0 ** (4 if method.inner is losses.climb_mse else 10)
averaged = copy.deepcopy(student) if args.ema or args.swa else None
# data order and augmentation: the same for every loss; the noise of the attacks: each process its own
generator = torch.Generator(device).manual_seed(args.seed)
if rank:
    torch.manual_seed(args.seed + 1_000_003 * rank)
now = SimpleNamespace(                  # what changes while training, and no module or optimizer keeps
    epoch=1, batch=0, steps=0, best=-1.0, averages=0, seconds=0.0, losses=[], order=generator.get_state(),
    class_p=torch.full((d.classes, d.classes), 1 / d.classes, device=device),       # dkl: row c, of class c
    class_sum=torch.zeros(d.classes, d.classes, device=device),
    delta=torch.empty(0, device=device))        # --free's perturbation
parts = dict(student=student, guide=guide, averaged=averaged, optimizer=optimizer, scheduler=scheduler,
             scaler=scaler)

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
    ramp = min(1.0, now.steps / total_steps / args.eps_ramp) if args.eps_ramp else 1.0
    eps, step_size = ramp * args.eps / 255, ramp * args.step_size / 255
    if args.free:               # no attack: the last update's gradient has moved delta
        return (x + now.delta.clamp(-eps, eps)).clamp(0, 1).requires_grad_()
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
        class_p       = lambda: now.class_p[y],
        progress      = lambda: now.steps / total_steps,
    )
    names = needs(method.loss)
    if args.bn_order == 'adv-nat':
        names = sorted(names, key=lambda name: name == 'logits')
    values = {k: forward[k]() for k in names}
    if 'class_p' in names and not look_ahead:           # for the next epoch
        now.class_sum.index_add_(0, y, (values['logits'].detach() / hp['T']).softmax(1))
    return method.loss(**values, **hp)

target = functools.partial(TARGETS[args.targets], smoothing=args.smoothing) if args.targets else None

def update(x, y):
    """One step of the optimiser. -> the loss, on the device."""
    total = 0.0
    for x, y in [(x[k::args.accumulate], y[k::args.accumulate]) for k in range(args.accumulate)]:
        x_adv = craft(x, y)
        perturbed = contextlib.nullcontext()
        if args.awp and now.steps >= args.awp_warmup * total_steps:
            def objective():
                with frozen_statistics(guide) if guide else contextlib.nullcontext():
                    return scale * loss_on(x, x_adv.detach(), y, look_ahead=True).mean()
            perturbed = weights_perturbed(student, objective, gamma=args.awp, average=training.average)
        with perturbed:
            loss = loss_on(x, x_adv, y).mean() / args.accumulate
            scaler.scale(loss).backward()
        total += loss.detach()
    if args.free:
        eps = args.eps / 255    # Shafahi et al. 2019: the step is eps
        now.delta.add_(eps * x_adv.grad.nan_to_num(0.0).sign()).clamp_(-eps, eps)
    training.average([p.grad for p in parameters if p.grad is not None])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    now.steps += 1
    return total

@torch.no_grad()
def move_average(weight):
    """averaged += weight (student - averaged), BN statistics and all."""
    for a, s in zip(averaged.state_dict().values(), student.state_dict().values()):
        a.lerp_(s, weight) if a.is_floating_point() else a.copy_(s)

def epoch_batches():
    """x, y of the rest of this epoch, this process's share; with --extra, images without labels are the last
    of every batch. Drawn as by one process from the start of the epoch: neither the number of processes nor
    where the training was stopped changes what is drawn."""
    generator.set_state(now.order)
    labelled = data.batches(d.x_train, d.y_train, args.batch_size - n_extra, d.augment, generator,
                            first=now.batch, share=slice(rank, None, world))
    unlabelled = [None] * steps_per_epoch
    if extra is not None:       # as many steps as without them, so that an epoch costs the same
        own = torch.Generator(device).manual_seed(args.seed + 1_000_003 * now.epoch)
        first = (now.epoch - 1) * steps_per_epoch * n_extra
        unlabelled = data.image_batches(extra, n_extra, d.augment, own, args.seed, first)
        unlabelled = itertools.islice(unlabelled, now.batch, None)
    # labelled first: stopped after the last batch, it still draws all that the next epoch's order depends on
    for (x, y), more, _ in zip(labelled, unlabelled, range(now.batch, steps_per_epoch)):
        if more is not None:
            more = more[world - 1 - rank::world]        # with its share of the others as many as everyone
            y_more = torch.full((len(more),), -1, device=device)    # nobody looks at it, or the teacher says
            if labels_extra:
                with torch.no_grad():
                    y_more = logits_of(teacher, more).argmax(1)
            x, y = torch.cat([x, more]), torch.cat([y, y_more])
        yield x, y

def validate(model, n=None, bn=None):
    """Clean and PGD-20 accuracy in percent on (the first n of) the held-out training images, and the mean
    clean CE, through the BN branch bn. No autocast: it starves the attack on a confident network."""
    net = fast.get(model, model)
    hits = torch.zeros(3, device=device)
    with attack_mode(model), branch(model, bn):
        for x, y in data.batches(d.x_val[:n][rank::world], d.y_val[:n][rank::world],
                                 data.at_once(500 if device.type == 'cuda' else 50, d.x_val)):
            ce = lambda x: F.cross_entropy(net(x), y, reduction='none')
            x_adv = pgd(ce, x, eps=args.eps / 255, step_size=args.eps / 4 / 255, steps=20, norm=args.norm)
            with torch.no_grad():
                logits = model(x)
                clean, robust = (logits.argmax(1) == y).sum(), (model(x_adv).argmax(1) == y).sum()
                hits += torch.stack([clean, robust, F.cross_entropy(logits, y, reduction='sum')])
    training.average([hits])
    clean, robust, loss = (world * hits / len(d.y_val[:n])).tolist()
    return 100 * clean, 100 * robust, loss

# -----------------------------------------------------------------------------
# the configuration, then the table
rule = f'{"PGD-20" if method.inner else "clean accuracy"} on {len(d.y_val)} held-out training images'
with training.guarded(args, now) as stop:
    for net, role in ((teacher, 'teacher'), (standard, 'standard_teacher')):
        if net is not None:
            n = min(100, len(d.y_val))
            clean, robust, _ = validate(net, n)
            about[role].update(val_clean=clean, val_pgd20=robust, val_n=n)
            print(f'{role.replace("_", " ")} {about[role]["path"]} ({about[role]["fingerprint"]}): '
                  f'{clean:.1f} % clean, {robust:.1f} % under PGD-20 on {n} held-out images', flush=True)
    config = dict(vars(args), hparams=hp, augment=d.augment, classes=d.classes, train_images=len(d.y_train),
                  val_images=len(d.y_val), teachers=about, precision=str(dtype or torch.float32),
                  processes=world, extra_labels='teacher' if labels_extra else None, **environment(device))
    run = dict(vars(args), teachers={role: known['fingerprint'] for role, known in about.items()},
               device=device.type, precision=str(dtype))
    if args.resume:
        try:
            training.load_state(args.out, run, now, parts)
        except (Refused, ValueError) as e:
            parser.error(e)
    if rank == 0:
        table = Table(args.out, config, first=now.epoch, epoch='d', lr='.4f', loss='.4f', val_clean='.2f',
                      val_pgd20='.2f', img_per_s='.0f', peak_gib='.2f', min_left='.1f')
    attack = ('no attack' if method.inner is None else f'free, {args.free} updates per batch' if args.free
              else f'PGD-{args.steps}, step {args.step_size:g}/255')
    print(f'eps {args.eps:g}/255 = {args.eps / 255:.5f}; {attack}; {len(d.y_train)} images, '
          f'{len(d.y_val)} more held out')
    if extra is not None:
        print(f'{len(extra)} more from {args.extra}, {n_extra} in every {args.batch_size}; their labels: '
              + (f"the teacher's, {args.teacher}" if labels_extra else f'--loss {args.loss} asks for none'))
    if now.steps:
        print(f'continuing in epoch {now.epoch}, after batch {now.batch}', flush=True)
    while now.epoch <= args.epochs:
        student.train()
        begun, images = time.perf_counter(), 0
        for x, y in tqdm(epoch_batches(), total=steps_per_epoch, initial=now.batch, leave=False,
                         disable=None if rank == 0 else True):
            if args.free and not len(now.delta):
                now.delta = torch.zeros_like(x)
            for _ in range(max(1, args.free)):
                now.losses.append(update(x, y))     # no .item(): it would wait for the GPU in every step
                if args.ema:                        # a short memory in the beginning
                    move_average(1 - min(args.ema, (1 + now.steps) / (10 + now.steps)))
            now.batch, images = now.batch + 1, images + world * len(x)
            begun += training.pause(args, run, now, parts, stop, begun)
        step_losses = torch.tensor([loss.item() for loss in now.losses])        # one wait per epoch
        now.seconds += time.perf_counter() - begun
        img_per_s = images / (time.perf_counter() - begun)
        # of several processes: one mean loss, one set of BN statistics, one of DKL
        training.average([step_losses])
        training.average([now.class_sum, *(buffer for net in (student, guide, averaged) if net
                                           for buffer in net.buffers())])
        if 'class_p' in asked:
            seen = now.class_sum.sum(1, keepdim=True)
            now.class_p = torch.where(seen > 0, now.class_sum / seen, now.class_p)
            now.class_sum.zero_()
        if args.swa and now.epoch > args.swa * args.epochs:
            now.averages += 1
            move_average(1 / now.averages)
            again = data.batches(d.x_train, d.y_train, args.batch_size, d.augment,
                                 torch.Generator(device).manual_seed(now.epoch))
            update_bn(again, averaged)              # the statistics of its own activations, on clean images
        model = averaged if args.ema or now.averages else student           # what is judged and kept
        clean, robust, val_loss = validate(model, bn=args.eval_branch)
        check_finite(step_losses, val_loss, now.epoch)
        score = robust if method.inner else clean   # on held-out training images: the test set takes no part
        if rank == 0:
            table.row(epoch=now.epoch, lr=scheduler.get_last_lr()[0], loss=step_losses.mean().item(),
                      val_clean=clean, val_pgd20=robust, img_per_s=img_per_s,
                      peak_gib=training.peak_gib(device),
                      min_left=now.seconds / now.epoch * (args.epochs - now.epoch) / 60)
            meta = dict(loss=args.loss, hparams=hp, dataset=args.dataset, eps=args.eps, norm=args.norm,
                        epoch=now.epoch, val_clean=clean, val_pgd20=robust, **about, run=config)
            if score >= now.best:                   # ties go to the later, more annealed epoch
                save_checkpoint(f'{args.out}/best.pt', model, selected_by=rule, **meta)
            save_checkpoint(f'{args.out}/last.pt', model, selected_by='last epoch', **meta)
        now.epoch, now.batch, now.losses, now.order = now.epoch + 1, 0, [], generator.get_state()
        now.best = max(now.best, score)
        if now.epoch <= args.epochs:
            training.save_state(args.out, run, now, parts)
    if rank == 0:
        table.curves('val_clean', 'val_pgd20')
        training.finished(args.out)
print(f'done in {now.seconds / 60:.1f} min. Next: python evaluate.py {args.out}/best.pt')

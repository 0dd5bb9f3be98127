"""
Adversarial training, with or without a teacher, with or without labels.

$ python train_adv.py --loss logit_mse --beta 0.2                      # trains its teacher first
$ python train_adv.py --loss trades --beta 5 --dataset cifar100
$ python train_adv.py --loss logit_mse --beta 0.2 --dataset digits     # no download, no GPU, three minutes

The defaults are the recipe of Al-Najjar et al., section 4: ResNet-18, SGD with Nesterov momentum 0.9, weight
decay 5e-4, one cycle with cosine annealing to 0.2, 100 epochs, batch 128, PGD-10 at 8/255 with step 2/255,
selection by PGD-20. Numbers that came out of it, with hardware and minutes: README.md and results/.
"""
import argparse, os, subprocess, sys, time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import attacks, data, models
from attacks import attack_mode, pgd
from log import Table, check_finite, environment, new_run
from losses import METHODS, hparams, needs, needs_teacher
from models import amp_dtype, fingerprint, load_checkpoint, save_checkpoint

# -----------------------------------------------------------------------------
# arguments. --loss and --dataset are read first: the loss's signature adds flags, the dataset sets defaults
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('--loss', default='logit_mse', choices=METHODS, help='see the table in README.md')
data.add_args(parser); models.add_args(parser); attacks.add_args(parser)
parser.add_argument('--steps', type=int, default=10, help='of the attack in training')
parser.add_argument('--init', default='uniform', choices=['uniform', 'normal', 'zero'],
                    help='where it starts (TRADES and kin: normal)')
parser.add_argument('--attack-bn', default='eval', choices=['eval', 'train'],
                    help='BN mode while the attack is crafted')
g = parser.add_argument_group('training')
g.add_argument('--teacher', metavar='PT',
               help="frozen standard teacher (default: this dataset and model's, trained if need be)")
g.add_argument('--teacher-model',
               help='architecture of a --teacher that holds weights only (default: --model, full width)')
g.add_argument('--epochs', type=int, default=100)
g.add_argument('--batch-size', type=int, default=128)
g.add_argument('--lr', type=float, default=0.2, help='maximum of the one-cycle schedule')
g.add_argument('--weight-decay', type=float, default=5e-4)
g.add_argument('--seed', type=int, default=0)
g.add_argument('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'],
               help='autocast; auto: bf16 where native')
g.add_argument('--out', metavar='DIR', help='default: runs/DATASET-MODEL-LOSS...')

first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
first.error = parser.error
first.add_argument('--loss', default='logit_mse', choices=METHODS)
data.add_args(first)
first = first.parse_known_args()[0]
method = METHODS[first.loss]
g = parser.add_argument_group(f'hyper-parameters of {first.loss}')
for name, default in hparams(method.loss).items():
    kind = dict(action='store_true') if default is False else dict(type=type(default))
    g.add_argument(f'--{name}', default=default, help=f'default {default}', **kind)
try:
    defaults = data.row(first.dataset, first.data_dir)
except ValueError as e:
    parser.error(e)
parser.set_defaults(**method.attack,
                    **{k: v for k, v in defaults.items() if k in ('width', 'batch_size', 'epochs')})
args, unknown = parser.parse_known_args()
if unknown:
    parser.error(f'unknown argument {unknown[0]}; --loss {args.loss} takes '
                 + (' '.join(f'--{k}' for k in hparams(method.loss)) or 'no hyper-parameter'))
hp = {k: getattr(args, k) for k in hparams(method.loss)}
if args.teacher and not needs_teacher(method):
    parser.error(f'--loss {args.loss} takes no --teacher')
for flag, low in dict(epochs=1, batch_size=2, steps=1, lr=0, weight_decay=0, **{k: 0 for k in hp}).items():
    if not low <= getattr(args, flag) < float('inf'):
        parser.error(f'--{flag.replace("_", "-")} {getattr(args, flag)}: a number, at least {low}')

# -----------------------------------------------------------------------------
# device, precision, data, models, output: wrong input is found here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
teacher, teacher_meta = None, None
try:
    dtype = amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype is not None             # --amp off is fp32, not TF32
    torch.set_float32_matmul_precision('high' if dtype else 'highest')
    attacks.resolve_args(args, defaults['eps'])
    with torch.device('meta'):
        models.build(args.model, 10, width=args.width)
    if args.teacher:
        models.read(args.teacher)
    task, tags = data.task(args), '-'.join(f'{k}{v}' for k, v in hp.items() if v)
    args.out = args.out or f'runs/{"-".join(filter(None, [task, args.loss, tags]))}-s{args.seed}'
    new_run(args.out)
    d = data.load(args.dataset, args.data_dir, subset=args.subset, device=device)
    mean, std = d.statistics() if args.normalize else (None, None)
    torch.manual_seed(args.seed)
    student = models.build(args.model, d.classes, width=args.width, mean=mean, std=std)
    if needs_teacher(method):
        if args.teacher is None:                # section 3: "it is feasible to train our own teacher model"
            folder = f'runs/{task}-teacher'
            args.teacher = f'{folder}/best.pt'
            if os.path.exists(f'{folder}/last.pt'):
                last = load_checkpoint(f'{folder}/last.pt')[1]
                if last['epoch'] < last['run']['epochs']:
                    raise ValueError(f'the teacher in {folder} is at epoch {last["epoch"]} of '
                                     f'{last["run"]["epochs"]}: wait for it or delete the folder, '
                                     f'or pass --teacher {args.teacher} as it is')
                print(f'no --teacher: taking {args.teacher}, trained earlier', flush=True)
            else:
                print(f'no --teacher, and none in {folder}: training it first', flush=True)
                flags = [f'--{k.replace("_", "-")}={getattr(args, k)}'
                         for k in ('dataset', 'data_dir', 'model', 'amp')]
                flags += [f'--{k}={getattr(args, k)}' for k in ('width', 'subset') if getattr(args, k)]
                flags += ['--normalize'] * args.normalize + [f'--out={folder}']
                script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train_teacher.py')
                if status := subprocess.run([sys.executable, script, *flags]).returncode:
                    sys.exit(f'no teacher, no student: train_teacher.py ended with status {status}')
        teacher, meta = load_checkpoint(args.teacher, args.teacher_model or args.model, d.classes)
        if teacher.config['num_classes'] != d.classes:
            raise ValueError(f'{args.teacher} knows {teacher.config["num_classes"]} classes, '
                             f'{args.dataset} has {d.classes}')
        if meta.get('dataset', args.dataset) != args.dataset:
            raise ValueError(f'{args.teacher} was trained on {meta["dataset"]}, not on {args.dataset}')
        teacher = teacher.to(device, memory_format=models.layout(device)).requires_grad_(False)
        teacher_meta = dict(path=args.teacher, fingerprint=fingerprint(teacher))
except ValueError as e:
    parser.error(e)
except KeyboardInterrupt:
    sys.exit('\nstopped before the first epoch')
student = student.to(device, memory_format=models.layout(device))

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
optimizer = torch.optim.SGD(student.parameters(), lr=args.lr, momentum=0.9, nesterov=True,
                            weight_decay=args.weight_decay)
# the paper states momentum 0.9: not cycled. 25 % of warm-up as in HAT's code, which the settings resemble
total_steps = max(5, args.epochs * steps_per_epoch)             # of four or fewer, OneCycleLR divides by zero
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total_steps, pct_start=0.25,
                                                cycle_momentum=False)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
# data order and augmentation: the same for every loss
generator = torch.Generator(device).manual_seed(args.seed)

# -----------------------------------------------------------------------------
# the two halves of the min-max problem

def logits_of(net, x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return net(x).float()

def craft(x, y):
    """x_adv: PGD on method.inner. What does not depend on x_adv is computed once, *_adv in every step."""
    if method.inner is None:
        return x
    scale = 2.0 ** 10 if dtype is torch.float16 else 1.0    # the gradient of a confident logit is 0 in fp16
    once = dict(y=lambda: y, logits=lambda: logits_of(student, x), t_logits=lambda: logits_of(teacher, x))
    live = dict(logits_adv=lambda x_adv: logits_of(student, x_adv),
                t_logits_adv=lambda x_adv: logits_of(teacher, x_adv))
    names = needs(method.inner)
    with attack_mode(student, bn=args.attack_bn):
        with torch.no_grad():
            fixed = {k: once[k]() for k in names if k in once}
        inner_hp = {k: hp[k] for k in hparams(method.inner)}
        climb = lambda x_adv: scale * method.inner(
            **fixed, **{k: live[k](x_adv) for k in names if k in live}, **inner_hp)
        return pgd(climb, x, eps=args.eps / 255, step_size=args.step_size / 255, steps=args.steps,
                   init=args.init, norm=args.norm)

def loss_on(x, x_adv, y):
    """method.loss, (B,). Every name a loss may ask for is here; those it asks for are
    computed, in the order it asks."""
    teach = torch.no_grad()(lambda x: logits_of(teacher, x))
    forward = dict(
        y             = lambda: y,
        logits        = lambda: logits_of(student, x),
        logits_adv    = lambda: logits_of(student, x_adv),
        logits_helper = lambda: logits_of(student, x + hp['h'] * (x_adv - x)),
        t_logits      = lambda: teach(x),
        t_logits_adv  = lambda: teach(x_adv),
    )
    return method.loss(**{k: forward[k]() for k in needs(method.loss)}, **hp)

def validate(model, n=None):
    """
    Clean and PGD-20 accuracy in percent on (the first n of) the held-out training images, and the mean clean
    CE; eager and without autocast, which starves the attack on a confident network of gradients.
    """
    hits = torch.zeros(3, device=device)
    with attack_mode(model):
        for x, y in data.batches(d.x_val[:n], d.y_val[:n], 500):
            ce = lambda x: F.cross_entropy(model(x), y, reduction='none')
            x_adv = pgd(ce, x, eps=args.eps / 255, step_size=args.eps / 4 / 255, steps=20, norm=args.norm)
            with torch.no_grad():
                logits = model(x)
                clean, robust = (logits.argmax(1) == y).sum(), (model(x_adv).argmax(1) == y).sum()
                hits += torch.stack([clean, robust, F.cross_entropy(logits, y, reduction='sum')])
    clean, robust, loss = (hits / len(d.y_val[:n])).tolist()
    return 100 * clean, 100 * robust, loss

# -----------------------------------------------------------------------------
# the configuration, then the table
if teacher is not None:
    n = min(100, len(d.y_val))
    clean, robust, _ = validate(teacher, n)
    teacher_meta.update(val_clean=clean, val_pgd20=robust, val_n=n)
    print(f'teacher {args.teacher} ({teacher_meta["fingerprint"]}): {clean:.1f} % clean, '
          f'{robust:.1f} % under PGD-20 on {n} held-out images')
config = dict(vars(args), hparams=hp, augment=d.augment, classes=d.classes, train_images=len(d.y_train),
              val_images=len(d.y_val), teacher_meta=teacher_meta, precision=str(dtype or torch.float32),
              **environment(device))
rule = f'{"PGD-20" if method.inner else "clean accuracy"} on {len(d.y_val)} held-out training images'
epoch, best, started = 0, -1.0, time.perf_counter()
try:
    table = Table(args.out, config, epoch='d', lr='.4f', loss='.4f', val_clean='.2f', val_pgd20='.2f',
                  img_per_s='.0f', min_left='.1f')
    print(f'eps {args.eps:g}/255 = {args.eps / 255:.5f}, step {args.step_size:g}/255, PGD-{args.steps}; '
          f'{len(d.y_train)} images, {len(d.y_val)} more held out')
    for epoch in range(1, args.epochs + 1):
        student.train()
        t0, losses = time.perf_counter(), []
        batches = data.batches(d.x_train, d.y_train, args.batch_size, d.augment, generator)
        for x, y in tqdm(batches, total=steps_per_epoch, leave=False, disable=None):
            x_adv = craft(x, y)
            loss = loss_on(x, x_adv, y).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            losses.append(loss.detach())            # no .item(): it would wait for the GPU in every step
        losses = torch.stack(losses).cpu()          # one wait per epoch
        img_per_s = len(losses) * len(x) / (time.perf_counter() - t0)
        clean, robust, val_loss = validate(student)
        check_finite(losses, val_loss, epoch)
        table.row(epoch=epoch, lr=scheduler.get_last_lr()[0], loss=losses.mean().item(), val_clean=clean,
                  val_pgd20=robust, img_per_s=img_per_s,
                  min_left=(time.perf_counter() - started) / epoch * (args.epochs - epoch) / 60)
        meta = dict(loss=args.loss, hparams=hp, dataset=args.dataset, eps=args.eps, norm=args.norm,
                    epoch=epoch, val_clean=clean, val_pgd20=robust, teacher=teacher_meta, run=config)
        score = robust if method.inner else clean   # on held-out training images: the test set takes no part
        if score >= best:                           # ties go to the later, more annealed epoch
            best = score
            save_checkpoint(f'{args.out}/best.pt', student, selected_by=rule, **meta)
        save_checkpoint(f'{args.out}/last.pt', student, selected_by='last epoch', **meta)
    table.curves('val_clean', 'val_pgd20')
except OSError as e:
    sys.exit(f'cannot write {args.out}: {e.strerror or e}. Stopped in epoch {epoch}; '
             'what was saved before is intact')
except FloatingPointError as e:
    sys.exit(f'{e}. Stopped; {args.out} holds the epochs before. Try a lower --lr, or --amp off')
except KeyboardInterrupt:
    sys.exit(f'\nstopped in epoch {epoch}; {args.out} holds the epochs before')
print(f'done in {(time.perf_counter() - started) / 60:.1f} min. Next: python evaluate.py {args.out}/best.pt')

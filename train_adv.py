"""
Adversarial training, with or without a teacher, with or without labels.

$ python train_adv.py --loss logit_mse --beta 0.2                      # trains its teacher first if there is none
$ python train_adv.py --loss trades --beta 5 --dataset cifar100
$ python train_adv.py --loss logit_mse --beta 0.2 --dataset digits     # no download, no GPU, two minutes on two cores

The defaults are the recipe of Al-Najjar et al., section 4: ResNet-18, SGD with Nesterov momentum 0.9, weight decay 5e-4,
one cycle with cosine annealing to 0.2, 100 epochs, batch 128, PGD-10 at 8/255 with step 2/255, selection by PGD-20.
Numbers that came out of it, with hardware and minutes: README.md and results/.
"""
import argparse, os, subprocess, sys, time

import torch
from tqdm import tqdm

import attacks, data, models
from attacks import attack_mode, pgd
from log import Table, check_finite, environment, new_run
from losses import METHODS, hparams, needs, needs_teacher
from models import amp_dtype, fingerprint, load_checkpoint, save_checkpoint

# -----------------------------------------------------------------------------
# arguments. --loss and --dataset are read first: the loss's signature adds its flags, the dataset's row sets defaults
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')     # one line, without the usage
parser.add_argument('--loss', default='logit_mse', choices=METHODS, help='see the table in README.md')
data.add_args(parser); models.add_args(parser); attacks.add_args(parser)
parser.add_argument('--steps', type=int, default=10, help='of the attack in training')
parser.add_argument('--init', choices=['uniform', 'normal', 'zero'], help="where the attack starts (default: the loss's)")
parser.add_argument('--attack-bn', default='eval', choices=['eval', 'train'], help='BN mode while the attack is crafted')
g = parser.add_argument_group('training')
g.add_argument('--teacher', metavar='PT', help="frozen standard teacher (default: this dataset and model's, trained if need be)")
g.add_argument('--teacher-model', help='architecture of a --teacher that holds weights only (default: --model, full width)')
g.add_argument('--epochs', type=int, default=100)
g.add_argument('--batch-size', type=int, default=128)
g.add_argument('--lr', type=float, default=0.2, help='maximum of the one-cycle schedule')
g.add_argument('--weight-decay', type=float, default=5e-4)
g.add_argument('--seed', type=int, default=0)
g.add_argument('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'], help='autocast; auto: bf16 where native')
g.add_argument('--compile', action='store_true', help='torch.compile student and teacher')
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
    g.add_argument(f'--{name}', default=default, help=f'default {default:g}', **kind)
try:
    defaults = data.row(first.dataset, first.data_dir)
except ValueError as e:
    parser.error(e)
parser.set_defaults(init=method.init, **{k: v for k, v in defaults.items() if k in ('width', 'batch_size', 'epochs')})
args, unknown = parser.parse_known_args()
if unknown:
    parser.error(f'unknown argument {unknown[0]}; --loss {args.loss} takes '
                 + (' '.join(f'--{k}' for k in hparams(method.loss)) or 'no hyper-parameter'))
hp = {k: getattr(args, k) for k in hparams(method.loss)}
for flag, low in (('epochs', 1), ('batch_size', 2), ('steps', 1), ('lr', 0), ('weight_decay', 0)):
    if not getattr(args, flag) >= low:
        parser.error(f'--{flag.replace("_", "-")} {getattr(args, flag)}: at least {low}')

# -----------------------------------------------------------------------------
# device, precision, data, models, output: everything that can be wrong with the input is wrong here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision('high')
task = data.task(args)
teacher, teacher_meta = None, None
try:
    attacks.resolve_args(args, defaults['eps'])
    dtype = amp_dtype(args.amp, device)
    d = data.load(args.dataset, args.data_dir, subset=args.subset, device=device)
    mean, std = d.statistics() if args.normalize else (None, None)
    torch.manual_seed(args.seed)
    student = models.build(args.model, d.classes, width=args.width, mean=mean, std=std)
    args.out = args.out or f'runs/{task}-{"-".join([args.loss, *(f"{k}{v:g}" for k, v in hp.items() if v)])}-s{args.seed}'
    new_run(args.out)
    if needs_teacher(method):
        if args.teacher is None:                        # section 3: "it is feasible to train our own teacher model"
            folder = f'runs/{task}-teacher'
            args.teacher = f'{folder}/best.pt'
            if os.path.exists(f'{folder}/last.pt'):
                print(f'no --teacher: taking {args.teacher}, trained earlier', flush=True)
            else:
                print(f'no --teacher, and none in {folder}: training it first', flush=True)
                flags = [f'--{k.replace("_", "-")}={getattr(args, k)}' for k in ('dataset', 'data_dir', 'model', 'amp')]
                flags += [f'--{k}={getattr(args, k)}' for k in ('width', 'subset') if getattr(args, k)]
                flags += ['--normalize'] * args.normalize + ['--compile'] * args.compile + [f'--out={folder}']
                script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train_teacher.py')
                if status := subprocess.run([sys.executable, script, *flags]).returncode:
                    sys.exit(status)
        teacher, meta = load_checkpoint(args.teacher, args.teacher_model or args.model, d.classes)
        if teacher.config['num_classes'] != d.classes:
            raise ValueError(f'{args.teacher} knows {teacher.config["num_classes"]} classes, {args.dataset} has {d.classes}')
        if meta.get('dataset', args.dataset) != args.dataset:
            raise ValueError(f'{args.teacher} was trained on {meta["dataset"]}, not on {args.dataset}')
        teacher = teacher.to(device, memory_format=models.layout(device)).requires_grad_(False)
        teacher_meta = dict(path=args.teacher, fingerprint=fingerprint(teacher))
except ValueError as e:
    parser.error(e)
student = student.to(device, memory_format=models.layout(device))

# speed: deletable, the rest does not know
net = student
if args.compile:
    net, teacher = torch.compile(net), teacher and torch.compile(teacher)

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
optimizer = torch.optim.SGD(student.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
# the paper states momentum 0.9: not cycled. 25 % of warm-up as in HAT's code, whose settings the paper's resemble
total_steps = max(5, args.epochs * steps_per_epoch)              # of four or fewer, OneCycleLR divides by zero
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total_steps, pct_start=0.25, cycle_momentum=False)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
generator = torch.Generator(device).manual_seed(args.seed)      # data order and augmentation: the same for every loss

# -----------------------------------------------------------------------------
# the two halves of the min-max problem

def logits_of(net, x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return net(x).float()

def craft(x, y, steps=args.steps):
    """x_adv: PGD on method.inner. What does not depend on x_adv is computed once, *_adv in every step."""
    if method.inner is None:
        return x
    scale = 2.0 ** 10 if dtype is torch.float16 else 1.0        # the gradient of a confident logit is 0 in fp16
    once = dict(y=lambda: y, logits=lambda: logits_of(net, x), t_logits=lambda: logits_of(teacher, x))
    live = dict(logits_adv=lambda x_adv: logits_of(net, x_adv), t_logits_adv=lambda x_adv: logits_of(teacher, x_adv))
    names = needs(method.inner)
    with attack_mode(student, bn=args.attack_bn):
        with torch.no_grad():
            fixed = {k: once[k]() for k in names if k in once}
        climb = lambda x_adv: scale * method.inner(**fixed, **{k: live[k](x_adv) for k in names if k in live})
        return pgd(climb, x, eps=args.eps / 255, step_size=args.step_size / 255, steps=steps, init=args.init, norm=args.norm)

def loss_on(x, x_adv, y):
    """method.loss, (B,). Every name a loss may ask for is here; those it asks for are computed, in the order it asks."""
    teach = torch.no_grad()(lambda x: logits_of(teacher, x))
    forward = dict(
        y             = lambda: y,
        logits        = lambda: logits_of(net, x),
        logits_adv    = lambda: logits_of(net, x_adv),
        logits_helper = lambda: logits_of(net, x + hp['h'] * (x_adv - x)),
        t_logits      = lambda: teach(x),
        t_logits_adv  = lambda: teach(x_adv),
    )
    return method.loss(**{k: forward[k]() for k in needs(method.loss)}, **hp)

def validate(net, n=None):
    """clean and PGD-20 accuracy in percent on (the first n of) the held-out training images, and the mean clean CE."""
    hits = torch.zeros(3, device=device)
    x_val, y_val = d.x_val[:n], d.y_val[:n]
    with attack_mode(net):
        for x, y in data.batches(x_val, y_val, 500):
            ce = lambda x: torch.nn.functional.cross_entropy(logits_of(net, x), y, reduction='none')
            x_adv = pgd(ce, x, eps=args.eps / 255, step_size=args.eps / 4 / 255, steps=20, norm=args.norm)
            with torch.no_grad():
                hits += torch.stack([(logits_of(net, x).argmax(1) == y).sum(), (logits_of(net, x_adv).argmax(1) == y).sum(), ce(x).sum()])
    clean, robust, loss = (hits / len(y_val)).tolist()
    return 100 * clean, 100 * robust, loss

# -----------------------------------------------------------------------------
# the configuration, then the table
if teacher is not None:
    n = min(200, len(d.y_val))
    clean, robust, _ = validate(teacher, n)
    teacher_meta.update(val_clean=clean, val_pgd20=robust, val_n=n)
    print(f'teacher {args.teacher} ({teacher_meta["fingerprint"]}): {clean:.1f} % clean, {robust:.1f} % under PGD-20 '
          f'on {n} held-out images')
config = dict(vars(args), hparams=hp, augment=d.augment, classes=d.classes, train_images=len(d.y_train), val_images=len(d.y_val),
              teacher_meta=teacher_meta, precision=str(dtype or torch.float32), **environment(device))
print(f'eps {args.eps:g}/255 = {args.eps / 255:.5f}, step {args.step_size:g}/255, PGD-{args.steps}; {len(d.y_train)} images, '
      f'{len(d.y_val)} more held out')
epoch, best, started = 0, -1.0, time.perf_counter()
try:
    table = Table(args.out, config, epoch='d', lr='.4f', loss='.4f', val_clean='.2f', val_pgd20='.2f', img_per_s='.0f', min_left='.1f')
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
        table.row(epoch=epoch, lr=scheduler.get_last_lr()[0], loss=losses.mean().item(), val_clean=clean, val_pgd20=robust,
                  img_per_s=img_per_s, min_left=(time.perf_counter() - started) / epoch * (args.epochs - epoch) / 60)
        meta = dict(loss=args.loss, hparams=hp, dataset=args.dataset, eps=args.eps, norm=args.norm, epoch=epoch,
                    val_clean=clean, val_pgd20=robust, teacher=teacher_meta, run=config)
        if robust > best:                           # held-out training images: the test set takes no part
            best = robust
            save_checkpoint(f'{args.out}/best.pt', student, selected_by=f'PGD-20 on {len(d.y_val)} held-out training images', **meta)
        save_checkpoint(f'{args.out}/last.pt', student, selected_by='last epoch', **meta)
    table.curves('val_clean', 'val_pgd20')
except OSError as e:
    sys.exit(f'cannot write {args.out}: {e.strerror or e}. Stopped in epoch {epoch}; what was saved before is intact')
except FloatingPointError as e:
    sys.exit(f'{e}. Stopped; {args.out} holds the epochs before. Try a lower --lr, or --amp off')
except KeyboardInterrupt:
    sys.exit(f'\nstopped in epoch {epoch}; {args.out} holds the epochs before')
print(f'done in {(time.perf_counter() - started) / 60:.1f} min. Next: python evaluate.py {args.out}/best.pt')

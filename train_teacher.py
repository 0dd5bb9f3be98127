"""
Standard training: the frozen teacher g of every method that asks for one.

$ python train_teacher.py                                  # ResNet-18 on CIFAR-10
$ python train_teacher.py --dataset cifar100 --model wrn-34-10
$ python train_teacher.py --dataset digits                 # no download, no GPU, seconds

The recipe is train_adv.py's, without the adversary: Al-Najjar et al. train "all the models" with it. best.pt
is the epoch of the highest clean accuracy on held-out training images; the test set takes no part.
"""
import argparse
import time

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

import data
import models
from support import checkpoint, ddp, describe, files, refusals, runs, speed

# -----------------------------------------------------------------------------
# flags, as those of train_adv.py
parser = argparse.ArgumentParser(description=__doc__, epilog=describe.TABLE_HELP, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
refusals.one_line(parser)
files.plain_output()

arg = parser.add_argument_group('data and model').add_argument
arg('--dataset', default='cifar10', help=f'{" ".join(data.DATASETS)}, or the NAME of DIR/NAME.npz')
arg('--data-dir', default='data', metavar='DIR')
arg('--augment', choices=data.AUGMENT, help="default: the dataset's; none for your own files")
arg('--subset', type=int, metavar='N', help='N training images only: the first')
arg('--subset-seed', type=int, metavar='SEED', help='draw the --subset at random instead')
arg('--model', default='resnet18', help=f'{models.NAMES}, or FILE.py:FUNCTION')
arg('--width', type=int, help="channels of the first layer (default: the paper's)")
arg('--normalize', action=argparse.BooleanOptionalAction, default=False, help='the model standardises images')
arg('--activation', default='relu', choices=models.ACTIVATIONS, help='hybrid: softplus backward only')

arg = parser.add_argument_group('optimisation').add_argument
arg('--epochs', type=int, default=100)
arg('--batch-size', type=int, default=128, help='of all processes together')
arg('--accumulate', type=int, default=1, metavar='K', help='a batch in K parts: less memory; BN sees a part')
arg('--lr', type=float, default=0.2, help='maximum of the schedule')
arg('--schedule', default='onecycle', choices=['onecycle', 'cosine', 'step'], help='cosine: no warm-up')
arg('--milestones', type=float, nargs='+', default=[0.5, 0.75], help='of --schedule step, shares of training')
arg('--nesterov', action=argparse.BooleanOptionalAction, default=True)
arg('--weight-decay', type=float, default=5e-4)

arg = parser.add_argument_group('machine and run').add_argument
arg('--seed', type=int, default=0)
arg('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'], help='auto: bf16 where native')
arg('--compile', action='store_true', help='faster after a minute; a CPU needs a C++ compiler')
arg('--sync-bn', action='store_true', help='under torchrun: BN statistics of the whole batch')
arg('--out', metavar='DIR', help='default: runs/DATASET-MODEL-teacher, with every flag that differs')
arg('--resume', action='store_true', help='continue the run in --out')
arg('--save-minutes', type=float, default=10, help='save a state to resume from this often')
arg('--dry-run', action='store_true', help='say what would be done and how long')

first, _ = parser.parse_known_args()
parser.set_defaults(**data.defaults(first.dataset, first.data_dir, teacher=True))
if first.model != parser.get_default('model'):      # the dataset's width is the default model's
    parser.set_defaults(width=None)
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, data, model. Wrong input is refused here, before any work: one line, no traceback
rank, world, device = ddp.init()
shape = dict(width=args.width, activation=args.activation)
refusals.optimisation(args, parser.get_default, world)
refusals.model(args.model, normalize=args.normalize, **shape)
args.out = args.out or describe.teacher_folder(args, parser.get_default)
run = runs.Run(args)

dtype = speed.precision(args.amp, device)                      # None: fp32, and then without TF32 either

d = data.load(args.dataset, args.data_dir, subset=args.subset, subset_seed=args.subset_seed,
              augment=args.augment, device=device)
notes = [*refusals.images(args, d.x_train, world), data.missing_classes(d, args.subset)]
if args.normalize:
    shape['mean'], shape['std'] = d.statistics()
torch.manual_seed(args.seed)
model = checkpoint.build(args.model, d, **shape)
ddp.broadcast(model)
if args.sync_bn:
    ddp.sync_bn(model)
net = torch.compile(model, dynamic=False) if args.compile else model      # checkpoints hold `model`

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
total_steps = args.epochs * steps_per_epoch
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=args.nesterov,
                            weight_decay=args.weight_decay)
if args.schedule == 'step':
    scheduler = MultiStepLR(optimizer, [round(m * total_steps) for m in args.milestones], gamma=0.1)
else:
    # PyTorch divides by zero at four steps
    scheduler = OneCycleLR(optimizer, args.lr, total_steps=max(5, total_steps), cycle_momentum=False,
                           pct_start=0.25 if args.schedule == 'onecycle' else 0.0)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

def logits_of(x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return net(x).float()

def update(x, y):
    """One step of the optimiser, in --accumulate parts. -> the loss, on the device."""
    total = 0.0
    for part in range(args.accumulate):
        x_part, y_part = x[part::args.accumulate], y[part::args.accumulate]
        loss = F.cross_entropy(logits_of(x_part), y_part) / args.accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
    ddp.average([p.grad for p in model.parameters()])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    return total

@torch.no_grad()
def validate(model):
    """Accuracy in percent and mean CE on the held-out training images; eager, without autocast."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for x, y in data.batches(d.x_val[rank::world], d.y_val[rank::world], data.at_once(500, d.x_val)):
        logits = model(x)
        sums[0] += (logits.argmax(1) == y).sum()
        sums[1] += F.cross_entropy(logits, y, reduction='sum')
    ddp.average([sums])
    clean, loss = (world * sums / len(d.y_val)).tolist()
    return 100 * clean, loss

# -----------------------------------------------------------------------------
# the run
epoch, batch, best, step_losses = 1, 0, -1.0, []

def state():
    """All that the next step depends on, beside the flags."""
    return dict(epoch=epoch, batch=batch, best=best, step_losses=step_losses, model=model,
                optimizer=optimizer, scheduler=scheduler, scaler=scaler)

def training_batches():
    """x, y of the rest of this epoch, this process's share of each batch."""
    return data.epoch(d, args.batch_size, args.seed, epoch, first=batch, share=slice(rank, None, world))

config = dict(vars(args), loss='standard', precision=str(dtype or torch.float32), processes=world,
              code=checkpoint.code_of(model), **data.facts(d), **describe.environment(device))
describe.summary(config, model, notes)
with run.guarded():             # Ctrl-C, full disk, out of memory: what was saved holds
    saved = run.begin(config, state)
    if saved:
        epoch, batch, best = saved['epoch'], saved['batch'], saved['best']
        step_losses = list(torch.tensor(saved['step_losses'], device=device))
    if args.dry_run:
        run.estimate(update, training_batches(), validate, model, total_steps, validations=args.epochs)

    while epoch <= args.epochs:
        model.train()
        t0, images = time.perf_counter(), 0
        for x, y in run.progress(training_batches(), f'epoch {epoch}', total=steps_per_epoch, initial=batch):
            step_losses.append(update(x, y))        # no .item() here: it would wait for the GPU
            batch += 1
            images += world * len(x)
            run.save_if_due(state)
        losses = torch.stack(step_losses)
        img_per_s = images / (time.perf_counter() - t0)
        run.save_state(state)           # the validation may take longer than a signal waits

        # of several processes: one mean loss, one set of BN statistics
        ddp.average([losses, *model.buffers()])
        clean, val_loss = validate(model)
        runs.check_finite(val_loss, epoch)
        run.row(epoch=epoch, lr=scheduler.get_last_lr()[0], loss=losses.mean().item(), val_clean=clean,
                img_per_s=img_per_s, peak_gib=describe.peak_gib(device))
        known = dict(epoch=epoch, val_clean=clean)
        rule = f'clean accuracy on {len(d.y_val)} held-out training images'
        if clean >= best:                           # held-out training images: the test set takes no part
            best = clean
            run.save_model('best.pt', model, selected_by=rule, **known)
        run.save_model('last.pt', model, selected_by='last epoch', **known)
        epoch, batch, step_losses = epoch + 1, 0, []
    run.finish(best, clean, rule)

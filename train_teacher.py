"""
Standard training: the frozen teacher g of every method that asks for one.

$ python train_teacher.py                                  # ResNet-18 on CIFAR-10
$ python train_teacher.py --dataset cifar100 --model wrn-34-10
$ python train_teacher.py --dataset digits                 # no download, no GPU, seconds

The recipe is train_adv.py's, without the adversary: Al-Najjar et al. train "all the models" with it. best.pt
is the epoch of the highest clean accuracy on held-out training images; the test set takes no part.
"""
import argparse, sys, time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data, models
from checkpoint import save_checkpoint
from log import Table, check_finite, environment, new_run
from models import amp_dtype

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
data.add_args(parser); models.add_args(parser)
g = parser.add_argument_group('training')
g.add_argument('--epochs', type=int, default=100)
g.add_argument('--batch-size', type=int, default=128)
g.add_argument('--lr', type=float, default=0.2, help='maximum of the one-cycle schedule')
g.add_argument('--weight-decay', type=float, default=5e-4)
g.add_argument('--seed', type=int, default=0)
g.add_argument('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'],
               help='autocast; auto: bf16 where native')
g.add_argument('--out', metavar='DIR',
               help='default: runs/DATASET-MODEL-teacher, where train_adv.py looks for it')
defaults = data.row_asked_for(parser)
parser.set_defaults(**{k: v for k, v in defaults.items() if k in ('width', 'batch_size')},
                    epochs=defaults.get('teacher_epochs', 100))
args = parser.parse_args()
for flag, low in dict(epochs=1, batch_size=2, lr=0, weight_decay=0).items():
    if not low <= getattr(args, flag) < float('inf'):
        parser.error(f'--{flag.replace("_", "-")} {getattr(args, flag)}: a number, at least {low}')

# -----------------------------------------------------------------------------
# device, precision, data, model, output: everything that can be wrong with the input is
# wrong here, before any work
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
try:
    dtype = amp_dtype(args.amp, device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype is not None             # --amp off is fp32, not TF32
    torch.set_float32_matmul_precision('high' if dtype else 'highest')
    with torch.device('meta'):
        models.build(args.model, 10, width=args.width)
    args.out = args.out or f'runs/{data.task(args)}-teacher'
    new_run(args.out)
    d = data.load(args.dataset, args.data_dir, subset=args.subset, device=device)
    mean, std = d.statistics() if args.normalize else (None, None)
    torch.manual_seed(args.seed)
    model = models.build(args.model, d.classes, width=args.width, mean=mean, std=std,
                         activation=args.activation)
except ValueError as e:
    parser.error(e)
model = model.to(device, memory_format=models.layout(device))

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True,
                            weight_decay=args.weight_decay)
total_steps = max(5, args.epochs * steps_per_epoch)             # of four or fewer, OneCycleLR divides by zero
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total_steps, pct_start=0.25,
                                                cycle_momentum=False)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
generator = torch.Generator(device).manual_seed(args.seed)

def logits_of(x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return model(x).float()

@torch.no_grad()
def validate():
    """Accuracy in percent and mean CE on the held-out training images; eager, without autocast."""
    model.eval()
    hits = torch.zeros(2, device=device)
    for x, y in data.batches(d.x_val, d.y_val, 500):
        logits = model(x)
        hits += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction='sum')])
    clean, loss = (hits / len(d.y_val)).tolist()
    return 100 * clean, loss

# -----------------------------------------------------------------------------
# the configuration, then the table
config = dict(vars(args), augment=d.augment, classes=d.classes, train_images=len(d.y_train),
              val_images=len(d.y_val), precision=str(dtype or torch.float32), **environment(device))

epoch, best, started = 0, -1.0, time.perf_counter()
try:
    table = Table(args.out, config, epoch='d', lr='.4f', loss='.4f', val_clean='.2f',
                  img_per_s='.0f', min_left='.1f')
    for epoch in range(1, args.epochs + 1):
        model.train()
        t0, losses = time.perf_counter(), []
        batches = data.batches(d.x_train, d.y_train, args.batch_size, d.augment, generator)
        for x, y in tqdm(batches, total=steps_per_epoch, leave=False, disable=None):
            loss = F.cross_entropy(logits_of(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            losses.append(loss.detach())            # no .item(): it would wait for the GPU in every step
        losses = torch.stack(losses).cpu()          # one wait per epoch
        img_per_s = len(losses) * len(x) / (time.perf_counter() - t0)
        clean, val_loss = validate()
        check_finite(losses, val_loss, epoch)
        table.row(epoch=epoch, lr=scheduler.get_last_lr()[0], loss=losses.mean().item(), val_clean=clean,
                  img_per_s=img_per_s,
                  min_left=(time.perf_counter() - started) / epoch * (args.epochs - epoch) / 60)
        meta = dict(loss='standard', dataset=args.dataset, epoch=epoch, val_clean=clean, run=config)
        if clean >= best:                           # held-out training images: the test set takes no part
            best = clean
            rule = f'clean accuracy on {len(d.y_val)} held-out training images'
            save_checkpoint(f'{args.out}/best.pt', model, selected_by=rule, **meta)
        save_checkpoint(f'{args.out}/last.pt', model, selected_by='last epoch', **meta)
    table.curves('val_clean')
except OSError as e:
    sys.exit(f'cannot write {args.out}: {e.strerror or e}. Stopped in epoch {epoch}; '
             'what was saved before is intact')
except FloatingPointError as e:
    sys.exit(f'{e}. Stopped; {args.out} holds the epochs before. Try a lower --lr, or --amp off')
except KeyboardInterrupt:
    sys.exit(f'\nstopped in epoch {epoch}; {args.out} holds the epochs before')
print(f'done in {(time.perf_counter() - started) / 60:.1f} min. Next: python evaluate.py {args.out}/best.pt')

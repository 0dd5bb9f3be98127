"""
Standard training: the frozen teacher g of every method that asks for one.

$ python train_teacher.py                                  # ResNet-18 on CIFAR-10
$ python train_teacher.py --dataset cifar100 --model wrn-34-10
$ python train_teacher.py --dataset digits                 # no download, no GPU, seconds

The recipe is train_adv.py's, without the adversary: Al-Najjar et al. train "all the models" with it. best.pt
is the epoch of the highest clean accuracy on held-out training images; the test set takes no part.
"""
import argparse, sys, time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data, models
from support import training
from support.checkpoint import save_checkpoint
from support.files import Refused
from support.log import Table, check_finite, environment, new_run

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
data.add_args(parser); models.add_args(parser); training.add_args(parser)
defaults = data.row_asked_for(parser)
parser.set_defaults(**defaults.get('flags', {}), epochs=defaults.get('teacher_epochs', 100))
args = parser.parse_args()

# -----------------------------------------------------------------------------
# device, precision, data, model, output: everything that can be wrong with the input is
# wrong here, before any work
rank, world, device = training.ranks()
try:
    training.check(args, world)
    dtype = training.precision(args.amp, device)
    with torch.device('meta'):
        models.build(args.model, 10, width=args.width)
    args.out = args.out or f'runs/{data.task(args)}-teacher'
    lock = new_run(args.out, args.resume, args.epochs) if rank == 0 else None
    if training.anywhere(rank == 0 and lock is None)[0]:
        sys.exit()                                      # there is nothing left to do
    d = data.load(args.dataset, args.data_dir, subset=args.subset, device=device)
    training.check(args, world, len(d.y_train))
    mean, std = d.statistics() if args.normalize else (None, None)
    torch.manual_seed(args.seed)
    model = models.build(args.model, d.classes, width=args.width, mean=mean, std=std,
                         activation=args.activation)
except (Refused, ValueError) as e:
    parser.error(e)
model = model.to(device, memory_format=models.layout(device))
if args.sync_bn:
    training.sync_bn(model)
fast = torch.compile(model, dynamic=False) if args.compile else model      # the speed block

# -----------------------------------------------------------------------------
# optimiser and schedule
steps_per_epoch = max(1, len(d.y_train) // args.batch_size)
total_steps = args.epochs * steps_per_epoch
optimizer, scheduler = training.optimizer_and_schedule(model.parameters(), args, total_steps)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
generator = torch.Generator(device).manual_seed(args.seed)
now = SimpleNamespace(epoch=1, batch=0, best=-1.0, seconds=0.0, losses=[], order=generator.get_state())
parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)

def logits_of(x):
    """fp32 logits of fp32 images; only the network itself runs in reduced precision."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return fast(x).float()

@torch.no_grad()
def validate():
    """Accuracy in percent and mean CE on the held-out training images; eager, without autocast."""
    model.eval()
    hits = torch.zeros(2, device=device)
    for x, y in data.batches(d.x_val[rank::world], d.y_val[rank::world], data.at_once(500, d.x_val)):
        logits = model(x)
        hits += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction='sum')])
    training.average([hits])
    clean, loss = (world * hits / len(d.y_val)).tolist()
    return 100 * clean, loss

# -----------------------------------------------------------------------------
# the configuration, then the table
config = dict(vars(args), augment=d.augment, classes=d.classes, train_images=len(d.y_train),
              val_images=len(d.y_val), precision=str(dtype or torch.float32), processes=world,
              **environment(device))
run = dict(vars(args), device=device.type, precision=str(dtype))
if args.resume:
    try:
        training.load_state(args.out, run, now, parts)
    except (Refused, ValueError) as e:
        parser.error(e)
rule = f'clean accuracy on {len(d.y_val)} held-out training images'
with training.guarded(args, now) as stop:
    if rank == 0:
        table = Table(args.out, config, first=now.epoch, epoch='d', lr='.4f', loss='.4f', val_clean='.2f',
                      img_per_s='.0f', peak_gib='.2f', min_left='.1f')
    if now.epoch > 1 or now.batch:
        print(f'continuing in epoch {now.epoch}, after batch {now.batch}', flush=True)
    while now.epoch <= args.epochs:
        model.train()
        begun, images = time.perf_counter(), 0
        generator.set_state(now.order)              # of the whole epoch, also of one that was interrupted
        for x, y in tqdm(data.batches(d.x_train, d.y_train, args.batch_size, d.augment, generator,
                                      first=now.batch, share=slice(rank, None, world)),
                         total=steps_per_epoch, initial=now.batch, leave=False,
                         disable=None if rank == 0 else True):
            total = 0.0
            for k in range(args.accumulate):
                x_part, y_part = x[k::args.accumulate], y[k::args.accumulate]
                loss = F.cross_entropy(logits_of(x_part), y_part) / args.accumulate
                scaler.scale(loss).backward()
                total += loss.detach()
            training.average([p.grad for p in model.parameters()])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            now.losses.append(total)                # no .item(): it would wait for the GPU in every step
            now.batch, images = now.batch + 1, images + world * len(x)
            begun += training.pause(args, run, now, parts, stop, begun)
        losses = torch.tensor([loss.item() for loss in now.losses])         # one wait per epoch
        now.seconds += time.perf_counter() - begun
        img_per_s = images / (time.perf_counter() - begun)
        training.average([losses])                  # of several processes: one mean loss,
        training.average(model.buffers())           # and one set of BN statistics
        clean, val_loss = validate()
        check_finite(losses, val_loss, now.epoch)
        if rank == 0:
            table.row(epoch=now.epoch, lr=scheduler.get_last_lr()[0], loss=losses.mean().item(),
                      val_clean=clean, img_per_s=img_per_s, peak_gib=training.peak_gib(device),
                      min_left=now.seconds / now.epoch * (args.epochs - now.epoch) / 60)
            meta = dict(loss='standard', dataset=args.dataset, epoch=now.epoch, val_clean=clean, run=config)
            if clean >= now.best:                   # held-out training images: the test set takes no part
                save_checkpoint(f'{args.out}/best.pt', model, selected_by=rule, **meta)
            save_checkpoint(f'{args.out}/last.pt', model, selected_by='last epoch', **meta)
        now.epoch, now.batch, now.losses, now.order = now.epoch + 1, 0, [], generator.get_state()
        now.best = max(now.best, clean)
        if now.epoch <= args.epochs:
            training.save_state(args.out, run, now, parts)
    if rank == 0:
        table.curves('val_clean')
        training.finished(args.out)
print(f'done in {now.seconds / 60:.1f} min. Next: python evaluate.py {args.out}/best.pt')

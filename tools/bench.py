"""
Images per second of a training step and of PGD evaluation, beside a plain implementation; each trick's share.

$ python -m tools.bench --loss logit_mse --beta 0.2 --width 16               # the ratio
$ python -m tools.bench --loss trades --width 8 --batch-size 64 --tricks     # each trick alone, and left out

plain is what public code does, fast is train_adv.py --compile. The rows take turns, in rounds: a row shows
the median of its rounds, and of its ratios to plain in the same round. Random images of CIFAR's size. FLOPs
are what convolutions and matrix products need, uncompiled (a multiply-add is two), also as a share of what a
large product reaches in the same rounds. On a GPU fp32 is TF32, as in PyTorch's convolutions; evaluation not.
"""
import argparse, contextlib, functools, json, re, resource, statistics, time
from typing import Callable, NamedTuple

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

import data, losses, models
from attacks import attack_mode, pgd, start
from support.files import atomic
from support.log import environment
from losses import needs

TRICKS = {                      # those that train_adv.py uses are FAST, below
    'loader':         'batches cut, cropped and flipped on the device',
    'once':           'clean logits once per attack',
    'frozen':         'parameters frozen in the attack',
    'channels_last':  'images and weights',
    'amp':            'bf16 or fp16',
    'compile attack': 'the network, in the attack',
    'compile update': 'network and teacher, in the update',
    'folded':         'BN in the convolutions, in the attack',
    'fused':          'optimiser in one kernel',
    'graphs':         'CUDA graphs of what is compiled',
}
EPS, STEP_SIZE, WORKERS, ROUNDS, N = 8 / 255, 2 / 255, 2, 5, 10_000
attack = dict(eps=EPS, step_size=STEP_SIZE)

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
# one line, without the usage
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
models.add_args(parser)
g = parser.add_argument_group('benchmark')
g.add_argument('--batch-size', type=int, default=128)
g.add_argument('--steps', type=int, default=10, help='of the attack; evaluation takes twice as many')
g.add_argument('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'], help='of fast')
g.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of a CPU')
g.add_argument('--seconds', type=float, default=30, help='per row, over all rounds; whole steps, so at least')
g.add_argument('--tricks', action='store_true', help='each alone, each left out of fast, and those not in it')
g.add_argument('--json', metavar='FILE', help='the table, every round of it')
parser.set_defaults(init='uniform')
method = losses.add_args(parser)
args, hp = losses.parse_args(parser, method)
foreign = sorted(losses.inputs(method) - {'y', 'logits', 'logits_adv', 't_logits'})
for wrong, message in [
        (method.inner is None, f'--loss {args.loss} attacks nothing'),
        (foreign, f'--loss {args.loss} also needs {" ".join(foreign)}: not measured here'),
        (method.settings.get('dual_bn'), f'--loss {args.loss} has a second BN: not measured here'),
        (args.targets or args.recipe == 'paper', '--targets and --recipe: not measured here'),
        (not 2 <= args.batch_size <= N, f'--batch-size {args.batch_size}: from 2 to {N}'),
        (min(args.steps, args.threads) < 1, '--steps and --threads: at least 1'),
        (not 0 < args.seconds < 1e6, f'--seconds {args.seconds}: more than 0')]:
    if wrong:
        parser.error(message)
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
cuda = device.type == 'cuda'
mean, std = ([0.5] * 3, [0.25] * 3) if args.normalize else (None, None)
options = dict(width=args.width, activation=args.activation, mean=mean, std=std)
try:
    dtype = models.amp_dtype(args.amp, device)
    with torch.device('meta'):
        models.build(args.model, 10, **options)
    if args.json:                       # proves now that it can be written
        with atomic(args.json) as tmp, open(tmp, 'w'):
            pass
except (ValueError, OSError) as e:
    parser.error(e)
torch.backends.cudnn.benchmark = True
torch._dynamo.config.recompile_limit = 256                      # every row has its own networks
torch.set_num_threads(args.threads)
FAST = {'loader', 'once', 'frozen', 'compile attack', 'compile update'} | ({'amp'} if dtype else set())
FAST |= {'channels_last'} if models.layout(device) is torch.channels_last else set()

# -----------------------------------------------------------------------------
# images: one by one in worker processes, or a batch at a time on the device
generator = torch.Generator().manual_seed(0)
images = torch.randint(256, (N, 32, 32, 3), generator=generator, dtype=torch.uint8)
labels = torch.randint(10, (N,), generator=generator)

class Images(torch.utils.data.Dataset):
    augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                  transforms.ToTensor()])
    def __len__(self):
        return N
    def __getitem__(self, i):
        return self.augment(Image.fromarray(images[i].numpy())), int(labels[i])

def from_workers():
    loader = torch.utils.data.DataLoader(Images(), args.batch_size, shuffle=True, drop_last=True,
                                         num_workers=WORKERS, persistent_workers=True, pin_memory=cuda)
    while True:
        yield from ((x.to(device), y.to(device)) for x, y in loader)

def from_device():
    x, y, g = images.to(device), labels.to(device), torch.Generator(device).manual_seed(0)
    while True:
        yield from data.batches(x, y, args.batch_size, True, g)

# -----------------------------------------------------------------------------
# the step, twice. Each returns its network, craft(x, y) -> x_adv and update(x, y) -> loss

layout = lambda on: torch.channels_last if 'channels_last' in on else torch.contiguous_format

def networks(on=()):
    """Student, teacher and optimiser, the same weights for all."""
    torch.manual_seed(0)
    build = lambda: models.build(args.model, 10, **options).to(device, memory_format=layout(on))
    net, teacher = build(), build()
    return net, teacher.eval().requires_grad_(False), torch.optim.SGD(
        net.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused='fused' in on or None)

def values(names, net, teacher, x, x_adv, y):
    forward = dict(y=lambda: y, logits=lambda: net(x), logits_adv=lambda: net(x_adv),
                   t_logits=lambda: torch.no_grad()(teacher)(x))
    return {k: forward[k]() for k in names}

def plain():
    """As the code of TRADES and its descendants: fp32, contiguous, eager, the attack written out, and the
    clean logits again in each of its steps, with a graph that nobody uses."""
    model, teacher, optimizer = networks()
    def craft(x, y):
        model.eval()
        x_adv = start(x, eps=EPS, init=args.init, norm='Linf')
        for _ in range(args.steps):
            x_adv.requires_grad_()
            loss = method.inner(**values(needs(method.inner), model, teacher, x, x_adv, y)).sum()
            grad = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + STEP_SIZE * torch.sign(grad)
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        model.train()
        return x_adv
    def update(x, y):
        x_adv = craft(x, y)
        optimizer.zero_grad()
        loss = method.loss(**values(needs(method.loss), model, teacher, x, x_adv, y), **hp).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return model, craft, update

def ours(on):
    """The step of train_adv.py with the tricks in on and no other; with none of them it is plain's."""
    net, teacher, optimizer = networks(on)
    attacked = models.folded(net) if 'folded' in on else net
    fast = functools.partial(torch.compile, dynamic=False, mode='reduce-overhead' if 'graphs' in on else None)
    def logits_of(net):
        def forward(x):
            with torch.autocast(device.type, dtype, enabled='amp' in on):
                out = net(x).float()
            return out.clone() if 'graphs' in on else out       # the next replay overwrites it
        return forward
    in_attack = logits_of(fast(attacked) if 'compile attack' in on else attacked)
    in_update, guide = [logits_of(fast(m) if 'compile update' in on else m) for m in (net, teacher)]
    def craft(x, y):
        if 'folded' in on:
            attacked.load_state_dict(models.folded(net).state_dict())
        net.eval()
        live = [k for k in needs(method.inner) if k == 'logits_adv' or 'once' not in on]
        with attack_mode(net) if 'frozen' in on else contextlib.nullcontext():
            with torch.no_grad():
                fixed = values(set(needs(method.inner)) - set(live), in_attack, guide, x, None, y)
            x_adv = pgd(lambda x_adv: method.inner(**fixed, **values(live, in_attack, guide, x, x_adv, y)),
                        x, **attack, steps=args.steps, init=args.init)
        net.train()
        return x_adv
    def update(x, y):
        x = x.contiguous(memory_format=layout(on))
        x_adv = craft(x, y)
        loss = method.loss(**values(needs(method.loss), in_update, guide, x, x_adv, y), **hp).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return net, craft, update

def evaluation(on):
    """PGD as evaluate.py has it: fp32, no TF32."""
    net = networks(on)[0].eval()
    fast = torch.compile(net, dynamic=False) if 'compile attack' in on else net
    def work(x, y):
        x = x.contiguous(memory_format=layout(on))
        with attack_mode(net) if 'frozen' in on else contextlib.nullcontext():
            pgd(lambda x_adv: losses.ce(fast(x_adv), y), x, **attack, steps=2 * args.steps)
    return work

# -----------------------------------------------------------------------------
# the rows, and their turns

class Row(NamedTuple):
    work: Callable              # of x, y
    on: set
    flops: float                # per image
    against: str | None = 'plain'       # the row that it is compared with

def flops(work):
    """Per image, of two, since BN in train mode needs more than one."""
    counter = FlopCounterMode(display=False)        # whose per-module account stumbles over autograd.grad
    counter.mod_tracker._fw_pre_hook = counter.mod_tracker._fw_post_hook = lambda *_: None
    with counter:
        work(data.to_float(images[:2].to(device)), labels[:2].to(device))
    return counter.get_total_flops() / 2

def product(precision):
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device).to(precision)
    return Row(lambda x, y: [a @ a for _ in range(10)], {'loader', *['amp'] * (precision is dtype)},
               20 * n ** 3 / args.batch_size, None)

cost = {once: flops(ours({'once'} if once else set())[2]) for once in (False, True)}
rows = {f'product, {p}': product(p) for p in {torch.float32, dtype or torch.float32}}
rows |= {'evaluation, product': product(torch.float32)} if cuda else {}         # without TF32
rows['plain'] = Row(plain()[2], set(), cost[False])
sets = {'fast': FAST}
if args.tricks:
    usable = [t for t in TRICKS if (cuda or t != 'graphs') and (dtype or t != 'amp')
              and (t != 'folded' or not re.match('wrn|preact', args.model))
              and (t != 'channels_last' or cuda or (args.width or 64) >= 8)]    # below, oneDNN crashes
    sets |= {'no trick': set()} | {f'plain + {t}': {t} for t in usable if t != 'graphs'}
    sets |= {f'fast {"-" if t in FAST else "+"} {t}': FAST ^ {t} for t in usable}
rows |= {name: Row(ours(on)[2], on, cost['once' in on]) for name, on in sets.items()}
cost = flops(evaluation(set()))
exact = FAST - {'amp', 'channels_last'}         # as evaluate.py
sets = {'plain': set(), 'eager': exact - {'compile attack'}, 'compiled': exact}
rows |= {f'evaluation, {name}': Row(evaluation(on), on, cost, 'evaluation, plain')
         for name, on in sets.items()}

workers, on_device = from_workers(), from_device()

def turn(name, seconds):
    """Images per second, over whole steps."""
    row = rows[name]
    if cuda:                                        # training as torch has it by default, or better
        torch.backends.cudnn.allow_tf32 = 'evaluation' not in name
        torch.set_float32_matmul_precision('highest' if 'evaluation' in name else 'high')
    batches = on_device if 'loader' in row.on else workers
    for _ in range(2 * WORKERS if batches is workers else 0):
        next(batches)                               # made ready while others had their turn
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    t0, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - t0 < seconds:
        row.work(*next(batches))
        n += args.batch_size
    wait()
    return n / (time.perf_counter() - t0)

config = dict(vars(args), fast=sorted(FAST), **environment(device))
print(json.dumps(config), flush=True)
rates, memory = {name: [] for name in rows}, {}
for name in tqdm(rows, desc='compiling', leave=False, disable=None):
    for _ in range(3 if cuda else 1):               # CUDA graphs: warm-up, recording, replay
        turn(name, 0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        turn(name, 0)
        memory[name] = dict(peak_mib=torch.cuda.max_memory_allocated() / 2 ** 20)
for r in tqdm(range(ROUNDS), leave=False, disable=None):
    for name in list(rows)[::1 if r % 2 else -1]:
        rates[name].append(turn(name, args.seconds / ROUNDS))

# -----------------------------------------------------------------------------
# the table
def ratio(name, other):
    return statistics.median(a / b for a, b in zip(rates[name], rates[other]))

table = {}
print(f'{"":<28}{"images/s":>10}{"ratio":>8}{"MFLOP/image":>13}{"GFLOP/s":>10}{"of peak":>9}')
for name, row in rows.items():
    rate, peak = statistics.median(rates[name]), f'product, {dtype if "amp" in row.on else torch.float32}'
    peak = 'evaluation, product' if cuda and 'evaluation' in name else peak
    r = table[name] = dict(
        tricks=sorted(row.on), images_per_s=rate, ratio=ratio(name, row.against or name), rounds=rates[name],
        mflop_per_image=row.flops / 1e6, gflop_per_s=rate * row.flops / 1e9,
        share_of_peak=ratio(name, peak) * row.flops / rows[peak].flops, **memory.get(name, {}))
    shown = (f"{rate:10.1f}{r['ratio']:8.2f}{r['mflop_per_image']:13.1f}" if row.against else ' ' * 31)
    print(f"{name:<28}{shown}{r['gflop_per_s']:10.1f}{r['share_of_peak']:9.2f}")
report = dict(config, ratio=table['fast']['ratio'], evaluation_ratio=table['evaluation, compiled']['ratio'],
              peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rows=table)
print(f"fast is {report['ratio']:.2f} times plain, evaluation {report['evaluation_ratio']:.2f} times; "
      f"{report['peak_rss_mib']:.0f} MiB of memory, all rows in one process")
if args.json:
    with atomic(args.json) as tmp, open(tmp, 'w') as f:
        json.dump(report, f, indent=1)

"""
What both training scripts share: the flags of a run, its optimiser and schedule, the state that it resumes
from, one line for whatever goes wrong, and several processes, started by torchrun.

    rank, world, device = ranks()               # 0, 1 and the GPU or the CPU, unless torchrun says otherwise
    with guarded(args, now) as stop:                # signals and errors
        ... if stop.asked: save_state(...)
"""
import argparse, contextlib, errno, math, os, shlex, signal, sys, time

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from support.checkpoint import read
from support.files import Refused, save
from models import amp_dtype

def add_args(parser):
    g = parser.add_argument_group('training')
    g.add_argument('--epochs', type=int, default=100)
    g.add_argument('--batch-size', type=int, default=128, help='of all processes together')
    g.add_argument('--lr', type=float, default=0.2, help='maximum of the schedule')
    g.add_argument('--schedule', default='onecycle', choices=['onecycle', 'step'])
    g.add_argument('--milestones', type=float, nargs='+', default=[0.5, 0.75], metavar='SHARE',
                   help='of --schedule step: lr / 10 after each of these shares of the training')
    g.add_argument('--nesterov', action=argparse.BooleanOptionalAction, default=True)
    g.add_argument('--weight-decay', type=float, default=5e-4)
    g.add_argument('--seed', type=int, default=0)
    g = parser.add_argument_group('speed and survival')
    g.add_argument('--amp', default='auto', choices=['auto', 'bf16', 'fp16', 'off'],
                   help='autocast; auto: bf16 where native')
    g.add_argument('--compile', action='store_true', help='faster after a minute; a CPU needs a C++ compiler')
    g.add_argument('--accumulate', type=int, default=1, metavar='K',
                   help='a batch in K parts, one after the other: less memory, BN statistics of a part')
    g.add_argument('--sync-bn', action='store_true',
                   help="BN statistics of the whole batch, under torchrun (default: each process's own)")
    g.add_argument('--resume', action='store_true', help='continue the run in --out where it was stopped')
    g.add_argument('--save-minutes', type=float, default=10,
                   help='a state to resume from at least this often, and after every epoch')
    g.add_argument('--out', metavar='DIR', help='default: runs/DATASET-MODEL-...')

def check(args, world, images=None):
    """Raises Refused for what no training can do. images: how many there are, once that is known."""
    for low, flags in ((0, ('lr', 'weight_decay', 'save_minutes')), (1, ('epochs', 'accumulate')),
                       (2, ('batch_size',))):
        for flag in flags:
            if not low <= getattr(args, flag) < float('inf'):
                raise Refused(f'--{flag.replace("_", "-")} {getattr(args, flag)}: '
                                 f'a number, at least {low}')
    if not all(0 < m < 1 for m in args.milestones):
        raise Refused('--milestones: shares of the training, from 0 to 1')
    if args.compile and not torch.cuda.is_available() and (args.width or 64) < 8:
        raise Refused(f'--compile --width {args.width}: on a CPU oneDNN crashes on fewer than 8 channels')
    if images == 0:
        raise Refused('there are no training images')
    parts = world * args.accumulate
    if images and parts > 1 and images < args.batch_size:
        raise Refused(f'--batch-size {args.batch_size}: there are {images} training images to share')
    if args.batch_size % parts or args.batch_size < 2 * parts:
        raise Refused(f'--batch-size {args.batch_size} in {world} processes times {args.accumulate} '
                         f'parts: a multiple of {parts}, and at least two images in each')

def precision(amp, device):
    """-> dtype of the autocast, None for fp32, which is then no TF32 either. Raises Refused."""
    dtype = amp_dtype(amp, device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype is not None
    torch.set_float32_matmul_precision('high' if dtype else 'highest')
    return dtype

def optimizer_and_schedule(parameters, args, total_steps):
    """SGD, and the scheduler to step after each of its total_steps."""
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, nesterov=args.nesterov,
                                weight_decay=args.weight_decay)
    if args.schedule == 'step':
        drops = [round(m * total_steps) for m in args.milestones]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.1 ** sum(step >= drop for drop in drops))
    # the paper states momentum 0.9: not cycled. 25 % of warm-up as in HAT's code, which the settings
    # resemble. Of four or fewer steps OneCycleLR divides by zero
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=max(5, total_steps), pct_start=0.25, cycle_momentum=False)

def peak_gib(device):
    """The most memory held so far: of the GPU, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                     # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == 'darwin' else 20)

# -----------------------------------------------------------------------------
# stop and continue. now: a namespace of what changes while training; parts: name -> module, optimizer,
# scheduler or scaler (or None), which hold the rest

NOT_THE_RUN = ('out', 'data_dir', 'resume', 'save_minutes')         # may differ when it goes on

def save_state(folder, run, now, parts):
    """Everything the next step depends on, to folder/state.pt; run: the flags. Called by every process: each
    has a namespace and noise of its own."""
    mine = dict(vars(now), noise=torch.get_rng_state(),
                cuda_noise=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)
    mine = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in mine.items()}
    mine['losses'] = [loss.item() for loss in now.losses]
    # without --sync-bn each process has BN statistics of its own until the end of the epoch
    modules = {k: part for k, part in parts.items() if isinstance(part, torch.nn.Module)}
    mine['buffers'] = {k: [b.cpu() for b in module.buffers()] for k, module in modules.items()}
    sound = all(map(math.isfinite, mine['losses'])) and all(
        bool(p.isfinite().all()) for module in modules.values() for p in module.parameters())
    broken, = anywhere(not sound)
    if broken:                              # the state before this one is still good
        raise FloatingPointError(f'non-finite loss or weights in epoch {now.epoch}, up to batch {now.batch}')
    everyones = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyones, mine)
    if is_first():
        save(f'{folder}/state.pt', dict(now=everyones, run=run,
                                        parts={k: part.state_dict() for k, part in parts.items() if part}))
    now.saved = time.perf_counter()

def load_state(folder, run, now, parts):
    """The reverse, if there is a state. Raises Refused if it is that of other flags or of another number
    of processes."""
    path = f'{folder}/state.pt'
    here = os.path.exists(path)
    somewhere, = anywhere(here)
    if somewhere and not here:
        raise Refused(f'--resume: {path} is not on this machine: --out has to be on a disk that all see')
    if not here:
        return
    state = read(path)
    for k in sorted(state['run'].keys() | run.keys()):
        if k not in NOT_THE_RUN and state['run'].get(k) != run.get(k):
            raise Refused(f'--resume: {folder} was started with {k.replace("_", "-")} '
                             f'{state["run"].get(k)}, not {run.get(k)}')
    if len(state['now']) != world_size():
        raise Refused(f'--resume: {folder} was started with {len(state["now"])} processes, '
                         f'not {world_size()}')
    for k, part in parts.items():
        if part:
            part.load_state_dict(state['parts'][k])
    mine = state['now'][dist.get_rank() if world_size() > 1 else 0]
    torch.set_rng_state(mine.pop('noise'))
    cuda_noise = mine.pop('cuda_noise')
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_noise)
    mine['losses'] = [torch.tensor(loss) for loss in mine['losses']]
    for k, buffers in mine.pop('buffers').items():
        for buffer, value in zip(parts[k].buffers(), buffers):
            buffer.copy_(value)
    vars(now).update({k: v.to(getattr(now, k).device) if isinstance(v, torch.Tensor) else v
                      for k, v in mine.items()}, saved=time.perf_counter())

def anywhere(*flags):
    """Each of the flags, if it is raised in any process: they act in the same step."""
    if world_size() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.float32)       # on the CPU: no wait for a GPU
    dist.all_reduce(raised)
    return raised.bool().tolist()

def finished(folder):
    """Nothing to resume."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f'{folder}/state.pt')

class Stop:
    """asked: by SIGTERM, as a cluster sends it, or by a first Ctrl-C. The second Ctrl-C does not wait."""
    asked = False
    def __call__(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

@contextlib.contextmanager
def guarded(args, now):
    """The training loop, with signals to stop it and one line for what ends it early."""
    stop = Stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except OSError as e:
        unwritten = e.strerror and e.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
        what = f'cannot write {args.out}: {e.strerror}' if unwritten else e
        sys.exit(f'{what}. Stopped in epoch {now.epoch}; '
                 'what was saved before is intact, and --resume continues')
    except FloatingPointError as e:
        sys.exit(f'{e}. Stopped; {args.out} holds the epochs before. Try a lower --lr, or --amp off')
    except KeyboardInterrupt:
        sys.exit(f'\nstopped in epoch {now.epoch}; {args.out} holds what was saved, --resume continues')
    except RuntimeError as e:
        if 'DataLoader worker' in str(e):
            sys.exit(f'{e}. A process that decodes images has died: too little memory, or shared memory '
                     f'(/dev/shm; docker run --shm-size)? Stopped in epoch {now.epoch}; --resume continues')
        if 'out of memory' not in str(e).lower() and "can't allocate memory" not in str(e):
            raise
        sys.exit(f'out of memory with --batch-size {args.batch_size}: try {args.batch_size // 2}, '
                 f'or --accumulate {2 * args.accumulate}')
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

def pause(args, run, now, parts, stop, begun):
    """After a step: save a state if it is time to, or if the run is to stop, which ends here. begun: when
    this epoch did. Returns the seconds that it took."""
    now.saved = getattr(now, 'saved', begun)
    saving = time.perf_counter()
    leaving, due = anywhere(stop.asked, saving - now.saved > 60 * args.save_minutes)
    if not leaving and not due:
        return 0.0
    trained = now.seconds
    now.seconds += saving - begun               # in the state; here the epoch adds its own
    save_state(args.out, run, now, parts)
    now.seconds = trained
    if leaving:
        leave(args, now)
    return time.perf_counter() - saving

def leave(args, now):
    """After save_state: out, with the command that continues."""
    if not is_first():
        sys.exit(1)
    launcher = f'torchrun --nproc-per-node {os.environ["LOCAL_WORLD_SIZE"]}' if world_size() > 1 else 'python'
    command = shlex.join([sys.argv[0], *sys.argv[1:], *['--resume'] * (not args.resume)])
    sys.exit(f'\nstopped in epoch {now.epoch}, batch {now.batch}. Continue with: {launcher} {command}')

# -----------------------------------------------------------------------------
# several processes: torchrun --nproc-per-node 2 train_adv.py ... Each takes its share of every batch.
# Gradients are averaged by hand: the loss has two forwards, AWP differentiates as well, and their 45 MB take
# a millisecond

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0

def ranks():
    """-> rank, number of processes, device. All but the first print nothing."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0))) if torch.cuda.is_available() else \
        torch.device('cpu')
    if device.type == 'cuda':
        if device.index >= torch.cuda.device_count():
            sys.exit(f'{os.environ["LOCAL_WORLD_SIZE"]} processes, {torch.cuda.device_count()} GPUs: each '
                     'process needs one of its own')
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')
    return rank, world, device

@torch.no_grad()
def average(tensors):
    """Their mean over the processes, in place and in one message."""
    if world_size() > 1:
        tensors = [t for t in tensors if t.is_floating_point()]
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / world_size()).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))

class SyncBatchNorm2d(torch.nn.BatchNorm2d):
    """BN that normalises, in training, with mean and variance of all processes. (torch's own wants a GPU.)"""
    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        f = x.float()                                   # also under autocast, as torch's
        mean = all_reduce(f.mean((0, 2, 3))) / world_size()
        var = all_reduce((f - mean[:, None, None]).square().mean((0, 2, 3))) / world_size()
        if self.track_running_stats:
            n = x.numel() / x.shape[1] * world_size()
            with torch.no_grad():
                self.num_batches_tracked += 1           # no momentum: the mean of all batches, for --swa
                momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * n / (n - 1), momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (f * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)

def sync_bn(net):
    """Every BN of net becomes a SyncBatchNorm2d; keys and weights stay."""
    for module in net.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d

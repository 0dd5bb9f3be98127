"""
One training step, written twice: plainly, as public code has it, and with each trick by itself. For
tools/bench.py, which times them, and for the tests, which compare them.

    setting = Setting(METHODS['trades'], dict(beta=6.0), device=torch.device('cpu'))
    net, craft, update = plain(setting)
    net, craft, update = ours(setting, Tricks(once=True, frozen=True))          # craft(x, y) -> x_adv
    loss = update(x, y)                                                         # crafts, and moves net
"""
import contextlib
import time
from typing import NamedTuple

import torch
from PIL import Image
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import data
import losses
import models
from attacks import attack_mode, pgd, start
from losses import needs
from support import speed

EPS, STEP_SIZE, WORKERS, N = 8 / 255, 2 / 255, 2, 10_000

class Tricks(NamedTuple):
    """What a step may do to be faster."""
    loader: bool = False            # batches cut, cropped and flipped on the device
    once: bool = False              # clean logits once per attack
    frozen: bool = False            # parameters frozen in the attack
    compile_attack: bool = False    # the network, in the attack
    compile_update: bool = False    # network and teacher, in the update
    amp: bool = False               # bf16 or fp16, of the setting; without GradScaler
    channels_last: bool = False     # images and weights
    folded: bool = False            # BN in the convolutions, in the attack; folded anew before every attack
    fused: bool = False             # optimiser in one kernel
    graphs: bool = False            # CUDA graphs of what is compiled

class Setting(NamedTuple):
    """What all the steps to be compared have in common."""
    method: losses.Method
    hp: dict                        # hyper-parameters of its loss
    device: torch.device
    dtype: torch.dtype | None = None        # of amp; None: fp32
    steps: int = 10                 # of the attack
    network: dict = dict(name='resnet18')   # arguments of models.build

    @property
    def init(self):
        return self.method.settings.get('init', 'uniform')

def of_train_adv(s):
    """What train_adv.py --compile does."""
    with torch.device('meta'):
        net = models.build(num_classes=10, **s.network)
    return Tricks(loader=True, once=True, frozen=True, compile_attack=True, compile_update=True,
                  amp=s.dtype is not None, channels_last=speed.layout(s.device) is torch.channels_last,
                  folded=speed.folding_pays(net, s.dtype, s.device))

def layout(tricks):
    return torch.channels_last if tricks.channels_last else torch.contiguous_format

def networks(s, tricks=Tricks()):
    """Student, frozen teacher and optimiser, the same weights for all."""
    torch.manual_seed(0)
    net, teacher = [models.build(num_classes=10, **s.network).to(s.device, memory_format=layout(tricks))
                    for _ in range(2)]
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4,
                                fused=tricks.fused or None)
    return net, teacher.eval().requires_grad_(False), optimizer

def inputs(names, net, teacher, x, x_adv, y):
    """What a loss or an objective asks for, by name."""
    out = {}
    if 'y' in names:
        out['y'] = y
    if 'logits' in names:
        out['logits'] = net(x)
    if 'logits_adv' in names:
        out['logits_adv'] = net(x_adv)
    if 't_logits' in names:
        with torch.no_grad():
            out['t_logits'] = teacher(x)
    return out

def plain(s):
    """As the code of TRADES and its descendants: fp32, contiguous, eager, the attack written out, and the
    clean logits again in each of its steps, with a graph that nobody uses."""
    net, teacher, optimizer = networks(s)

    def craft(x, y):
        net.eval()
        x_adv = start(x, eps=EPS, init=s.init, norm='Linf')
        for _ in range(s.steps):
            x_adv.requires_grad_()
            objective = s.method.inner(**inputs(needs(s.method.inner), net, teacher, x, x_adv, y)).sum()
            grad, = torch.autograd.grad(objective, [x_adv])
            x_adv = x_adv.detach() + STEP_SIZE * torch.sign(grad)
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        net.train()
        return x_adv

    def update(x, y):
        x_adv = craft(x, y)
        optimizer.zero_grad()
        loss = s.method.loss(**inputs(needs(s.method.loss), net, teacher, x, x_adv, y), **s.hp).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return net, craft, update

def authors(s, path):
    """trades_loss of the TRADES repository's trades.py, in the loop of its train_trades_cifar10.py. It asks
    for a GPU in two places, which it is spared where there is none."""
    with open(path) as f:
        code = f.read()
    if s.device.type == 'cpu':
        code = code.replace('.cuda()', '')
    module = {}
    exec(compile(code, path, 'exec'), module)
    net, _, optimizer = networks(s)
    net.train()

    def update(x, y):
        optimizer.zero_grad()
        loss = module['trades_loss'](model=net, x_natural=x, y=y, optimizer=optimizer, step_size=STEP_SIZE,
                                  epsilon=EPS, perturb_steps=s.steps, beta=s.hp.get('beta', 6.0))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return net, None, update

def ours(s, tricks):
    """The step of train_adv.py with these tricks and no other; with none of them it is plain's."""
    net, teacher, optimizer = networks(s, tricks)
    attacked = speed.folded(net) if tricks.folded else net
    once = [name for name in needs(s.method.inner) if tricks.once and name != 'logits_adv']
    every_step = [name for name in needs(s.method.inner) if name not in once]

    def logits_of(network, compiled):
        if compiled:
            mode = 'reduce-overhead' if tricks.graphs else None
            network = torch.compile(network, dynamic=False, mode=mode)
        def forward(x):
            with torch.autocast(s.device.type, s.dtype, enabled=tricks.amp):
                logits = network(x).float()
            return logits.clone() if tricks.graphs else logits      # the next replay overwrites them
        return forward

    in_attack = logits_of(attacked, tricks.compile_attack)
    in_update = logits_of(net, tricks.compile_update)
    teach = logits_of(teacher, tricks.compile_update)

    def craft(x, y):
        if tricks.folded:
            attacked.load_state_dict(speed.folded(net).state_dict())
        net.eval()
        with attack_mode(net) if tricks.frozen else contextlib.nullcontext():
            with torch.no_grad():
                fixed = inputs(once, in_attack, teach, x, None, y)
            def objective(x_adv):
                return s.method.inner(**fixed, **inputs(every_step, in_attack, teach, x, x_adv, y))
            x_adv = pgd(objective, x, eps=EPS, step_size=STEP_SIZE, steps=s.steps, init=s.init)
        net.train()
        return x_adv

    def update(x, y):
        if tricks.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        x = x.contiguous(memory_format=layout(tricks))
        x_adv = craft(x, y)
        loss = s.method.loss(**inputs(needs(s.method.loss), in_update, teach, x, x_adv, y), **s.hp).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return net, craft, update

def evaluation(s, tricks):
    """PGD as evaluate.py has it, of twice the steps: fp32, no TF32."""
    net = networks(s, tricks)[0].eval()
    search = torch.compile(net, dynamic=False) if tricks.compile_attack else net

    def work(x, y):
        with attack_mode(net) if tricks.frozen else contextlib.nullcontext():
            return pgd(lambda x_adv: losses.ce(search(x_adv), y), x, eps=EPS, step_size=STEP_SIZE,
                       steps=2 * s.steps)

    return work

def flops(s):
    """Per image, of an evaluation, of a step that computes its clean logits once, and of one that computes
    them again in every step of its attack. A gradient of the images costs as much as the forward, one of the
    weights as much again; of the first layer it counts the one too many that the update has no use for."""
    net, counter = networks(s)[0].eval(), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(torch.zeros(2, 3, 32, 32, device=s.device))
    forward = counter.get_total_flops() / 2
    clean = len({'logits', 't_logits'} & set(needs(s.method.inner)))
    names = needs(s.method.loss)
    students = ('logits' in names) + ('logits_adv' in names)
    update = forward * (3 * students + ('t_logits' in names))
    attack = 2 * s.steps * forward
    return dict(evaluation=2 * attack, once=attack + clean * forward + update,
                again=attack + clean * s.steps * forward + update)

def profile(work, batch, device):
    """-> seconds of every kind of operation in one call of work, on the device; of the call; and how many
    kernels it launched there (on a CPU: how many operations)."""
    cuda = device.type == 'cuda'
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        t0 = time.perf_counter()
        work(*batch)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - t0
    kinds, launches = {}, 0
    for event in profiler.key_averages():
        if event.is_user_annotation:        # a name for a stretch of time; its kernels are counted themselves
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total         # microseconds
        if event.device_type.name.lower() == device.type and spent > 0:
            kinds[event.key] = kinds.get(event.key, 0) + spent / 1e6
            launches += event.count
    return kinds, seconds, launches

# -----------------------------------------------------------------------------
# random images of CIFAR's size: one by one in worker processes, or a batch at a time on the device
images = torch.randint(256, (N, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
labels = torch.randint(10, (N,), generator=torch.Generator().manual_seed(1))

class Images(torch.utils.data.Dataset):
    augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                  transforms.ToTensor()])
    def __len__(self):
        return N
    def __getitem__(self, i):
        return self.augment(Image.fromarray(images[i].numpy())), int(labels[i])

def from_workers(batch_size, device):
    loader = torch.utils.data.DataLoader(Images(), batch_size, shuffle=True, drop_last=True,
                                         num_workers=WORKERS, persistent_workers=True,
                                         pin_memory=device.type == 'cuda')
    while True:
        for x, y in loader:
            yield x.to(device), y.to(device)

def from_device(batch_size, device):
    x, y, generator = images.to(device), labels.to(device), torch.Generator(device).manual_seed(0)
    while True:
        order = torch.randperm(N, generator=generator, device=device)
        for i in order[:N // batch_size * batch_size].split(batch_size):
            yield data.to_float(data.augmented(x[i], 'crop+flip', generator)), y[i]

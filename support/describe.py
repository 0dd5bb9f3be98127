"""
What a run is called and how it is shown: its folder's name, the summary, the table's columns, the curves.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import math
import os
import platform
import shlex
import sys

import torch

from losses import METHODS
from support import autoattack
from support.files import Refused, say

# may differ when a run is continued: where it lies and how it is watched, and the versions and names
# of the machine
NOT_THE_RUN = {'out', 'data_dir', 'resume', 'save_minutes', 'dry_run', 'device', 'torch', 'torchvision',
               'numpy', 'python', 'autoattack', 'pyautoattack'}

def name(args, defaults, hp=None):
    """runs/..., with every flag in it that is not at its default; defaults: a function of the flag. hp: of a
    training with --loss, its hyper-parameters, which stand there in any case."""
    shown = {'loss', 'dataset', 'model', 'width', 'subset', 'seed', *(hp or ()), *NOT_THE_RUN}
    tags = [args.dataset, os.path.basename(args.model).replace('.py:', '-')]
    if args.width:
        tags.append(f'w{args.width}')
    if args.subset:
        tags.append(f'n{args.subset}')
    if hp is not None:
        tags.append(args.loss)
        for flag, value in hp.items():
            if value:
                tags.append(flag + (value if isinstance(value, str) else f'{value:.4g}'))
    for flag, value in vars(args).items():
        if flag in shown or value == defaults(flag):
            continue
        if value is True or value is False:
            tags.append(flag if value else f'no_{flag}')
        elif isinstance(value, str):                # of a path its last two parts
            tags.append(flag + '-'.join(value.split(os.sep)[-2:]))
        elif isinstance(value, list):
            tags.append(flag + '-'.join(map(str, value)))
        else:
            tags.append(f'{flag}{value:.6g}')
    text = '-'.join(tags).replace('/', '-').replace(' ', '_')
    if len(text) > 180:                             # a file system has 255
        text = f'{text[:160]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'
    return f'runs/{text}' if args.seed is None else f'runs/{text}-s{args.seed}'

def teacher_folder(args, defaults, only=None):
    """Where train_teacher.py with these flags puts its run: a student looks there. only: the flags
    that count."""
    if only:
        args = argparse.Namespace(dataset=args.dataset, model=args.model, width=args.width,
                                  subset=args.subset,
                                  **{flag: getattr(args, flag) or None for flag in only})
    text = name(argparse.Namespace(**dict(vars(args), seed=None)),
                lambda flag: None if flag == 'seed' else defaults(flag))
    seed = vars(args).get('seed', 0)
    return f'{text}-teacher' + (f'-s{seed}' if seed else '')

def as_flag(name, value):
    """A hyper-parameter as it is typed."""
    if isinstance(value, bool):
        return f'--{name}' if value else f'--no-{name}'
    return f'--{name} {value:.4g}' if isinstance(value, float) else f'--{name} {value}'

def flag_of(default):
    """argparse's arguments for a hyper-parameter: a switch, a number, or a word, as its default is. Raises
    Refused for another default."""
    if not isinstance(default, (bool, int, float, str)):
        raise Refused(f'a hyper-parameter has the default {default!r}, and needs a number, True, False or a '
                      'word: --help and the command line are made of it')
    if isinstance(default, bool):
        return dict(action=argparse.BooleanOptionalAction, default=default)
    kind = {int: number, float: float}.get(type(default), str)
    return dict(type=kind, default=default)

def number(text):
    """A whole number, or a fraction."""
    return int(text) if text.lstrip('+-').isdecimal() else float(text)

def same_command(*more):
    """The command line that is being run, and more, to be pasted."""
    spec = sys.modules['__main__'].__spec__
    script = ['-m', spec.name] if spec else [sys.argv[0]]
    return shlex.join(['python', *script, *sys.argv[1:], *more])

def environment(device):
    """Versions and hardware: what a number depends on and a command line does not say."""
    cuda = device.type == 'cuda'
    versions = {name: importlib.metadata.version(name) for name in ('torchvision', 'numpy')}
    with contextlib.suppress(ImportError):                  # training does not need it
        package, version = autoattack.package()
        versions[package] = version
    return dict(versions, torch=str(torch.__version__), device_type=device.type,
                python=platform.python_version(), tf32=cuda and torch.backends.cudnn.allow_tf32,
                device=torch.cuda.get_device_name(device) if cuda else
                f'CPU, {torch.get_num_threads()} threads')

def peak_gib(device):
    """The most memory held so far: of the GPU, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                     # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == 'darwin' else 20)

def attack(config):
    """The attack of the training, in words."""
    if METHODS[config['loss']].inner is None:
        return 'no attack'
    text = f'eps {config["eps"]:g}/255 = {config["eps"] / 255:.5f} in {config["norm"]}; '
    if config['free']:
        return text + f'free, {config["free"]} updates per batch'
    return text + f'PGD-{config["steps"]}, step {config["step_size"]:g}/255, from {config["init"]}'

def summary(config, net, notes=()):
    """The first thing on the screen: what will be trained, in five lines."""
    if config.get('extra'):
        labels = "the teacher's" if config['pseudo_labels'] else 'not needed'
        notes = [*notes, f'{config["extra_fraction"]:.0%} of every batch from {config["extra"]}; '
                 f'their labels: {labels}']
    hparams = ''.join(f' {as_flag(flag, value)}' for flag, value in config.get('hparams', {}).items())
    say(f'{config["loss"]}{hparams}; {attack(config)}',
        f'data: {config["dataset"]}, {config["train_images"]} training images, '
        f'augmentation {config["augment"]}; {config["val_images"]} more held out for selection; '
        f'{config["classes"]} classes',
        f'model: {config["model"]}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} million weights'
        + (f', width {config["width"]}' if config['width'] else ''),
        f'optimiser: SGD, lr {config["lr"]:g}, {config["schedule"]}, '
        f'weight decay {config["weight_decay"]:g}; '
        f'{config["epochs"]} epochs of batches of {config["batch_size"]}, seed {config["seed"]}',
        f'{config["precision"].replace("torch.", "")} on {config["device"]}'
        + (', compiled: the first step takes a minute' if config['compile'] else '')
        + f'; folder {config["out"]}',
        *[note for note in notes if note])

# the table's columns: how each is shown, and what it is
COLUMNS = {
    'epoch': ('d', 'of --epochs'),
    'lr': ('.4f', 'learning rate at its end'),
    'loss': ('.4f', 'mean training loss'),
    'val_clean': ('.2f', 'accuracy on the held-out training images, %'),
    'val_pgd20': ('.2f', 'the same under PGD-20'),
    'img_per_s': ('.0f', 'training images per second, without validation'),
    'peak_gib': ('.2f', 'most memory held so far, GiB'),
    'min_left': ('.1f', "minutes left, from the last epoch's time with its validation"),
}
TABLE_HELP = ('The table, a row per epoch: '
              + '; '.join(f'{name}: {what}' for name, (_, what) in COLUMNS.items()) + '.')

def draw_curves(rows, path):
    """The training, a dict per epoch, as PNG: what tools/figures.py shows of several runs side by side."""
    try:
        import matplotlib                           # it takes a second, at the end of a run only
    except (ImportError, ValueError) as e:          # ValueError: it knows no such MPLBACKEND
        say(f'note: no curves: {e}'.splitlines()[0])
        return
    from support import drawing
    with matplotlib.rc_context(drawing.STYLE):
        drawing.save(drawing.training({'': rows}), path.removesuffix('.png'), ['png'])

"""
Checkpoints: what build() needs to make the network again, its weights, and what is known of it.

    net, meta = load_checkpoint('runs/x/best.pt')                # ours: the file says what to build
    net, meta = load_checkpoint('other.pt', 'resnet18', 10)      # somebody else's: a bare state dict
    net, meta = load_checkpoint('other.pt', 'net.py:make', 10)   # of a network that make() in net.py returns
"""
import copy
import hashlib
import math
import os
import sys

import data
import models
from losses import METHODS
from support import child, ddp, describe, files, speed, state_dicts
from support.files import Refused, save, say
from support.foreign import from_file, try_out
from support.state_dicts import read
from support.validation import clean_and_pgd

def fingerprint(net):
    """sha256 of weights, normalisation and activation, 16 hex digits: the same function, the same
    fingerprint."""
    digest = hashlib.sha256()
    if net.build_args['mean']:
        digest.update(repr((net.build_args['mean'], net.build_args['std'])).encode())
    if net.build_args['activation'] != 'relu':
        digest.update(net.build_args['activation'].encode())
    if net.build_args['name'] == 'preactresnet18-fast':         # the keys of another network
        digest.update(b'fast')
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

def code_of(*networks):
    """Digests of the files that networks of one's own come from; None where all are ours."""
    digests = [net.build_args.get('code') for net in networks if net]
    return digests if any(digests) else None

def save_checkpoint(path, net, **meta):
    """The plain module's weights, on the CPU so that torch.load needs no GPU, what build() needs to make
    it again, and whatever the caller adds."""
    weights = {k: v.cpu() for k, v in net.state_dict().items()}
    save(path, {'state_dict': weights, 'config': net.build_args, **meta})

def is_ours(ckpt):
    """Written by save_checkpoint: it says what to build."""
    config = isinstance(ckpt, dict) and ckpt.get('config')
    return (isinstance(config, dict) and set(config) >= {'name', 'num_classes', 'width', 'mean', 'std'}
            and isinstance(config['name'], str) and isinstance(ckpt.get('run', {}), dict))

def warm_start(student, args, d):
    """Load the weights that --warm-start names into student; an auxiliary BN that they lack starts as its
    twin. Raises Refused if they are of another network, or of one that normalises images otherwise."""
    path = args.teacher if args.warm_start == 'teacher' else args.warm_start
    if path is None:                # --dry-run, and the teacher is not trained yet
        return
    net = load_checkpoint(path, args.model, d.classes, width=args.width, channels=d.x_train.shape[-1])[0]
    weights, mine = net.state_dict(), student.state_dict()
    for key in mine:
        twin = key.replace('.aux.', '.')
        if key not in weights and twin in weights:
            weights[key] = weights[twin]
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    if (shapes != {key: tensor.shape for key, tensor in mine.items()}
            or any(net.build_args[k] != student.build_args[k] for k in ('mean', 'std'))):
        raise Refused(f'--warm-start: {path} is another network than the student, or normalises its images '
                      'otherwise')
    student.load_state_dict(weights)

def load_checkpoint(path, name=None, num_classes=None, *, flag='--model', **options):
    """
    -> (net in eval mode on the CPU, fp32, and meta). One of ours needs the path alone, but for a network
    of one's own: its code is never run because a file names it. A foreign one is a state dict, bare or
    under one of the usual keys, and needs build()'s arguments, or FILE.py:FUNCTION in place of the name.
    meta['weights'] says in words which were taken, what was done to their keys, and what was assumed; it
    is printed if it is not obvious. flag: where the user gives the name. Always strict. Raises Refused,
    one line.
    """
    ckpt = read(path)
    if not isinstance(ckpt, dict):
        raise Refused(f'{path} holds a {type(ckpt).__name__}, not a state dict')
    ours = is_ours(ckpt)
    place = state_dicts.found(ckpt)
    if place is None:
        holds = ', '.join(map(str, ckpt))[:100] or 'nothing'
        raise Refused(f'{path} is a PyTorch file but no state dict (it holds {holds}): save one alone')
    weights, key, others = place
    config = _config(path, ckpt['config'] if ours else None, name, num_classes, flag, options)
    try:
        if '.py:' in config['name']:
            net = from_file(config['name'], config['num_classes'])
        else:
            net = models.build(**config)
    except (TypeError, ValueError) as e:            # of a config that is not of this version, or damaged
        raise Refused(f'{path}: {config["name"]}: {e}'.splitlines()[0]) from e
    expected = net.state_dict()
    as_found = weights
    weights, done = state_dicts.fitted(as_found, expected)
    wrong = state_dicts.differences(weights, expected)
    if wrong:
        prefix = state_dicts.part_that_fits(as_found, expected)
        if prefix:
            rest = next((k for k in as_found if not str(k).startswith(prefix)), 'other layers in it')
            raise Refused(f'{path}: {config["name"]} is what begins with {prefix}, and there is more, '
                          f'such as {rest}: save that part alone, without {prefix}')
        there = ''
        if wrong[0].startswith('no '):
            there = f' (found there: {next(iter(as_found))})'
        raise Refused(f'{path} does not fit {config["name"]} with {config["num_classes"]} classes: '
                      f'{len(wrong)} entries differ, the first: {wrong[0]}{there}')
    net.load_state_dict(weights)
    net.eval()
    if others:
        done.insert(0, f'the file also holds {" ".join(others)}')
    if not ours and '.py:' not in config['name']:
        done += _assumed(config, done, flag)
    text = '; '.join([f'weights: {key or "the whole file"}', *done])
    if done or not ours:
        say(f'{path}: {text}')
    known = {k: v for k, v in ckpt.items() if k != 'state_dict'} if ours else {}
    return net, dict(known, weights=text)

def _config(path, config, name, num_classes, flag, options):
    """build()'s arguments, or FILE.py:FUNCTION as the name. config: what one of ours says."""
    if config is None:
        if name is None:
            raise Refused(f'{path} holds weights only: name their architecture with {flag} (and --width)')
        return dict(name=name, num_classes=num_classes, **options)
    if num_classes not in (None, config['num_classes']):
        raise Refused(f'{path} knows {config["num_classes"]} classes, the data have {num_classes}')
    if '.py:' not in config['name']:
        return config
    if name is None or '.py:' not in name:
        raise Refused(f"{path} is of a network of one's own; its code is run only if you name it. "
                      f'If you trust that file: {describe.same_command(flag, config["name"])}')
    return dict(config, name=name)

def _assumed(config, done, flag):
    """What the keys and shapes of a foreign network leave open."""
    assumed = []
    if not config.get('mean'):
        other = '--mean and --std' if flag == '--model' else f'{flag} FILE.py:FUNCTION, which standardises'
        assumed.append(f'taken for one of images in [0, 1], not standardised (else {other})')
    if any('downsample' in text for text in done):
        assumed.append('taken for one without max pooling')     # torchvision's 7x7 stem would not fit
    if config['name'] == 'preactresnet18':
        assumed.append('taken for the network of Rice et al., whose shortcut projects the activated x; '
                       'Wong et al. have the same keys and project x: --model preactresnet18-fast')
    return assumed

def build(name, d, flag='--model', **shape):
    """A new network for the data d, on their device. name: models.build's, or FILE.py:FUNCTION. Raises
    Refused."""
    device = d.y_train.device
    try:
        if '.py:' in name:
            net = from_file(name, d.classes).to(device)
            try_out(net, f'{flag} {name}', d.x_train.shape[1:], device)
        else:
            net = models.build(name, d.classes, channels=d.x_train.shape[-1], **shape)
    except ValueError as e:
        raise Refused(f'{flag}: {e}') from e
    return net.to(device, memory_format=speed.layout(device))

def copied(net):
    """A copy of net, for --ema or --swa to average into. Raises Refused where PyTorch can make none."""
    try:
        return copy.deepcopy(net)
    except Exception as e:                          # of a network of one's own: a lock in it, say
        line = f'--ema and --swa need a copy of the network: {type(e).__name__}: {e}'.splitlines()[0]
        raise Refused(line) from e

def as_validated(net, meta):
    """Of the two BN of a dual one net uses from here on that which it was validated with."""
    for m in net.modules():
        if isinstance(m, models.DualBatchNorm2d):
            m.auxiliary = meta.get('run', {}).get('eval_branch') == 'aux'

# -----------------------------------------------------------------------------
# teachers

def load_teacher(path, args, d, device):
    """-> the frozen network in path, on the device, and what the student's checkpoint says of it. Raises
    Refused."""
    width = None if args.teacher_model else args.width          # a --teacher-model's own
    net, meta = load_checkpoint(path, args.teacher_model or args.model, d.classes, flag='--teacher-model',
                                width=width, channels=d.x_train.shape[-1])
    if args.teacher_model and 'config' in meta and '.py:' not in args.teacher_model:
        say(f'note: {path} says itself what it is, {net.build_args["name"]}: --teacher-model is not for it')
    if meta.get('dataset', args.dataset) != args.dataset:
        raise Refused(f'{path} was trained on {meta["dataset"]}, not on {args.dataset}')
    its_run = meta.get('run', {})
    if args.subset is None and its_run.get('subset') is None:
        if its_run.get('data') not in (None, data.fingerprint(d)):
            say(f'note: {path} was trained on other images, or in another order: it may know those that are '
                'held out here')
    as_validated(net, meta)
    net = net.to(device, memory_format=speed.layout(device)).requires_grad_(False)
    return net, dict(path=path, fingerprint=fingerprint(net), code=net.build_args.get('code'),
                     trained_with=meta.get('loss'), stored_clean=meta.get('val_clean'))

def load_teachers(args, wanted, d, device):
    """wanted: names of the inputs of a loss and its attack. -> {role: network}, {role: what is known of it};
    a role is a flag of train_adv.py that names a file, 'teacher' or 'standard_teacher'. Where the flag is
    None it is set to the standard teacher, which is trained if need be; --dry-run trains none, and takes an
    untrained network to measure with."""
    roles = []
    if any(name.startswith('t_') for name in wanted):
        roles.append('teacher')
    if any(name.startswith('s_') for name in wanted):
        roles.append('standard_teacher')
    networks, known = {}, {}
    for role in roles:
        path = getattr(args, role) or standard_teacher(args)
        setattr(args, role, path)
        if path:
            networks[role], known[role] = load_teacher(path, args, d, device)
        else:
            networks[role] = build(args.model, d, width=args.width).requires_grad_(False)
            networks[role].eval()
    return networks, known

def check_teachers(networks, known, args, d):
    """Validates the teachers on up to 100 held-out images, completes known, and prints a line each.
    Refuses one that gives no numbers, or is so far below the accuracy stored in it that chance does not
    explain it (four standard deviations): then labels, order of classes or normalisation are others than
    in its training."""
    for role, about in known.items():
        path, stored, n = about['path'], about['stored_clean'], min(100, len(d.y_val))
        clean, robust, loss = clean_and_pgd(networks[role], d.x_val[:n], d.y_val[:n], eps=args.eps / 255,
                                            norm=args.norm)
        if not math.isfinite(loss):
            raise Refused(f'the teacher {path} gives non-finite logits on {n} held-out images: train another')
        about.update(val_clean=clean, val_pgd20=robust, val_n=n)
        say(f'{role.replace("_", " ")} {path} ({about["fingerprint"]}): {clean:.1f} % clean, '
            f'{robust:.1f} % under PGD-20 on {n} held-out images')
        if role == 'teacher' and METHODS[args.loss].teacher == 'robust' and robust <= 100 / d.classes:
            say(f'note: --loss {args.loss} learns from a robust teacher, and this one is not')
        if stored is None:
            if clean < 50:
                say('note: that is little for a teacher: are its images standardised, in another order of '
                    'classes?')
            continue
        p = min(max(stored / 100, 0.02), 0.98)
        if clean < stored - 400 * math.sqrt(p * (1 - p) / n):
            raise Refused(f'the teacher {path} has {clean:.1f} % on {n} held-out images and had '
                          f'{stored:.1f} % in its own training: other labels, another order of classes or '
                          'another normalisation?')

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def standard_teacher(args):
    """Path of this dataset's and model's standard teacher, trained now if need be (Al-Najjar et al.,
    section 3: "it is feasible to train our own teacher model"); --dry-run trains none, and returns None.
    Where another run is training it, waits. Raises Refused where several processes would train it."""
    flags = []
    for flag in ('dataset', 'data_dir', 'model', 'amp', 'width', 'subset', 'subset_seed', 'augment'):
        if getattr(args, flag) is not None:
            flags.append(f'--{flag.replace("_", "-")}={getattr(args, flag)}')
    if args.normalize:
        flags.append('--normalize')
    folder = describe.teacher_folder(args, {}.get, only=('normalize', 'subset_seed', 'augment'))
    path = f'{folder}/best.pt'
    while True:
        files.wait_for(f'{folder}/.lock',
                       f'no teacher given: waiting for the one that another run trains in {folder}')
        last = read(f'{folder}/last.pt') if os.path.exists(f'{folder}/last.pt') else None
        if last and last['epoch'] == last['run']['epochs']:
            say(f'no teacher given: taking {path}, trained earlier')
            return path
        if ddp.world_size() > 1:
            raise Refused(f'no teacher given, and none in {folder}: train it first, with train_teacher.py')
        if args.dry_run:
            say(f'no teacher given, and none in {folder} that is finished: it would be trained first')
            return None
        say(f'no teacher given, and none in {folder} that is finished: training it first')
        script = os.path.join(ROOT, 'train_teacher.py')
        try:
            status = child.run([script, *flags, f'--out={folder}', '--resume'])
        except child.Stopped:
            sys.exit('stopped while the teacher was trained; the same command continues')
        if status and not files.is_locked(f'{folder}/.lock'):        # another run may have been quicker
            sys.exit(f'no teacher, no student: train_teacher.py ended with status {status}')

"""
Checkpoints: what build() needs to make the network again, its weights, and what is known of it.

    net, meta = load_checkpoint('runs/x/best.pt')                # ours: the file says what to build
    net, meta = load_checkpoint('other.pt', 'resnet18', 10)      # somebody else's: a bare state dict
    net, meta = load_checkpoint('other.pt', 'net.py:make', 10)   # of a network that make() in net.py returns
"""
import hashlib
import math
import re
import runpy

import torch

from support.files import Refused, save, say
import models

def fingerprint(net):
    """sha256 of weights, normalisation and activation, 16 hex digits: the same function, the same
    fingerprint."""
    digest = hashlib.sha256()
    if net.config['mean']:
        digest.update(repr((net.config['mean'], net.config['std'])).encode())
    if net.config['activation'] != 'relu':
        digest.update(net.config['activation'].encode())
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

def save_checkpoint(path, net, **meta):
    """The plain module's weights, what build() needs to make it again, and whatever the caller adds."""
    save(path, {'state_dict': net.state_dict(), 'config': net.config, **meta})

def read(path):
    """What torch.save wrote to path, on the CPU.
    Raises Refused for anything else, one line that says what it is."""
    try:
        with open(path, 'rb') as f:
            head = f.read(64).lstrip()
    except OSError as e:
        raise Refused(f'cannot read {path}: {e.strerror}') from e
    if head.startswith(b'<'):
        raise Refused(f'{path} is a web page, not a checkpoint: the download failed, fetch it again')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:                  # zip, pickle, EOF, EINVAL: whatever a truncated or foreign file
        if 'Unsupported' in str(e):         # provokes in torch.load
            raise Refused(f'{path} holds Python objects beside tensors and is not unpickled: '
                             'save its state dict alone') from e
        raise Refused(f'{path} is not a PyTorch checkpoint, or is truncated ({type(e).__name__})') from e

def is_ours(ckpt):
    """Written by save_checkpoint: it says what to build."""
    config = isinstance(ckpt, dict) and ckpt.get('config')
    return isinstance(config, dict) and set(config) >= {'name', 'num_classes', 'width', 'mean', 'std'}

def from_file(spec, num_classes):
    """The network that function() returns, spec being file.py:function. Raises Refused, one line."""
    file, function = spec.rsplit(':', 1)
    try:
        net = runpy.run_path(file)[function]()
    except Exception as e:                  # it is somebody else's code
        raise Refused(f'--model {spec}: {type(e).__name__}: {e}'.splitlines()[0]) from e
    if not isinstance(net, torch.nn.Module):
        raise Refused(f'--model {spec} returns a {type(net).__name__}, not a torch.nn.Module')
    net.config = dict(name=spec, num_classes=num_classes, width=None, mean=None, std=None, activation='relu',
                      dual_bn=False)
    return net

def warm_start(student, path, name=None, num_classes=None, **options):
    """Load the weights of load_checkpoint(path, ...) into student; an auxiliary BN that they lack starts as
    its twin. Raises Refused if they are of another network, or of one that normalises images otherwise."""
    net = load_checkpoint(path, name, num_classes, **options)[0]
    weights, mine = net.state_dict(), student.state_dict()
    weights.update({k: weights[k.replace('.aux.', '.')] for k in mine
                    if '.aux.' in k and k not in weights and k.replace('.aux.', '.') in weights})
    if ({k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in mine.items()}
            or [net.config[k] for k in ('mean', 'std')] != [student.config[k] for k in ('mean', 'std')]):
        raise Refused(f'--warm-start: {path} is another network than the student, '
                         'or normalises its images otherwise')
    student.load_state_dict(weights)

def load_checkpoint(path, name=None, num_classes=None, **options):
    """-> (net in eval mode on the CPU, meta). One of ours needs the path alone. A foreign one is a state
    dict, bare or under one of the usual keys, and needs build()'s arguments, or file.py:function in place of
    the name; its meta is {}. Always strict. Raises Refused, one line."""
    ckpt = read(path)
    if not isinstance(ckpt, dict):
        raise Refused(f'{path} holds a {type(ckpt).__name__}, not a state dict')
    config = ckpt['config'] if is_ours(ckpt) else None
    weights = next((ckpt[k] for k in ('state_dict', 'model_state_dict', 'model', 'net')
                    if isinstance(ckpt.get(k), dict)), ckpt)
    weights = {re.sub(r'^((module|_orig_mod)\.)+', '', str(k)): v for k, v in weights.items()
               if 'sub_block1.' not in str(k)}        # the TRADES code builds this block and never calls it
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise Refused(f'{path} is a PyTorch file but no state dict')
    if config is None:
        if name is None:
            raise Refused(f'{path} holds weights only: name their architecture with --model (and --width)')
        config = dict(name=name, num_classes=num_classes, **options)
    elif num_classes not in (None, config['num_classes']):
        raise Refused(f'{path} knows {config["num_classes"]} classes, the data have {num_classes}')
    net = from_file(name or config['name'], num_classes) if '.py:' in config['name'] else models.build(**config)
    expected = net.state_dict()
    wrong = ([f'no {k}' for k in expected if k not in weights]
             + [f'unknown {k}' for k in weights if k not in expected])
    wrong += [f'{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}' for k, v in expected.items()
              if k in weights and weights[k].shape != v.shape]
    if wrong:
        raise Refused(f'{path} does not fit {config["name"]} with {config["num_classes"]} classes: '
                         f'{len(wrong)} entries differ, the first: {wrong[0]}')
    net.load_state_dict(weights)
    return net.eval(), {k: v for k, v in ckpt.items() if k != 'state_dict'} if is_ours(ckpt) else {}

def build(name, d, **shape):
    """A new network for the data d: models.build's name, or FILE.py:FUNCTION. Raises Refused."""
    if '.py:' in name:
        return from_file(name, d.classes)
    try:
        return models.build(name, d.classes, **shape)
    except ValueError as e:
        raise Refused(f'--model: {e}') from e

def load_teacher(path, args, d, device):
    """-> the frozen network in path, on the device, and what the student's checkpoint says of it. Raises Refused."""
    net, meta = load_checkpoint(path, args.teacher_model or args.model, d.classes)
    if meta.get('dataset', args.dataset) != args.dataset:
        raise Refused(f'{path} was trained on {meta["dataset"]}, not on {args.dataset}')
    for m in net.modules():                                     # of its two, the BN it was validated with
        if isinstance(m, models.DualBatchNorm2d):
            m.auxiliary = meta.get('run', {}).get('eval_branch') == 'aux'
    net = net.to(device, memory_format=models.layout(device)).requires_grad_(False)
    return net, dict(path=path, fingerprint=fingerprint(net), trained_with=meta.get('loss'),
                     stored_clean=meta.get('val_clean'))

def check_teacher(about, clean, robust, loss, n):
    """After its validation on n held-out images: completes about, prints a line, and refuses a teacher that gives no
    numbers, or is so far below the accuracy stored in it that chance does not explain it (four standard deviations):
    then labels, order of classes or normalisation are others than in its training."""
    path, stored = about['path'], about['stored_clean']
    if not math.isfinite(loss):
        raise Refused(f'the teacher {path} gives non-finite logits on {n} held-out images: train another')
    about.update(val_clean=clean, val_pgd20=robust, val_n=n)
    say(f'teacher {path} ({about["fingerprint"]}): {clean:.1f} % clean, {robust:.1f} % under PGD-20 on {n} held-out '
        'images')
    if stored is not None:
        p = min(max(stored / 100, 0.02), 0.98)
        if clean < stored - 400 * math.sqrt(p * (1 - p) / n):
            raise Refused(f'the teacher {path} has {clean:.1f} % on {n} held-out images and had {stored:.1f} % in its own '
                          'training: other labels, another order of classes or another normalisation?')

"""
Somebody else's weights: files that are not ours, the state dict in them, the keys that a network expects.

    content = read('other.pt')                           # whatever wrote it; nothing in it is run
    weights, where, others = found(content)
    weights, notes = fitted(weights, net.state_dict())   # keys as they are first, then less and less so
"""
import argparse
import re
import warnings
import zipfile

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from support.files import Refused

# where others keep a state dict, the first that is there is taken; EMA last: it is said where a file has both
CONTAINERS = ('state_dict', 'model_state_dict', 'model', 'net', 'network', 'params',
              'state_dict_ema', 'model_ema', 'ema', 'ema_state_dict', 'params_ema')
# plain values that trainings keep beside the weights: numpy's numbers, and their flags
SCALAR = np.float64(0).__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype, SCALAR, (SCALAR, 'numpy.core.multiarray.scalar'),        # of numpy 1
        *{type(np.dtype(kind)) for kind in '?bBhHiIlLqQefd'}]

# -----------------------------------------------------------------------------
# files

def read(path):
    """What torch.save wrote to path, on the CPU.
    Raises Refused for anything else, one line that says what it is."""
    try:
        with open(path, 'rb') as f:
            head = f.read(64)
    except OSError as e:
        raise Refused(f'cannot read {path}: {e.strerror}') from e
    if head.startswith(b'version https://git-lfs'):
        raise Refused(f'{path} stands for a file that Git LFS keeps: fetch it with git lfs pull')
    if head[8:9] == b'{' and head[6:8] == b'\0\0':                      # a length of 8 bytes, then JSON
        return _safetensors(path)
    text = head.lstrip(b'\xef\xbb\xbf\xff\xfe').replace(b'\0', b'').strip()       # UTF-8 or UTF-16
    if text.startswith(b'<'):
        raise Refused(f'{path} is a web page, not a checkpoint: the download failed, fetch it again')
    if text and text.decode('ascii', 'replace').replace('\n', ' ').isprintable() and text.isascii():
        start = text.decode('ascii').splitlines()[0][:40]
        raise Refused(f'{path} is a text ("{start}"), not a checkpoint: did a download fail?')
    if head.startswith(b'\x1f\x8b'):
        raise Refused(f'{path} is compressed: unpack it with gunzip')
    if str(path).endswith('.safetensors'):
        return _safetensors(path)
    _refuse_damaged(path)
    try:
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter('ignore')         # of the pickle's protocol
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:                          # zip, pickle, EOF, EINVAL: whatever a file provokes
        text = str(e)
        if blocked := re.search(r'GLOBAL (\S+) whose module \S+ is blocked', text):
            raise Refused(f'{path} would run {blocked[1]} when it is unpickled: a malicious pickle. Nothing '
                          'was executed; delete it, and doubt where it came from') from e
        if 'TorchScript' in text:
            raise Refused(f'{path} is a TorchScript archive: save the state dict of the module '
                          'it was made of') from e
        unknown_code = 'Unsupported operand' in text    # of pickle protocol 4 or 5, or it is no pickle
        if unknown_code and (head.startswith(b'PK') or head[:1] == b'\x80' and head[1] >= 4):
            raise Refused(f'{path} was saved with a pickle_protocol that PyTorch reads only where the file '
                          'may run any code: ask for torch.save(state_dict, path) alone') from e
        if unknown := re.search(r'GLOBAL (\S+) was not an allowed', text):
            raise Refused(f'{path} holds {unknown[1]} beside tensors, which could run any code, and is not '
                          'unpickled: save its state dict alone') from e
        if 'Unsupported' in text and not unknown_code:
            raise Refused(f'{path} holds Python objects beside tensors and is not unpickled: '
                          'save its state dict alone') from e
        raise Refused(f'{path} is not a PyTorch checkpoint, or is truncated ({type(e).__name__})') from e

def _refuse_damaged(path):
    """Raises Refused if path is a zip file, as torch.save writes, with a checksum that is not its own."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as z:
            damaged = z.testzip()
    except Exception as e:                  # zipfile, zlib and struct each have their own
        raise Refused(f'{path} is damaged ({type(e).__name__}): copy it again') from e
    if damaged:
        raise Refused(f'{path} is damaged: {damaged} in it fails its checksum: copy it again')

def _safetensors(path):
    """The state dict in a safetensors file. Raises Refused."""
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise Refused(f'{path} is a safetensors file: pip install safetensors, and it is read') from e
    try:
        return load_file(path)
    except Exception as e:
        problem = f'{path} is a damaged safetensors file ({type(e).__name__}: {e})'
        raise Refused(problem.splitlines()[0]) from e

# -----------------------------------------------------------------------------
# state dicts

def _is_weights(value):
    return isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values())

def found(ckpt):
    """-> (state dict, where it was, [where others were]); None where the file holds none, or several in
    places that say nothing. Where: keys, '' for the whole file."""
    if _is_weights(ckpt):
        return ckpt, '', []

    def by_rank(things):
        return sorted(things, key=lambda k: CONTAINERS.index(k) if k in CONTAINERS else len(CONTAINERS))

    sets = []
    for key in by_rank(ckpt):
        inner = ckpt[key]
        if _is_weights(inner):
            sets.append((key, inner))
        elif isinstance(inner, dict):
            deeper = [name for name in by_rank(inner) if _is_weights(inner[name])]
            if deeper:
                sets.append((f'{key}.{deeper[0]}', inner[deeper[0]]))
    if not sets or len(sets) > 1 and str(sets[0][0]).split('.')[0] not in CONTAINERS:
        return None
    return sets[0][1], sets[0][0], [str(key) for key, _ in sets[1:]]

def differences(weights, expected):
    """What keeps weights from load_state_dict(strict=True), in words."""
    wrong = [f'no {k}' for k in expected if k not in weights]
    wrong += [f'unknown {k}' for k in weights if k not in expected]
    for k, v in expected.items():
        if k not in weights:
            continue
        w = weights[k]
        if not is_lazy(v) and w.shape != v.shape:
            wrong.append(f'{k} is {tuple(w.shape)}, not {tuple(v.shape)}')
        elif w.is_meta or w.is_quantized or w.layout is not torch.strided:
            kind = 'without values' if w.is_meta else 'quantized' if w.is_quantized else 'sparse'
            wrong.append(f'{k} is a tensor {kind}')
    return wrong

def part_that_fits(weights, expected):
    """What the keys of the one part begin with that expected could be loaded from, or None: the network
    within a training's module, which holds a metric or an attacker, too."""
    first, keys = next(iter(expected), ''), {str(key) for key in weights}
    prefixes = [key[:len(key) - len(first)] for key in keys if key.endswith(f'.{first}')]
    fitting = [prefix for prefix in prefixes if all(prefix + k in keys for k in expected)]
    return fitting[0] if len(fitting) == 1 else None

def fitted(weights, expected):
    """
    -> (weights with the keys of expected, [what was done to them, in words]): as they are if they fit,
    else after the least that makes them fit. If nothing does: those that differ least; see differences().
    """
    weights = {str(k): v for k, v in weights.items()}
    best, notes = weights, []
    for candidate, done in _prefixes(weights, expected):
        for change in (_unchanged, _without_unused, _renamed):
            changed, more = change(candidate, expected)
            changed = _counted(changed, expected)
            wrong = len(differences(changed, expected))
            if not wrong:
                return changed, done + more
            if wrong < len(differences(best, expected)):
                best, notes = changed, done + more
    return best, notes

def _prefixes(weights, expected):
    """Yield the weights as they are; without what all keys begin with; with what expected's begin with."""
    yield weights, []
    done = []
    if 'n_averaged' in weights:
        weights = {k: v for k, v in weights.items() if k != 'n_averaged'}
        done = ['n_averaged left out']
        yield weights, done
    for prefix in _shared(weights):
        bare = {k[len(prefix):]: v for k, v in weights.items()}
        yield bare, [*done, f'prefix {prefix} dropped']
        inner = {re.sub(r'(^|\.)_orig_mod\.', r'\1', k): v for k, v in bare.items()}
        if inner.keys() != bare.keys():
            yield inner, [*done, f'prefix {prefix}_orig_mod. dropped']
    theirs, ours = ['', *_shared(weights)][-1], ['', *_shared(expected)][-1]
    if ours != theirs:
        how = f'{theirs} taken for {ours}'
        if ours.endswith(theirs):
            how = f'{ours[:len(ours) - len(theirs)]} added'
        yield {ours + k[len(theirs):]: v for k, v in weights.items()}, [*done, f'prefix {how}']

def _shared(keys):
    """What all the keys begin with: its first part, its first two, and so on."""
    prefixes, keys = [], [k.split('.') for k in keys]
    for parts in zip(*[k[:-1] for k in keys]):
        if len(set(parts)) > 1:
            break
        prefixes.append(f'{prefixes[-1] if prefixes else ""}{parts[0]}.')
    return prefixes

def _unchanged(weights, expected):
    return weights, []

def _without_unused(weights, expected):
    """The TRADES code builds a sub_block1 and never calls it; thop leaves its counts behind."""
    unused = []
    for name, pattern in ('sub_block1', r'(.*\.)?sub_block1\.'), ('total_ops', r'(.*\.)?total_(ops|params)$'):
        if any(re.match(pattern, k) for k in weights if k not in expected):
            weights = {k: v for k, v in weights.items() if k in expected or not re.match(pattern, k)}
            unused.append(f'the unused {name} left out')
    return weights, unused

def _plain(key):
    """One name for what torchvision, timm and the pytorch-cifar family call differently."""
    key = re.sub(r'(^|\.)downsample\.', r'\1shortcut.', key)
    return re.sub(r'^(fc|classifier|head|head\.fc|last_linear)\.(?=weight$|bias$)', 'linear.', key)

def _renamed(weights, expected):
    """The weights under expected's keys if both have the same plain names, one to one."""
    theirs, ours = {_plain(k): k for k in weights}, {_plain(k): k for k in expected}
    if len(theirs) < len(weights) or len(ours) < len(expected) or not theirs.keys() <= ours.keys():
        return weights, []
    done = [f'keys renamed, such as {theirs[k]} to {ours[k]}' for k in theirs if theirs[k] != ours[k]][:1]
    return {ours[k]: weights[theirs[k]] for k in theirs}, done

def _counted(weights, expected):
    """BN's num_batches_tracked, which old files lack and which eval mode does not read."""
    missing = {k: v for k, v in expected.items() if k.endswith('.num_batches_tracked') and k not in weights}
    return {**weights, **missing}

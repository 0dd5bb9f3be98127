"""
Somebody else's networks and weights: what checkpoint.py needs to read them, and nothing of ours.

    net = from_file('net.py:make', 10)                   # as `python net.py` would, in its own folder
    weights, notes = fitted(weights, net.state_dict())   # keys as they are first, then less and less so
"""
import contextlib
import importlib.util
import os
import pickletools
import re
import sys
import zipfile

import torch

from support.files import Refused

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# where others keep a state dict, the first that is there is taken; EMA last: it is said where a file has both
CONTAINERS = ('state_dict', 'model_state_dict', 'model', 'net', 'network', 'params',
              'state_dict_ema', 'model_ema', 'ema', 'ema_state_dict', 'params_ema')
DANGEROUS = {'os', 'posix', 'nt', 'subprocess', 'sys', 'builtins', '__builtin__', 'shutil', 'socket', 'runpy',
             'importlib', 'ctypes', 'pty', 'code', 'webbrowser', 'commands', 'pdb', 'asyncio', 'multiprocessing',
             'urllib', 'requests', 'operator'}
HARMLESS = {'builtins.set', '__builtin__.set', 'builtins.bytearray', 'builtins.list', 'builtins.dict',
            'builtins.int', 'builtins.float', 'builtins.tuple', 'builtins.complex', 'builtins.slice'}

# -----------------------------------------------------------------------------
# code: what `import` finds

def _names_in(folder):
    """What `import` could find in a folder: its .py files and its subfolders."""
    return {os.path.splitext(n)[0] for n in os.listdir(folder)
            if n.endswith('.py') or os.path.isdir(os.path.join(folder, n))}

def _within(module, folder):
    place = getattr(module, '__file__', None)
    if not place and type(module).__name__ == 'module':         # a folder without __init__.py has a path alone
        place = next(iter(getattr(module, '__path__', ())), None)
    return isinstance(place, str) and os.path.realpath(place).startswith(folder + os.sep)

class Surroundings:
    """
    Between enter() and leave(), `import` finds what it would in a script that lies in folder: its neighbours first, and
    none of our modules. leave() puts ours back; what was imported under their names is kept aside for the next enter().
    """
    def __init__(self, folder):
        self.folder, self.depth, self.theirs = os.path.realpath(folder), 0, {}

    def _hidden(self, name, module):
        if name == '__main__' or _within(module, self.folder):
            return False
        # our environment may lie in our folder; its packages are nobody's to hide
        top = name.split('.')[0]
        ours = _within(module, ROOT) and top in _names_in(ROOT)
        return ours or top in self.neighbours and top not in sys.stdlib_module_names

    def enter(self):
        self.depth += 1
        if self.depth > 1:
            return
        self.neighbours = {n for n in _names_in(self.folder)
                           if os.path.exists(os.path.join(self.folder, n + '.py'))
                           or os.path.exists(os.path.join(self.folder, n, '__init__.py'))}
        self.ours = {name: m for name, m in list(sys.modules.items()) if self._hidden(name, m)}
        for name in self.ours:
            del sys.modules[name]
        sys.modules.update(self.theirs)
        self.path = sys.path[:]
        sys.path[:] = [self.folder] + [p for p in sys.path if os.path.realpath(p or '.') != ROOT]
        importlib.invalidate_caches()

    def leave(self):
        self.depth -= 1
        if self.depth > 0:
            return
        names = {name.split('.')[0] for name in self.ours}
        if self.folder != ROOT:
            names |= _names_in(ROOT)
        self.theirs = {name: m for name, m in list(sys.modules.items())
                       if name.split('.')[0] in names and (name in self.ours or _within(m, self.folder))}
        for name in self.theirs:
            del sys.modules[name]
        sys.modules.update(self.ours)
        # at the end, where it shadows nothing: what their code imports later is found
        sys.path[:] = self.path if self.folder in self.path else [*self.path, self.folder]

def from_file(spec, num_classes):
    """The network that function() returns, spec being FILE.py:FUNCTION, in fp32 and with logits (B, num_classes) as its
    output. Raises Refused, one line."""
    file, function = spec.rsplit(':', 1)
    file = os.path.abspath(file)
    if not os.path.isfile(file):
        raise Refused(f'--model {spec}: there is no file {file}')
    around = Surroundings(os.path.dirname(file))
    argv, here = sys.argv, os.getcwd()
    around.enter()
    try:
        sys.argv = [file]
        os.chdir(around.folder)
        net = getattr(_imported(file), function)()
    except (Exception, SystemExit) as e:            # it is somebody else's code
        lines = f'{type(e).__name__}: {e}'.splitlines()
        raise Refused(f'--model {spec}: {lines[0]}') from e
    finally:
        os.chdir(here)
        sys.argv = argv
        around.leave()
    if not isinstance(net, torch.nn.Module):
        raise Refused(f'--model {spec} returns a {type(net).__name__}, not a torch.nn.Module')
    net = net.float()
    if around.theirs or _names_in(around.folder) & _names_in(ROOT):
        # an import within forward() finds their modules again, not ours of the same name
        net.register_forward_pre_hook(lambda net, inputs: around.enter())
        net.register_forward_hook(lambda net, inputs, out: around.leave(), always_call=True)
    net.register_forward_hook(lambda net, inputs, out: _logits(out, spec, num_classes))
    net.config = dict(name=f'{file}:{function}', num_classes=num_classes, width=None, mean=None, std=None,
                      activation='relu', dual_bn=False)
    return net

def _imported(file):
    name = os.path.splitext(os.path.basename(file))[0]
    if name in sys.modules and getattr(sys.modules[name], '__file__', None) != file:
        name = f'_{name}_of_a_model'                # random.py, say: nobody must get it for the library's
    found = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module                      # dataclasses, and neighbours that import it
    try:
        found.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module

def _logits(out, spec, num_classes):
    """The logits in what a network returns: itself, `logits` of a dict or an object, or the first tensor."""
    if not isinstance(out, torch.Tensor):
        values = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, (tuple, list)) else []
        named = out.get('logits') if isinstance(out, dict) else getattr(out, 'logits', None)
        tensors = [v for v in (named, *values) if isinstance(v, torch.Tensor)]
        if not tensors:
            raise Refused(f'--model {spec}: its output is a {type(out).__name__} without a tensor, not logits')
        out = tensors[0]
    if num_classes is not None and (out.ndim != 2 or out.shape[1] != num_classes):
        shape = ', '.join(map(str, out.shape[1:]))
        raise Refused(f'--model {spec}: its output is (B, {shape}), the data need logits (B, {num_classes})')
    return out

# -----------------------------------------------------------------------------
# files

def refuse_damaged(path):
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

def safetensors(path):
    """The state dict in a safetensors file. Raises Refused."""
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise Refused(f'{path} is a safetensors file: pip install safetensors, and it is read') from e
    try:
        return load_file(path)
    except Exception as e:
        raise Refused(f'{path} is a damaged safetensors file ({type(e).__name__}: {e})'.splitlines()[0]) from e

def why_not_loaded(path):
    """What in the pickle(s) of a file keeps torch.load(weights_only=True) from it, as half a sentence, or None."""
    protocol, names = _pickled(path)
    evil = [n for n in names if n.split('.')[0] in DANGEROUS and n not in HARMLESS]
    if evil:
        return (f'would run {evil[0]} when it is unpickled: a malicious pickle. Nothing was executed; delete it, '
                'and doubt where it came from')
    if protocol is not None and protocol > 2:
        return (f'was saved with pickle_protocol={protocol}, which PyTorch reads only where it may run any code: '
                'save it again with torch.save(state_dict, path) alone')
    return None

def _pickled(path):
    """-> protocol of the first pickle in path, and the names (module.function) that they look up; nothing is run."""
    names, strings, protocol = [], [], None
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:      # what is no pickle ends it
        if zipfile.is_zipfile(path):
            z = stack.enter_context(zipfile.ZipFile(path))
            f = stack.enter_context(z.open(next(n for n in z.namelist() if n.endswith('data.pkl'))))
        else:
            f = stack.enter_context(open(path, 'rb'))
        for _ in range(5):                          # before PyTorch 1.6 a file was five pickles in a row
            for op, value, _ in pickletools.genops(f):
                if op.name == 'PROTO' and protocol is None:
                    protocol = value
                elif op.name in ('GLOBAL', 'INST'):
                    names.append(value.replace(' ', '.'))
                elif op.name == 'STACK_GLOBAL':
                    names.append('.'.join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    return protocol, names

# -----------------------------------------------------------------------------
# state dicts

def _is_weights(value):
    return isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values())

def found(ckpt):
    """-> (state dict, where it was, [where others were]), None where the file holds none. Where: keys, '' for the whole
    file."""
    if _is_weights(ckpt):
        return ckpt, '', []
    sets = []
    for key in CONTAINERS:
        inner = ckpt.get(key)
        if _is_weights(inner):
            sets.append((key, inner))
        elif isinstance(inner, dict):
            for name in CONTAINERS:
                if _is_weights(inner.get(name)):
                    sets.append((f'{key}.{name}', inner[name]))
                    break
    if not sets:
        return None
    return sets[0][1], sets[0][0], [key for key, _ in sets[1:]]

def differences(weights, expected):
    """What keeps weights from load_state_dict(strict=True), in words."""
    wrong = [f'no {k}' for k in expected if k not in weights] + [f'unknown {k}' for k in weights if k not in expected]
    return wrong + [f'{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}' for k, v in expected.items()
                    if k in weights and weights[k].shape != v.shape]

def fitted(weights, expected):
    """
    -> (weights with the keys of expected, [what was done to them, in words]): as they are if they fit, else after the
    least that makes them fit. If nothing does: those that differ least; see differences().
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
    """Yield the weights as they are; without what every key begins with, part by part; with what expected's do."""
    yield weights, []
    done = []
    if 'n_averaged' in weights:
        weights = {k: v for k, v in weights.items() if k != 'n_averaged'}
        done = ['n_averaged left out']
        yield weights, done
    bare, prefix = weights, ''
    while len(first := {k.partition('.')[0] for k in bare}) == 1 and all('.' in k for k in bare):
        prefix += f'{first.pop()}.'
        bare = {k.partition('.')[2]: v for k, v in bare.items()}
        yield bare, [*done, f'prefix {prefix} dropped']
    inner = {re.sub(r'(^|\.)_orig_mod\.', r'\1', k): v for k, v in bare.items()}
    if inner.keys() != bare.keys():
        yield inner, [*done, '_orig_mod dropped']
    first = {k.partition('.')[0] for k in expected}
    if len(first) == 1:
        prefix = f'{first.pop()}.'
        yield {prefix + k: v for k, v in bare.items()}, [*done, f'prefix {prefix} added']

def _unchanged(weights, expected):
    return weights, []

def _without_unused(weights, expected):
    """The TRADES code builds a sub_block1 and never calls it."""
    used = {k: v for k, v in weights.items() if k in expected or not re.match(r'(.*\.)?sub_block1\.', k)}
    return used, ['the unused sub_block1 left out'] if len(used) < len(weights) else []

def _plain(key):
    """One name for what torchvision, timm and the pytorch-cifar family call differently."""
    key = re.sub(r'(^|\.)downsample\.', r'\1shortcut.', key)
    return re.sub(r'^(fc|classifier|head|head\.fc)\.(?=weight$|bias$)', 'linear.', key)

def _renamed(weights, expected):
    """The weights under expected's keys if both have the same plain names, one to one."""
    theirs, ours = {_plain(k): k for k in weights}, {_plain(k): k for k in expected}
    if len(theirs) < len(weights) or len(ours) < len(expected) or not theirs.keys() <= ours.keys():
        return weights, []
    return {ours[k]: weights[theirs[k]] for k in theirs}, ['renamed: fc, linear; downsample, shortcut']

def _counted(weights, expected):
    """BN's num_batches_tracked, which old files lack and which eval mode does not read."""
    missing = {k: v for k, v in expected.items() if k.endswith('.num_batches_tracked') and k not in weights}
    return {**weights, **missing}

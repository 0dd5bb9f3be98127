"""
Somebody else's networks: their code runs as it would in its own folder, and finds nothing of ours.

    net = from_file('net.py:make', 10)              # what make() returns, as `python net.py` would find it
"""
import hashlib
import importlib.util
import os
import sys

import torch

from support.files import Refused

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

# -----------------------------------------------------------------------------
# what `import` finds

def _names_in(folder):
    """What `import` could find in a folder: its .py files and its subfolders."""
    names = set()
    for entry in os.listdir(folder):
        if entry.endswith('.py'):
            names.add(entry[:-3])
        elif os.path.isdir(os.path.join(folder, entry)):
            names.add(entry)
    return names

def _wins(folder, name):
    """Does folder/name come before an installed package? A folder without __init__.py does not."""
    path = os.path.join(folder, name)
    return os.path.exists(f'{path}.py') or os.path.exists(os.path.join(path, '__init__.py'))

def _lies_in(module, folder, name):
    """Is it folder/name.py, or in the package folder/name?"""
    place = getattr(module, '__file__', None)
    if not place and type(module).__name__ == 'module':     # a folder without __init__.py has a path alone
        place = next(iter(getattr(module, '__path__', ())), None)
    if not isinstance(place, str):
        return False
    stem = os.path.join(folder, name)
    return f'{os.path.realpath(place)}{os.sep}'.startswith((f'{stem}.py{os.sep}', f'{stem}{os.sep}'))

class Surroundings:
    """
    Between enter() and leave(), `import` finds what it would in a script that lies in folder: its
    neighbours first, and none of our modules. leave() puts ours back, and keeps theirs aside for the next
    enter(): nobody else finds them.
    """
    def __init__(self, folder):
        self.folder = os.path.realpath(folder)
        self.depth, self.ours, self.theirs = 0, {}, {}
        self.inside = self.outside = 0              # how many modules there were: as many, the same ones
        self.neighbours, self.our_names = set(), set()
        self.path = self.path_inside = []
        if self.folder != ROOT:                     # there `import` finds the same
            self.neighbours, self.our_names = _names_in(self.folder), _names_in(ROOT)

    def _loaded(self):
        """Yield name, first part of the name, module of all that could be theirs or ours."""
        names = (self.neighbours | self.our_names) - {'__main__'}
        for name, module in list(sys.modules.items()):
            top = name.partition('.')[0]
            if top in names:
                yield name, top, module

    def _hidden(self):
        """Our modules, and those of others that theirs come before."""
        hidden = []
        for name, top, module in self._loaded():
            if top in self.our_names and _lies_in(module, ROOT, top):
                hidden.append(name)
            elif top in self.neighbours and top not in sys.stdlib_module_names:
                if _wins(self.folder, top) and not _lies_in(module, self.folder, top):
                    hidden.append(name)
        return hidden

    def enter(self):
        self.depth += 1
        if self.depth > 1:
            return
        names = self.ours if len(sys.modules) == self.outside else self._hidden()
        self.ours = {name: sys.modules.pop(name) for name in list(names)}
        sys.modules.update(self.theirs)
        self.inside = len(sys.modules)
        if sys.path != self.path:
            self.path = sys.path[:]
            self.path_inside = [self.folder, *[p for p in self.path if os.path.realpath(p or '.') != ROOT]]
        sys.path[:] = self.path_inside

    def leave(self):
        self.depth -= 1
        if self.depth > 0:
            return
        if len(sys.modules) != self.inside:
            self.theirs = {name: m for name, top, m in self._loaded() if _lies_in(m, self.folder, top)}
        for name in self.theirs:
            del sys.modules[name]
        sys.modules.update(self.ours)
        self.outside = len(sys.modules)
        sys.path[:] = self.path

# -----------------------------------------------------------------------------
# the network

def from_file(spec, num_classes):
    """The network that function() returns, spec being FILE.py:FUNCTION, in fp32; its output are the logits
    (B, num_classes). Raises Refused, one line."""
    file, function = spec.rsplit(':', 1)
    file = os.path.abspath(file)
    if not os.path.isfile(file):
        raise Refused(f'--model {spec}: there is no file {file}')
    around = Surroundings(os.path.dirname(file))
    argv, here = sys.argv, os.getcwd()
    importlib.invalidate_caches()                   # the folder may be new
    around.enter()
    try:
        sys.argv = [file]
        os.chdir(around.folder)
        net = getattr(_imported(file), function)
        if not isinstance(net, torch.nn.Module):
            net = net()
    except (Exception, SystemExit) as e:            # it is somebody else's code
        lines = f'{type(e).__name__}: {e}'.splitlines()
        raise Refused(f'--model {spec}: {lines[0]}') from e
    finally:
        os.chdir(here)
        sys.argv = argv
        around.leave()
    if not isinstance(net, torch.nn.Module):
        raise Refused(f'--model {spec} returns a {type(net).__name__}, not a torch.nn.Module')
    net = getattr(net, '_orig_mod', net).float()    # of torch.compile: --compile does that

    # an import within forward() finds their modules again, not ours of the same name
    @torch.compiler.disable
    def before(net, inputs):
        around.enter()

    @torch.compiler.disable
    def after(net, inputs, out):
        around.leave()

    try:
        net.register_forward_pre_hook(before)
        net.register_forward_hook(after, always_call=True)
        net.register_forward_hook(lambda net, inputs, out: _logits(out, spec, num_classes))
    except RuntimeError as e:                       # of torch.jit
        kind = type(net).__name__
        raise Refused(f'--model {spec} returns a {kind}: return the module it was made of') from e
    net.build_args = dict(name=f'{file}:{function}', num_classes=num_classes, width=None, mean=None, std=None,
                      activation='relu', dual_bn=False, code=_digest(file, around))
    return net

def try_out(net, spec, shape, device):
    """
    Two images of shape (H, W, C) through net in eval mode and, leaving no trace, in train mode, before
    anything is trained. Lazy layers are made here: an optimiser asks for their parameters. Raises Refused,
    one line, for a network that cannot be trained on such images, or cannot be saved.
    """
    height, width, channels = shape
    x = torch.linspace(0, 1, 2 * channels * height * width, device=device)
    x = x.view(2, channels, height, width).requires_grad_()
    training, keys = net.training, list(net.state_dict())
    net.eval()
    try:
        logits = net(x)
        gpus = [device] if device.type == 'cuda' else []
        with torch.no_grad(), torch.random.fork_rng(devices=gpus):
            net(x)                  # what it keeps of a forward is without a graph then, and can be copied
            buffers = [b.clone() for b in net.buffers()]
            net.train()             # where it may return more than logits
            net(x)
            for b, before in zip(net.buffers(), buffers):
                b.copy_(before)
    except Refused:
        raise
    except Exception as e:
        line = f'{spec} fails on images {tuple(x.shape)}: {type(e).__name__}: {e}'.splitlines()[0]
        raise Refused(line) from e
    net.train(training)
    if not logits.requires_grad:
        raise Refused(f'{spec}: its logits have no gradient at the images, so that nothing attacks it')
    if not any(p.requires_grad for p in net.parameters()):
        raise Refused(f'{spec} has no parameter to train: each is frozen, or there is none')
    if list(net.state_dict()) != keys:
        raise Refused(f'{spec} makes layers in its first forward, and its checkpoint would fit no new one: '
                      'make them in __init__, as torch.nn.LazyLinear for instance')
    for key, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise Refused(f'{spec}: {key} in its state dict is a {type(value).__name__}, and a checkpoint '
                          'holds tensors')

def _digest(file, around):
    """16 hex digits of the file and of its neighbours that it has imported."""
    files = {file, *[getattr(module, '__file__', None) for module in around.theirs.values()]} - {None}
    digest = hashlib.sha256()
    for path in sorted(files):
        with open(path, 'rb') as f:
            digest.update(f.read())
    return digest.hexdigest()[:16]

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
    """The logits in what a network returns: itself, `logits` of a dict or an object, else the one of its
    tensors that has the right shape."""
    tensors = _tensors(out)
    if not tensors:
        raise Refused(f'--model {spec}: its output is a {type(out).__name__} without a tensor, not logits')
    if num_classes is None:
        return tensors[0]
    fitting = [t for t in tensors if t.ndim == 2 and t.shape[1] == num_classes]
    if not fitting:
        shape = ', '.join(['B', *map(str, tensors[0].shape[1:])])
        raise Refused(f'--model {spec}: its output is ({shape}), the data need logits (B, {num_classes})')
    if len(fitting) > 1:
        raise Refused(f'--model {spec}: its output holds {len(fitting)} tensors (B, {num_classes}): return '
                      "the logits alone, or a dict that names them 'logits'")
    return fitting[0]

def _tensors(out):
    """The tensors in a network's output; if one is named logits, that alone."""
    named = out.get('logits') if isinstance(out, dict) else getattr(out, 'logits', None)
    if isinstance(named, torch.Tensor):
        return [named]
    if isinstance(out, dict):
        values = out.values()
    else:
        values = out if isinstance(out, (tuple, list)) else [out]
    return [v for v in values if isinstance(v, torch.Tensor)]

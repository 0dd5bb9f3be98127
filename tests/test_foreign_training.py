"""Somebody else's networks are trained as ours, or one line says beforehand why they cannot be."""
import pytest
import torch

from support import checkpoint
from support.foreign import from_file, try_out
from test_foreign import LINEAR, X, files
from test_smoke import run

TRAINED = LINEAR + '''
import threading, types
def lazy():
    return torch.nn.Sequential(torch.nn.LazyConv2d(8, 3, 2), torch.nn.LazyBatchNorm2d(), torch.nn.Flatten(),
                               torch.nn.LazyLinear(10))
class Configured(Net):
    """Its config is its own, as with the networks of transformers."""
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(scale=2.0)
    def forward(self, x):
        return self.config.scale * super().forward(x)
class Silent(Net):
    """train() returns nothing, as where somebody keeps BN in eval mode."""
    def train(self, mode=True):
        super().train(mode)
class Keeps(Net):
    """Its features: --ema cannot copy a tensor that has a graph."""
    def forward(self, x):
        self.features = self[0](x) * self[1].bias.sum()
        return super().forward(x)
class in_place(Net):
    def forward(self, x):
        return super().forward(x.mul_(2).sub_(1))
class large(Net):
    def forward(self, x):
        return super().forward(x.view(len(x), 3, 224, 224))
class late(Net):
    def forward(self, x):
        if not hasattr(self, 'head'):
            self.head = torch.nn.Linear(10, 10)
        return self.head(super().forward(x))
def frozen():
    return Net().requires_grad_(False)
class numpy(Net):
    def forward(self, x):
        return torch.from_numpy(super().forward(x).detach().numpy())
class extra(Net):
    def get_extra_state(self):
        return {'version': 1}
    def set_extra_state(self, state):
        pass
def scripted():
    return torch.jit.script(Net())
class Auxiliary(Net):
    """In training also what a second head says."""
    def __init__(self):
        super().__init__()
        self.aux = torch.nn.Linear(3072, 10)
    def forward(self, x):
        z = self[1](self[0](x))
        return (self.aux(x.flatten(1)), z) if self.training else z
class Counted(Net):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
    def forward(self, x):
        return self[1](self[0](self.norm(x)))
class Adapted(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.a = torch.nn.Parameter(torch.zeros(10, 10))
    def forward(self, x):
        z = super().forward(x)
        return z + z @ self.a
def compiled():
    return torch.compile(Net(), backend='eager')
class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
'''

@pytest.fixture(scope='module')
def to_train(tmp_path_factory):
    return files(tmp_path_factory.mktemp('to_train'), net=TRAINED)

@pytest.mark.parametrize('name', ['lazy', 'Configured', 'Silent', 'Keeps', 'compiled'])
def test_it_is_trained_averaged_and_evaluated(name, to_train, tmp_path):
    flags = ['--dataset', 'synthetic', '--model', f'{to_train}/net.py:{name}']
    trained = run('train_adv.py', *flags, '--loss', 'trades', '--subset', 64, '--epochs', 1, '--steps', 1,
                  '--ema', 0.9, '--out', tmp_path)
    again = run('evaluate.py', tmp_path / 'best.pt', *flags, '--n', 20, '--attacks', 'clean')
    assert checkpoint.fingerprint(trained['averaged']) == checkpoint.fingerprint(again['model'])
    before, after = trained['student'](X), trained['averaged'](X)
    assert before.shape == (4, 10) and not torch.equal(before, after)

@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('name, says', [
    ('in_place', 'fails on images (2, 3, 32, 32): RuntimeError: a '), ('large', 'RuntimeError: shape'),
    ('late', 'in its first forward'), ('frozen', 'no parameter to train'), ('numpy', 'no gradient'),
    ('extra', '_extra_state in its state dict is a dict'), ('scripted', 'RecursiveScriptModule'),
    ('Auxiliary', 'its output holds 2 tensors (B, 10): return the logits alone'),
    ('Locked', '--ema and --swa need a copy of the network: TypeError')])
def test_or_one_line_says_why_it_cannot_be_before_anything_is_written(name, says, to_train, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run('train_adv.py', '--dataset', 'synthetic', '--model', f'{to_train}/net.py:{name}', '--epochs', 1,
            '--loss', 'trades', '--subset', 64, '--ema', 0.9, '--out', tmp_path / 'run')
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and says in err and not list(tmp_path.glob('run/*.pt'))

def test_awp_without_a_weight_to_perturb_is_refused_at_once(to_train, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run('train_adv.py', '--dataset', 'synthetic', '--model', f'{to_train}/net.py:Adapted', '--epochs', 1,
            '--loss', 'trades', '--awp', 0.005, '--out', tmp_path / 'run')
    assert e.value.code == 2 and '--awp perturbs what is called weight' in capsys.readouterr().err

def test_trying_it_out_leaves_no_trace(to_train):
    net = from_file(f'{to_train}/net.py:Counted', 10)
    before, noise = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    try_out(net, 'net', (32, 32, 3), torch.device('cpu'))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert torch.equal(torch.get_rng_state(), noise)

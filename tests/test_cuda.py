"""
What only a GPU can show: pytest tests/test_cuda.py, by itself, since the other tests hide the GPU. Skipped
without one.

With REHEARSE=1 what can be run on a CPU runs there, in place of the GPU and on few images: it shows that
these tests have no slip of their own, and nothing else.
"""
import copy
import gc
import json
import os
import subprocess
import sys

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')     # before CUDA starts: deterministic products

import pytest
import torch
import torch.nn.functional as F

import attacks
import losses
import models
from losses import METHODS
from support import checkpoint, runs, speed
from test_smoke import HERE, TINY, run
from tools import steps
from tools.steps import Tricks

CUDA, REHEARSAL = torch.cuda.is_available(), bool(os.environ.get('REHEARSE'))
DEVICE = torch.device('cuda' if CUDA else 'cpu')
pytestmark = pytest.mark.skipif(not (CUDA or REHEARSAL), reason='needs a GPU, and to be run alone')
gpu_alone = pytest.mark.skipif(not CUDA, reason='needs a GPU')
HALVES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
# a rehearsal takes a few, and small ones
TRAINED = list(METHODS) if CUDA else ['trades', 'logit_mse']
NETWORKS = ['resnet18', 'preactresnet18', 'wrn-10-1', 'mobilenetv2'] if CUDA else ['wrn-10-1']
WIDTH = 16 if CUDA else 8

n = 64 if CUDA else 8
X = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Y = torch.arange(n) % 10

@pytest.fixture(autouse=True)
def as_before():
    """Scripts set these for their whole process."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)

@gpu_alone
def test_images_outside_0_and_1_are_nan_where_asking_would_wait():
    x = 2 * X.to(DEVICE)
    x_adv = attacks.pgd(lambda x_adv: x_adv.flatten(1).sum(1), x, steps=1)
    assert x_adv.isnan().all()

@pytest.fixture(scope='module')
def robust(tmp_path_factory):
    """A network that withstands a little: the checkpoint's path."""
    out = tmp_path_factory.mktemp('robust')
    run('train_adv.py', '--loss', 'pgd_at', *TINY[:2], '--width', 8, '--epochs', 4 if CUDA else 1,
        '--steps', 2, '--subset', 512 if CUDA else 64, '--amp', 'off', '--out', out)
    return out / 'last.pt'

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run('train_teacher.py', *TINY, '--epochs', 1, '--out', out)
    return out / 'best.pt'

# -----------------------------------------------------------------------------
# the network and its attack

def network(name):
    torch.manual_seed(0)
    net = models.build(name, 10, width=WIDTH)
    net(torch.rand(64, 3, 32, 32))                  # BN statistics of something
    return net

def seen(net, dtype=None):
    """Logits, gradient at X, one signed step and the objective after ten, on the CPU in fp32."""
    device = next(net.parameters()).device
    x, y = X.to(device, memory_format=speed.layout(device)), Y.to(device)

    def logits_of(x):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return net(x).float()

    def objective(x_adv):
        return F.cross_entropy(logits_of(x_adv), y, reduction='none')

    if dtype is torch.float16:
        objective = attacks.scaled(objective, 2.0 ** 10)
    with attacks.attack_mode(net):
        leaf = x.detach().requires_grad_()
        grad, = torch.autograd.grad(objective(leaf).sum(), leaf)
        one = attacks.fgsm(objective, x)
        ten = attacks.pgd(objective, x, init='zero')
        with torch.no_grad():
            return [t.cpu() for t in (logits_of(x), grad / grad.norm(), one, objective(ten).mean())]

@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_logits_gradients_and_attacks_are_those_of_the_cpu(name, precision):
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    net = network(name)
    logits, grad, one, ten = seen(net)
    there = copy.deepcopy(net).to(DEVICE, memory_format=speed.layout(DEVICE))
    logits2, grad2, one2, ten2 = seen(there, HALVES.get(precision))
    off, cosine, signs = {'fp32': (1e-3, 0.9999, 0.99), 'bf16': (0.05, 0.9, 0.75),
                          'fp16': (0.01, 0.99, 0.9)}[precision]
    assert ((logits2 - logits).abs().max() / logits.abs().max()) < off
    assert F.cosine_similarity(grad.flatten(), grad2.flatten(), dim=0) > cosine
    assert ((one2 - one).abs() < 1e-6).float().mean() > signs
    assert abs(ten2 - ten) < 0.05 * ten             # ten steps of different signs, and as strong

# -----------------------------------------------------------------------------
# training

def flags_of(loss, teacher):
    asked = losses.asked_for(METHODS[loss])
    flags = ['--loss', loss]
    flags += ['--teacher', teacher] if any(name.startswith('t_') for name in asked) else []
    return flags + (['--standard-teacher', teacher] if any(name.startswith('s_') for name in asked) else [])

@pytest.mark.parametrize('amp', HALVES)
@pytest.mark.parametrize('loss', TRAINED)
def test_an_epoch_of_every_loss_in_mixed_precision(loss, amp, teacher, tmp_path):
    script = run('train_adv.py', *TINY, *flags_of(loss, teacher), '--epochs', 1, '--steps', 2, '--amp', amp,
                 '--batch-size', 8, '--out', tmp_path)
    live = script['update'].__globals__
    row = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[-1])
    student, scaler = live['student'], live['scaler']
    assert row['loss'] == row['loss'] and all(bool(v.isfinite().all()) for v in student.state_dict().values())
    assert scaler.is_enabled() == (amp == 'fp16')
    if amp == 'fp16':
        # the scale has come down to where it holds: the last step was taken
        assert scaler.get_scale() >= 16 and scaler.state_dict()['_growth_tracker'] > 0
    if METHODS[loss].inner is None:
        return
    student.train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    x = X.to(DEVICE, memory_format=speed.layout(DEVICE))
    x_adv = live['craft'](x, Y.to(DEVICE))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert x_adv.dtype == torch.float32 and x_adv.isfinite().all()
    assert 0.1 < ((x_adv - x).abs() * 255).mean() and ((x_adv - x).abs() * 255).max() < 8.001

def stepped(side):
    """x_adv and the weights after two updates, from the same start."""
    net, craft, update = side
    x, y = X.to(DEVICE), Y.to(DEVICE)
    torch.manual_seed(3)
    x_adv = craft(x, y).clone()
    for _ in range(2):
        update(x, y)
    return x_adv.cpu(), torch.cat([p.detach().flatten() for p in net.parameters()]).cpu()

COMPILED = Tricks(once=True, frozen=True, compile_attack=True, compile_update=True)

@pytest.mark.parametrize('tricks', [
    COMPILED, pytest.param(COMPILED._replace(graphs=True), marks=gpu_alone),
    Tricks(once=True, frozen=True, folded=True), Tricks(fused=True)],
    ids=['compile', 'graphs', 'folded', 'fused'])
@pytest.mark.parametrize('loss', ['trades', 'logit_mse'] if CUDA else ['trades'])
def test_compiled_and_graphs_compute_what_eager_does(loss, tricks):
    torch.backends.cudnn.allow_tf32 = False
    method = METHODS[loss]._replace(settings=dict(init='uniform'))
    setting = steps.Setting(method, losses.hparams(method.loss), DEVICE, None, 3,
                            dict(name=NETWORKS[0], width=WIDTH))
    x_adv, weights = stepped(steps.plain(setting))
    x_adv2, weights2 = stepped(steps.ours(setting, tricks))
    # a gradient next to zero may have either sign
    assert ((x_adv - x_adv2).abs() > 1e-6).float().mean() < 0.02
    assert F.cosine_similarity(weights, weights2, dim=0) > 0.999

def test_train_adv_compiled_crafts_and_updates_as_eager(tmp_path):
    found = []
    for flags in [], ['--compile']:
        script = run('train_adv.py', *TINY[:2], '--loss', 'trades', '--model', 'wrn-10-1', '--width', 8,
                     '--subset', 64, '--epochs', 1, '--steps', 2, '--init', 'uniform', '--amp', 'off',
                     '--out', tmp_path / f'{flags}', *flags)
        live = script['update'].__globals__
        torch.manual_seed(7)
        live['student'].load_state_dict(models.build('wrn-10-1', 10, width=8).state_dict())
        live['student'].train()
        torch.manual_seed(8)
        x, y = X.to(DEVICE), Y.to(DEVICE)
        x_adv = live['craft'](x, y)
        live['loss_on'](x, x_adv, y).mean().backward()
        found.append((x_adv.cpu(), torch.cat([p.grad.flatten() for p in live['student'].parameters()]).cpu()))
    (x_adv, grad), (x_adv2, grad2) = found
    assert ((x_adv - x_adv2).abs() > 1e-6).float().mean() < 0.02
    assert F.cosine_similarity(grad, grad2, dim=0) > 0.99

# -----------------------------------------------------------------------------
# stopped and continued

def trained(out, monkeypatch, flags, stop_after=None):
    """The weights after two epochs, stopped within them and continued if stop_after says after which step."""
    with monkeypatch.context() as patch:
        precise = speed.precision
        def deterministic(amp, device):
            dtype = precise(amp, device)
            torch.backends.cudnn.benchmark = False          # it may choose another kernel in the next process
            return dtype
        patch.setattr(speed, 'precision', deterministic)
        argv = ['train_adv.py', '--loss', 'dkl', *TINY, '--epochs', 2, '--steps', 2, '--batch-size', 16,
                '--awp', 0.01, '--awp-warmup', 0, '--out', out, *flags]
        if stop_after is not None:
            save_if_due, counted = runs.Run.save_if_due, []
            def stopping(self, state):
                counted.append(1)
                self.stop_asked = len(counted) == stop_after
                save_if_due(self, state)
            patch.setattr(runs.Run, 'save_if_due', stopping)
            with pytest.raises(SystemExit):
                run(*argv)
            assert (out / 'state.pt').exists()
            patch.setattr(runs.Run, 'save_if_due', save_if_due)
            argv.append('--resume')
        run(*argv)
    net, _ = checkpoint.load_checkpoint(out / 'last.pt')
    return torch.cat([v.double().flatten() for v in net.state_dict().values()])

@pytest.mark.parametrize('amp', ['off', *HALVES] if CUDA else ['fp16'])
def test_resumed_bit_for_bit_with_deterministic_algorithms(amp, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(True)
    whole = trained(tmp_path / 'whole', monkeypatch, ['--amp', amp])
    parts = trained(tmp_path / 'parts', monkeypatch, ['--amp', amp], stop_after=3)
    assert torch.equal(whole, parts)

def test_resumed_without_them_differs_by_rounding(tmp_path, monkeypatch):
    whole = trained(tmp_path / 'whole', monkeypatch, ['--amp', 'off'])
    parts = trained(tmp_path / 'parts', monkeypatch, ['--amp', 'off'], stop_after=3)
    assert F.cosine_similarity(whole, parts, dim=0) > 0.999

# -----------------------------------------------------------------------------
# evaluation

JUDGED = ['--n', str(n), '--eps', '8', '--no-audit', '--attacks', 'clean', 'fgsm', 'pgd', 'aa-fast']

@pytest.fixture(scope='module')
def cpu_report(robust):
    command = [sys.executable, HERE / 'evaluate.py', robust, *JUDGED, '--out', robust.parent / 'cpu.json']
    hidden = dict(os.environ, CUDA_VISIBLE_DEVICES='')
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=hidden)
    return robust.parent / 'cpu.json'

@pytest.mark.parametrize('flags', [[], ['--fast']], ids=['eager', 'fast'])
def test_evaluation_image_by_image_against_the_cpu(flags, robust, cpu_report, tmp_path):
    run('evaluate.py', robust, *JUDGED, *flags, '--out', tmp_path / 'gpu.json')
    here, there = [json.loads(path.read_text())['results'] for path in (cpu_report, tmp_path / 'gpu.json')]
    assert here['clean']['robust'] == there['clean']['robust']
    for row in here:            # the noise of the start is another
        differ = sum(a != b for a, b in zip(here[row]['robust'], there[row]['robust']))
        assert differ <= max(1, 0.05 * n), (row, differ)

# -----------------------------------------------------------------------------
# refusals

@gpu_alone
def test_more_processes_than_gpus_are_refused(tmp_path):
    processes = torch.cuda.device_count() + 1
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc-per-node={processes}']
    command = [*torchrun, HERE / 'train_adv.py', '--loss', 'pgd_at', *TINY, '--out', tmp_path / 'run']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode and f'{processes} processes on {processes - 1} GPUs' in done.stderr
    assert 'train_adv.py", line' not in done.stderr            # torchrun's own traceback follows

@gpu_alone
def test_out_of_memory_is_one_line(tmp_path):
    gc.collect()                                    # what earlier scripts hold is room for this one
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 2 ** 28) / whole)
    try:
        with pytest.raises(SystemExit) as stop:
            run('train_adv.py', '--loss', 'pgd_at', '--dataset', 'synthetic', '--width', 64,
                '--batch-size', 512, '--epochs', 1, '--steps', 2, '--out', tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert 'out of memory with --batch-size 512: try 256' in str(stop.value.code)
    assert '\n' not in str(stop.value.code)

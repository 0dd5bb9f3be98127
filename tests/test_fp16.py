"""
float16, which nobody trains in on a CPU: autocast and GradScaler exist there, so that scaling, skipped steps,
AWP and the schedule are run and not only read.
"""
import copy
import warnings

import pytest
import torch

import attacks
import losses
import models
from losses import INNERS, METHODS
from support import checkpoint, validation
from test_smoke import TINY, X, Y, run

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run('train_teacher.py', *TINY, '--epochs', 2, '--amp', 'fp16', '--out', out)
    return out / 'best.pt'

@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*flags): one epoch of two steps in fp16, without its validation -> the script's live globals."""
    def judge(*args, **options):
        return 50.0, 50.0, 1.0
    monkeypatch.setattr(validation, 'clean_and_pgd', judge)
    monkeypatch.setattr(checkpoint, 'clean_and_pgd', judge)

    def start(*flags):
        script = run('train_adv.py', *TINY, '--subset', 8, '--batch-size', 4, '--epochs', 1, '--steps', 2,
                     '--amp', 'fp16', '--out', tmp_path / 'run', *flags)
        live = script['update'].__globals__
        live['student'].train()
        # its own schedule has ended
        live['optimizer'].param_groups[0].update(lr=0.05, initial_lr=0.05)
        live['scheduler'] = torch.optim.lr_scheduler.ConstantLR(live['optimizer'], factor=1.0)
        return live

    return start

def test_an_attack_has_one_scale_and_one_start_whatever_row_it_is_in():
    for name, row in METHODS.items():
        for inner in INNERS.values():
            if row.inner is inner.objective:
                assert row.fp16_scale == inner.fp16_scale, name
                assert row.settings.get('init', 'uniform') == inner.init or name == 'mart'

X_ADV = (X + 8 / 255 * torch.randn(X.shape, generator=torch.Generator().manual_seed(2)).sign()).clamp(0, 1)

def weights(live):
    return torch.cat([p.detach().flatten() for p in live['parameters']]).clone()

def sound(live):
    """Weights and BN statistics are finite."""
    networks = [net for net in (live['student'], live['guide']) if net]
    return all(bool(v.isfinite().all()) for net in networks for v in net.state_dict().values())

def moved_by(live, dtype):
    """What one update on a given x_adv adds to the weights in this precision, and its loss; everything is as
    before afterwards."""
    before = [(thing, copy.deepcopy(thing.state_dict())) for thing in
              (live['student'], live['guide'], live['optimizer'], live['scheduler']) if thing]
    scaler, start = live['scaler'], weights(live)
    live['craft'] = lambda x, y: X_ADV
    live['dtype'], live['scaler'] = dtype, torch.amp.GradScaler('cpu', enabled=dtype is torch.float16)
    for _ in range(20):                             # the first scales may be too large, and are halved
        loss = live['update'](X, Y)
        if not torch.equal(weights(live), start):
            break
    moved = weights(live) - start
    for thing, state in before:
        thing.load_state_dict(state)
    live['dtype'], live['scaler'] = torch.float16, scaler
    return moved, loss

@pytest.mark.parametrize('loss', METHODS)
def test_every_loss_takes_the_step_that_it_takes_in_fp32(loss, teacher, train):
    asked = losses.asked_for(METHODS[loss])
    flags = ['--teacher', teacher] if any(name.startswith('t_') for name in asked) else []
    flags += ['--standard-teacher', teacher] if any(name.startswith('s_') for name in asked) else []
    live = train('--loss', loss, *flags)
    assert live['scaler'].is_enabled() and live['step'] == 2 and sound(live)
    fp16, value16 = moved_by(live, torch.float16)
    fp32, value32 = moved_by(live, None)
    assert torch.allclose(value16, value32, rtol=0.05, atol=0.01)
    # a gradient still scaled would be larger by thousands, one scaled back twice smaller
    assert 0.8 < fp16.norm() / fp32.norm() < 1.25 and torch.cosine_similarity(fp16, fp32, dim=0) > 0.8

def test_a_step_that_overflows_is_skipped_and_the_next_is_taken(train):
    live = train('--loss', 'trades', '--awp', 0.01, '--awp-warmup', 0, '--ema', 0.9)
    student, optimizer, scheduler = live['student'], live['optimizer'], live['scheduler']
    live['scaler'] = torch.amp.GradScaler('cpu', init_scale=2.0 ** 34)
    before, momentum = weights(live), copy.deepcopy(optimizer.state_dict()['state'])
    at, average = scheduler.last_epoch, copy.deepcopy(student.bn1.running_mean)
    loss = live['update'](X, Y)
    # AWP's own gradient has overflowed, too: no weight and no statistic may keep a trace of it
    assert torch.equal(weights(live), before) and loss.isfinite() and sound(live)
    assert not torch.equal(student.bn1.running_mean, average)
    for k, state in optimizer.state_dict()['state'].items():
        assert torch.equal(state['momentum_buffer'], momentum[k]['momentum_buffer'])
    assert live['scaler'].get_scale() == 2.0 ** 33
    # the schedule goes on, so that it ends where it should
    assert scheduler.last_epoch == at + 1
    while live['scaler'].get_scale() > 2.0 ** 8 and torch.equal(weights(live), before):
        live['update'](X, Y)
    assert not torch.equal(weights(live), before) and sound(live) and live['scaler'].get_scale() > 2.0 ** 8

def test_a_first_step_that_is_skipped_is_no_warning(train, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: scaler(device, init_scale=2.0 ** 60))
    with warnings.catch_warnings(record=True) as caught:
        train('--loss', 'pgd_at')
    assert not [w for w in caught if 'lr_scheduler' in str(w.message)]

def test_an_attack_that_overflows_goes_on_with_a_smaller_scale(train, monkeypatch):
    live = train('--loss', 'pgd_at', '--steps', 8, '--init', 'zero')
    live['method'] = live['method']._replace(fp16_scale=2.0 ** 30)      # 2 ** 30 overflows, 2 ** 14 does not
    x_adv = live['craft'](X, Y)
    assert x_adv.isfinite().all() and ((x_adv - X).abs() * 255).mean() > 2
    loss = live['loss_on'](X, x_adv, Y)
    assert loss.isfinite().all() and sound(live)

def test_scaled_leaves_the_values_and_scales_the_gradient():
    x = torch.rand(3, 4, requires_grad=True)
    def objective(x):
        return x.square().sum(1)
    seen = []
    def in_the_network(x):
        x = x * 1.0
        x.register_hook(lambda grad: seen.append(grad))
        return objective(x)
    value = attacks.scaled(in_the_network, 1024.0)(x)
    assert torch.equal(value, objective(x))
    grad, = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(seen[0], 2 * 1024 * x)
    assert torch.allclose(grad / grad.norm(), x / x.norm())

@pytest.mark.parametrize('norm', ['Linf', 'L2'])            # sign(NaN) is 0, but NaN / |NaN| is NaN
def test_scaled_lets_one_image_rest_and_not_the_others(norm):
    limit = 60_000
    class Half(torch.autograd.Function):            # overflows as a layer in fp16 does
        @staticmethod
        def forward(ctx, x):
            return x.clone()
        @staticmethod
        def backward(ctx, grad):
            return torch.where(grad.abs() > limit, torch.nan, grad)

    slope = torch.tensor([1.0, 100.0, 1e4])[:, None]
    objective = attacks.scaled(lambda x: (slope * Half.apply(x) * slope.sqrt()).sum(1), 1024.0)
    x = torch.full((3, 5), 0.5)
    x_adv = attacks.pgd(objective, x, eps=0.1, step_size=0.01, steps=5, init='zero', norm=norm)
    size = (x_adv - x).norm(dim=1) if norm == 'L2' else (x_adv - x)[:, 0]
    steps = (size / 0.01).round().tolist()
    assert steps[0] == 5 and 0 < steps[2] < 5 and x_adv.isfinite().all()

def test_awp_leaves_alone_what_overflows():
    torch.manual_seed(0)
    net = models.build('resnet18', 10, width=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(4, 3, 32, 32)
    def objective():
        return net.conv1.weight.sum() * torch.tensor(float('inf')) + net(x).sum()
    with attacks.frozen_statistics(net):
        with attacks.weights_perturbed(net, objective, gamma=0.01):
            assert torch.equal(net.conv1.weight, before['conv1.weight'])
            assert not torch.equal(net.linear.weight, before['linear.weight'])
            assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

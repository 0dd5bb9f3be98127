"""
What this repository claims, checked in under 90 seconds on two cores: python test_smoke.py (or pytest).
Slower and rarer claims: pytest tests
"""
import inspect, json, math, pathlib, re, runpy, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attacks, data, losses, models
from support import checkpoint
from losses import METHODS, hparams, needs
from support.files import Refused
from tools import methods

HERE = pathlib.Path(__file__).parent
README = (HERE / 'README.md').read_text()
TINY = '--dataset synthetic --width 4 --subset 64'.split()

# -----------------------------------------------------------------------------
# losses

def inputs(B=7, K=10, scale=3.0, dtype=torch.float64, seed=0):
    """One value for every name a loss may ask for."""
    g = torch.Generator().manual_seed(seed)
    names = {name for m in METHODS.values() for name in losses.asked_for(m)} - {'y', 'progress', 'class_p'}
    out = {name: (scale * torch.randn(B, K, generator=g, dtype=torch.float64)).to(dtype)
           for name in sorted(names)}
    class_p = torch.rand(B, K, generator=g, dtype=torch.float64).to(dtype)
    return dict(out, class_p=class_p / class_p.sum(1, keepdim=True), progress=0.9,
                y=torch.randint(K, (B,), generator=g))

def call(fn, tensors, **hp):
    return fn(**{name: tensors[name] for name in needs(fn)}, **hp)

# Written from the papers, over probabilities and one class at a time; nothing is shared with losses.py.
def softmax(z, T=1.0):
    e = [math.exp((v - max(z)) / T) for v in z]
    return [v / sum(e) for v in e]

def KL(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))

def H(p, q):
    """Cross-entropy of two distributions."""
    return -sum(a * math.log(b) for a, b in zip(p, q))

def MSE(a, b):
    return sum((u - v) ** 2 for u, v in zip(a, b)) / len(a)

def als_label(p, y, alpha):
    least = [k for k in range(len(p)) if p[k] == min(p)]
    return [(1 - alpha) * (k == y) + alpha * (k in least) / len(least) for k in range(len(p))]

def pairs(w, d):
    """DKL's double sum, as printed."""
    return sum(w[j] * w[k] * (d[j] - d[k]) ** 2 for j in range(len(d)) for k in range(len(d)))

def nll(p, i):
    return -math.log(p[i['y']])

FORMULAS = {
    'standard':   lambda i: nll(i['p'], i),
    'als':        lambda i: H(als_label(i['p'], i['y'], 0.1), i['p']),
    'pgd_at':     lambda i: nll(i['p_adv'], i),
    'nat_adv':    lambda i: 0.5 * nll(i['p'], i) + 0.5 * nll(i['p_adv'], i),
    'advprop':    lambda i: 0.5 * nll(i['p'], i) + 0.5 * nll(i['p_adv'], i),
    'alp':        lambda i: 0.5 * nll(i['p'], i) + 0.5 * nll(i['p_adv'], i) + 0.5 * MSE(i['z'], i['z_adv']),
    'trades':     lambda i: nll(i['p'], i) + 6 * KL(i['p'], i['p_adv']),
    'hat':        lambda i: nll(i['p'], i) + 2.5 * KL(i['p'], i['p_adv'])
                            - 0.5 * math.log(i['p_helper'][int(np.argmax(i['t_adv']))]),
    'mart':       lambda i: nll(i['p_adv'], i)
                            - math.log(1.0001 - max(i['p_adv'][k] for k in range(10) if k != i['y']) + 1e-12)
                            + 5 * (1.0000001 - i['p'][i['y']]) * KL(i['p'], i['p_adv']),
    'dkl':        lambda i: nll(i['p'], i) + 4 * H(i['p'], i['p_adv'])
                            + 20 / 4 * pairs(i['w'], [a - b for a, b in zip(i['z'], i['z_adv'])]),
    'lbgat':      lambda i: MSE(i['z_adv'], i['guide']) + nll(softmax(i['guide']), i),
    'softmax_kl': lambda i: 0.2 * (KL(i['t'], i['p']) + KL(i['t'], i['p_adv'])) + KL(i['p'], i['p_adv']),
    'logit_mse':  lambda i: 0.2 * (MSE(i['z'], i['v']) + MSE(i['z_adv'], i['v'])) + MSE(i['z'], i['z_adv']),
    'ltd':        lambda i: H(softmax(i['v'], 5), i['p']) + 6 * KL(i['p'], i['p_adv']),
    'ard':        lambda i: 0.1 * 900 * KL(softmax(i['v'], 30), softmax(i['z_adv'], 30)),
    'iad1':       lambda i: i['t_adv'][i['y']] ** 0.1 * KL(i['t'], i['p_adv'])
                            + (1 - i['t_adv'][i['y']] ** 0.1) * KL(i['p'], i['p_adv']),
    'iad2':       lambda i: 0.25 * nll(i['p_adv'], i)
                            + 0.5 * i['t_adv'][i['y']] ** 0.1 * KL(i['t_adv'], i['p_adv'])
                            + 0.5 * (1 - i['t_adv'][i['y']] ** 0.1) * KL(i['p'], i['p_adv'])
                            + 0.25 * KL(i['s_adv'], i['p_adv']),
    'rslad':      lambda i: (5 * KL(i['t'], i['p_adv']) + KL(i['t'], i['p'])) / 60,
    'adaad':      lambda i: KL(i['t_adv'], i['p_adv']) / 10,
    'kd_swa':     lambda i: 0.3 * nll(i['p_adv'], i)
                            + 4 * 0.6 * H(softmax(i['v_adv'], 2), softmax(i['z_adv'], 2))
                            + 4 * 0.1 * H(softmax(i['s_z_adv'], 2), softmax(i['z_adv'], 2)),
}
CLIMBS = {
    'ce':           lambda i: nll(i['p_adv'], i),
    'kl':           lambda i: KL(i['p'], i['p_adv']),
    'mse':          lambda i: MSE(i['z'], i['z_adv']),
    'least_likely': lambda i: math.log(i['p_adv'][i['p'].index(min(i['p']))]),
    'teacher':      lambda i: KL(i['t'], i['p_adv']),
    'both':         lambda i: KL(i['t_adv'], i['p_adv']),
}

@pytest.mark.parametrize('fn, formula', [
    *[pytest.param(METHODS[k].loss, f, id=k) for k, f in FORMULAS.items()],
    *[pytest.param(losses.INNERS[k][0], f, id=f'climb_{k}') for k, f in CLIMBS.items()]])
def test_equals_its_formula_in_float64(fn, formula):
    tensors = inputs()
    got = call(fn, tensors)
    for b in range(len(got)):
        row = {k: v[b].tolist() for k, v in tensors.items() if k != 'progress'}
        i = dict(row, z=row['logits'], z_adv=row['logits_adv'], v=row['t_logits'],
                 v_adv=row['t_logits_adv'], s_z_adv=row['s_logits_adv'], guide=row['guide_logits'],
                 w=row['class_p'], p=softmax(row['logits']), p_adv=softmax(row['logits_adv']),
                 p_helper=softmax(row['logits_helper']), t=softmax(row['t_logits']),
                 t_adv=softmax(row['t_logits_adv']), s_adv=softmax(row['s_logits_adv']))
        assert got[b].item() == pytest.approx(formula(i), rel=1e-10)

def test_every_method_and_every_attack_has_a_formula():
    for rows, formulas, name in (METHODS, FORMULAS, 'FORMULAS'), (losses.INNERS, CLIMBS, 'CLIMBS'):
        missing = [row for row in rows if row not in formulas]
        assert not missing, f'test_smoke.py, {name}: write an independent formula for {" ".join(missing)}'
        assert set(formulas) <= set(rows)

@pytest.mark.parametrize('name', METHODS)
def test_loss_contract(name):
    loss, inner = METHODS[name].loss, METHODS[name].inner
    tensors = inputs(dtype=torch.float32, scale=60.0)           # confident: softmax underflows in float32
    for k, v in tensors.items():
        if k.endswith(('logits', 'logits_adv', 'logits_helper')):
            v.requires_grad_(not k.startswith(('t_', 's_')))
    for fn in filter(None, (loss, inner)):
        value = call(fn, tensors)
        assert value.shape == (7,) and value.dtype == torch.float32 and value.isfinite().all()
        target = tensors['logits_adv'] if 'logits_adv' in needs(fn) else tensors['logits']
        grad, = torch.autograd.grad(value.sum(), target)
        assert grad.isfinite().all() and grad.abs().sum() > 0
        order = torch.randperm(7)
        shuffled = {k: v if k == 'progress' else v[order] for k, v in tensors.items()}
        assert torch.equal(call(fn, shuffled), value[order])
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
               for p in inspect.signature(loss).parameters.values())

def test_hard_label_free_methods_name_no_label():
    said = {name for name, m in METHODS.items() if re.search(r'\bNo label\b', m.loss.__doc__)}
    assert said == {name for name, m in METHODS.items() if 'y' not in losses.asked_for(m)}
    assert {'softmax_kl', 'logit_mse', 'ltd', 'rslad', 'adaad'} <= said

def test_kl_direction_by_hand():
    p, q = torch.tensor([[.5, .5]]).log(), torch.tensor([[.9, .1]]).log()
    expected = .5 * math.log(.5 / .9) + .5 * math.log(.5 / .1)      # KL(p || q), q first
    assert losses.kl(q, p).item() == pytest.approx(expected)

def test_softmax_kl_reverse_swaps_the_teacher_terms_only():
    i, kl = inputs(), losses.kl
    expected = (0.2 * (kl(i['t_logits'], i['logits']) + kl(i['t_logits'], i['logits_adv']))
                + kl(i['logits_adv'], i['logits']))
    assert torch.allclose(call(losses.softmax_kl, i, reverse=True), expected)

def test_clean_branch_of_trades_is_not_detached():
    z, z_adv = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
    y = torch.zeros(3, dtype=torch.long)
    with_kl, = torch.autograd.grad(losses.trades(z, z_adv, y).sum(), z)
    without, = torch.autograd.grad(losses.trades(z, z_adv, y, beta=0.0).sum(), z)
    assert (with_kl - without).abs().max() > 1e-3

def test_options_of_losses_do_what_they_say():
    i, kl, ce = inputs(), losses.kl, losses.ce
    z, z_adv, v, y = i['logits'], i['logits_adv'], i['t_logits'], i['y']
    same = lambda a, b: torch.allclose(a, b, rtol=1e-12)
    assert same(call(losses.iad1, dict(i, progress=0.1)), kl(z_adv, v))
    assert same(call(losses.iad1, i, released=True) - call(losses.iad1, i),
                (1 - i['t_logits_adv'].softmax(1)[range(7), y] ** 0.1) * kl(z_adv, v))
    akd2 = 0.25 * ce(z_adv, y) + 0.5 * kl(z_adv, i['t_logits_adv']) + 0.25 * kl(z_adv, i['s_logits_adv'])
    assert same(call(losses.iad2, dict(i, progress=0.1)), akd2)
    assert same(call(losses.ard, i, alpha=0.0), ce(z, y))
    assert same(call(losses.lbgat, i, beta=6.0) - call(losses.lbgat, i), 6 * kl(z_adv, z))
    assert same(call(losses.adaad, i, alpha=0.0), 0.1 * kl(z, v))

def test_dkl_has_the_gradient_of_kl():
    """The theorem behind it: w = p, alpha = beta = 1, and z' fixed in the weighted square."""
    z, z_adv, y = inputs()['logits'].requires_grad_(), inputs()['logits_adv'].requires_grad_(), inputs()['y']
    grad = lambda value, of: torch.autograd.grad(value.sum(), of)[0]
    p = z.detach().softmax(1)
    decoupled = lambda z_adv, beta: (losses.dkl(z, z_adv, p, y, alpha=1.0, beta=beta) - losses.ce(z, y))
    assert torch.allclose(grad(decoupled(z_adv, 1.0), z), grad(losses.kl(z_adv, z), z))
    assert torch.allclose(grad(decoupled(z_adv, 0.0), z_adv), grad(losses.kl(z_adv, z), z_adv))

@pytest.mark.parametrize('rule', losses.TARGETS.values(), ids=losses.TARGETS)
def test_soft_targets_are_distributions_ties_included(rule):
    logits = torch.tensor([[0., 1, 2, 3], [5, 0, 0, 0], [1, 1, 1, 1], [2, 3, 0, 1]])
    y = torch.tensor([0, 1, 2, 3])
    target = rule(logits, y, smoothing=0.3)
    assert torch.allclose(target.sum(1), torch.ones(4)) and (target >= 0).all()
    expected = {'smooth': torch.full((4, 4), 0.075) + 0.7 * torch.eye(4),
                'adversarial_smoothing': torch.tensor([[1, 0, 0, 0], [0, 0.8, 0.1, 0.1],
                                                       [0.075, 0.075, 0.775, 0.075], [0, 0, 0.3, 0.7]]),
                }[rule.__name__]
    assert torch.allclose(target, expected)

@pytest.mark.parametrize('name', [k for k, m in METHODS.items() if 'y' in needs(m.loss)
                                  and k not in ('als', 'ard', 'iad1')])     # no cross-entropy to a label
def test_soft_targets_go_with_every_loss_that_takes_labels(name):
    i, loss = inputs(), METHODS[name].loss
    soften = lambda smoothing: dict(i, y=losses.Softened(i['y'], losses.smooth, smoothing))
    assert torch.allclose(call(loss, soften(0.0)), call(loss, i))
    # a loss that knows y, and has no cross-entropy to it, belongs into the list above
    assert not torch.allclose(call(loss, soften(0.1)), call(loss, i)), f'{name} does not see soft targets'

# -----------------------------------------------------------------------------
# attacks

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = models.build('resnet18', 10, width=4)
    net(torch.rand(64, 3, 32, 32))          # BN statistics of something
    return net

X = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6)

@pytest.mark.parametrize('norm, eps', [('Linf', 8 / 255), ('L2', 0.5)])
@pytest.mark.parametrize('init', ['uniform', 'normal', 'zero'])
def test_pgd_stays_in_the_ball_and_raises_its_objective(net, norm, eps, init):
    objective = lambda x: F.cross_entropy(net(x), Y, reduction='none')
    with attacks.attack_mode(net):
        x_adv = attacks.pgd(objective, X, eps=eps, step_size=eps / 4, steps=10, init=init, norm=norm)
        with torch.no_grad():
            assert (objective(x_adv) > objective(X)).all()
    size = (x_adv - X).flatten(1).abs().amax(1) if norm == 'Linf' else (x_adv - X).flatten(1).norm(dim=1)
    assert (size <= eps * (1 + 1e-5)).all() and (size > eps / 2).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.dtype == torch.float32 and not x_adv.requires_grad

def test_restarts_keep_the_best_of_every_image(net):
    objective = lambda x: F.cross_entropy(net(x), Y, reduction='none')
    settings = dict(eps=8 / 255, step_size=8 / 255, steps=1)
    with attacks.attack_mode(net), torch.no_grad():
        torch.manual_seed(3)
        singles = torch.stack([objective(attacks.pgd(objective, X, **settings)) for _ in range(4)])
        torch.manual_seed(3)
        best = objective(attacks.pgd(objective, X, restarts=4, **settings))
    assert torch.allclose(best, singles.amax(0)) and (best > singles[-1]).any()

def test_fgsm_is_one_signed_step(net):
    objective = lambda x: F.cross_entropy(net(x), Y, reduction='none')
    with attacks.attack_mode(net):
        x = X.clone().requires_grad_()
        grad, = torch.autograd.grad(objective(x).sum(), x)
        expected = (X + 8 / 255 * grad.sign()).clamp(X - 8 / 255, X + 8 / 255).clamp(0, 1)
        assert torch.equal(attacks.fgsm(objective, X, eps=8 / 255), expected)

def test_self_alignment_has_no_gradient_at_x(net):
    """Why the attacks of TRADES and its family start beside x."""
    with attacks.attack_mode(net):
        z = net(X).detach()
        for objective, method in ((losses.climb_kl, METHODS['trades']),
                                  (losses.climb_mse, METHODS['logit_mse'])):
            x = X.clone().requires_grad_()
            grad, = torch.autograd.grad(objective(net(x), z).sum(), x)
            assert grad.abs().max() < 1e-6 and method.settings['init'] == 'normal'

def test_pgd_takes_vectors_a_radius_per_image_any_sizes_and_inference_mode():
    def climb(x):
        return x.flatten(1).sum(1)
    x = torch.full((4, 5), 0.5, requires_grad=True)
    eps = torch.tensor([0.1, 0.2, 0.3, 0.4])
    x_adv = attacks.pgd(climb, x, eps=eps, step_size=np.full(10, 0.1))
    assert (torch.allclose(x_adv, (0.5 + eps)[:, None].expand(4, 5)) and not x_adv.requires_grad
            and x.requires_grad)
    one_step = attacks.pgd(climb, x, eps=eps, step_size=eps / 4, steps=1, init='zero')
    assert torch.allclose(one_step, (0.5 + eps / 4)[:, None].expand(4, 5))
    assert torch.allclose(
        (attacks.pgd(climb, x, eps=eps, step_size=0.1, norm='L2', restarts=2) - x).norm(dim=1), eps)
    of_numpy = np.float32(0.1)
    assert torch.allclose(attacks.pgd(climb, x, eps=of_numpy, step_size=of_numpy), torch.tensor(0.6))
    assert attacks.pgd(climb, X[:0]).shape == X[:0].shape
    with torch.inference_mode():
        made_there = torch.full((2, 3, 4, 4), 0.5)
        x_adv = attacks.pgd(climb, made_there, eps=0.1, step_size=0.1)
    assert torch.allclose(x_adv, made_there + 0.1)
    with pytest.raises(ValueError), attacks.attack_mode(torch.nn.Linear(1, 1), bn='Train'):
        pass

def test_cw_margin_by_hand():
    logits = torch.tensor([[1., 5., 3.], [4., 0., 1.]])
    assert attacks.cw_margin(logits, torch.tensor([1, 2])).tolist() == [-2., 3.]

@pytest.mark.parametrize('bn', ['eval', 'train'])
def test_attack_mode_moves_nothing_and_restores_all(net, bn):
    net.train()
    net.layer1.eval()                       # a mixed state has to survive too
    net.conv1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, grads = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    with attacks.attack_mode(net, bn=bn):
        assert not any(p.requires_grad for p in net.parameters()) and net.bn1.training == (bn == 'train')
        attacks.pgd(lambda x: F.cross_entropy(net(x), Y, reduction='none'), X, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert grads == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    net.train().requires_grad_(True)

# -----------------------------------------------------------------------------
# scripts, through their command lines

def run(script, *argv):
    """A script in this process, as __main__ with these arguments: saves the import of torch.
    Returns its globals."""
    old = sys.argv
    sys.argv = [script, *map(str, argv)]
    try:
        return runpy.run_path(str(HERE / script), run_name='__main__')
    except Refused as e:                    # as the script's excepthook does
        print(f'{script}: error: {e}', file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        sys.argv, sys.excepthook = old, sys.__excepthook__

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run('train_teacher.py', '--dataset', 'synthetic', '--width', 4, '--epochs', 4, '--out', out)
    return out / 'best.pt'

@pytest.mark.parametrize('loss', METHODS)
def test_every_loss_trains_and_the_teacher_does_not(loss, teacher, tmp_path):
    before = teacher.read_bytes()
    asked = losses.asked_for(METHODS[loss])
    flags = ['--teacher', teacher] if any(name.startswith('t_') for name in asked) else []
    flags += ['--standard-teacher', teacher] if any(name.startswith('s_') for name in asked) else []
    script = run('train_adv.py', '--loss', loss, *TINY, *flags, '--epochs', 1, '--steps', 2,
                 '--out', tmp_path)
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert log[0]['loss'] == loss and log[0]['torch'] == str(torch.__version__)
    assert math.isfinite(log[1]['loss']) and len(log) == 2
    for name in ('best.pt', 'last.pt'):
        net, meta = checkpoint.load_checkpoint(tmp_path / name)
        assert meta['loss'] == loss and meta['hparams'] == hparams(METHODS[loss].loss) and meta['eps'] == 8
    torch.manual_seed(0)
    start = models.build('resnet18', 10, width=4)
    assert checkpoint.fingerprint(net) != checkpoint.fingerprint(start)         # the student moved
    if script['teacher'] is not None:
        assert all(p.grad is None and not p.requires_grad for p in script['teacher'].parameters())
        assert (checkpoint.fingerprint(script['teacher']) == meta['teacher']['fingerprint']
                == checkpoint.fingerprint(checkpoint.load_checkpoint(teacher)[0]))
        assert teacher.read_bytes() == before
    assert all(p.grad is None for p in script['student'].parameters())
    assert script['student'].conv1.weight.requires_grad

    # what the loss is given carries a gradient, but for the frozen teachers' answers
    live, given = script['loss_on'].__globals__, {}
    def spy(**inputs):
        given.update(inputs)
        return METHODS[loss].loss(**inputs)
    live['method'] = METHODS[loss]._replace(loss=spy)
    live['loss_on'](X, X, Y, moves_bn=False)
    for name, value in given.items():
        if 'logits' in name:
            assert value.requires_grad != name.startswith(('t_', 's_')), f'train_adv.py, loss_on: {name}'

@pytest.mark.parametrize('amp', ['bf16', 'fp16'] if torch.cuda.is_available() else ['bf16'])
def test_a_training_in_mixed_precision(amp, teacher, tmp_path):
    """On a GPU where there is one. More: tests/test_fp16.py on a CPU, tests/test_cuda.py on a GPU."""
    script = run('train_adv.py', '--loss', 'logit_mse', '--teacher', teacher, *TINY, '--epochs', 1,
                 '--steps', 2, '--amp', amp, '--out', tmp_path)
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert (log[0]['precision'] == {'bf16': 'torch.bfloat16', 'fp16': 'torch.float16'}[amp]
            and math.isfinite(log[1]['loss']))
    net, _ = checkpoint.load_checkpoint(tmp_path / 'last.pt')
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in net.parameters())
    assert script['student'].conv1.weight.is_cuda == torch.cuda.is_available()

def test_evaluate_reports_and_writes_the_same_numbers(teacher, tmp_path, capsys):
    run('evaluate.py', teacher, '--n', 40, '--eps', 64, '--attacks', 'fgsm', 'pgd', 'cw',
        '--out', tmp_path / 'e.json')
    report, screen = json.loads((tmp_path / 'e.json').read_text()), capsys.readouterr().out
    results = report['results']
    assert list(results) == ['clean', 'fgsm', 'pgd-20', 'cw-20', 'all of the above'] and report['complete']
    for name, r in results.items():
        assert re.search(rf'^{re.escape(name)} +{r["accuracy"]:.2f} ', screen, re.M) and r['n'] == 40
        assert r['max_perturbation'] is None or 32 < r['max_perturbation'] <= 64.01
        assert r['class_std'] == pytest.approx(np.std(list(r['per_class'].values())))
    net, d = checkpoint.load_checkpoint(teacher)[0], data.load('synthetic')
    clean = (net(data.to_float(d.x_test[:40])).argmax(1) == d.y_test[:40]).float().mean().item()
    assert results['clean']['accuracy'] == pytest.approx(100 * clean) and clean > 0.2
    assert (results['all of the above']['accuracy'] <= results['pgd-20']['accuracy']
            < results['clean']['accuracy'])

# -----------------------------------------------------------------------------
# README

def test_readme_has_the_table_of_methods():
    if methods.table() not in README:
        pytest.fail('README.md, Methods: paste what python -m tools.methods prints over the table',
                    pytrace=False)

if __name__ == '__main__':
    sys.exit(pytest.main([__file__, '-q', *sys.argv[1:]]))

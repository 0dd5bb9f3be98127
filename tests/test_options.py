"""What composes with every loss: weight perturbation, averages, dual BN, activations, BN order, free
training, warm starts, images without labels, recipes."""
import json, math, re, shutil, subprocess, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attacks, data, losses, models
from support import checkpoint
from losses import METHODS
from test_smoke import HERE, README, TINY, X, Y, net, run, teacher          # net, teacher: fixtures

def train(out, *flags, loss='trades', epochs=1):
    """In fp32, also where bf16 is native: what follows is compared with fp32."""
    return run('train_adv.py', '--loss', loss, *TINY, '--steps', 1, '--epochs', epochs, '--amp', 'off',
               '--out', out, *flags)

def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}

# -----------------------------------------------------------------------------
# adversarial weight perturbation

def test_awp_moves_the_matrices_by_gamma_uphill_and_restores_every_bit(net):
    net.train()
    objective = lambda: F.cross_entropy(net(X), Y)
    before = state(net)
    with attacks.frozen_statistics(net):
        low = objective().item()
        with attacks.weights_perturbed(net, objective, gamma=0.01):
            within, high = state(net), objective().item()
    assert high > low
    for k, v in before.items():
        moved = (within[k] - v).norm() if v.is_floating_point() else 0
        assert moved == pytest.approx(0.01 * v.norm().item(), rel=1e-3) if v.dim() > 1 else moved == 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())

def test_awp_leaves_a_frozen_layer_alone(net):
    net.conv1.weight.requires_grad_(False)
    before = state(net)
    with attacks.weights_perturbed(net, lambda: F.cross_entropy(net(X), Y), gamma=0.01):
        assert torch.equal(net.conv1.weight, before['conv1.weight'])
        assert not torch.equal(net.linear.weight, before['linear.weight'])
    assert not net.conv1.weight.requires_grad and torch.equal(net.linear.weight, before['linear.weight'])

def test_awp_passes_over_a_weight_that_is_not_used(net):
    net.spare = torch.nn.Linear(2, 2)
    before, seen = net.spare.weight.clone(), []
    with attacks.weights_perturbed(net, lambda: F.cross_entropy(net(X), Y), gamma=0.01, average=seen.append):
        assert torch.equal(net.spare.weight, before)
    assert None not in seen[0]
    with pytest.raises(ValueError, match='no linear weight'):
        with attacks.weights_perturbed(net, lambda: net.linear.bias.sum(), gamma=0.01):
            pass

def test_awp_changes_the_update_and_leaves_the_statistics_to_the_real_forwards(tmp_path):
    """With a learning rate of zero the weights stay where they were, bit for bit."""
    script = train(tmp_path / 'a', '--awp', 0.01, '--awp-warmup', 0, '--lr', 0)
    torch.manual_seed(0)
    start = models.build('resnet18', 10, width=4)
    assert all(torch.equal(a, b) for a, b in zip(script['student'].parameters(), start.parameters()))
    assert script['student'].bn1.num_batches_tracked == 2 * 2           # two batches: x and x_adv, no more
    assert torch.equal(*[train(tmp_path / f'warm-up{len(flags)}', *flags)['student'].linear.weight
                         for flags in ([], ['--awp', 0.01, '--awp-warmup', 1])])
    moved = [train(tmp_path / f'moved{len(flags)}', *flags)['student'].linear.weight
             for flags in ([], ['--awp', 0.01, '--awp-warmup', 0])]
    assert not torch.equal(*moved)

# -----------------------------------------------------------------------------
# averages of the weights

def test_ema_averages_weights_and_statistics_and_is_what_is_kept(tmp_path):
    script = train(tmp_path, '--ema', 0.9)
    before, student = state(script['averaged']), state(script['student'])
    kept = checkpoint.load_checkpoint(tmp_path / 'last.pt')[0].state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in before.items())
    assert not torch.equal(before['bn1.running_mean'], student['bn1.running_mean'])
    one = train(tmp_path / 'one', '--ema', 0.9, '--subset', 32)     # a single step: decay (1 + 1) / (10 + 1)
    torch.manual_seed(0)
    start = models.build('resnet18', 10, width=4)
    for a, s, w in zip(*(net.parameters() for net in (one['averaged'], one['student'], start))):
        assert torch.allclose(a, 2 / 11 * w + 9 / 11 * s, atol=1e-6)
    script['move_average'](0.25)
    for k, v in script['averaged'].state_dict().items():
        expected = before[k] + 0.25 * (student[k] - before[k]) if v.is_floating_point() else student[k]
        assert torch.allclose(v, expected, atol=1e-6)

def test_swa_is_the_mean_of_the_epochs_with_statistics_of_its_own(tmp_path, monkeypatch):
    seen, update_bn = [], torch.optim.swa_utils.update_bn
    def spy(loader, averaged):
        seen.append(state(averaged))
        update_bn(loader, averaged)
    monkeypatch.setattr(torch.optim.swa_utils, 'update_bn', spy)
    script = train(tmp_path, '--swa', 0.4, epochs=2)                    # after both epochs
    first, student = seen[0], script['student'].state_dict()
    net, _ = checkpoint.load_checkpoint(tmp_path / 'last.pt')
    for k, p in net.named_parameters():
        assert torch.allclose(p, (first[k] + student[k]) / 2, atol=1e-6)
    batches = data.epoch(script['d'], 32, seed=0, epoch=2)
    with torch.no_grad():
        outputs = [net.conv1(x) for x, _ in batches]
    mean, var = [torch.stack([getattr(o, f)((0, 2, 3)) for o in outputs]).mean(0) for f in ('mean', 'var')]
    assert torch.allclose(net.bn1.running_mean, mean, atol=1e-5)
    assert torch.allclose(net.bn1.running_var, var, atol=1e-5)

# -----------------------------------------------------------------------------
# BN: two branches, and the order of the forwards

def moved(old, *batches):
    """running_mean of the first BN after these inputs of it."""
    for batch in batches:
        old = 0.9 * old + 0.1 * batch.mean((0, 2, 3))
    return old

def first_bn(script, x):
    with torch.no_grad():
        return script['student'].conv1(x)

def test_dual_bn_keeps_the_two_apart(tmp_path):
    script = train(tmp_path, '--craft-branch', 'main', loss='advprop')
    bn, x, x_adv = script['student'].bn1, X, 1 - X
    main, aux = bn.running_mean.clone(), bn.aux.running_mean.clone()
    script['student'].train()
    losses_on_both = script['loss_on'](x, x_adv, Y)
    assert torch.allclose(bn.running_mean, moved(main, first_bn(script, x)), atol=1e-6)
    assert torch.allclose(bn.aux.running_mean, moved(aux, first_bn(script, x_adv)), atol=1e-6)
    with models.bn_branch(script['student'], 'main'):
        script['student'].zero_grad()
        F.cross_entropy(script['student'](x), Y).backward()
        assert bn.weight.grad.abs().sum() > 0 and bn.aux.weight.grad is None
    assert losses_on_both.shape == Y.shape

@pytest.mark.parametrize('craft_branch, calls', [('main', 0), ('aux', 1)])
def test_the_craft_branch_crafts(craft_branch, calls, tmp_path):
    script, seen = train(tmp_path, '--craft-branch', craft_branch, loss='advprop'), []
    script['student'].bn1.aux.register_forward_hook(lambda *_: seen.append(1))
    script['craft'](X, Y)
    assert len(seen) == calls                                           # of --steps 1

def test_a_source_of_transfer_uses_the_branch_that_it_was_validated_with(tmp_path):
    train(tmp_path, '--eval-branch', 'aux', loss='advprop')
    script = run('evaluate.py', tmp_path / 'last.pt', '--branch', 'main', '--n', 4, '--attacks', 'clean',
                 '--transfer-from', tmp_path / 'last.pt', '--no-audit')
    assert script['source'].bn1.auxiliary and not script['model'].bn1.auxiliary

def test_both_branches_can_be_evaluated(tmp_path):
    train(tmp_path, loss='advprop', epochs=2)
    reports = {b: run('evaluate.py', tmp_path / 'last.pt', '--branch', b, '--n', 64, '--attacks', 'clean')
               for b in ('main', 'aux')}
    net, _ = checkpoint.load_checkpoint(tmp_path / 'last.pt')
    x = data.to_float(data.load('synthetic').x_test[:64])
    logits = {}
    for b, script in reports.items():
        with torch.no_grad(), models.bn_branch(net, b):
            logits[b] = net(x)
        y = data.load('synthetic').y_test[:64]
        assert script['results']['clean']['correct'] == (logits[b].argmax(1) == y).sum()
        assert f'goes through the {b} BN' in ' '.join(script['notes'])
    assert not torch.allclose(*logits.values())
    assert torch.equal(net(x), logits['main'])                          # the default

@pytest.mark.parametrize('order', ['nat-adv', 'adv-nat', 'nat', 'adv'])
def test_bn_order_does_what_its_name_says(order, tmp_path):
    script = train(tmp_path, '--bn-order', order)
    script['student'].train()
    batches = dict(nat=first_bn(script, X), adv=first_bn(script, 1 - X))
    expected = moved(script['student'].bn1.running_mean.clone(), *[batches[k] for k in order.split('-')])
    value = script['loss_on'](X, 1 - X, Y)
    assert torch.allclose(script['student'].bn1.running_mean, expected, atol=1e-6)
    script['student'].train()
    z, z_adv = script['student'](X), script['student'](1 - X)           # the values do not depend on it
    assert torch.allclose(value, losses.trades(z, z_adv, Y), rtol=1e-4, atol=1e-5)

# -----------------------------------------------------------------------------
# activations

def test_the_hybrid_is_relu_forward_and_softplus_backward():
    u = torch.linspace(-2, 2, 101, requires_grad=True)
    out = models.ACTIVATIONS['hybrid'](u)
    assert torch.equal(out, F.relu(u))
    grad, = torch.autograd.grad(out.sum(), u)
    smooth, = torch.autograd.grad(models.ACTIVATIONS['softplus'](u).sum(), u)
    assert torch.allclose(grad, smooth, atol=1e-6) and torch.allclose(grad, 1 / (1 + torch.exp(-10 * u)))

@pytest.mark.parametrize('model', ['resnet18', 'resnet50', 'preactresnet18', 'wrn-10-1', 'mobilenetv2'])
def test_the_activation_reaches_every_nonlinearity(model):
    torch.manual_seed(0)
    relu, hybrid, silu = [models.build(model, 10, width=4, activation=a).eval()
                          for a in ('relu', 'hybrid', 'silu')]
    hybrid.load_state_dict(relu.state_dict()), silu.load_state_dict(relu.state_dict())
    x = X.clone().requires_grad_()
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (relu, hybrid)]
    assert torch.equal(relu(X), hybrid(X)) and not torch.allclose(relu(X), silu(X))
    assert not torch.allclose(*grads)
    assert checkpoint.fingerprint(relu) != checkpoint.fingerprint(hybrid)
    assert not any(m.act is F.relu for m in hybrid.modules() if isinstance(m, models.Net))

def test_a_hybrid_is_attacked_with_both_gradients(tmp_path):
    train(tmp_path, '--activation', 'hybrid')
    runs = [run('evaluate.py', tmp_path / 'last.pt', '--n', 16, '--attacks', 'fgsm', *flags)
            for flags in ([], ['--activation', 'relu'])]
    assert [s['model'].build_args['activation'] for s in runs] == ['hybrid', 'relu']
    assert runs[0]['results']['clean']['correct'] == runs[1]['results']['clean']['correct']
    assert any('evaluated with relu' in note for note in runs[1]['notes'])

# -----------------------------------------------------------------------------
# attacks in training

def test_free_training_carries_the_perturbation_over(tmp_path):
    script = train(tmp_path, '--free', 3, '--steps', 10, loss='pgd_at')
    delta = script['delta']
    assert delta.abs().max() <= 8 / 255 + 1e-7 and (delta.abs() > 7.9 / 255).float().mean() > 0.2
    x = torch.rand(32, 3, 32, 32)
    x_adv = script['craft'](x, None)
    assert torch.allclose(x_adv, (x + delta).clamp(0, 1), atol=1e-6) and x_adv.requires_grad
    assert script['step'] == 2 * 3 and script['scheduler'].last_epoch == 2 * 3

def test_eps_and_step_grow_over_the_ramp(tmp_path):
    script = train(tmp_path, '--eps-ramp', 0.5, loss='pgd_at')
    craft, size = script['craft'], []
    for progress in (0.0, 0.25, 0.5, 1.0):
        craft.__globals__['step'] = progress * script['total_steps']
        size.append(255 * (craft(X, Y) - X).abs().max().item())
    assert size[0] == 0 and 3.5 < size[1] < 4.01 and 7 < size[2] < 8.01 and 7 < size[3] < 8.01

def test_step_schedules():
    assert attacks.step_sizes(2.0, 4, 'constant') == [2, 2, 2, 2]
    assert attacks.step_sizes(2.0, 4, 'linear') == [2, 1.5, 1, 0.5]
    assert attacks.step_sizes(2.0, 2, 'cosine') == [2, pytest.approx(1)]
    x = torch.full((1, 3, 4, 4), 0.5)                                   # uphill everywhere: sizes add up
    x_adv = attacks.pgd(lambda x: x.sum((1, 2, 3)), x, eps=1.0, step_size=[0.1, 0.05], steps=2, init='zero')
    assert torch.allclose(x_adv, torch.full_like(x, 0.65))

def test_inner_changes_what_the_attack_climbs_and_where_it_starts(tmp_path):
    script = train(tmp_path / 'a', '--inner', 'mse', loss='pgd_at')
    assert script['method'].inner is losses.climb_mse and script['args'].init == 'normal'
    assert train(tmp_path / 'b', '--inner', 'ce')['args'].init == 'uniform'

# -----------------------------------------------------------------------------
# where training starts, and from what

def test_a_warm_start_starts_from_the_teacher(teacher, tmp_path):
    weights = checkpoint.load_checkpoint(teacher)[0].state_dict()
    for i, flags in enumerate([('--warm-start', 'teacher', '--teacher', teacher, '--loss', 'logit_mse'),
                               ('--warm-start', teacher, '--loss', 'advprop')]):
        student = train(tmp_path / str(i), '--lr', 0, *flags)['student']
        for k, p in student.named_parameters():
            assert torch.equal(p, weights[k.replace('.aux.', '.')])

def images(n=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)

@pytest.mark.parametrize('kind', ['npy', 'npz', 'compressed'])
def test_images_without_labels_are_read_and_of_an_npy_stay_on_the_disk(kind, tmp_path):
    path = tmp_path / f'extra.{"npy" if kind == "npy" else "npz"}'
    dict(npy=lambda: np.save(path, images()), npz=lambda: np.savez(path, label=np.zeros(50), image=images()),
         compressed=lambda: np.savez_compressed(path, x=images()))[kind]()
    opened = data.open_images(path, (32, 32, 3))
    if kind == 'npy':
        np.save(tmp_path / 'grey.npy', np.zeros((5, 8, 8), np.uint8))
        assert data.open_images(tmp_path / 'grey.npy', (8, 8, 1)).shape == (5, 8, 8, 1)
    assert np.array_equal(opened, images()) and isinstance(opened, np.memmap) == (kind == 'npy')
    batches = data.image_batches(opened, 20, 'none', torch.Generator().manual_seed(0))
    x = torch.cat([next(batches) for _ in range(5)])                    # two rounds of the fifty
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    number = lambda x: sorted((255 * x).round().long().sum((1, 2, 3)).tolist())
    assert number(x) == sorted(2 * images().astype(int).sum((1, 2, 3)).tolist())

@pytest.mark.parametrize('loss, labels', [('logit_mse', 'not needed'), ('trades', "the teacher's")])
def test_images_without_labels_get_the_teachers_or_none(loss, labels, teacher, tmp_path, capsys):
    np.savez(tmp_path / 'extra.npz', x=images())
    script = train(tmp_path / 'out', '--extra', tmp_path / 'extra.npz', '--extra-fraction', 0.25,
                   '--teacher', teacher, loss=loss)
    assert labels in capsys.readouterr().out
    script['training_batches'].__globals__.update(epoch=1)
    batches = list(script['training_batches']())
    assert len(batches) == script['steps_per_epoch'] == 2
    for x, y in batches:
        assert len(x) == len(y) == 32
        known = {row.tobytes() for row in script['d'].x_train.numpy()}
        rows = (255 * x).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        assert [row.tobytes() in known for row in rows] == [True] * 24 + [False] * 8
        with torch.no_grad():
            expected = script['teacher'](x[24:]).argmax(1) if loss == 'trades' else torch.full((8,), -1)
        assert torch.equal(y[24:], expected)

def test_every_name_is_the_right_network_on_the_right_images(tmp_path):
    script = train(tmp_path)
    class Answers(torch.nn.Module):
        """Ten equal logits: who was asked, and the mean of what."""
        def __init__(self, who):
            super().__init__()
            self.who = who
        def forward(self, x):
            return (100 * self.who + x.mean((1, 2, 3)))[:, None].expand(-1, 10)
    def loss(logits, logits_adv, logits_helper, t_logits, t_logits_adv, s_logits_adv, guide_logits, class_p,
             y, progress, *, h=2.0, T=1.0):
        return locals()
    who = dict(net=1, teacher_net=2, standard_net=3, guide_net=4)
    script['loss_on'].__globals__.update({k: Answers(v) for k, v in who.items()},
                                         method=losses.Method(loss, None), hp=dict(h=2.0, T=1.0),
                                         loss_inputs=losses.needs(loss), guide=torch.nn.Identity(),
                                         class_p=torch.rand(10, 10), class_sum=torch.zeros(10, 10),
                                         step=0.25 * script['total_steps'])
    seen, x_adv = script['loss_on'](X, X / 2, Y), X / 2
    for name, net, x in [('logits', 'net', X), ('logits_adv', 'net', x_adv),
                         ('logits_helper', 'net', X + 2 * (x_adv - X)), ('guide_logits', 'guide_net', X),
                         ('t_logits', 'teacher_net', X), ('t_logits_adv', 'teacher_net', x_adv),
                         ('s_logits_adv', 'standard_net', x_adv)]:
        assert torch.equal(seen[name], Answers(who[net])(x)), name
    assert torch.equal(seen['y'], Y) and seen['progress'] == 0.25
    assert torch.equal(seen['class_p'], script['loss_on'].__globals__['class_p'][Y])

# -----------------------------------------------------------------------------
# state that two of the losses ask for

def test_dkl_gets_the_class_means_of_the_epoch_before(tmp_path):
    script = train(tmp_path, '--lr', 0, '--awp', 1e-9, '--awp-warmup', 0, loss='dkl')
    class_p = script['class_p']
    assert torch.allclose(class_p.sum(1), torch.ones(10)) and (script['class_sum'] == 0).all()
    student = script['student'].train()
    d, expected = script['d'], torch.zeros(10, 10)
    for x, y in data.epoch(d, 32, seed=0, epoch=1):
        expected.index_add_(0, y, (student(x) / 4).softmax(1).detach())
    assert torch.allclose(class_p, expected / expected.sum(1, keepdim=True), atol=1e-4)
    script['update'](X, Y)                                          # with a look ahead that does not count
    assert script['class_sum'].sum() == pytest.approx(len(X), rel=1e-5)

def test_the_guide_of_lbgat_learns_and_is_not_the_student(tmp_path):
    script = train(tmp_path, loss='lbgat')
    guide, student = script['guide'], script['student']
    kept, _ = checkpoint.load_checkpoint(tmp_path / 'last.pt')
    assert checkpoint.fingerprint(kept) == checkpoint.fingerprint(student) != checkpoint.fingerprint(guide)
    ours = {id(p) for group in script['optimizer'].param_groups for p in group['params']}
    assert {id(p) for p in guide.parameters()} <= ours and guide.bn1.num_batches_tracked == 2

# -----------------------------------------------------------------------------
# recipes

@pytest.mark.parametrize('loss', [k for k, m in METHODS.items() if m.recipe])
def test_a_recipe_is_taken_and_explicit_flags_win(loss, teacher, tmp_path):
    asked = losses.asked_for(METHODS[loss])
    flags = ['--teacher', teacher] if any(name.startswith('t_') for name in asked) else []
    flags += ['--standard-teacher', teacher] if any(name.startswith('s_') for name in asked) else []
    train(tmp_path, '--recipe', 'paper', *flags, loss=loss)
    config = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[0])
    for k, v in METHODS[loss].recipe.items():
        assert config[k] == (1 if k in ('epochs', 'steps') else v)

@pytest.mark.parametrize('schedule, rises_for', [('cosine', -1), ('onecycle', 0.25 * 6 - 1)])
def test_cosine_is_the_one_cycle_without_its_rise(schedule, rises_for, tmp_path):
    train(tmp_path, '--schedule', schedule, loss='pgd_at', epochs=3)
    rates = [json.loads(line)['lr'] for line in (tmp_path / 'log.jsonl').read_text().splitlines()[1:]]
    for rate, step in zip(rates, (2, 4)):               # of 0 to 5
        done = (step - rises_for) / (5 - rises_for)
        assert rate == pytest.approx(0.1 * (1 + math.cos(math.pi * done)), rel=1e-4)

# -----------------------------------------------------------------------------
# README: adding your own

def test_readme_recipe_for_a_loss_of_your_own(tmp_path):
    """Pasted where its comments say, the new loss trains and its flag exists."""
    block = re.search(r'```python\n(# losses.py.*?)```', README, re.S)[1]
    loss, row, name = re.split(r'# .*, .*\n', block)[1:]
    assert len(block.splitlines()) < 15
    for file in HERE.glob('*.py'):
        (tmp_path / file.name).write_text(file.read_text())
    shutil.copytree(HERE / 'support', tmp_path / 'support')
    for file, before, code in [('losses.py', 'def softmax_kl(', loss), ('losses.py', "    'trades': ", row),
                               ('train_adv.py', "    if 'guide_logits' in loss_inputs:  ", name)]:
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1
        (tmp_path / file).write_text(text.replace(before, code.rstrip('\n') + '\n' + before))
    done = subprocess.run([sys.executable, 'train_adv.py', '--loss', 'trades_flip', '--gamma', '0.5', *TINY,
                           '--epochs', '1', '--steps', '1'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '--gamma 0.5;' in done.stdout, done.stderr

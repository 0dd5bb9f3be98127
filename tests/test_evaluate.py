"""evaluate.py: what it reports, refuses and flags, and that the eager network in fp32 has the last word."""
import argparse, fcntl, json, os, pty, re, struct, subprocess, sys, termios

import pytest
import torch

import data
from support import evaluation, shards, speed, summary
from test_smoke import HERE, run

NETS = '''
import torch
from torch import nn
import torch.nn.functional as F
class Net(nn.Sequential):
    def __init__(self, after=lambda z: z):
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))
        self.after = after
    def forward(self, x):
        return self.after(super().forward(x))
class Training(Net):
    def train(self, mode=True):
        return nn.Module.train(self, True)
plain = Net
training = Training
two = lambda: Net(lambda z: z[:, :2])
crash = lambda: Net(lambda z: z @ z)
detached = lambda: Net(lambda z: z.detach())
neighbours = lambda: Net(lambda z: z - z.mean(0))
noisy = lambda: Net(lambda z: F.dropout(z, 0.2, True))
saturated = lambda: Net(lambda z: 1e4 * z)
half = lambda: Net(lambda z: z.bfloat16())
misnamed = lambda: Net(lambda z: z.roll(1, 1))
class within(Net):
    def forward(self, x):
        with torch.autocast('cpu', torch.bfloat16):
            return super().forward(x).float()
softmax = lambda: Net(lambda z: z.softmax(1))
class counting(Net):
    def forward(self, x):
        with torch.no_grad():
            self[1].bias += 1
        return super().forward(x)
class writing(Net):
    def forward(self, x):
        x.data.mul_(0.5)
        return super().forward(x)
'''

@pytest.fixture(scope='module')
def tmp(tmp_path_factory):
    """The NETS, and weights for them: class means and noise, right as it is, half broken at eps 2.5."""
    out = tmp_path_factory.mktemp('nets')
    (out / 'nets.py').write_text(NETS)
    d = data.load('synthetic')
    x = data.to_float(d.x_train).flatten(1)
    weight = torch.stack([x[d.y_train == c].mean(0) - x.mean(0) for c in range(10)])
    weight += 8 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weights = {'1.weight': 0.2 * weight, '1.bias': -0.2 * weight @ x.mean(0)}
    changes = dict(plain=lambda v: v, half=torch.Tensor.half, nan=lambda v: v * float('nan'))
    for name, change in changes.items():
        torch.save({k: change(v) for k, v in weights.items()}, out / f'{name}.pt')
    torch.save(dict(weights, **{'1.weight': weights['1.weight'].half()}), out / 'half_but_bias.pt')
    return out

N = 30
FLAGS = f'--n {N} --batch-size 12 --eps 2.5 --steps 5'.split()

def net(tmp, name='plain', weights='plain.pt'):
    return [tmp / weights, '--model', f'{tmp}/nets.py:{name}', '--dataset', 'synthetic']

def logits(tmp, x):
    weights = torch.load(tmp / 'plain.pt', weights_only=True)
    return x.flatten(1) @ weights['1.weight'].T + weights['1.bias']

def evaluate(*argv, out):
    script = run('evaluate.py', *argv, '--out', out)
    return script, json.loads(out.read_text())

def refused(says, *argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run('evaluate.py', *argv)
    out = capsys.readouterr()
    assert e.value.code == 2 and says in out.err and out.err.count('\n') == 1, out
    assert 'accuracy' not in out.out                        # before any work

@pytest.fixture(scope='module')
def whole(tmp):
    script, r = evaluate(*net(tmp), *FLAGS, '--attacks', 'fgsm', 'pgd', 'cw', 'weak', 'strong',
                         '--transfer-from', tmp / 'plain.pt', '--sweep-eps', 0, 1, 12, '--sweep-steps', 1, 10,
                         '--save-adv', tmp / 'adv.pt', out=tmp / 'e.json')
    return script, r, tmp / 'adv.pt'

def test_every_row_is_there_and_means_what_it_says(whole):
    _, r, _ = whole
    right = {row: v['correct'] for row, v in r['results'].items()}
    assert set(right) == {'clean', 'fgsm', 'pgd-5', 'cw-5', 'weak', 'strong',
                          'transfer', 'transfer-cw', 'all within eps 2.5',
                          'pgd-5 at eps 0', 'pgd-5 at eps 1', 'pgd-5 at eps 12', 'pgd-1', 'pgd-10'}
    assert right['pgd-5 at eps 0'] == right['clean'] > right['pgd-5'] > right['pgd-5 at eps 12']
    assert right['transfer'] == right['pgd-5']              # from itself
    assert right['pgd-10'] <= right['pgd-1']
    moved = {row: v['max_perturbation'] for row, v in r['results'].items()}
    assert 3 < moved['weak'] < 4.01 and 120 < moved['strong'] < 127.6 and moved['pgd-5 at eps 0'] == 0
    d = data.load('synthetic')
    for row, v in r['results'].items():
        assert [sum(line) for line in v['confusion']] == torch.bincount(d.y_test[:N], minlength=10).tolist()
        assert sum(line[c] for c, line in enumerate(v['confusion'])) == v['correct'] == v['robust'].count('1')
        for c, line in enumerate(v['confusion']):
            assert v['class_interval'][str(c)] == summary.wilson(line[c], sum(line))
            assert v['per_class'][str(c)] == pytest.approx(100 * line[c] / sum(line))
    low, high = summary.wilson(50, 100)
    assert (low, high) == pytest.approx((40.4, 59.6), abs=0.05)

def test_the_report_says_what_was_evaluated_and_what_was_looked_at(whole, tmp):
    script, r, _ = whole
    assert set(r['evaluated']) >= {'weights', 'images', 'eps', 'norm', 'pyautoattack', 'precision', 'seed',
                                   'torch', 'step_size', 'transfer_from', 'search', 'tf32', 'batch_size'}
    assert len(r['evaluated']['weights']) == 16
    assert r['evaluated']['weights'] == r['evaluated']['transfer_from']
    assert r['search'] == 'float32, eager'
    assert {'precision', 'batch_size', 'randomised', 'zero_gradient', 'logits', 'recount', 'hold_out',
            'autoattack', 'threat_model', 'n'} <= set(r['flags'])
    raised = {name for name, flag in r['flags'].items() if flag['raised']}
    assert raised == {'n'}
    assert all(r['flags'][name]['text'] in r['notes'] for name in raised)
    assert len(r['audit']) > 10 and all(set(c) == {'name', 'figure', 'verdict', 'text'} for c in r['audit'])

def test_saved_images_are_what_the_report_says(whole, tmp):
    _, r, path = whole
    saved, d = torch.load(path, weights_only=True), data.load('synthetic')
    x, y = data.to_float(d.x_test[:N]), d.y_test[:N]
    right = logits(tmp, saved['x_adv']).argmax(1) == y
    assert saved['x_adv'].dtype == torch.float32 and (saved['x_adv'] - x).abs().max() <= 2.501 / 255
    assert torch.equal(right, saved['robust'])
    # all of this radius, and the sweep over steps after it
    assert right.sum() <= r['results']['all within eps 2.5']['correct'] < r['results']['clean']['correct']

def test_images_that_are_verified_and_saved_again_stay_what_they_are(tmp, tmp_path):
    flags = [*net(tmp), *FLAGS, '--no-audit', '--attacks', 'pgd']
    evaluate(*flags, '--save-adv', tmp_path / 'a.adv', out=tmp_path / 'a.json')
    again = ['--verify', tmp_path / 'a.adv', '--save-adv', tmp_path / 'b.adv']
    evaluate(*flags, *again, out=tmp_path / 'b.json')
    r = evaluate(*net(tmp), *FLAGS, '--no-audit', '--verify', tmp_path / 'b.adv', out=tmp_path / 'c.json')[1]
    a, b = [torch.load(tmp_path / name, weights_only=True) for name in ('a.adv', 'b.adv')]
    assert 0 < a['robust'].sum() < N and not r['flags']['verified']['raised']
    assert r['results']['verified']['correct'] == b['robust'].sum() <= a['robust'].sum()

def test_steps_as_large_as_the_range_are_taken(tmp, tmp_path):
    """In proportion they, and the audit's, would be larger."""
    r = evaluate(*net(tmp), '--n', 8, '--eps', 140, '--step-size', 129, '--steps', 1, '--attacks', 'pgd',
                 '--sweep-eps', 8, 255, out=tmp_path / 'e.json')[1]
    assert (r['results']['pgd-1 at eps 255']['correct'] <= r['results']['pgd-1 at eps 8']['correct']
            and r['audit'])

def test_attacks_that_are_all_of_another_radius_have_no_row_of_all(tmp, tmp_path):
    r = evaluate(*net(tmp), '--n', 8, '--no-audit', '--attacks', 'weak', 'strong', out=tmp_path / 'e.json')[1]
    assert list(r['results']) == ['clean', 'weak', 'strong'] and 'threat_model' not in [
        name for name, flag in r['flags'].items() if flag['raised']]

def test_an_attack_of_another_radius_is_not_among_all(tmp, tmp_path):
    r = evaluate(*net(tmp), '--n', 8, '--eps', '1', '--no-audit', '--steps', 1, '--attacks', 'pgd', 'strong',
                 out=tmp_path / 'e.json')[1]
    assert list(r['results']) == ['clean', 'pgd-1', 'strong', 'all within eps 1']
    assert r['results']['all within eps 1']['correct'] == r['results']['pgd-1']['correct']

def test_verify(whole, tmp, tmp_path, capsys):
    _, _, path = whole
    saved = torch.load(path, weights_only=True)
    r = evaluate(*net(tmp), *FLAGS, '--verify', path, out=tmp_path / 'e.json')[1]
    assert list(r['results']) == ['clean', 'verified'] and not r['flags']['verified']['raised']
    assert r['results']['verified']['correct'] == saved['robust'].sum()
    torch.save(dict(saved, robust=~saved['robust']), tmp_path / 'lies.pt')
    assert evaluate(*net(tmp), *FLAGS, '--verify', tmp_path / 'lies.pt', out=tmp_path / 'l.json')[1]['flags'][
        'verified']['raised']
    torch.save(dict(saved, x_adv=(saved['x_adv'] * 1.05).clamp(0, 1)), tmp_path / 'far.pt')
    torch.save(dict(saved, x_adv=saved['x_adv'] - 0.5), tmp_path / 'range.pt')
    torch.save(dict(saved, x_adv=(saved['x_adv'] * 255).byte()), tmp_path / 'bytes.pt')
    for file, says, flags in [(path, 'eps was 2.5, is 8.0', ['--n', N]),
                              (path, 'images was 30', ['--eps', 2.5]),
                              (tmp_path / 'far.pt', 'images are outside the Linf ball of 2.5/255', FLAGS),
                              (tmp_path / 'range.pt', 'not float32 (30, 3, 32, 32) in [0, 1]', FLAGS),
                              (tmp_path / 'bytes.pt', 'x_adv is torch.uint8', FLAGS),
                              (tmp / 'plain.pt', 'was not written by evaluate.py --save-adv', FLAGS)]:
        refused(says, *net(tmp), '--verify', file, *flags, '--out', tmp_path / 'r.json', capsys=capsys)

def test_an_image_that_is_wrong_as_it_is_is_not_verified(whole, tmp, tmp_path):
    """Adversarial images of one network, judged by another that is wrong on other clean images."""
    weights = torch.load(tmp / 'plain.pt', weights_only=True)
    other = torch.randn(weights['1.weight'].shape, generator=torch.Generator().manual_seed(1))
    weights['1.weight'] = weights['1.weight'] + 0.5 * weights['1.weight'].std() * other
    torch.save(weights, tmp_path / 'other.pt')
    r = evaluate(tmp_path / 'other.pt', *net(tmp)[1:], *FLAGS, '--verify', whole[2], '--no-audit',
                 out=tmp_path / 'e.json')[1]['results']
    clean, verified = r['clean']['robust'], r['verified']['robust']
    assert '0' in clean and all(c == '1' for c, v in zip(clean, verified) if v == '1')

def test_other_code_does_not_continue_an_evaluation(tmp, tmp_path, monkeypatch, capsys):
    (tmp_path / 'nets.py').write_text(NETS)
    argv = [tmp / 'plain.pt', '--model', f'{tmp_path}/nets.py:plain', '--dataset', 'synthetic', *FLAGS]
    argv += ['--attacks', 'fgsm', 'pgd', '--no-audit', '--out', tmp_path / 'e.json']
    save = shards.files.save
    def once(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(shards.files, 'save', once)         # stopped after its first batch
        run('evaluate.py', *argv)
    (tmp_path / 'nets.py').write_text(NETS.replace('Linear(3072, 10)', 'Linear(3072, 10, True)'))
    refused('code was', *argv, capsys=capsys)

@pytest.mark.parametrize('name, weights, says', [
    ('plain', 'nan.pt', 'non-finite logits'), ('training', 'plain.pt', 'is in training mode'),
    ('two', 'plain.pt', 'output is (B, 2), the data need logits (B, 10)'),
    ('crash', 'plain.pt', 'RuntimeError'),
    ('detached', 'plain.pt', 'the logits have no gradient'),
    ('writing', 'plain.pt', 'writes into the images')])
def test_networks_that_cannot_be_evaluated(name, weights, says, tmp, tmp_path, capsys):
    refused(says, *net(tmp, name, weights), *FLAGS, '--out', tmp_path / 'e.json', capsys=capsys)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('damage, says', [
    (lambda x, y: ((x - 0.5) / 0.2, y), 'the normalisation belongs into the model'),
    (lambda x, y: (x.double(), y), 'images are torch.float64'),
    (lambda x, y: (x, y.int()), 'labels are torch.int32'), (lambda x, y: (x, y + 1), '1 to 10, not int64'),
    (lambda x, y: (x, y - 1), 'labels are torch.int64, -1 to')])
def test_data_that_cannot_be_evaluated(damage, says, tmp, tmp_path, capsys, monkeypatch):
    load, to_float = data.load, data.to_float
    def damaged(*args, **options):
        d = load(*args, **options)
        return d._replace(y_test=damage(to_float(d.x_test), d.y_test)[1])
    monkeypatch.setattr(data, 'load', damaged)
    monkeypatch.setattr(data, 'to_float', lambda x: damage(to_float(x), torch.zeros(1))[0])
    refused(says, *net(tmp), *FLAGS, '--out', tmp_path / 'e.json', capsys=capsys)

@pytest.mark.parametrize('flags, says', [
    ('--sweep-eps 0.5', '0 or 1 to 255'), ('--sweep-steps 0', 'at least 1'),
    ('--norm L2 --eps 128 --attacks weak', 'weak and strong are Linf attacks'),
    ('--fast --attacks apgd-ce', '--fast is for autoattack as a whole'),
    ('--fast --individual', '--fast is for autoattack as a whole'),
    ('--individual --attacks pgd', '--individual is of autoattack'),
    ('--transfer-from /none.pt', 'cannot read /none.pt'), ('--verify /none.pt', 'cannot read /none.pt'),
    ('--save-adv {tmp}/plain.pt', 'is there already: choose another --save-adv'),
    ('--out {tmp}/new --save-adv {tmp}/../{tmp.name}/new', 'the report goes there')])
def test_bad_flags(flags, says, tmp, tmp_path, capsys):
    refused(says, *net(tmp), *FLAGS, '--out', tmp_path / 'e.json', *flags.format(tmp=tmp).split(),
            capsys=capsys)

@pytest.mark.parametrize('name, weights, flag', [
    ('plain', 'plain.pt', None), ('plain', 'half.pt', 'precision'), ('half', 'plain.pt', 'precision'),
    ('plain', 'half_but_bias.pt', 'precision'), ('within', 'plain.pt', 'precision'),
    ('neighbours', 'plain.pt', 'batch_size'), ('noisy', 'plain.pt', 'randomised'),
    ('saturated', 'plain.pt', 'zero_gradient'), ('softmax', 'plain.pt', 'probabilities'),
    ('counting', 'plain.pt', 'moving')])
def test_suspicious_networks_are_flagged(name, weights, flag, tmp, tmp_path, capsys):
    r = evaluate(*net(tmp, name, weights), *FLAGS, '--attacks', 'pgd', '--no-audit',
                 out=tmp_path / 'e.json')[1]
    gate = ('precision', 'batch_size', 'randomised', 'zero_gradient', 'probabilities', 'moving')
    raised = {key for key in gate if r['flags'][key]['raised']}
    besides = {'noisy': {'batch_size'}, 'counting': {'batch_size', 'randomised'}}.get(name, set())
    assert raised - besides == {flag} - {None}
    assert r['fingerprint'] == r['evaluated']['weights']
    screen = capsys.readouterr().out
    assert all(f'note: {r["flags"][key]["text"]}\n' in screen for key in raised)

def test_a_clean_accuracy_near_chance_is_said_before_the_attacks(tmp, tmp_path, capsys):
    r = evaluate(*net(tmp, 'misnamed'), *FLAGS, '--attacks', 'pgd', '--no-audit', out=tmp_path / 'e.json')[1]
    screen = capsys.readouterr().out
    assert r['flags']['hold_out']['raised'] and screen.count('little more than chance') == 1
    assert screen.index('\nclean ') < screen.index('little more than chance') < screen.index('\npgd-5 ')

@pytest.mark.parametrize('trained, says', [
    (dict(val_clean=90.0), 'was 90.0 on the hold-out'), (dict(val_clean=52.0), ''), ({}, ''),
    (dict(val_clean=90.0, eval_branch='main'), '')])
def test_clean_accuracy_is_compared_with_that_of_the_same_branch(trained, says):
    clean = dict(accuracy=50.0, n=1000, per_class=dict.fromkeys(range(10), 50.0))
    text = summary.doubtful(clean, trained, dict(branch='aux' if 'eval_branch' in trained else 'main'))
    assert says in text and bool(text) == bool(says)

@pytest.mark.parametrize('eps, raised', [(7.905, True), (8, False), (7.5, False)])
def test_a_leaderboard_s_eps_is_8_pixels_and_not_a_rounded_number(eps, raised, tmp, tmp_path):
    r = evaluate(*net(tmp), '--n', 4, '--eps', eps, '--attacks', 'fgsm', '--no-audit',
                 out=tmp_path / 'e.json')[1]
    assert r['flags']['eps']['raised'] is raised

def test_the_eager_network_has_the_last_word(tmp, tmp_path, monkeypatch):
    """A compiled network that is wrong makes the attack weaker, and believe what is not so."""
    honest = evaluate(*net(tmp), *FLAGS, '--no-audit', '--attacks', 'apgd-ce', out=tmp_path / 'e.json')[1]
    assert honest['results']['apgd-ce']['correct'] < honest['results']['clean']['correct']
    counts = honest['flags']['recount']['attacks']['apgd-ce']
    assert counts['attack'] == counts['here'] > 0 and not honest['flags']['recount']['raised']
    monkeypatch.setattr(torch, 'compile', lambda model: lambda x: model(x).roll(1, 1))
    r = evaluate(*net(tmp), *FLAGS, '--no-audit', '--attacks', 'apgd-ce', '--compile',
                 out=tmp_path / 'c.json')[1]
    assert r['search'] == 'float32, compiled' and r['flags']['recount']['raised']
    # nothing was ever searched
    assert r['results']['apgd-ce']['correct'] == r['results']['clean']['correct']

def test_fast_is_confirmed_in_fp32_and_searched_again(tmp, tmp_path, monkeypatch):
    exact = evaluate(*net(tmp), *FLAGS, '--n', 12, '--no-audit', '--attacks', 'aa-fast',
                     out=tmp_path / 'e.json')[1]
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    monkeypatch.setattr(speed, 'autocast_dtype', lambda amp, device: torch.bfloat16)      # emulated on a CPU
    fast = evaluate(*net(tmp), *FLAGS, '--n', 12, '--no-audit', '--attacks', 'aa-fast', '--fast',
                    '--save-adv', tmp_path / 'adv.pt', out=tmp_path / 'f.json')[1]
    assert 'AutoAttack in bfloat16, what is left' in fast['search'] and 'bfloat16' not in exact['search']
    right = {row: v['correct'] for row, v in fast['results'].items()}
    assert 'autoattack, after apgd-t again' in right
    assert right['clean'] == exact['results']['clean']['correct']
    row = 'aa-fast (two of the four attacks)'
    assert right[row] <= exact['results'][row]['correct'] < right['clean']
    d = data.load('synthetic')
    x_adv = torch.load(tmp_path / 'adv.pt', weights_only=True)['x_adv']
    assert (logits(tmp, x_adv).argmax(1) == d.y_test[:12]).sum() == right[row]
    # bf16 that finds nothing at all: fp32 finds what it found before
    in_bf16 = lambda: torch.is_autocast_enabled('cpu')
    monkeypatch.setattr(torch, 'compile', lambda model: lambda x: model(x) * (not in_bf16()))
    blind = evaluate(*net(tmp), *FLAGS, '--n', 12, '--no-audit', '--attacks', 'aa-fast', '--fast',
                     out=tmp_path / 'b.json')[1]
    assert blind['results']['autoattack, after apgd-t']['correct'] == right['clean']
    assert blind['results'][row]['correct'] == exact['results'][row]['correct']

def test_a_terminal_gets_a_bar_with_the_time_left_and_a_file_does_not(tmp, tmp_path):
    command = [sys.executable, HERE / 'evaluate.py', *net(tmp), *FLAGS, '--attacks', 'pgd', '--no-audit']
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    subprocess.run([str(v) for v in command + ['--out', tmp_path / 'a.json']], check=True, stderr=slave,
                   stdout=subprocess.DEVNULL)
    os.set_blocking(master, False)
    seen = os.read(master, 100000).decode()
    os.close(slave)
    assert 'pgd: 0 of 3 batches' in seen and ' left' in seen
    done = subprocess.run([str(v) for v in command + ['--out', tmp_path / 'b.json']], check=True,
                          capture_output=True, text=True)
    assert not done.stderr and 'pgd-5' in done.stdout

def test_a_long_part_of_autoattack_says_that_it_runs(tmp, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, 'TELL', 0.2)
    evaluate(*net(tmp), '--n', 8, '--eps', 1, '--attacks', 'square', '--no-audit', out=tmp_path / 'e.json')
    assert capsys.readouterr().out.count('square: 0 of 1 batches after 0.0 minutes') > 1

def test_the_name_of_a_report_tells_what_its_rows_depend_on():
    args = dict(checkpoint='best.pt', attacks=['pgd'], norm='Linf', eps=8.0, step_size=2.0, n=100, steps=20,
                restarts=1, seed=0, transfer_from=None, sweep_eps=[], sweep_steps=[], verify=None, fast=False,
                individual=False, draw=False, activation=None)
    def name(**other):
        return evaluation.report_path(argparse.Namespace(**dict(args, **other)), dual_bn=False)
    assert name() == 'best.eval-Linf-8-n100-pgd.json'
    assert name(steps=100, step_size=1.0) == 'best.eval-Linf-8-n100-pgd-steps100-step_size1.json'
    others = [dict(steps=5), dict(restarts=2), dict(step_size=1.0), dict(seed=1), dict(individual=True)]
    assert len({name(), *[name(**other) for other in others]}) == 6

def test_a_batch_larger_than_the_data_is_said(tmp, tmp_path):
    flags = '--n 6 --eps 2.5 --attacks fgsm --no-audit'.split()
    r = evaluate(*net(tmp), *flags, '--batch-size', 50, out=tmp_path / 'a.json')[1]
    assert '--batch-size 50, and 6 images: they are one batch' in r['notes']
    r = evaluate(*net(tmp), *flags, out=tmp_path / 'b.json')[1]
    assert not any('--batch-size' in note for note in r['notes'])

def test_notes_name_only_attacks_that_ran(tmp, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    monkeypatch.setattr(speed, 'autocast_dtype', lambda amp, device: torch.bfloat16)
    flags = '--n 6 --eps 2.5 --no-audit --fast'.split()
    pgd = evaluate(*net(tmp), *flags, '--attacks', 'pgd', out=tmp_path / 'a.json')[1]
    assert not re.search('FAB|Square|AutoAttack|bfloat16', ' '.join([pgd['search'], *pgd['notes']]))
    two = evaluate(*net(tmp), *flags, '--attacks', 'aa-fast', out=tmp_path / 'b.json')[1]
    assert not re.search('FAB|Square', ' '.join(two['notes'])) and 'AutoAttack in bfloat16' in two['search']
    trained = dict(norm='Linf', eps=8.0)
    first = dict(logits='torch.float32', weights=['torch.float32'], computed=[], tf32=False,
                 batch_dependence=0, change=0,
                 zero_gradient=0, no_gradient=0, logit_norm=1, margin=1, confidence=1, probabilities=False,
                 moves=False)
    evaluated = dict(norm='Linf', eps=2.5, branch='main')
    for rows, raised in (['clean'], False), (['clean', 'pgd-5'], True), (['clean', 'strong'], False):
        results = {name: dict(accuracy=60.0, n=6, per_class={0: 60.0}) for name in rows}
        flag = summary.flags(first, results, {}, [], trained, evaluated, None, 6)['threat_model']
        assert flag['raised'] is raised and ('attacked with' in flag['text']) is raised

def test_figures_are_drawn_of_the_finished_report(tmp, tmp_path, monkeypatch):
    figures, drawn = pytest.importorskip('tools.figures'), []
    monkeypatch.setattr(figures, 'draw', lambda report, checkpoint, model: drawn.append(
        (json.loads(open(report).read())['complete'], checkpoint)))
    evaluate(*net(tmp), *FLAGS, '--attacks', 'clean', '--figures', out=tmp_path / 'e.json')
    assert drawn == [(True, str(tmp / 'plain.pt'))]

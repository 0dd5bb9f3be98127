"""bench.py as a user runs it; what it times computes the same as the plain implementation
and as train_adv.py."""
import json, subprocess, sys

import pytest
import torch

import models
from test_smoke import HERE, TINY, X, Y, run

SMALL = '--model wrn-10-1 --width 8 --batch-size 6 --steps 3 --seconds 1'.split()    # compiled in seconds
X = 0.1 + 0.8 * X

@pytest.fixture(scope='module', params=['trades', 'logit_mse'])
def script(request):
    return run('tools/bench.py', '--loss', request.param, *SMALL, '--seconds', 0.001)

def test_as_a_user_runs_it(tmp_path):
    done = subprocess.run([sys.executable, 'tools/bench.py', '--loss', 'logit_mse', '--beta', '0.2', *SMALL,
                           '--json', tmp_path / 'b.json'], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'b.json').read_text())
    rows = report['rows']
    assert all(row[k] > 0 for row in rows.values() for k in
               ('images_per_s', 'ratio', 'mflop_per_image', 'gflop_per_s', 'share_of_peak'))
    pairs = zip(rows['fast']['rounds'], rows['plain']['rounds'])
    assert report['ratio'] == rows['fast']['ratio'] == sorted(a / b for a, b in pairs)[2]
    assert rows['plain']['ratio'] == 1 and report['peak_rss_mib'] > 0
    assert f"fast is {report['ratio']:.2f} times plain" in done.stdout

# A gradient next to zero may have either sign, and its pixel then goes the other way: fast and plain may
# differ at one pixel in a thousand, and elsewhere not at all
def agree(a, b):
    return ((a - b).abs() > 1e-6).float().mean() < 1e-3

def stepped(side):
    """x_adv, loss and the weights after one update, from the same start."""
    net, craft, update = side
    torch.manual_seed(3)
    x_adv = craft(X, Y)
    torch.manual_seed(3)
    return x_adv, update(X, Y), torch.cat([p.detach().flatten() for p in net.parameters()])

def test_fast_equals_plain(script):
    script['args'].init = 'uniform'         # 0.001 beside x the gradient of KL and MSE is rounding, in part
    x_adv, loss, weights = stepped(script['plain']())
    assert 0.5 < ((x_adv - X).abs() * 255).mean() <= 8.001
    FAST = script['FAST']
    for on in set(), FAST, {'once', 'fused'}:       # channels_last draws its noise in another order
        x_adv2, loss2, weights2 = stepped(script['ours'](on - {'amp'}))
        assert agree(x_adv, x_adv2), on
        assert torch.allclose(loss, loss2, rtol=1e-3), on
        assert torch.allclose(weights, weights2, rtol=1e-3, atol=1e-4), on

def test_fast_is_what_train_adv_does(script, tmp_path):
    if 't_logits' in script['needs'](script['method'].loss):
        pytest.skip('its attack is that of the others; the teacher is another')
    train = run('train_adv.py', '--loss', script['args'].loss, *TINY, *SMALL[:4], '--epochs', 1, '--steps', 3,
                '--batch-size', 32, '--out', tmp_path)
    net, craft, _ = script['ours']({'once', 'frozen'})
    train['student'].load_state_dict(net.state_dict())
    train['student'].train()
    script['args'].init = train['args'].init
    torch.manual_seed(3)
    x_adv = craft(X, Y)
    torch.manual_seed(3)
    assert torch.equal(x_adv, train['craft'](X, Y))
    assert torch.equal(script['method'].loss(**script['values'](
        script['needs'](script['method'].loss), net, None, X, x_adv, Y)), train['loss_on'](X, x_adv, Y))

@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2', 'wrn-10-1', 'preactresnet18'])
def test_folded_is_the_network_in_eval_mode(name):
    net = models.build(name, 10, width=4)
    net(X)                                          # moves the statistics
    assert torch.allclose(models.folded(net)(X), net.eval()(X), atol=1e-4)

@pytest.mark.parametrize('flags, message', [
    ('--loss hat', 'also needs logits_helper t_logits_adv'), ('--loss standard', 'attacks nothing'),
    ('--loss advprop', 'second BN'), ('--loss trades --gamma 1', '--loss trades takes --beta'),
    ('--loss trades --batch-size 1', '--batch-size 1: from 2'), ('--seconds 0', '--seconds 0.0: more than 0'),
    ('--model resnet7', "unknown model 'resnet7'"), ('--json /proc/x/y.json', '/proc/x')])
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run('tools/bench.py', *flags.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count('\n') == 1 and message in err and not out

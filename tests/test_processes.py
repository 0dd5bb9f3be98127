"""Two processes train what one does, stop together, and say so when one is gone."""
import os, signal, subprocess, sys

import pytest

from support import runs
from test_smoke import HERE
from test_survival import ADV, arguments, begun, finished, same, started

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
# one update, no noise, and no sign of a gradient near zero: what differs is the order of the sums
PLAIN = ['--loss', 'pgd_at', '--norm', 'L2', '--init', 'zero', '--epochs', '1', '--subset', '32',
         '--lr', '0.01', '--amp', 'off']

@pytest.mark.parametrize('flags', [['--sync-bn'], ['--sync-bn', '--swa', '0.1'], []],
                         ids=['sync-bn', 'sync-bn-swa', 'local-bn'])
def test_two_processes_are_one(flags, tmp_path):
    """The same global batch: with common BN statistics the same network; without, another one, because each
    half was normalised by itself."""
    subprocess.run([*ADV, str(tmp_path / '1'), *PLAIN, *flags[1:]], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([*TORCHRUN, *ADV[1:], str(tmp_path / '2'), *PLAIN, *flags], check=True,
                          capture_output=True, text=True)
    assert 'FutureWarning' not in done.stderr
    (one, log_one), (two, log_two) = finished(tmp_path / '1'), finished(tmp_path / '2')
    apart = max(((two[k] - v).norm() / v.norm()).item() for k, v in one.items()
                if v.is_floating_point())
    assert len(log_two) == 1 and not (tmp_path / '2' / 'state.pt').exists()
    assert apart < 1e-4 if flags else apart > 1e-2
    assert abs(log_one[0]['loss'] - log_two[0]['loss']) < (1e-4 if flags else 0.3)

def test_two_processes_begin_with_one_network(tmp_path):
    """Also where its code draws from a generator that our seed does not reach: here, that of the process."""
    (tmp_path / 'two.py').write_text("""
import os, sys
import torch
from support import ddp
ddp.init()
net = torch.nn.BatchNorm2d(4)
torch.nn.init.constant_(net.weight, os.getpid())
apart = len(set(ddp.gather(net.weight[0].item())))
ddp.broadcast(net, None)
sys.exit((apart, len(set(ddp.gather(net.weight[0].item())))) != (2, 1))
""")
    subprocess.run([*TORCHRUN, str(tmp_path / 'two.py')], check=True, capture_output=True,
                   env=dict(os.environ, PYTHONPATH=str(HERE)))

def test_two_processes_stop_together_and_continue(tmp_path):
    command = [*TORCHRUN, *ADV[1:], str(tmp_path), '--loss', 'trades']
    process = started(command)
    begun(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    done = subprocess.run([*ADV, str(tmp_path), '--loss', 'trades', '--resume'],
                          capture_output=True, text=True)
    assert done.returncode == 2 and 'was started with processes 2, not 1' in done.stderr
    subprocess.run([*command, '--resume'], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([*TORCHRUN, *ADV[1:], str(tmp_path / 'undisturbed'), '--loss', 'trades'], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    same(finished(tmp_path), finished(tmp_path / 'undisturbed'))
    again = subprocess.run([*command, '--resume'], capture_output=True, text=True)
    assert again.returncode == 0 and 'nothing to resume' in again.stdout

def test_what_two_processes_refuse_is_read(tmp_path):
    """By both, and by one alone: torch's own excepthook would hold the line back."""
    (tmp_path / 'last.pt').write_bytes(b'a model')
    for flags, line in ((['--batch-size', '31'], '--batch-size 31 in 2 processes'),
                        ([], 'holds a trained model already')):
        done = subprocess.run([*TORCHRUN, *ADV[1:], str(tmp_path), '--loss', 'pgd_at', *flags],
                              capture_output=True, text=True)
        assert done.returncode and 'train_adv.py: error: ' in done.stderr and line in done.stderr

def test_common_statistics_in_reduced_precision_and_for_an_average(tmp_path):
    flags = ['--loss', 'pgd_at', '--epochs', '2', '--sync-bn', '--amp', 'bf16', '--swa', '0.5',
             '--awp', '0.005']
    subprocess.run([*TORCHRUN, *ADV[1:], str(tmp_path), *flags], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    assert len(finished(tmp_path)[1]) == 2

def test_another_process_that_is_gone_is_one_line(tmp_path, monkeypatch):
    run = runs.Run(arguments(tmp_path))
    monkeypatch.setattr(runs.ddp, 'world_size', lambda: 2)
    with pytest.raises(SystemExit, match='another process has ended .* nothing had been'), run.guarded():
        raise RuntimeError('[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer')
    monkeypatch.setattr(runs.ddp, 'world_size', lambda: 1)
    with pytest.raises(RuntimeError), run.guarded():
        raise RuntimeError('gloo')

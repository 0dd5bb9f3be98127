"""
tools/gpu_day.py without a GPU: the whole of it rehearsed, and what happens to steps that are cut, fail or are
done.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import models
from support import checkpoint, runs
from test_smoke import HERE
from tools import gpu_day
from tools.gpu_day import Step

def test_rehearsal(tmp_path):
    """Every step, with tiny settings; the command given again does nothing."""
    command = [sys.executable, '-m', 'tools.gpu_day', '--rehearse', '--out', tmp_path / 'day']
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    record = json.loads((tmp_path / 'day/day.json').read_text())
    assert done.returncode == 0, (done.stdout, record)
    assert not record['failed']
    assert {'tests', 'bench-small', 'teacher', 'logit_mse-eager', 'trades-fast'} < set(record['done'])
    assert record['done']['tests']['status'] == 0 and record['plans']['trades']['epochs'] == 2
    back = tmp_path / 'day/back'
    for name in ('versions.log', 'tests.log', 'bench-small.json', 'logit_mse-log.jsonl', 'trades-fast.json',
                 'logit_mse-1.pt'):
        assert (back / name).exists(), name
    assert list((back / 'figures').glob('*.png'))
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0 and not again.stdout

def test_weights_come_back_in_pieces_and_are_joined(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = models.build('resnet18', 10, width=8)
    checkpoint.save_checkpoint(tmp_path / 'best.pt', net, epoch=3)
    monkeypatch.setattr(gpu_day, 'PIECE', 300_000)
    gpu_day.split(tmp_path / 'best.pt', tmp_path / 'back')
    pieces = sorted(tmp_path.glob('back-*.pt'))
    assert len(pieces) > 2 and all(path.stat().st_size <= 300_000 for path in pieces)
    gpu_day.join(tmp_path / 'back')
    joined, meta = checkpoint.load_checkpoint(tmp_path / 'back.pt')
    assert meta['epoch'] == 3
    for k, v in net.state_dict().items():
        assert torch.allclose(joined.state_dict()[k], v, rtol=1e-3, atol=1e-6)

def run_with(rate):
    return [json.dumps({}), *[json.dumps(dict(epoch=k, min_left=rate * (3 - k) / 60)) for k in (1, 2, 3)]]

def test_a_training_is_planned_from_the_fastest_way_that_worked(tmp_path):
    for name, rate in (('rate-eager', 9.0), ('rate-compile', 6.0), ('rate-graphs', 3.0)):
        (tmp_path / f'runs/{name}').mkdir(parents=True)
        (tmp_path / f'runs/{name}/log.jsonl').write_text('\n'.join(run_with(rate)) + '\n')
    step = Step('logit_mse', '', '', 7, rates=gpu_day.WAYS)
    # graphs have failed
    plan = gpu_day.planned(step, tmp_path, {'rate-eager': {}, 'rate-compile': {}}, 5, 100)
    assert plan['epochs'] == int(0.85 * 300 / 6) and plan['fast'] == '--compile' and not plan['env']
    plan = gpu_day.planned(step, tmp_path, dict.fromkeys(gpu_day.WAYS), 60, 100)
    assert plan['epochs'] == 100 and plan['env'] == {'TORCHINDUCTOR_CUDAGRAPHS': '1'}
    plan = gpu_day.planned(step, tmp_path, {'rate-eager': {}}, 0.1, 100)
    assert plan['epochs'] == 2 and plan['fast'] == ''
    assert gpu_day.planned(step, tmp_path, {}, 5, 100)['why'] == 'no rate was measured'

def test_what_is_cut_continues_and_what_fails_is_left_out_and_tried_again(tmp_path, monkeypatch, capsys):
    write = "import sys; open(sys.argv[1], 'a').write('x')"
    steps = [Step('slow', f'-c "{write}; import time; time.sleep(60)" {{dir}}/slow', 'slow', 1),
             Step('wrong', '-c "import sys; print(1 / 0)"', 'wrong', 1),
             Step('after', f'-c "{write}" {{dir}}/after', 'after', 1, needs=('wrong',)),
             Step('last', f'-c "{write}" {{dir}}/last', 'last', 1)]
    monkeypatch.setattr(gpu_day, 'steps_of', lambda args: steps)
    args = argparse.Namespace(out=str(tmp_path), data_dir='data', minutes=0.7, now=None, rehearse=True)
    assert not gpu_day.day(args)                    # slow has a quarter of the time
    record = json.loads((tmp_path / 'day.json').read_text())
    assert set(record['done']) == {'last'} and set(record['failed']) == {'slow', 'wrong', 'after'}
    assert 'stopped after' in record['failed']['slow'] and record['failed']['wrong'] == 'ended with status 1'
    out = capsys.readouterr().out
    assert 'ZeroDivisionError' in out and 'left out: needs wrong' in out

    steps[0] = steps[0]._replace(command=f'-c "{write}" {{dir}}/slow')
    steps[1] = steps[1]._replace(command=f'-c "{write}" {{dir}}/wrong')
    args.minutes = 2
    assert gpu_day.day(args)
    assert (tmp_path / 'slow').read_text() == 'xx'
    assert (tmp_path / 'last').read_text() == 'x'   # done is done

def test_sigterm_stops_the_step_at_work(tmp_path):
    day = subprocess.Popen([sys.executable, '-m', 'tools.gpu_day', '--rehearse', '--out', tmp_path], cwd=HERE,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / 'versions.log').exists():
        assert day.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    day.terminate()
    assert 'the same command continues' in day.communicate(timeout=60)[1]
    assert not [name for name in os.listdir('/proc') if name.isdigit() and at_work(name, str(tmp_path))]

def at_work(pid, folder):
    """Has the process this folder in its environment?"""
    try:
        with open(f'/proc/{pid}/environ') as f:
            return f'TORCHINDUCTOR_CACHE_DIR={folder}' in f.read()
    except OSError:
        return False

def test_half_a_file_of_a_killed_compilation_is_one_line(tmp_path):
    import torch._inductor.runtime.cache_dir_utils          # a compilation has
    run = object.__new__(runs.Run)
    run.folder, run.rank = tmp_path, 0
    with pytest.raises(SystemExit) as stop:
        with run.guarded():
            raise RuntimeError('ImportError: /tmp/x/y.main.so: file too short\n\nSet TORCHDYNAMO_VERBOSE=1')
    assert 'delete /' in stop.value.code and '\n' not in stop.value.code

@pytest.mark.parametrize('flags, says', [
    ([], 'there is no GPU: --rehearse'), (['--join', 'nowhere'], 'nowhere-1.pt')])
def test_refusals_are_one_line(flags, says):
    done = subprocess.run([sys.executable, '-m', 'tools.gpu_day', *flags], cwd=HERE, capture_output=True,
                          text=True, env=dict(os.environ, CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 2 and says in done.stderr and done.stderr.count('\n') == 1

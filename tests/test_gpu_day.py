"""
tools/gpu_day.py without a GPU: the whole of it rehearsed, and what happens to steps that are cut, fail or are
done.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
import torch

import models
from support import checkpoint, files, runs
from support.files import Refused
from test_smoke import HERE
from tools import gpu_day, pieces
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
    monkeypatch.setattr(pieces, 'PIECE', 300_000)
    pieces.split(tmp_path / 'best.pt', tmp_path / 'back')
    written = sorted(tmp_path.glob('back-*.pt'))
    assert len(written) > 2 and all(path.stat().st_size <= 300_000 for path in written)
    pieces.join(tmp_path / 'back')
    joined, meta = checkpoint.load_checkpoint(tmp_path / 'back.pt')
    assert meta['epoch'] == 3
    for k, v in net.state_dict().items():
        assert torch.allclose(joined.state_dict()[k], v, rtol=1e-3, atol=1e-6)

    # killed while the weights of a later epoch are split: the pieces are no mixture
    checkpoint.save_checkpoint(tmp_path / 'best.pt', net, epoch=4)
    save, saved = files.save, []
    def killed(path, content):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, content)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pieces.files, 'save', killed)
        pieces.split(tmp_path / 'best.pt', tmp_path / 'back')
    assert checkpoint.read(tmp_path / 'back-1.pt')['epoch'] == 3            # so that they are split again
    with pytest.raises(Refused, match='of epoch 4, .*back-1.pt of 3'):
        pieces.join(tmp_path / 'back')

    torch.save(meta, tmp_path / 'whole-1.pt')
    with pytest.raises(Refused, match='whole-1.pt is no piece'):
        pieces.join(tmp_path / 'whole')

def run_with(rate):
    """The log of a run over 100 images, at 100 images a second and rate seconds an epoch."""
    rows = [dict(epoch=k, img_per_s=100, min_left=rate * (3 - k) / 60) for k in (1, 2, 3)]
    return ''.join(json.dumps(line) + '\n' for line in [dict(train_images=100), *rows])

def test_a_training_is_planned_from_the_fastest_way_that_worked(tmp_path):
    for name, rate in (('rate-compile', 4.0), ('rate-graphs', 1.0)):
        (tmp_path / f'runs/{name}').mkdir(parents=True)
        (tmp_path / f'runs/{name}/log.jsonl').write_text(run_with(rate))
    step = Step('logit_mse', '', '', 7, rates=gpu_day.WAYS)
    settings = dict(images=300, fallback=30, most=100)              # two seconds more for 200 more images
    # graphs have failed
    plan = gpu_day.planned(step, tmp_path, {'rate-compile': {}}, 5, settings)
    assert plan['epochs'] == int(0.85 * 300 / 6) and not plan['env']
    plan = gpu_day.planned(step, tmp_path, dict.fromkeys(gpu_day.WAYS), 60, settings)
    assert plan['epochs'] == 100 and plan['env'] == {'TORCHINDUCTOR_CUDAGRAPHS': '1'}
    assert gpu_day.planned(step, tmp_path, {'rate-compile': {}}, 0.1, settings)['epochs'] == 2
    plan = gpu_day.planned(step, tmp_path, {}, 5, settings)
    assert plan['epochs'] == int(0.85 * 300 / 30) and 'not measured' in plan['why']

def test_the_steps_that_have_to_follow_keep_their_minutes():
    first, last, more = Step('a', '', '', 10), Step('b', '', '', 5), Step('c', '', '', 7, extra=True)
    steps = [first, more, last]
    assert gpu_day.minutes_for(first, steps, 15) == 10 and gpu_day.minutes_for(first, steps, 30) == 20
    assert gpu_day.minutes_for(more, steps[1:], 30) == 7 and gpu_day.minutes_for(more, steps[1:], 3) == 3
    asked = sum(step.minutes for step in gpu_day.STEPS if not step.extra)
    assert 24 < asked < 26                          # --minutes 25 gives each what it asks for

def test_the_core_of_the_cuda_tests_is_some_of_each_kind():
    """What a GPU day runs first, as pytest reads it where there is a GPU."""
    seen = ('import sys, pytest, torch; torch.cuda.is_available = lambda: True; '
            'sys.exit(pytest.main(sys.argv[1:]))')
    command = [sys.executable, '-c', seen, '--collect-only', '-q', '-p', 'no:cacheprovider',
               'tests/test_cuda.py', *shlex.split(gpu_day.REAL['tests'])]
    listed = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout
    whole = (HERE / 'tests/test_cuda.py').read_text()
    left_out = {'test_train_adv_compiled_crafts_and_updates_as_eager'}
    assert {name for name in re.findall(r'def (test_\w+)', whole) if f'::{name}' not in listed} == left_out
    assert 15 < listed.count('::') < 30 and '[standard-' not in listed and '[logit_mse-graphs]' in listed

def test_what_is_cut_continues_and_what_fails_is_left_out_and_tried_again(tmp_path, monkeypatch, capsys):
    write = "import sys; open(sys.argv[1], 'a').write('x')"
    steps = [Step('slow', f'-c "{write}; import time; time.sleep(60)" {{dir}}/slow', 'slow', 1),
             Step('wrong', '-c "import sys; print(1 / 0)"', 'wrong', 1),
             Step('after', f'-c "{write}" {{dir}}/after', 'after', 1, needs=('wrong',)),
             Step('last', f'-c "{write}" {{dir}}/last', 'last', 1),
             Step('more', f'-c "{write}" {{dir}}/more', 'more', 1, extra=True)]
    monkeypatch.setattr(gpu_day, 'steps_of', lambda args: steps)
    args = argparse.Namespace(out=str(tmp_path), data_dir='data', minutes=0.7, now=None, rehearse=True)
    assert not gpu_day.day(args)                    # slow has a quarter of the time
    record = json.loads((tmp_path / 'day.json').read_text())
    assert set(record['done']) == {'last', 'more'} and set(record['failed']) == {'slow', 'wrong', 'after'}
    assert 'stopped after' in record['failed']['slow'] and record['failed']['wrong'] == 'ended with status 1'
    out = capsys.readouterr().out
    assert 'ZeroDivisionError' in out and 'left out: needs wrong' in out

    steps[0] = steps[0]._replace(command=f'-c "{write}" {{dir}}/slow')
    steps[1] = steps[1]._replace(command=f'-c "{write}" {{dir}}/wrong')
    args.minutes = 2
    assert gpu_day.day(args)
    assert (tmp_path / 'slow').read_text() == 'xx'
    assert (tmp_path / 'last').read_text() == 'x'   # done is done

WRITE = ("import os, sys; [os.makedirs(os.path.dirname(path), exist_ok=True) or open(path, 'a').write('x') "
         "for path in sys.argv[1:]]")

def test_what_was_judged_of_a_training_that_was_cut_is_judged_and_drawn_again(tmp_path, monkeypatch):
    train = f'-c "{WRITE}; import time; time.sleep(60)" {{dir}}/runs/a/best.pt'
    steps = [Step('a', train, 'runs/a/last.pt', 1),
             Step('bench', '-m {dir}', 'bench', 1),
             Step('judge', f'-c "{WRITE}" {{dir}}/a.json', 'a.json', 1, needs=('runs/a/best.pt',)),
             Step('draw', f'-c "{WRITE}" {{dir}}/drawn/1', 'drawn', 1, needs=('a.json',)),
             Step('other', f'-c "{WRITE}" {{dir}}/b.json', 'b.json', 1)]
    monkeypatch.setattr(gpu_day, 'steps_of', lambda args: steps)
    args = argparse.Namespace(out=str(tmp_path), data_dir='data', minutes=0.5, now=None, rehearse=True)
    monkeypatch.setattr(gpu_day, 'bring_back', lambda folder: None)         # these are no checkpoints
    def made():
        return [(tmp_path / path).read_text() for path in ('a.json', 'drawn/1', 'b.json')]
    for epochs in 'x', 'xx':                        # cut, and cut again an epoch later
        assert not gpu_day.day(args)
        record = json.loads((tmp_path / 'day.json').read_text())
        assert set(record['done']) == {'judge', 'draw', 'other'} and made() == ['x', 'x', 'x']
        assert (tmp_path / 'runs/a/best.pt').read_text() == epochs
        args.minutes += 0.5

    cut = {'a': 'stopped after 10 s', 'bench': 'stopped after 10 s'}
    assert [step.name for step in gpu_day.in_order(args, {}, cut)] == ['a', 'judge', 'draw', 'other', 'bench']
    steps[0] = steps[0]._replace(command=f'-c "{WRITE}" {{dir}}/runs/a/best.pt {{dir}}/runs/a/last.pt')
    steps[1] = steps[1]._replace(command=f'-c "{WRITE}" {{dir}}/bench')
    args.minutes += 2
    before = (tmp_path / 'b.json').stat().st_mtime_ns
    assert gpu_day.day(args) and made() == ['x', 'x', 'x']                  # anew, not 'xx'
    drawn, best = [(tmp_path / path).stat().st_mtime_ns for path in ('drawn/1', 'runs/a/best.pt')]
    assert drawn > best and (tmp_path / 'b.json').stat().st_mtime_ns == before

def test_where_nothing_can_be_compiled_the_rest_is_trained_without(tmp_path, monkeypatch, capsys):
    compiles = f'-c "{WRITE.replace("sys.argv[1:]", "sys.argv[1:2]")}; assert sys.argv[2:] == []" '
    steps = [Step('rate-compile', compiles + '{dir}/runs/rate-compile/last.pt --compile',
                  'runs/rate-compile/last.pt', 1),
             Step('teacher', compiles + '{dir}/runs/teacher/last.pt --compile', 'runs/teacher/last.pt', 1),
             Step('trades', compiles + '{dir}/runs/trades/last.pt --compile', 'runs/trades/last.pt', 1)]
    monkeypatch.setattr(gpu_day, 'steps_of', lambda args: steps)
    args = argparse.Namespace(out=str(tmp_path), data_dir='data', minutes=9, now=None, rehearse=True)
    assert not gpu_day.day(args)
    record = json.loads((tmp_path / 'day.json').read_text())
    assert set(record['done']) == {'teacher', 'trades'} and set(record['failed']) == {'rate-compile'}
    assert capsys.readouterr().out.count('again without --compile') == 1

def test_what_was_refused_is_not_for_want_of_a_compiler(tmp_path, monkeypatch):
    refused = f'-c "{WRITE}; sys.exit(2)" {{dir}}/runs/a/log --compile'
    monkeypatch.setattr(gpu_day, 'steps_of', lambda args: [Step('a', refused, 'runs/a/last.pt', 1)])
    args = argparse.Namespace(out=str(tmp_path), data_dir='data', minutes=9, now=None, rehearse=True)
    assert not gpu_day.day(args) and (tmp_path / 'runs/a/log').read_text() == 'x'
    record = json.loads((tmp_path / 'day.json').read_text())
    assert record['failed'] == {'a': 'ended with status 2'} and not record['eager']

def test_a_training_that_outlived_its_call_is_waited_for(tmp_path, monkeypatch, capsys):
    (tmp_path / 'runs/a').mkdir(parents=True)
    holds = f"import sys, time; sys.path.insert(0, {str(HERE)!r}); from support import files; " \
            "f = open(sys.argv[1], 'w'); files.lock(f); print(flush=True); time.sleep(3)"
    orphan = subprocess.Popen([sys.executable, '-c', holds, tmp_path / 'runs/a/.lock'],
                              stdout=subprocess.PIPE)
    orphan.stdout.readline()
    monkeypatch.setattr(gpu_day, 'steps_of', lambda args: [
        Step('a', f'-c "{WRITE}" {{dir}}/runs/a/last.pt', 'runs/a/last.pt', 1)])
    args = argparse.Namespace(out=str(tmp_path), data_dir='data', minutes=9, now=None, rehearse=True)
    assert gpu_day.day(args) and orphan.poll() is not None
    assert 'waiting for the training' in capsys.readouterr().out

def test_in_the_background_of_a_script_a_step_that_is_cut_saves_all_the_same(tmp_path):
    """There a shell has SIGINT ignored, by children of children, too."""
    script = f"""
import signal, sys, time
from tools import gpu_day, pieces
gpu_day.handle_signals()
step = gpu_day.Step('a', '', 'a', 1)
begun = time.monotonic()
gpu_day.run(step, '-c "import time; time.sleep(60)"', {{}}, {str(tmp_path / 'log')!r}, 2)
print(time.monotonic() - begun)
"""
    command = f'{shlex.quote(sys.executable)} -c {shlex.quote(script)} & wait'
    done = subprocess.run(['bash', '-c', command], cwd=HERE, capture_output=True, text=True)
    assert float(done.stdout) < 20 and 'KeyboardInterrupt' in (tmp_path / 'log').read_text()

def test_sigterm_stops_the_step_at_work(tmp_path):
    day = subprocess.Popen([sys.executable, '-m', 'tools.gpu_day', '--rehearse', '--out', tmp_path], cwd=HERE,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / 'versions.log').exists():
        assert day.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    second = subprocess.run(day.args, cwd=HERE, capture_output=True, text=True)
    assert second.returncode == 2 and 'another gpu_day is at work' in second.stderr
    day.terminate()
    assert 'the same command continues' in day.communicate(timeout=60)[1]
    assert json.loads((tmp_path / 'day.json').read_text())['seconds'] > 0.5         # its minutes count
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
    run.folder, run.rank, run.args = tmp_path, 0, argparse.Namespace(dry_run=False)
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

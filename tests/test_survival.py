"""A run that is killed, stopped or moved to several processes ends where an undisturbed one does."""
import json, os, pathlib, random, shutil, signal, subprocess, sys, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import files, runs, sources
from support.files import Refused
from test_smoke import run

HERE = pathlib.Path(__file__).parent.parent
ADV = [sys.executable, str(HERE / 'train_adv.py'), '--dataset', 'synthetic', '--width', '4',
       '--subset', '128', '--epochs', '3', '--steps', '2', '--save-minutes', '0', '--out']
EVERYTHING = ['--loss', 'hat', '--awp', '0.005', '--ema', '0.9', '--accumulate', '2']  # a teacher, noise

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    subprocess.run([sys.executable, str(HERE / 'train_teacher.py'), '--dataset', 'synthetic', '--width', '4',
                    '--epochs', '2', '--out', str(out)], check=True, stdout=subprocess.DEVNULL)
    return str(out / 'best.pt')

def finished(folder):
    """Weights of both checkpoints, and the log without its times."""
    weights = {f'{name} {k}': v for name in ('best.pt', 'last.pt')
               for k, v in torch.load(folder / name, weights_only=True)['state_dict'].items()}
    rows = [json.loads(line) for line in open(folder / 'log.jsonl')][1:]
    return weights, [{k: v for k, v in row.items() if k not in ('img_per_s', 'min_left', 'peak_gib')}
                     for row in rows]

def same(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())

def started(command, **options):
    def heed():                     # what a shell starts in the background ignores Ctrl-C, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=heed, **options)

@pytest.fixture(scope='module')
def undisturbed(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed')
    subprocess.run([*ADV, str(out), '--teacher', teacher, *EVERYTHING], check=True, stdout=subprocess.DEVNULL)
    assert not (out / 'state.pt').exists()
    return finished(out)

def begun(folder, process, seconds=120):
    while not (folder / 'state.pt').exists() and process.poll() is None and seconds > 0:
        time.sleep(0.1)
        seconds -= 0.1
    assert (folder / 'state.pt').exists()

def test_kill_9_five_times(teacher, undisturbed, tmp_path):
    draw = random.Random(0)
    command = [*ADV, str(tmp_path), '--teacher', teacher, *EVERYTHING]
    kills = 0
    for attempt in range(5):
        process = started([*command, '--resume'] if attempt else command)
        begun(tmp_path, process)
        time.sleep(draw.uniform(0, 2))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2                       # on a fast machine the run may be over before the fifth
    if (tmp_path / 'state.pt').exists():
        subprocess.run([*command, '--resume'], check=True, stdout=subprocess.DEVNULL)
    same(finished(tmp_path), undisturbed)

def test_killed_in_the_validation(teacher, undisturbed, tmp_path):
    """Which may take longer than a scheduler waits after its signal: the epoch before it is saved."""
    command = [*ADV, str(tmp_path), '--teacher', teacher, *EVERYTHING, '--save-minutes', '100']
    process = started(command)
    begun(tmp_path, process)
    process.kill()
    process.communicate()
    values = torch.load(tmp_path / 'state.pt', weights_only=True)['ranks'][0]['values']
    assert (values['epoch'], values['batch']) == (1, 4)
    subprocess.run([*command, '--resume'], check=True, stdout=subprocess.DEVNULL)
    same(finished(tmp_path), undisturbed)

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_names_the_command_that_continues(number, teacher, undisturbed, tmp_path):
    process = started([*ADV, str(tmp_path), '--teacher', teacher, *EVERYTHING])
    begun(tmp_path, process)
    process.send_signal(number)
    err = process.communicate(timeout=120)[1].strip()
    assert process.returncode == 1 and 'Traceback' not in err
    command = err.split('Continue with: python ')[1]
    assert command.endswith('--resume')
    subprocess.run(f'{sys.executable} {command}', shell=True, check=True, stdout=subprocess.DEVNULL)
    same(finished(tmp_path), undisturbed)

def test_stopped_after_the_last_batch_of_an_epoch(tmp_path):
    """Which a signal always does where an epoch is one batch: the next epoch draws what it would have."""
    command = [*ADV[:-1], '--subset', '32', '--epochs', '6', '--loss', 'trades', '--out']
    subprocess.run([*command, str(tmp_path / 'a')], check=True, stdout=subprocess.DEVNULL)
    process = started([*command, str(tmp_path / 'b')])
    begun(tmp_path / 'b', process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert torch.load(tmp_path / 'b/state.pt', weights_only=True)['ranks'][0]['values']['batch'] == 1
    subprocess.run([*command, str(tmp_path / 'b'), '--resume'], check=True, stdout=subprocess.DEVNULL)
    same(finished(tmp_path / 'a'), finished(tmp_path / 'b'))

def test_what_cannot_go_on_is_refused(teacher, tmp_path):
    command = [*ADV, str(tmp_path), '--teacher', teacher, *EVERYTHING]
    process = started(command)
    begun(tmp_path, process)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2 and 'another run is at work in' in second.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    for more, message in (([], 'holds an unfinished run: continue it with --resume'),
                          (['--resume', '--lr', '0.1'], 'was started with lr 0.2, not 0.1')):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
    (tmp_path / 'state.pt').write_bytes((tmp_path / 'state.pt').read_bytes()[:1000])
    done = subprocess.run([*command, '--resume'], capture_output=True, text=True)
    assert done.returncode == 2 and 'truncated' in done.stderr and done.stderr.count('\n') == 1

def test_the_teacher_resumes_too(tmp_path):
    command = [sys.executable, str(HERE / 'train_teacher.py'), '--dataset', 'synthetic', '--width', '4',
               '--epochs', '4', '--save-minutes', '0', '--out']
    subprocess.run([*command, str(tmp_path / 'a')], check=True, stdout=subprocess.DEVNULL)
    process = started([*command, str(tmp_path / 'b')])
    begun(tmp_path / 'b', process)
    process.kill()
    process.communicate()
    subprocess.run([*command, str(tmp_path / 'b'), '--resume'], check=True, stdout=subprocess.DEVNULL)
    same(finished(tmp_path / 'a'), finished(tmp_path / 'b'))

def test_a_teacher_is_its_weights_wherever_the_file_lies(teacher, tmp_path):
    shutil.copy(teacher, tmp_path / 'a.pt')
    command = [*ADV, str(tmp_path / 'out'), '--loss', 'logit_mse', '--teacher']
    process = started([*command, str(tmp_path / 'a.pt')])
    begun(tmp_path / 'out', process)
    process.kill()
    process.communicate()
    (tmp_path / 'a.pt').rename(tmp_path / 'b.pt')
    other = torch.load(teacher, weights_only=True)
    other['state_dict']['linear.bias'] += 0.001
    torch.save(other, tmp_path / 'c.pt')
    for finished_too in (False, True):
        done = subprocess.run([*command, str(tmp_path / 'c.pt'), '--resume'], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count('\n') == 1
        assert ('holds a finished run with teacher' if finished_too else
                'was started with teacher') in done.stderr
        done = subprocess.run([*command, str(tmp_path / 'b.pt'), '--resume'], capture_output=True, text=True)
        assert done.returncode == 0 and ('nothing to resume' in done.stdout) == finished_too

@pytest.mark.parametrize('change, says', [('extra', 'was started with extra-data'),
                                          ('code', 'was started with code')])
def test_other_extra_images_and_other_code_are_not_continued_with(change, says, tmp_path, capsys):
    """In this process: stopped after its first step."""
    def train(*more):
        return run('train_adv.py', '--loss', 'softmax_kl', '--dataset', 'synthetic', '--subset', 64,
                   '--steps', 1, '--epochs', 1, '--model', f'{tmp_path}/net.py:make',
                   '--teacher', tmp_path / 'teacher.pt', '--teacher-model', f'{tmp_path}/net.py:make',
                   '--extra', tmp_path / 'extra.npy', '--out', tmp_path / 'out', *more)
    (tmp_path / 'net.py').write_text(
        'import torch\nfrom inner import SCALE\n'
        'def make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))\n')
    (tmp_path / 'inner.py').write_text('SCALE = 1')
    np.save(tmp_path / 'extra.npy', np.full((40, 32, 32, 3), 100, np.uint8))
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).state_dict(),
               tmp_path / 'teacher.pt')
    with pytest.MonkeyPatch.context() as patch:
        def stop(self, state):
            self.save_state(state)
            raise runs.Stopped
        patch.setattr(runs.Run, 'save_if_due', stop)
        with pytest.raises(SystemExit):
            train()
    if change == 'extra':
        np.save(tmp_path / 'extra.npy', np.zeros((40, 32, 32, 3), np.uint8))
    else:
        (tmp_path / 'inner.py').write_text('SCALE = 2')
    with pytest.raises(SystemExit):
        train('--resume')
    assert says in capsys.readouterr().err

def test_a_teacher_of_another_hold_out_is_said(tmp_path, capsys):
    """Of the same images in another order others are held out: the teacher knows those of the student."""
    x, y, u, v = sources.synthetic()
    for order in np.arange(640), np.random.default_rng(0).permutation(640):
        np.savez(tmp_path / 'mine.npz', x_train=x[order], y_train=y[order], x_test=u, y_test=v)
        if not (tmp_path / 'teacher').exists():
            run('train_teacher.py', '--dataset', 'mine', '--data-dir', tmp_path, '--width', 4, '--epochs', 1,
                '--out', tmp_path / 'teacher')
        capsys.readouterr()
        run('train_adv.py', '--loss', 'ltd', '--dataset', 'mine', '--data-dir', tmp_path, '--width', 4,
            '--subset', 64, '--epochs', 1, '--steps', 1, '--teacher', tmp_path / 'teacher/best.pt',
            '--out', tmp_path / f'subset{order[0]}')
        assert 'it may know those' not in capsys.readouterr().out           # of a part nothing is compared
        run('train_adv.py', '--loss', 'ltd', '--dataset', 'mine', '--data-dir', tmp_path, '--width', 4,
            '--batch-size', 512, '--epochs', 1, '--steps', 1, '--teacher', tmp_path / 'teacher/best.pt',
            '--out', tmp_path / f'out{order[0]}')
        assert ('it may know those' in capsys.readouterr().out) == bool(order[0])

def test_two_students_that_need_one_teacher(tmp_path):
    """One trains it, the other waits and says so."""
    command = [*ADV[:-1], '--loss', 'logit_mse', '--epochs', '1', '--seed']
    both = [started([*command, seed], cwd=tmp_path) for seed in '01']
    shown = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum('waiting for the one that another run trains' in text for text in shown) == 1
    assert sum('training it first' in text for text in shown) >= 1
    known = [torch.load(path, weights_only=True)['teacher']['fingerprint']
             for path in tmp_path.glob('runs/*-s?/last.pt')]
    assert len(known) == 2 and known[0] == known[1]

def arguments(folder, **flags):
    return SimpleNamespace(**dict(dict(out=str(folder), resume=True, dry_run=False, save_minutes=0, epochs=2,
                                       batch_size=2, accumulate=1), **flags))

def test_where_a_run_stopped_counts_the_batch_that_is_saved(tmp_path):
    run = runs.Run(arguments(tmp_path))
    run.config, run.stop_asked = {}, True
    with pytest.raises(SystemExit, match='stopped in epoch 1, after 2 of 3'), run.guarded():
        for k in run.progress(range(1, 3), 'epoch 1', total=3, initial=1):
            run.save_if_due(lambda: dict(epoch=1, step_losses=[]))

def test_half_a_run_without_a_state_is_not_finished(tmp_path):
    net = torch.nn.Linear(2, 2)
    for epoch in (1, 2):
        files.save(tmp_path / 'last.pt', dict(state_dict=net.state_dict(), epoch=epoch, run=dict(epochs=2)))
        run = runs.Run(arguments(tmp_path))
        run.config = dict(epochs=2)
        assert run._is_finished() == (epoch == 2)
    run.config = dict(epochs=3)
    with pytest.raises(Refused, match='holds a finished run with epochs 2, not 3'):
        run._is_finished()

def test_a_sweep_with_resume_trains_every_radius_or_is_refused(tmp_path):
    """What a finished run was trained with is compared: a loop over --eps in one folder is no sweep."""
    command = [*ADV, str(tmp_path), '--loss', 'pgd_at', '--epochs', '1', '--resume']
    subprocess.run([*command, '--eps', '4'], check=True, stdout=subprocess.DEVNULL)
    again = subprocess.run([*command, '--eps', '4'], capture_output=True, text=True)
    assert again.returncode == 0 and 'nothing to resume' in again.stdout
    other = subprocess.run([*command, '--eps', '8'], capture_output=True, text=True)
    assert other.returncode == 2 and 'holds a finished run with eps 4.0, not 8.0' in other.stderr
    assert other.stderr.count('\n') == 1

def test_other_training_data_are_refused(tmp_path):
    x, y, u, v = sources.synthetic()
    np.savez(tmp_path / 'mine.npz', x_train=x, y_train=y, x_test=u, y_test=v)
    command = [sys.executable, str(HERE / 'train_adv.py'), '--dataset', 'mine', '--data-dir', str(tmp_path),
               '--width', '4', '--batch-size', '32', '--loss', 'pgd_at', '--epochs', '3', '--steps', '1',
               '--save-minutes', '0', '--out', str(tmp_path / 'out')]
    process = started(command)
    begun(tmp_path / 'out', process)
    process.kill()
    process.communicate()
    for labels in (y[::-1].copy(), y % 5):
        np.savez(tmp_path / 'mine.npz', x_train=x, y_train=labels, x_test=u, y_test=v % (labels.max() + 1))
        done = subprocess.run([*command, '--resume'], capture_output=True, text=True)
        assert done.returncode == 2 and 'was started with' in done.stderr and done.stderr.count('\n') == 1

def test_a_state_that_is_no_number_does_not_replace_a_good_one(tmp_path):
    run, net, losses = runs.Run(arguments(tmp_path)), torch.nn.Linear(2, 2), [torch.tensor(1.0)]
    run.config = {}
    def state():
        return dict(epoch=1, step_losses=losses, net=net)
    run.save_state(state)
    good = (tmp_path / 'state.pt').read_bytes()
    losses.append(torch.tensor(float('nan')))
    with pytest.raises(FloatingPointError, match='loss in epoch 1, step 2'):
        run.save_state(state)
    losses.clear()
    with torch.no_grad():
        net.weight.fill_(float('inf'))
    with pytest.raises(FloatingPointError, match='weights before the first epoch'):
        run.save_state(state)
    assert (tmp_path / 'state.pt').read_bytes() == good

@pytest.mark.parametrize('damage, says', [
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), 'truncated'),
    (lambda path: torch.save({'a': torch.zeros(2)}, path), 'no state of this script')])
def test_a_damaged_state_is_named(damage, says, tmp_path):
    command = [*ADV, str(tmp_path), '--loss', 'pgd_at']
    process = started(command)
    begun(tmp_path, process)
    process.kill()
    process.communicate()
    damage(tmp_path / 'state.pt')
    done = subprocess.run([*command, '--resume'], capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count('\n') == 1

def test_a_torn_log_is_written_again_and_left_overs_are_removed(tmp_path):
    command = [*ADV, str(tmp_path), '--loss', 'pgd_at']
    process = started(command)
    begun(tmp_path, process)
    while len((tmp_path / 'log.jsonl').read_text().splitlines()) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    (tmp_path / 'log.jsonl').write_text('{"epoch": ')
    (tmp_path / '.state.pt.1234.tmp').write_text('half')
    subprocess.run([*command, '--resume'], check=True, stdout=subprocess.DEVNULL)
    assert [row['epoch'] for row in finished(tmp_path)[1]] == [1, 2, 3]
    assert not (tmp_path / '.state.pt.1234.tmp').exists()

@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_save_too(number, tmp_path):
    process = started([*ADV, str(tmp_path), '--loss', 'pgd_at'])
    begun(tmp_path, process)
    process.send_signal(number)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and 'Continue with: python' in err and (tmp_path / 'state.pt').exists()

def test_another_script_runs_in_a_thread(tmp_path):
    """Where Python takes no handlers: train_adv.py in a thread of somebody's program trains its teacher."""
    code = ('import threading; from support import child; '
            'thread = threading.Thread(target=lambda: print(child.run(["-c", "raise SystemExit(3)"]))); '
            'thread.start(); thread.join()')
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('3\n', '')

def test_nohup_holds_while_another_script_is_run():
    code = ('import os, signal; from support import child; signal.signal(signal.SIGHUP, signal.SIG_IGN); '
            'print(child.run(["-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"]))')
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == '0\n', done

@pytest.mark.parametrize('number, to_both', [(signal.SIGTERM, False), (signal.SIGINT, True),
                                             (signal.SIGINT, False)])
def test_a_signal_while_the_teacher_is_trained_first_saves_it(number, to_both, tmp_path):
    process = started([sys.executable, str(HERE / 'train_adv.py'), '--dataset', 'synthetic', '--width', '24'],
                      cwd=tmp_path, start_new_session=True)
    folder = tmp_path / 'runs/synthetic-resnet18-w24-teacher'
    begun(folder, process)
    if to_both:                                             # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and 'Continue with: python' in err
    assert err.endswith('stopped while the teacher was trained; the same command continues\n')
    assert (folder / 'state.pt').exists() and not files.is_locked(folder / '.lock')

def test_a_closed_pipe_does_not_end_a_training(tmp_path):
    command = ' '.join([*ADV, str(tmp_path), '--loss', 'pgd_at'])
    done = subprocess.run(['bash', '-c', f'{command} | head -1; exit ${{PIPESTATUS[0]}}'],
                          capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr and len(finished(tmp_path)[1]) == 3

def test_a_thread_trains_without_signal_handlers(tmp_path):
    code = ('import runpy, sys, threading\n'
            f'sys.argv = {[str(a) for a in ADV[1:]] + [str(tmp_path), "--loss", "pgd_at"]}\n'
            'sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])\n'
            't = threading.Thread(target=lambda: runpy.run_path(sys.argv[0], run_name="__main__"))\n'
            't.start(); t.join()\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'Traceback' not in done.stderr and len(finished(tmp_path)[1]) == 3

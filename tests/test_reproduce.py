"""
The papers' tables: every command of every table is one that the scripts take, a table that is killed trains
nothing twice, and what is finished is left alone.
"""
import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

import models
from support import checkpoint, files, refusals
from support.files import Refused
from test_smoke import HERE
from tools import plan as plans
from tools import reproduce, results
from tools.tables import EVALUATIONS, TABLES, Row

ROOT = pathlib.Path(plans.ROOT)
PAPERS = [name for name in TABLES if name != 'small']
SCALES = [(name, ('--scale', scale), dataset) for name in PAPERS for scale in ('cpu', 'paper')
          for dataset in ('cifar10', 'cifar100')
          if any(dataset in row.paper for row in TABLES[name].rows.values())]

# -----------------------------------------------------------------------------
# the tables as data

def parse(*argv):
    """What main() makes of these flags: the Plan, all rows, the work."""
    defaults = dict(scale=None, rows=None, seeds=None, dataset=None, width=None, epochs=None, n=None,
                    compile=False, data_dir='data', runs=str(ROOT / 'runs'), results=str(ROOT / 'results'))
    parser = argparse.ArgumentParser()
    parser.add_argument('table')
    for flag in ('scale', 'dataset'):
        parser.add_argument(f'--{flag}')
    for flag in ('width', 'epochs', 'n'):
        parser.add_argument(f'--{flag}', type=int)
    args = parser.parse_args(argv, argparse.Namespace(**defaults))
    return reproduce.planned(args, pytest.fail)

def jobs_of(plan, name, seed=0):
    firsts = plans.first_jobs(plan, plans.all_flags(plan, name)).values()
    return [*firsts, plans.training(plan, name, seed)], plans.evaluations(plan, name, seed).values()

def evaluate_parser():
    """evaluate.py's, without the evaluation."""
    lines = (ROOT / 'evaluate.py').read_text().partition('args = parser.parse_args()')[0]
    names = {'__name__': 'evaluate'}
    hook = sys.excepthook
    exec(compile(lines, 'evaluate.py', 'exec'), names)
    sys.excepthook = hook
    return names['parser']

@pytest.mark.parametrize('name, scale, dataset', [('small', (), 'cifar10'), *SCALES])
def test_every_command_is_taken_by_its_script(name, scale, dataset):
    plan, rows, work = parse(name, *scale, '--dataset', dataset)
    judge = evaluate_parser()
    assert rows and work
    for row in rows:
        trainings, evaluations = jobs_of(plan, row)
        for job in trainings:
            names = plans.head(job.command)                 # argparse's own refusals
            args = argparse.Namespace(**vars(names['args']))
            refusals.optimisation(args, names['parser'].get_default)
            refusals.model(args.model, width=args.width)
            if 'hp' in names:
                refusals.training(args, names['method'], names['hp'], names['parser'].get_default)
                refusals.attack(args)
            assert args.dataset == dataset and args.seed == 0
            assert '{' not in job.command and job.product.startswith('runs/')
        for job in evaluations:
            args = judge.parse_args(shlex.split(job.command)[1:])
            assert args.out == job.product and os.path.dirname(args.checkpoint) == trainings[-1].product

def test_a_wrong_flag_is_refused_by_the_script():
    with pytest.raises(Refused, match='unknown argument --tau'):
        plans.head('train_adv.py --loss trades --tau 5')
    with pytest.raises(SystemExit):
        plans.head('train_adv.py --loss trade')

@pytest.mark.parametrize('name', TABLES)
def test_a_number_for_every_column(name):
    table = TABLES[name]
    for row in table.rows.values():
        for numbers in row.paper.values():
            assert len(numbers) in (0, len(table.columns))
            assert all(n is None or isinstance(n, str) or 0 <= n <= 100 for n in numbers)
    for evaluation, _, _ in table.columns.values():
        assert evaluation in EVALUATIONS

def test_tables_share_their_runs():
    one, _, _ = parse('p1-table1', '--scale', 'cpu', '--width', '8')
    two, _, _ = parse('p1-table2', '--scale', 'cpu', '--width', '8')
    folder = plans.training(one, 'logit_mse-0.2', 0).product
    assert folder == plans.training(two, 'logit_mse', 0).product
    # the name the script gives itself: a run that was started by hand is the table's
    assert folder == ('runs/cifar10-resnet18-w8-logit_mse-beta0.2-teachercifar10-resnet18-w8-epochs20-'
                      'compile-teacher-best.pt-epochs20-compile-s0')
    paper, _, _ = parse('p1-table2', '--scale', 'paper')
    assert plans.training(paper, 'trades', 2).command == 'train_adv.py --loss trades --beta 5 --seed 2'

def test_the_papers_settings():
    """The resolved flags of one row of each paper, as its text has them."""
    def resolved(table, row):
        plan, _, _ = parse(table, '--scale', 'paper')
        return plans.head(plans.training(plan, row, 0).command)['args']
    a = resolved('p1-table2', 'logit_mse')
    assert (a.model, a.width, a.batch_size) == ('resnet18', None, 128)
    assert (a.epochs, a.lr, a.schedule) == (100, 0.2, 'onecycle')
    assert (a.weight_decay, a.nesterov, a.steps, a.eps, a.step_size) == (5e-4, True, 10, 8, None)
    a = resolved('p2-whitebox', 'rslad')
    assert (a.epochs, a.lr, a.weight_decay, a.nesterov) == (300, 0.1, 2e-4, False)
    assert [round(m * a.epochs) for m in a.milestones] == [215, 260, 285]
    a = resolved('p3-table1', 'adversarial')
    assert (a.epochs, a.schedule, a.steps, round(a.eps / 255, 3), a.step_size) == (100, 'cosine', 2, 0.1, 2)
    a = resolved('p3-table2', 'adversarial')
    assert (a.steps, a.eps / 255, a.step_size / 255) == (2, 0.5, 0.5)
    for table, row in (('p4-table1', 'ltd'), ('p4-table5', 'adv-nat'), ('p4-table6', 'T=50')):
        a = resolved(table, row)
        assert (a.model, a.epochs, a.lr, a.weight_decay, a.nesterov) == ('wrn-34-10', 120, 0.1, 5e-4, True)
        assert [round(m * a.epochs) for m in a.milestones] == [80, 100]
        assert (a.steps, a.batch_size) == (8, 128)

# -----------------------------------------------------------------------------
# what is printed

def run_of(accuracy, low, high):
    result = dict(accuracy=accuracy, interval=[low, high], class_std=7.04, n=100)
    return results.Measured({'best': dict(results=dict(clean=result))}, [], 1.0)

def test_a_cell_has_ours_the_interval_the_spread_and_the_papers():
    column = ('best', 'clean', 'accuracy')
    assert results.cell(column, [run_of(50, 40, 60)], 47.17) == '50.0 (40.0-60.0) / *47.17*'
    assert results.cell(column, [run_of(50, 40, 60), run_of(54, 44, 64)], None) == '52.0 ± 2.8 (42.0-62.0)'
    assert results.cell(('best', 'clean', 'class_std'), [run_of(50, 40, 60)], 6.9) == '7.0 / *6.9*'
    assert results.cell(column, [], '?') == '- / *?*'

def test_the_reports_of_small_are_still_the_tables():
    plan, rows, _ = parse('small')
    found = results.find(plan, rows)
    text = results.markdown(plan, found)
    assert len(found['trades']) == 3 and all(found[row] for row in rows)
    assert re.search(r'\| trades \| 35.4 ± 1.0 \(.*\| 22.5 ± 0.2 .* 20.8 ± 1.8 \(', text)
    assert 'python train_teacher.py --model resnet18 --width 8 --epochs 15 --out runs/small/teacher' in text
    # chosen by clean accuracy, in epoch 3; under PGD-20 the first was the best
    assert '| 3.5 (3) / 3.5 | 18 | 0 | `--loss standard` |' in text

@pytest.mark.parametrize('folder', sorted(path.parent.name for path in HERE.glob('results/p*/table.md')))
def test_the_tables_kept_are_what_their_reports_give(folder):
    table, width, epochs = re.fullmatch(r'(.*)-cpu-w(\d+)(?:-e(\d+))?', folder).groups()
    report = json.loads(next(HERE.glob(f'results/{folder}/*.best.json')).read_text())
    flags = ['--scale', 'cpu', '--width', width, '--n', str(report['results']['clean']['n'])]
    plan, rows, _ = parse(table, *flags, *(['--epochs', epochs] if epochs else []))
    text = results.markdown(plan, results.find(plan, rows))
    assert text == (HERE / f'results/{folder}/table.md').read_text(), 'python -m tools.reproduce ... --table'

def test_the_scatter_shows_ours_and_the_papers():
    plan, rows, _ = parse('p3-figure4', '--scale', 'cpu')
    result = dict(accuracy=50.0)
    report = dict(results={column[1]: result for column in plan.table.columns.values()})
    run = results.Measured({column[0]: report for column in plan.table.columns.values()}, [], 1.0)
    figure = results.scatter(plan, {name: {0: run} if name == 'als' else {} for name in rows})
    for axes in figure.axes:
        full = [line for line in axes.lines if line.get_markerfacecolor() != 'none']
        assert len(axes.lines) == len(rows) + 1 and [line.get_label() for line in full] == ['als']
    x, y = figure.axes[1].lines[0].get_data()
    assert (x[0], y[0]) == (91.87, 11.28)               # traditional: clean, and PGD at 0.5

# -----------------------------------------------------------------------------
# a tiny table, through the same code

DRIVER = """
import sys
from tools import reproduce, tables
from tools.tables import Row, Table
tables.EVALUATIONS['tiny'] = ('best', '--n 20 --attacks pgd --no-audit', '')
row = lambda flags: Row(flags, {'synthetic': (50.0, '?')})
tables.TABLES['tiny'] = Table(
    'Tiny', rows={'trades': row('--loss trades'), 'logit_mse': row('--loss logit_mse --teacher {standard}')},
    columns={'clean': ('tiny', 'clean', 'accuracy'), 'PGD-20': ('tiny', 'pgd-20', 'accuracy')},
    budget='--dataset synthetic --width 4 --subset 32 --epochs 4 --steps 1 --batch-size 16 --save-minutes 0',
    first={'standard': Row('', settings='--dataset synthetic --width 4 --subset 32 --epochs 1',
                           script='train_teacher.py')})
reproduce.main(['tiny', *sys.argv[1:]])
"""

def tiny(folder, *argv):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', DRIVER, *argv], cwd=folder, env=env, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def ran(output):
    """The scripts it started."""
    return re.findall(r'^\$ python \S*?(\w+)\.py', output, re.M)

def test_killed_in_a_row_nothing_is_trained_twice(tmp_path):
    first = tiny(tmp_path)
    log = lambda: next(iter(tmp_path.glob('runs/*logit_mse*/log.jsonl')), None)
    deadline = time.time() + 300
    while time.time() < deadline and not (log() and log().read_text().count('"epoch"') >= 1):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert ran(first.communicate()[0]) == ['train_adv', 'evaluate', 'train_teacher', 'train_adv']
    assert log().with_name('state.pt').exists(), 'it was too quick to be killed in the middle'
    done = {path: path.stat().st_mtime_ns for pattern in ('*teacher/*.pt', '*trades*/*.pt', '*trades*/*.json')
            for path in tmp_path.glob(f'runs/{pattern}')}
    assert len(done) == 5

    again = tiny(tmp_path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and ran(output) == ['train_adv', 'evaluate'], output
    begins = tuple(map(int, re.search(r'continuing in epoch (\d+), after batch (\d+)', output).groups()))
    assert begins >= (1, 2) and log().read_text().count('"epoch"') == 4     # of two batches an epoch
    assert {path: path.stat().st_mtime_ns for path in done} == done
    table = (tmp_path / 'results/tiny/table.md').read_text()
    assert re.search(r'\| trades \| [\d.]+ \(.*\) / \*50.0\* \| .* / \*\?\* .* \| 0 \| `--loss tr', table)
    assert table.count('python train_adv.py') == 3 and 'python train_teacher.py' in table   # one in a note

    # a third time there is nothing to do; other weights are evaluated again, and a report is not thrown away
    best = next(tmp_path.glob('runs/*logit_mse*/best.pt'))
    shutil.copy(next(tmp_path.glob('runs/*trades*/best.pt')), best)
    third = tiny(tmp_path)
    assert ran(third.communicate(timeout=300)[0]) == ['evaluate'] and best.with_name('tiny.json.old').exists()

@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='POSIX signals')
def test_a_signal_to_stop_goes_on_to_the_training_which_saves(tmp_path):
    stopped = tiny(tmp_path, '--rows', 'trades')
    state = lambda: next(iter(tmp_path.glob('runs/*trades*/state.pt')), None)
    deadline = time.time() + 300
    while time.time() < deadline and not state():
        time.sleep(0.05)
    os.kill(stopped.pid, signal.SIGTERM)
    output, _ = stopped.communicate(timeout=300)
    assert stopped.returncode == 1 and output.rstrip().endswith('stopped; the same command continues'), output
    assert 'Continue with: python' in output and state() and not files.is_locked(state().parent / '.lock')
    assert 'evaluate.py' not in output.split('Continue with')[0]

def test_dry_run_measures_with_teachers_that_are_not_there(tmp_path):
    measuring = tiny(tmp_path, '--rows', 'logit_mse', '--dry-run')
    output, _ = measuring.communicate(timeout=300)
    assert measuring.returncode == 0 and output.count('# about 0.0 hours') == 2, output
    assert 'hours of training' in output and not list(tmp_path.iterdir())
    commands = [line for line in output.splitlines() if line.startswith('python ')]
    assert [ran(f'$ {command}')[0] for command in commands] == ['train_teacher', 'train_adv', 'evaluate']

# -----------------------------------------------------------------------------
# without running anything

@pytest.fixture
def plan(tmp_path):
    plan, _, _ = parse('p1-table2', '--scale', 'cpu')
    return plan._replace(base=str(tmp_path), results=str(tmp_path / 'results'))

def test_a_row_that_fails_and_one_that_others_train_are_said(plan, monkeypatch):
    monkeypatch.setattr(reproduce, 'run', lambda plan, job: False)
    assert reproduce.do_row(plan, 'trades', 0).endswith('ended with an error')
    monkeypatch.setattr(reproduce.files, 'is_locked', lambda path: True)
    assert 'another process is training runs/' in reproduce.do_row(plan, 'trades', 0)

def test_a_teacher_that_another_process_trains_is_waited_for(plan, monkeypatch, capsys):
    locked = iter([True, True, True])
    monkeypatch.setattr(reproduce.files, 'is_locked', lambda path: next(locked, False))
    monkeypatch.setattr(reproduce.files.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(reproduce, 'run', lambda plan, job: False)
    assert reproduce.do_row(plan, 'logit_mse', 0).endswith('-teacher ended with an error')
    assert capsys.readouterr().out.count('waiting for runs/') == 1

@pytest.mark.parametrize('content', ['{"complete": true}', '{"complete": true, "args"', '[]', ''])
def test_what_is_torn_is_made_again_and_left_out_of_the_table(content, plan, tmp_path, capsys):
    job = plans.evaluations(plan, 'trades', 0)['best']
    (tmp_path / job.product).parent.mkdir(parents=True)
    (tmp_path / job.product).write_text(content)
    assert not plans.is_evaluated(plan, job)
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results/trades-s0.command').write_text(plans.record(plan, 'trades', 0))
    (tmp_path / 'results/trades-s0.best.json').write_text(content)
    assert results.measured(plan, 'trades', 0) is None
    assert 'note: trades, seed 0, is left out: ' in capsys.readouterr().out
    (tmp_path / job.product).with_name('log.jsonl').write_text('{"loss": "tra\n{}\n')
    with pytest.raises(Refused, match='log.jsonl is damaged'):
        plans.is_trained(plan, plans.training(plan, 'trades', 0))

def test_one_report_serves_best_and_last_of_the_same_weights(plan, tmp_path, monkeypatch):
    judge, started = evaluate_parser(), []
    folder = tmp_path / plans.training(plan, 'trades', 0).product
    def run(place, job):
        started.append(job.product)
        args = judge.parse_args(shlex.split(job.command)[1:])
        net, _ = checkpoint.load_checkpoint(str(tmp_path / args.checkpoint))
        (tmp_path / job.product).write_text(json.dumps(dict(
            complete=True, args=vars(args), fingerprint=checkpoint.fingerprint(net))))
        return True
    monkeypatch.setattr(reproduce, 'run', run)
    jobs = plans.evaluations(plan, 'trades', 0)
    def judged(best, last):
        started.clear()
        checkpoint.save_checkpoint(str(folder / 'best.pt'), best)
        checkpoint.save_checkpoint(str(folder / 'last.pt'), last)
        for job in jobs.values():
            assert (reproduce.evaluate(plan, job, list(jobs.values())) is None
                    and plans.is_evaluated(plan, job))
        return started
    one, other = models.build('resnet18', 10, width=4), models.build('resnet18', 10, width=4)
    assert judged(one, other) == [jobs['best'].product, jobs['last'].product]
    assert judged(other, other) == [jobs['best'].product]       # that of last.pt is still true

    (folder / 'last-n1000.json').unlink()
    assert judged(one, one) == [jobs['best'].product]           # and here it is made of the other one

def test_a_folder_with_other_flags_is_refused(plan, tmp_path):
    job = plans.training(plan, 'trades', 0)
    (tmp_path / job.product).mkdir(parents=True)
    (tmp_path / job.product / 'log.jsonl').write_text('{"loss": "trades", "beta": 6.0, "epochs": 20}\n')
    with pytest.raises(Refused, match='--beta 6.0, not 5.0'):
        plans.is_trained(plan, job)
    (tmp_path / job.product / 'log.jsonl').write_text('{"loss": "trades", "beta": 5.0, "epochs": 20}\n')
    assert not plans.is_trained(plan, job)

def test_what_does_not_go_together(capsys):
    for argv, text in ((['p1-table2'], '--scale'),
                       (['p1-table2', '--scale', 'paper', '--width', '8'], '--width'),
                       (['p4-table6', '--scale', 'cpu', '--dataset', 'cifar100'], 'cifar100'),
                       (['small', '--rows', 'nothing'], 'unknown row'),
                       (['small', '--scale', 'paper'], 'leave --scale out'),
                       (['p1-table2', '--scale', 'cpu', '--n', '0'], '--n 0: at least 1'),
                       (['p1-table2', '--scale', 'cpu', '--n', '10001'], 'CIFAR has 10,000 test images'),
                       (['small', '--runs', '/tmp/elsewhere'], 'a folder called runs')):
        with pytest.raises(SystemExit) as ended:
            reproduce.main(argv)
        assert ended.value.code == 2 and text in capsys.readouterr().err

def test_rows_are_what_they_are_said_to_be():
    """Every paper row that wants a teacher gets one, and no other does."""
    from losses import METHODS
    for name in PAPERS:
        for row in TABLES[name].rows.values():
            assert isinstance(row, Row)
            if row.script == 'train_adv.py':
                loss = re.search(r'--loss (\w+)', row.flags)[1]
                assert bool(METHODS[loss].teacher) == ('--teacher' in row.flags), row

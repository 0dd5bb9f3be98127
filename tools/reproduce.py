"""
The papers' tables (tools/tables.py), row by row: train what is missing, evaluate it, print ours beside
theirs.

$ python -m tools.reproduce p1-table2 --scale cpu --width 8         # two cores: days; the same line continues
$ python -m tools.reproduce p1-table2 --scale paper                 # the paper's settings and seeds: a GPU
$ python -m tools.reproduce p4-table6 --scale cpu --dry-run         # what it would run, and how long
$ python -m tools.reproduce small --rows trades logit_mse --seeds 0 1 2   # 9 minutes a row on a CPU core
$ python -m tools.reproduce small --table                               # what is there already

What is finished is left alone, what was cut is continued, and a run that another table or you have made is
taken: runs are named by their flags. Reports, logs and commands also go to results/TABLE-SCALE/, and table.md
there is made of them. Several processes may do different rows. Scale cpu: ResNet-18 of --width, 20 epochs,
1,000 test images.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

import torch

import data
import models
from support import checkpoint, child, describe, files, refusals
from support.files import atomic, say
from tools import results
from tools.plan import ROOT, Plan, all_flags, evaluations, first_jobs, head, is_evaluated, is_trained
from tools.plan import record, shown, text_of, training
from tools.tables import TABLES

# forward passes that an image costs: in a training step beside its attack, under AutoAttack if it withstands
# it; and the share of images that is taken to do so
STEP_PASSES, AUTOATTACK_PASSES, WITHSTAND = 7, 9800, 0.4

# -----------------------------------------------------------------------------
# doing it

def run(place, job):
    """-> did it end well?"""
    say(f'$ {shown(place, job)}')
    script, *argv = shlex.split(shown(place, job))[1:]
    try:
        return child.run([os.path.join(ROOT, script), *argv], cwd=place.base) == 0
    except child.Stopped:
        sys.exit('stopped; the same command continues')

def train(place, job):
    """Trains what is not trained yet. -> None, or what is in the way, in words."""
    if is_trained(place, job):
        return None
    if files.is_locked(os.path.join(place.base, job.product, '.lock')):
        return f'another process is training {job.product}'
    if not run(place, job):
        return f'the training of {job.product} ended with an error'
    return None

def evaluate(place, job, others):
    """Evaluates what is not evaluated yet. others: the row's other evaluations; the report of one of them
    serves if best.pt is last.pt. -> None, or what is in the way, in words."""
    path = os.path.join(place.base, job.product)
    if is_evaluated(place, job):
        return None
    if os.path.exists(path) and '"complete": false' not in text_of(path):
        os.replace(path, f'{path}.old')         # of other flags or weights; half a one is continued
    for other in others:
        if is_evaluated(place, job, other.product):
            say(f'{job.product}: of the same weights as {other.product}, which is copied')
            with atomic(path) as tmp:
                shutil.copy(os.path.join(place.base, other.product), tmp)
            return None
    if not run(place, job):
        return f'{job.product} ended with an error'
    return None

def do_row(plan, name, seed):
    """-> None, or what is in the way, in words."""
    firsts = list(first_jobs(plan, all_flags(plan, name)).values())
    for job in firsts:                      # several rows, and processes, may need the same
        files.wait_for(os.path.join(plan.base, job.product, '.lock'),
                       f'waiting for {job.product}, which another process trains')
    for job in [*firsts, training(plan, name, seed)]:
        problem = train(plan, job)
        if problem:
            return problem
    jobs = list(evaluations(plan, name, seed).values())
    for job in jobs:
        problem = evaluate(plan, job, jobs)
        if problem:
            return problem
    keep(plan, name, seed)
    return None

def keep(plan, name, seed):
    """Log, reports and commands of the row also in results/; the commands last: they say that the rest is
    there."""
    kept = f'{plan.results}/{name}-s{seed}'
    made = {'jsonl': f'{training(plan, name, seed).product}/log.jsonl'}
    for evaluation, job in evaluations(plan, name, seed).items():
        made[f'{evaluation}.json'] = job.product
    for ending, path in made.items():
        with atomic(f'{kept}.{ending}') as tmp:
            shutil.copy(os.path.join(plan.base, path), tmp)
    with atomic(f'{kept}.command') as tmp, open(tmp, 'w') as f:
        f.write(record(plan, name, seed))

# -----------------------------------------------------------------------------
# --dry-run

def kind_of(job):
    """Trainings of one kind take the same time."""
    names = head(job.command)
    free = {'seed', 'teacher', 'standard_teacher', 'lr', 'weight_decay', 'schedule', 'milestones', 'nesterov',
            'awp_warmup', 'smoothing', 'bn_order', *names.get('hp', ()), *describe.NOT_THE_RUN}
    return job.command.split()[0], str({k: v for k, v in vars(names['args']).items() if k not in free})

def stand_ins(job, firsts, folder, dataset):
    """Untrained networks where the training looks for its teachers, in folder/runs/."""
    args = head(job.command)['args']
    for flag in ('teacher', 'standard_teacher', 'warm_start'):
        path = getattr(args, flag, None)
        if path in (None, 'teacher'):
            continue
        like = args
        for first in firsts:
            if path == f'{first.product}/best.pt':
                like = head(first.command)['args']
        classes = data.DATASETS.get(dataset, {}).get('classes') or 10
        checkpoint.save_checkpoint(f'{folder}/{path}', models.build(like.model, classes, width=like.width))

def measure(plan, job, firsts):
    """-> hours of the training, and seconds of a step for one image, by a few steps that the script times.
    Ends with the script's own words if it fails."""
    script, *argv = shlex.split(job.command)
    argv += ['--dry-run', '--data-dir', os.path.abspath(plan.data_dir)]
    with tempfile.TemporaryDirectory() as empty:
        stand_ins(job, firsts, empty, plan.dataset)
        ended = subprocess.run([sys.executable, os.path.join(ROOT, script), *argv], cwd=empty, text=True,
                               capture_output=True)
    found = re.search(r'steps of ([\d.]+) s.*about (\d+) minutes', ended.stdout)
    if ended.returncode or not found:
        sys.exit(f'{job.command} --dry-run: {ended.stderr.strip() or ended.stdout.strip()}')
    return int(found[2]) / 60, float(found[1]) / head(job.command)['args'].batch_size

def dry_run(plan, work, timed):
    """Prints every command once; with timed also the hours that it takes."""
    done, speeds, hours, judging = set(), {}, 0.0, 0.0
    if plan.base != os.getcwd():
        say(f'cd {shlex.quote(plan.base)}')
    for name, seed in work:
        firsts = list(first_jobs(plan, all_flags(plan, name)).values())
        row = training(plan, name, seed)
        for job in [*firsts, row]:
            if job.product in done:
                continue
            done.add(job.product)
            if is_trained(plan, job):
                say(f'{shown(plan, job)}      # is there')
                continue
            say(shown(plan, job))
            if timed:
                if kind_of(job) not in speeds:
                    speeds[kind_of(job)] = measure(plan, job, firsts)
                hours += speeds[kind_of(job)][0]
                say(f'    # about {speeds[kind_of(job)][0]:.1f} hours')
        for job in evaluations(plan, name, seed).values():
            say(shown(plan, job))
            if kind_of(row) in speeds and 'autoattack' in job.command:
                passes = 2 * getattr(head(row.command)['args'], 'steps', 0) + STEP_PASSES
                n = re.search(r'--n (\d+)', job.command)
                images = WITHSTAND * (int(n[1]) if n else 10000)
                judging += images * AUTOATTACK_PASSES * speeds[kind_of(row)][1] / passes / 3600
    if timed:
        say(f'# {hours:.1f} hours of training; some {judging:.1f} of AutoAttack where {WITHSTAND:.0%} of the '
            'images withstand it')

# -----------------------------------------------------------------------------

def planned(args, refuse):
    """The Plan of these flags, the names of all rows, and the (row, seed) to do."""
    table = TABLES[args.table]
    if args.n and args.n > 10_000:
        refuse(f'--n {args.n}: CIFAR has 10,000 test images')
    datasets = list(dict.fromkeys(dataset for row in table.rows.values() for dataset in row.paper))
    dataset, tags = args.dataset or datasets[0], [args.table]
    if dataset not in datasets:
        refuse(f'--dataset {dataset}: {args.table} is of {" ".join(datasets)}')
    if dataset != datasets[0]:
        tags.append(dataset)
    scale, n, width = args.scale, args.n, args.width or 16
    for flag in ('n', 'width', 'epochs'):
        if vars(args)[flag] is not None and vars(args)[flag] < 1:
            refuse(f'--{flag} {vars(args)[flag]}: at least 1')
    if table.budget is not None:
        if scale:
            refuse(f'{args.table} has one scale: leave --scale out')
    elif not scale:
        refuse(f'{args.table} needs --scale cpu or --scale paper')
    if scale == 'cpu':
        n = n or 1000
        tags += [scale, f'w{width}'] + ([f'e{args.epochs}'] if args.epochs else [])
    elif args.epochs or args.width:
        refuse('--epochs and --width are of --scale cpu')
    elif scale:
        tags.append(scale)
    runs = os.path.abspath(args.runs)
    if os.path.basename(runs) != 'runs':
        refuse(f'--runs {args.runs}: a folder called runs, as the training scripts name it')
    kept = os.path.join(os.path.abspath(args.results), '-'.join(tags))
    plan = Plan(args.table, table, scale, dataset, width, args.epochs, n, scale == 'cpu' or args.compile,
                os.path.dirname(runs), kept, args.data_dir)
    rows = {name: row for name, row in table.rows.items() if dataset in row.paper}
    for name in args.rows or ():
        if name not in rows:
            refuse(f'unknown row {name!r}; {args.table} has {" ".join(rows)}')
    chosen = args.rows or [name for name, row in rows.items() if row.cpu or scale != 'cpu']
    seeds = args.seeds or (table.seeds if scale == 'paper' else (0,))
    return plan, list(rows), [(name, seed) for seed in seeds for name in chosen]

def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m tools.reproduce', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    refusals.one_line(parser)
    files.plain_output()
    arg = parser.add_argument
    arg('table', choices=TABLES)
    arg('--scale', choices=['cpu', 'paper'])
    arg('--rows', nargs='+', metavar='ROW', help='default: all; at scale cpu those tools/tables.py picks')
    arg('--seeds', nargs='+', type=int, help="default: 0; at scale paper as many as the paper's")
    arg('--dataset', help='default: cifar10; or cifar100, where the paper has it')
    arg('--width', type=int, help='of --scale cpu: channels of the first layer (default: 16)')
    arg('--epochs', type=int, help="of --scale cpu (default: 20, or the table's)")
    arg('--n', type=int, help='test images (default: at scale cpu the first 1000, else all)')
    arg('--compile', action='store_true', help='also at scale paper')
    arg('--data-dir', default='data')
    arg('--runs', default='runs', metavar='DIR', help='where runs lie and go: a folder called runs')
    arg('--results', default='results', metavar='DIR', help='where the table goes')
    arg('--dry-run', action='store_true', help='the commands, and how long they take by a few measured steps')
    arg('--commands', action='store_true', help='the commands alone')
    arg('--table', dest='table_only', action='store_true', help='run nothing: what is there')
    args = parser.parse_args(argv)
    plan, names, work = planned(args, parser.error)

    if args.dry_run or args.commands:
        timed = not args.commands
        if timed and plan.scale == 'paper' and not torch.cuda.is_available():
            say('# no GPU here: hours of scale paper are not measured')
            timed = False
        dry_run(plan, work, timed)
        return
    missing = []
    for name, seed in [] if args.table_only else work:
        problem = do_row(plan, name, seed)
        if problem:
            say(f'{name}, seed {seed}: {problem}; going on with the next')
            missing.append(f'{name}-s{seed}')
    found = results.find(plan, names)
    text = results.markdown(plan, found)
    say(text)
    if any(found.values()) and not args.table_only:
        with atomic(f'{plan.results}/table.md') as tmp, open(tmp, 'w') as f:
            f.write(text)
        results.draw(plan, found)
    if missing:
        sys.exit(f'not finished: {" ".join(missing)}')

if __name__ == '__main__':
    main()

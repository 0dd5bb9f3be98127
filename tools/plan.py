"""
What a table of tools/tables.py asks for, as commands; what each of them makes; and whether it is there
already.

    plan = Plan('p1-table2', TABLES['p1-table2'], scale='cpu', dataset='cifar10', width=8, ...)
    training(plan, 'trades', seed=0)            # -> Job: the folder of the run, and the command
    evaluations(plan, 'trades', seed=0)         # -> {name: Job}: the reports, and their commands
    is_trained(plan, job), is_evaluated(plan, job)

Runs are named by their flags, as the training scripts name them: two tables that ask for the same run share
it.
"""
import argparse
import functools
import json
import os
import shlex
import shutil
import sys
from typing import NamedTuple

from support import checkpoint, describe, refusals
from support.files import Refused, atomic
from tools.tables import EVALUATIONS, Table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIRST_EPOCHS = 20                   # at scale cpu, of a teacher

class Job(NamedTuple):
    product: str                    # the folder of a training, or the report of an evaluation, in Place.base
    command: str                    # SCRIPT FLAGS, without --resume and --data-dir

class Place(NamedTuple):
    base: str                       # the folder that holds runs/
    results: str
    data_dir: str

class Plan(NamedTuple):
    """What the flags of tools/reproduce.py ask for; the last three are those of Place."""
    name: str                       # of the table
    table: Table
    scale: str | None               # 'cpu', 'paper'; None: the table has one only
    dataset: str
    width: int
    epochs: int | None              # at scale cpu, instead of the table's
    n: int | None                   # test images, where the evaluation does not say
    compile: bool
    base: str
    results: str
    data_dir: str

# -----------------------------------------------------------------------------
# commands

@functools.cache
def head(command):
    """The variables of a training script (args, parser, hp) once it has read the flags of command: its own
    lines are run, up to where it asks for a device. Raises Refused, or ends like the script, for flags that
    it does not take."""
    script, *argv = shlex.split(command)
    with open(os.path.join(ROOT, script)) as f:
        lines, marker, _ = f.read().partition('\nrank, world, device = ddp.init()')
    if not marker:
        raise ValueError(f'{script}: where do its flags end?')
    names, before = {'__name__': script}, (sys.argv, sys.excepthook)
    sys.argv = [script, *argv]
    try:
        exec(compile(lines, script, 'exec'), names)
    finally:
        sys.argv, sys.excepthook = before
    return names

def folder_of(command):
    """Where the training writes: its --out, or the name that it gives itself."""
    names = head(command)
    args, default = names['args'], names['parser'].get_default
    if args.out:
        return args.out
    if 'hp' in names:
        return describe.name(args, default, names['hp'])
    return describe.teacher_folder(args, default)

def settings(plan, row, first):
    """The flags beside the method's. first: is it a network that rows need?"""
    if plan.table.budget is not None:
        return (row.settings or '') if first else plan.table.budget
    if plan.scale == 'cpu':
        epochs = plan.epochs or plan.table.epochs
        if first or row.script == 'train_teacher.py':
            epochs = FIRST_EPOCHS
        text = f'--width {plan.width} --epochs {epochs}'
    elif first or row.settings is not None:
        text = row.settings or ''
    else:
        text = plan.table.settings
    dataset = '' if plan.dataset == 'cifar10' else f'--dataset {plan.dataset} '
    return f'{dataset}{text}' + (' --compile' if plan.compile else '')

def first_jobs(plan, text):
    """name -> the training of Table.first[name], for every {name} in text."""
    jobs = {}
    for name, row in plan.table.first.items():
        if f'{{{name}}}' in text:
            command = ' '.join(f'{row.script} {settings(plan, row, True)} {row.flags}'.split())
            jobs[name] = Job(folder_of(command), command)
    return jobs

def filled(plan, text):
    """text with the path of a checkpoint for every {name}."""
    for name, job in first_jobs(plan, text).items():
        text = text.replace(f'{{{name}}}', f'{job.product}/best.pt')
    return text

def all_flags(plan, name):
    """Of the row and of its evaluations, with their {names}."""
    used = [EVALUATIONS[column[0]][1] for column in plan.table.columns.values()]
    return ' '.join([plan.table.rows[name].flags, *used])

def training(plan, name, seed):
    """The Job of a row."""
    row = plan.table.rows[name]
    command = f'{row.script} {settings(plan, row, False)} {filled(plan, row.flags)} --seed {seed}'
    if plan.table.folder:
        command += f' --out {plan.table.folder}/{name}-s{seed}'
    command = ' '.join(command.split())
    return Job(folder_of(command), command)

def evaluations(plan, name, seed):
    """name of the evaluation -> its Job."""
    flags, folder, jobs = plan.table.rows[name].flags, training(plan, name, seed).product, {}
    for evaluation in dict.fromkeys(column[0] for column in plan.table.columns.values()):
        which, asked, word = EVALUATIONS[evaluation]
        if word not in flags:
            continue
        if 'hybrid' in flags and 'autoattack' in asked:     # by ReLU's gradients: the smooth ones may mask it
            asked += ' --activation relu'
        out = f'{folder}/{evaluation}.json'
        if '--n ' not in asked and plan.n:
            asked += f' --n {plan.n}'
            out = f'{folder}/{evaluation}-n{plan.n}.json'
        if plan.compile and '--compile' not in asked:
            asked += ' --compile'
        jobs[evaluation] = Job(out, f'evaluate.py {folder}/{which}.pt {filled(plan, asked)} --out {out}')
    return jobs

def record(plan, name, seed):
    """What makes the row, as text."""
    jobs = [training(plan, name, seed), *evaluations(plan, name, seed).values()]
    return ''.join(f'python {job.command}\n' for job in jobs)

def shown(place, job):
    """The command as it can be pasted, in the folder that holds runs/."""
    script, _, flags = job.command.partition(' ')
    if place.base != ROOT:
        script = shlex.quote(os.path.join(ROOT, script))
    resume = '' if script.endswith('evaluate.py') else ' --resume'
    folder = '' if place.data_dir == 'data' else f' --data-dir {shlex.quote(os.path.abspath(place.data_dir))}'
    return f'python {script} {flags}{folder}{resume}'

# -----------------------------------------------------------------------------
# is it there?

def text_of(path):
    """'' where there is none."""
    if not os.path.exists(path):
        return ''
    with open(path) as f:
        return f.read()

def log_of(folder):
    """The configuration and the epochs in its log, {} and [] without one."""
    whole = text_of(f'{folder}/log.jsonl').split('\n')[:-1]    # a run at work may be writing the last line
    try:
        rows = [json.loads(line) for line in whole]
    except ValueError as e:
        raise Refused(f'{folder}/log.jsonl is damaged: move {folder} away, or delete it') from e
    return (rows[0], rows[1:]) if rows else ({}, [])

def is_trained(place, job):
    """Is it there to its last epoch? Raises Refused if the folder holds a run of other flags."""
    folder = os.path.join(place.base, job.product)
    config, epochs = log_of(folder)
    if not config:
        return is_kept(place, job)
    args = argparse.Namespace(**vars(head(job.command)['args']))
    if 'eps' in args:
        refusals.attack(args)                   # as the script does, which fills in the step
    for flag, value in vars(args).items():
        if flag in describe.NOT_THE_RUN or flag not in config:
            continue
        if value is None and flag in ('augment', 'teacher', 'standard_teacher'):       # the script finds it
            continue
        if config[flag] != value:
            raise Refused(f'{folder} holds a run with --{flag.replace("_", "-")} {config[flag]}, '
                          f'not {value}: move it away, or delete it')
    if not all(os.path.exists(f'{folder}/{name}') for name in ('best.pt', 'last.pt')):
        return False
    return not os.path.exists(f'{folder}/state.pt') and bool(epochs) and epochs[-1]['epoch'] == args.epochs

def is_kept(place, job):
    """A teacher of small lies in results/, the same for everyone: it is put in its place."""
    kept = f'{place.results}/{os.path.basename(job.product)}'
    if not os.path.exists(f'{kept}.pt') or text_of(f'{kept}.command') != job.command:
        return False
    best = os.path.join(place.base, job.product, 'best.pt')
    if not os.path.exists(best):
        with atomic(best) as tmp:
            shutil.copy(f'{kept}.pt', tmp)
    return True

def said(value):
    """A flag's value as words of the command line."""
    if isinstance(value, list):
        return [f'{v:g}' if isinstance(v, float) else str(v) for v in value]
    return [] if value is True else said([value])

def is_evaluated(place, job, product=None):
    """Is the report there, whole, with these flags, and of the weights that are there now? With product, that
    of another job is looked at: best.pt may be last.pt."""
    try:
        report = json.loads(text_of(os.path.join(place.base, product or job.product)))
        complete, given, judged = report['complete'], report['args'], report['fingerprint']
    except (ValueError, KeyError, TypeError):           # none, torn, or no report
        return False
    if complete is not True:
        return False
    asked, flag = {}, None
    for word in shlex.split(job.command)[2:]:
        if word.startswith('--'):
            flag = word[2:].replace('-', '_')
            asked[flag] = []
        else:
            asked[flag].append(word)
    if not given['audit'] and 'no_audit' not in asked:
        return False
    for flag in asked.keys() - {'out', 'no_audit'}:
        if said(given[flag]) != asked[flag]:
            return False
    net, _ = checkpoint.load_checkpoint(os.path.join(place.base, shlex.split(job.command)[1]))
    if 'activation' in asked:
        net.build_args = dict(net.build_args, activation=asked['activation'][0])
    return judged == checkpoint.fingerprint(net)

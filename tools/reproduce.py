"""
The tables of results/, row by row: train what is missing, evaluate it, print the table.

$ python -m tools.reproduce small                          # every row, seed 0; about 9 minutes each on a CPU core
$ python -m tools.reproduce small --rows trades logit_mse --seeds 0 1 2
$ python -m tools.reproduce small --commands               # what it would run
$ python -m tools.reproduce small --table                  # what is there already

What was interrupted is continued or run again, and so is what another command has left there; what is
finished is left alone. Weights go to runs/TABLE/ROW-sSEED; logs, reports and commands also to results/TABLE,
of which the table is made. Several processes may do different rows.
"""
import argparse, json, os, shlex, shutil, statistics, subprocess, sys

# -----------------------------------------------------------------------------
# small: every method at one small budget on CIFAR-10, for a CPU. Two teachers: STANDARD is trained once, on
# all training images, with the student's architecture; ROBUST is a row, see the hold-out column

MODEL = '--model resnet18 --width 8'
BUDGET = f'{MODEL} --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile'
STANDARD, ROBUST = 'runs/small/teacher/best.pt', 'runs/small/pgd_at-warm-s0/best.pt'
SMALL = {
    'standard':      '--loss standard',
    'als':           '--loss als',
    'pgd_at':        '--loss pgd_at',
    'nat_adv':       '--loss nat_adv',
    'alp':           '--loss alp',
    'trades':        '--loss trades',
    'trades-beta5':  '--loss trades --beta 5',
    'mart':          '--loss mart',
    'dkl':           '--loss dkl',
    'lbgat':         '--loss lbgat',
    'hat':           f'--loss hat --teacher {STANDARD}',
    'ltd':           f'--loss ltd --teacher {STANDARD}',
    'softmax_kl':    f'--loss softmax_kl --beta 0.2 --teacher {STANDARD}',
    'softmax_kl-reverse': f'--loss softmax_kl --beta 0.2 --reverse --teacher {STANDARD}',
    'logit_mse':     f'--loss logit_mse --beta 0.2 --teacher {STANDARD}',
    # options that go with any loss
    'fast':          '--loss pgd_at --steps 1 --step-size 10',
    'free':          '--loss pgd_at --free 4',
    'pgd_at-warm':   f'--loss pgd_at --warm-start {STANDARD}',
    'logit_mse-warm': f'--loss logit_mse --beta 0.2 --teacher {STANDARD} --warm-start teacher',
    'logit_mse-awp': f'--loss logit_mse --beta 0.2 --teacher {STANDARD} --awp 0.005',
    'logit_mse-ema': f'--loss logit_mse --beta 0.2 --teacher {STANDARD} --ema 0.995',
    'trades-awp':    '--loss trades --awp 0.005',
    'trades-ema':    '--loss trades --ema 0.995',
    # paper 3: AdvProp, adversarial label smoothing, smooth adversarial training, and their mixtures
    'advprop':       '--loss advprop',
    'nat_adv-als':   '--loss nat_adv --targets als',
    'nat_adv-smooth-act': '--loss nat_adv --activation hybrid',
    'advprop-als':   '--loss advprop --targets als',
    'advprop-act':   '--loss advprop --activation hybrid',
    'als-act':       '--loss nat_adv --targets als --activation hybrid',
    'advprop-als-act': '--loss advprop --targets als --activation hybrid',
    # with a robust teacher
    'ard':           f'--loss ard --teacher {ROBUST}',
    'rslad':         f'--loss rslad --teacher {ROBUST}',
    'iad1':          f'--loss iad1 --teacher {ROBUST}',
    'iad2':          f'--loss iad2 --teacher {ROBUST} --standard-teacher {STANDARD}',
    'adaad':         f'--loss adaad --teacher {ROBUST}',
    'adaad-standard': f'--loss adaad --teacher {STANDARD}',     # what everyone tries once
    'rslad-standard': f'--loss rslad --teacher {STANDARD}',
    'kd_swa':        f'--loss kd_swa --teacher {ROBUST} --standard-teacher {STANDARD}',
}
TABLES = {'small': dict(
    rows=SMALL, budget=BUDGET, teacher=f'{MODEL} --epochs 15',
    evaluate={'pgd': '--n 1000 --attacks pgd',
              'autoattack': '--n 200 --attacks autoattack --batch-size 200 --compile'})}

# -----------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
parser.error = lambda message: parser.exit(2, f'{parser.prog}: error: {message}\n')
parser.add_argument('table', choices=TABLES)
parser.add_argument('--rows', nargs='+', metavar='ROW', help='default: all')
parser.add_argument('--seeds', nargs='+', type=int, default=[0])
parser.add_argument('--data-dir', default='data')
parser.add_argument('--commands', action='store_true', help='print the commands, run nothing')
parser.add_argument('--table-only', '--table', dest='table_only', action='store_true', help='run nothing')
args = parser.parse_args()
table = TABLES[args.table]
for row in args.rows or []:
    if row not in table['rows']:
        parser.error(f'unknown row {row!r}; {args.table} has {" ".join(table["rows"])}')
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS, RESULTS = f'runs/{args.table}', f'results/{args.table}'

def evaluations(row):
    """name -> flags: the table's. A hybrid activation may mask its own gradients: it is also attacked with
    ReLU's, and by AutoAttack with no others. AdvProp also through its auxiliary BN, by PGD."""
    flags, more = dict(table['evaluate']), {}
    if 'hybrid' in table['rows'][row]:
        flags['autoattack'] += ' --activation relu'
        more['pgd-relu'] = flags['pgd'] + ' --activation relu'
    if 'advprop' in table['rows'][row]:
        more['pgd-aux'] = flags['pgd'] + ' --branch aux'
    return {**flags, **more}

def steps(row, seed):
    """product -> the command that makes it: the training's folder, then the reports in it."""
    folder = f'{RUNS}/{row}-s{seed}'
    train = f'train_adv.py {table["budget"]} {table["rows"][row]} --seed {seed} --out {folder}'
    return {folder: train, **{f'{folder}/{name}.json': f'evaluate.py {folder}/best.pt {flags} '
                              f'--out {folder}/{name}.json' for name, flags in evaluations(row).items()}}

def text(file):
    return open(file).read() if os.path.exists(file) else ''

def make(product, command):
    """Once: PRODUCT.command, written last, says that it is done and how."""
    if text(f'{product}.command') == command:
        return
    if os.path.isdir(product):
        shutil.rmtree(product)                  # half a training, or another one
    elif '"complete": false' not in text(product) and os.path.exists(product):
        os.remove(product)                      # a report of other flags; half a one is continued
    print(f'$ python {command}', flush=True)
    script, *argv = shlex.split(command)
    argv += ['--data-dir', args.data_dir] if args.data_dir != 'data' else []
    if status := subprocess.run([sys.executable, os.path.join(HERE, script), *argv]).returncode:
        sys.exit(f'stopped: {script} ended with status {status}')
    with open(f'{product}.command', 'w') as f:
        f.write(command)

teacher = {f'{RUNS}/teacher': f'train_teacher.py {table["teacher"]} --out {RUNS}/teacher'}
work = [(row, seed) for seed in args.seeds for row in args.rows or table['rows']]
if args.commands:
    for todo in [teacher, *[steps(*item) for item in work]]:
        print(*[f'python {command}' for command in todo.values()], sep='\n')
    sys.exit()

if not args.table_only:
    (folder, command), = teacher.items()
    if os.path.exists(f'{RESULTS}/teacher.pt') and text(f'{RESULTS}/teacher.command') == command \
            and not os.path.exists(f'{folder}.command'):        # it is kept there: the same for everyone
        os.makedirs(folder, exist_ok=True)
        shutil.copy(f'{RESULTS}/teacher.pt', f'{folder}/best.pt')
        shutil.copy(f'{RESULTS}/teacher.command', f'{folder}.command')
    make(folder, command)
    os.makedirs(RESULTS, exist_ok=True)
    for row, seed in work:
        todo, kept = steps(row, seed), f'{RESULTS}/{row}-s{seed}'
        for product, command in todo.items():
            make(product, command)
        shutil.copy(f'{RUNS}/{row}-s{seed}/log.jsonl', f'{kept}.jsonl')
        for name in evaluations(row):
            shutil.copy(f'{RUNS}/{row}-s{seed}/{name}.json', f'{kept}.{name}.json')
        with open(f'{kept}.command', 'w') as f:
            f.write(''.join(f'python {command}\n' for command in todo.values()))

# -----------------------------------------------------------------------------
# the table: one line per row and way of evaluating it, its seeds averaged

def measured(row, seed):
    """The figures of one finished run of the present commands, or None."""
    kept = f'{RESULTS}/{row}-s{seed}'
    if text(f'{kept}.command') != ''.join(f'python {command}\n' for command in steps(row, seed).values()):
        return None
    reports = {name: json.load(open(f'{kept}.{name}.json')) for name in evaluations(row)}
    pgd = {name: report['results']['pgd-20']['accuracy'] for name, report in reports.items() if 'pgd' in name}
    worst, trained = reports['autoattack']['results']['autoattack (worst case)'], reports['pgd']['trained']
    config, *epochs = [json.loads(line) for line in open(f'{kept}.jsonl')]
    return dict(clean=reports['pgd']['results']['clean']['accuracy'], **pgd, autoattack=worst['accuracy'],
                interval=worst['interval'], epoch=trained['epoch'], held_out=trained['val_pgd20'],
                last=epochs[-1]['val_pgd20'],
                seconds=statistics.median(config['train_images'] / e['img_per_s'] for e in epochs))

def figure(values):
    """mean, and with several seeds ± standard deviation."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'

n = [shlex.split(flags)[1] for flags in table['evaluate'].values()]
print(f'Teacher: `python train_teacher.py {table["teacher"]}`. '
      f'Every row: `python train_adv.py {table["budget"]}` and what stands in its last column.\n')
print(f'| row | clean, n={n[0]} | PGD-20, n={n[0]} | AutoAttack, n={n[1]} (95 %) '
      '| PGD-20 on the hold-out, best (epoch) / last | s/epoch | seeds | flags |\n' + '|---' * 8 + '|')
for row, flags in table['rows'].items():
    runs = {seed: m for seed in range(10) if (m := measured(row, seed))}
    if runs:
        column = lambda name: [m[name] for m in runs.values()]
        low, high = map(statistics.mean, zip(*column('interval')))
        pgd = figure(column('pgd')) + ''.join(f'; {name[4:]} {figure(column(name))}'
                                              for name in evaluations(row) if name.startswith('pgd-'))
        print(f'| {row} | {figure(column("clean"))} | {pgd} | {figure(column("autoattack"))} '
              f'({low:.0f}-{high:.0f}) | {figure(column("held_out"))} '
              f'({" ".join(map(str, column("epoch")))}) / {figure(column("last"))} '
              f'| {statistics.median(column("seconds")):.0f} | {" ".join(map(str, runs))} | `{flags}` |')

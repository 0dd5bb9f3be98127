"""
The tables of results/, row by row: train what is missing, evaluate it, print the table.

$ python reproduce.py small                          # every row, seed 0; about 25 minutes each on a CPU core
$ python reproduce.py small --rows trades logit_mse --seeds 0 1 2
$ python reproduce.py small --commands               # what it would run
$ python reproduce.py small --table                  # what is there already

What was interrupted is run again, and so is a row whose command has changed; what is finished is left alone.
Weights go to runs/TABLE/ROW-sSEED, logs, JSON and command also to results/TABLE, of which the table is made.
"""
import argparse, json, os, shlex, shutil, statistics, subprocess, sys

# -----------------------------------------------------------------------------
# small: every method at one small budget on CIFAR-10, for a CPU. Two teachers: STANDARD is trained once, on
# all training images, with the student's architecture; ROBUST is a row, see the hold-out column

MODEL = '--model resnet18 --width 8'
BUDGET = f'{MODEL} --subset 10000 --epochs 5 --batch-size 64 --lr 0.1'
STANDARD, ROBUST = 'runs/small/teacher/best.pt', 'runs/small/trades-s0/best.pt'
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
    evaluate={'pgd': '--n 1000 --attacks pgd', 'autoattack': '--n 200 --attacks autoattack'})}

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
HERE = os.path.dirname(os.path.abspath(__file__))

def evaluations(row):
    """name -> flags: the table's, and once more with ReLU's own gradients for a hybrid activation, which may
    mask its own, and through the auxiliary BN of AdvProp."""
    flags = dict(table['evaluate'])
    for word, suffix, more in (('hybrid', '-relu', ' --activation relu'),
                               ('advprop', '-aux', ' --branch aux')):
        if word in table['rows'][row]:
            flags |= {name + suffix: f + more for name, f in table['evaluate'].items()}
    return flags

def run(command):
    print(f'$ python {command}', flush=True)
    if args.commands:
        return
    script, *argv = shlex.split(command)
    if status := subprocess.run([sys.executable, os.path.join(HERE, script), *argv]).returncode:
        sys.exit(f'stopped: {script} ended with status {status}')

def command_of(row, seed):
    return (f'train_adv.py {table["rows"][row]} {table["budget"]} --seed {seed} '
            f'--out runs/{args.table}/{row}-s{seed}')

def same(file, command):
    return os.path.exists(file) and open(file).read() == f'python {command}\n'

def train(command, folder):
    """Once: folder/command, written last, says that it is done and how."""
    if args.commands or not same(f'{folder}/command', command):
        if not args.commands:
            shutil.rmtree(folder, ignore_errors=True)
        run(f'{command} --data-dir {args.data_dir}')
        if not args.commands:
            with open(f'{folder}/command', 'w') as f:
                f.write(f'python {command}\n')

if not args.table_only:
    if not args.commands:
        os.makedirs(f'results/{args.table}', exist_ok=True)
    folder = f'runs/{args.table}/teacher'
    train(f'train_teacher.py {table["teacher"]} --out {folder}', folder)
    if not args.commands:
        shutil.copy(f'{folder}/log.jsonl', f'results/{args.table}/teacher.jsonl')
    for seed in args.seeds:
        for row in args.rows or table['rows']:
            folder, kept = f'runs/{args.table}/{row}-s{seed}', f'results/{args.table}/{row}-s{seed}'
            command = command_of(row, seed)
            train(command, folder)
            if not args.commands and not same(f'{kept}.command', command):      # of this command, nothing yet
                for name in evaluations(row):
                    if os.path.exists(f'{kept}.{name}.json'):
                        os.remove(f'{kept}.{name}.json')
                shutil.copy(f'{folder}/log.jsonl', f'{kept}.jsonl')
                shutil.copy(f'{folder}/command', f'{kept}.command')
            for name, flags in evaluations(row).items():
                if args.commands or not os.path.exists(f'{kept}.{name}.json'):
                    report = f'{folder}/{name}.json'
                    if os.path.exists(report):                  # half of one
                        os.remove(report)
                    run(f'evaluate.py {folder}/best.pt {flags} --out {report}')
                    if not args.commands:
                        shutil.copy(report, f'{kept}.{name}.json')
if args.commands:
    sys.exit()

# -----------------------------------------------------------------------------
# the table: one line per row and way of evaluating it, its seeds averaged

def measured(row, seed, suffix):
    """The figures of one finished run of the present command, or None."""
    kept = f'results/{args.table}/{row}-s{seed}'
    if not (same(f'{kept}.command', command_of(row, seed))
            and all(os.path.exists(f'{kept}.{name}{suffix}.json') for name in table['evaluate'])):
        return None
    pgd, autoattack = [json.load(open(f'{kept}.{name}{suffix}.json')) for name in table['evaluate']]
    config, *epochs = [json.loads(line) for line in open(f'{kept}.jsonl')]
    worst = autoattack['results']['autoattack (worst case)']
    return dict(clean=pgd['results']['clean']['accuracy'], pgd=pgd['results']['pgd-20']['accuracy'],
                autoattack=worst['accuracy'], interval=worst['interval'], epoch=pgd['trained']['epoch'],
                held_out=pgd['trained']['val_pgd20'], last=epochs[-1]['val_pgd20'],
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
    for suffix in sorted({name[len(base):] for base in table['evaluate'] for name in evaluations(row)
                          if name.startswith(base)}):
        runs = {seed: m for seed in range(10) if (m := measured(row, seed, suffix))}
        if runs:
            column = lambda name: [m[name] for m in runs.values()]
            low, high = map(statistics.mean, zip(*column('interval')))
            accuracies = ' | '.join(figure(column(name)) for name in ('clean', 'pgd', 'autoattack'))
            print(f'| {row}{suffix} | {accuracies} ({low:.0f}-{high:.0f}) | {figure(column("held_out"))} '
                  f'({" ".join(map(str, column("epoch")))}) / {figure(column("last"))} '
                  f'| {statistics.median(column("seconds")):.0f} | {" ".join(map(str, runs))} | `{flags}` |')

"""
The tables of results/, row by row: train what is missing, evaluate it, print the table.

$ python reproduce.py small                          # every row, seed 0: an hour per six rows on one CPU core
$ python reproduce.py small --rows trades logit_mse --seeds 0 1 2
$ python reproduce.py small --commands               # what it would run
$ python reproduce.py small --table                  # what is there already

A row that was interrupted is deleted and run again; a finished one is left alone. Weights go to
runs/TABLE/ROW-sSEED, logs and JSON also to results/TABLE, from where the table is made.
"""
import argparse, json, os, shlex, shutil, statistics, subprocess, sys

# -----------------------------------------------------------------------------
# small: every method at one small budget on CIFAR-10, for a CPU. STANDARD and ROBUST are teachers: the first
# is trained once, on all training images, with the student's architecture; the second is the row that
# withstands PGD-20 best on held-out training images

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

def train_command(row, seed, folder):
    return (f'train_adv.py {table["rows"][row]} {table["budget"]} --seed {seed} --out {folder}')

def run(command):
    print(f'$ python {command}', flush=True)
    if args.commands:
        return
    script, *argv = shlex.split(command)
    if status := subprocess.run([sys.executable, os.path.join(HERE, script), *argv]).returncode:
        sys.exit(f'stopped: {script} ended with status {status}')

def trained(folder):
    """The last line of its log has been reached, and its weights are there."""
    try:
        config, *epochs = [json.loads(line) for line in open(f'{folder}/log.jsonl')]
        return len(epochs) == config['epochs'] and os.path.exists(f'{folder}/best.pt')
    except (OSError, ValueError):
        return False

def train(command, folder):
    if not trained(folder):
        if not args.commands:
            shutil.rmtree(folder, ignore_errors=True)
        run(f'{command} --data-dir {args.data_dir}')

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
            if all(os.path.exists(f'{kept}.{name}.json') for name in table['evaluate']):
                continue
            train(train_command(row, seed, folder), folder)
            for name, flags in table['evaluate'].items():
                if not os.path.exists(f'{kept}.{name}.json'):
                    tmp = f'{folder}/{name}.json'
                    if os.path.exists(tmp):         # of an evaluation that was interrupted, or not copied
                        os.remove(tmp)
                    run(f'evaluate.py {folder}/best.pt {flags} --out {tmp}')
                    if not args.commands:
                        shutil.copy(tmp, f'{kept}.{name}.json')
            if not args.commands:
                shutil.copy(f'{folder}/log.jsonl', f'{kept}.jsonl')
if args.commands:
    sys.exit()

# -----------------------------------------------------------------------------
# the table: one line per row, its seeds averaged

def measured(row, seed):
    """The figures of one run, or None."""
    kept = f'results/{args.table}/{row}-s{seed}'
    try:
        reports = {name: json.load(open(f'{kept}.{name}.json')) for name in table['evaluate']}
        config, *epochs = [json.loads(line) for line in open(f'{kept}.jsonl')]
    except OSError:
        return None
    pgd, autoattack = reports['pgd']['results'], reports['autoattack']['results']['autoattack (worst case)']
    return dict(clean=pgd['clean']['accuracy'], pgd=pgd['pgd-20']['accuracy'],
                autoattack=autoattack['accuracy'], interval=autoattack['interval'],
                epoch=reports['pgd']['trained']['epoch'],
                seconds=statistics.median(config['train_images'] / e['img_per_s'] for e in epochs))

def figure(values):
    """mean, and with several seeds ± standard deviation."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'

n = {name: shlex.split(flags)[1] for name, flags in table['evaluate'].items()}
print(f'\n| row | clean, n={n["pgd"]} | PGD-20, n={n["pgd"]} | AutoAttack, n={n["autoattack"]} (95 %) '
      '| best epoch | s/epoch | seeds | python train_adv.py ... |\n' + '|---' * 8 + '|')
for row, flags in table['rows'].items():
    runs = {seed: m for seed in range(10) if (m := measured(row, seed))}
    if runs:
        column = lambda name: [m[name] for m in runs.values()]
        low, high = map(statistics.mean, zip(*column('interval')))
        accuracies = ' | '.join(figure(column(name)) for name in ('clean', 'pgd', 'autoattack'))
        print(f'| {row} | {accuracies} ({low:.0f}-{high:.0f}) | {" ".join(map(str, column("epoch")))} '
              f'| {statistics.median(column("seconds")):.0f} | {" ".join(map(str, runs))} | `{flags}` |')

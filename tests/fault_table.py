"""
What happens when something goes wrong: each fault injected into a run as a user starts it, as a table.

$ python tests/fault_table.py > results/faults.md                       # ten minutes on a CPU
$ python tests/fault_table.py runs/x/best.pt data > results/faults.md   # AutoAttack on that: longer
"""
import json, os, pathlib, random, resource, shutil, signal, subprocess, sys, tempfile, time

import numpy as np
import torch
from PIL import Image

HERE = pathlib.Path(__file__).parent.parent
work = pathlib.Path(tempfile.mkdtemp())
SMALL = ['--dataset', 'synthetic', '--width', '4', '--subset', '128', '--epochs', '3', '--steps', '2']
RUN = ['train_adv.py', '--loss', 'trades', *SMALL, '--awp', '0.005', '--ema', '0.9', '--save-minutes', '0']

def start(argv, **options):
    return subprocess.Popen([sys.executable, HERE / argv[0], *map(str, argv[1:])], cwd=work, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)

def run(argv, **options):
    """-> status, the last line of stderr. A traceback is a failure of this table."""
    process = start(argv, **options)
    err = process.communicate()[1].strip()
    assert 'Traceback' not in err, err
    lines = [line for line in err.splitlines() if 'it/s' not in line and line.strip()]
    return process.returncode, lines[-1] if lines else '-'

def row(fault, status, said, left):
    said = said.replace(str(work), 'DIR').replace(str(HERE) + '/', '').replace('|', '\\|')
    print(f'| {fault} | {status} | {said} | {left} |', flush=True)

def weights(folder):
    return {name: torch.load(folder / name, weights_only=True)['state_dict']
            for name in ('best.pt', 'last.pt')}

def equal(a, b):
    return 'identical, tensor by tensor' if all(
        torch.equal(v, b[f][k]) for f in a for k, v in a[f].items()) else '**DIFFERENT**'

def files(folder):
    return {path.name: path.read_bytes() for path in sorted((work / folder).glob('*'))}

def left(folder, before=None):
    """What is in folder, or whether that is what was there before."""
    if before is None:
        return ' '.join(files(folder)) or 'nothing'
    return 'as it was' if files(folder) == before else '**CHANGED**'

def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)

print('| fault | exit status | what it says | what is left |\n|---|---|---|---|')

# -----------------------------------------------------------------------------
# stopped
process = start([*RUN, '--out', 'whole'])
wait_for(work / 'whole/state.pt', process)
begun = time.perf_counter()
process.communicate()
assert process.returncode == 0
whole, draw, took = weights(work / 'whole'), random.Random(0), time.perf_counter() - begun
for k in range(5):
    process = start([*RUN, '--out', f'kill-{k}'])
    wait_for(work / f'kill-{k}/state.pt', process)
    time.sleep(draw.uniform(0, took))
    process.kill()
    process.communicate()
    at = torch.load(work / f'kill-{k}/state.pt', weights_only=True)['now'][0] if process.returncode else None
    status, said = run([*RUN, '--out', f'kill-{k}', '--resume'])
    saved = f' (saved: epoch {at["epoch"]}, batch {at["batch"]})' if at else ' (it had ended)'
    row(f'kill -9 at a random moment, {k + 1} of 5{saved}', process.returncode, '-',
        f'`--resume`: {equal(whole, weights(work / f"kill-{k}"))} to a run left alone')
for name, number in ('SIGTERM', signal.SIGTERM), ('Ctrl-C', signal.SIGINT):
    process = start([*RUN, '--out', name])
    wait_for(work / f'{name}/state.pt', process)
    process.send_signal(number)
    said = process.communicate()[1].strip().splitlines()[-1]
    run([*RUN, '--out', name, '--resume'])
    row(name, process.returncode, said, f'the command it names: {equal(whole, weights(work / name))}')
process = start([*RUN, '--out', 'two'])
wait_for(work / 'two/state.pt', process)
row('a second run in the same folder', *run([*RUN, '--out', 'two']),
    'the first goes on' if process.poll() is None else '**the first has ended**')
process.send_signal(signal.SIGTERM)
process.communicate()
before = files('two')
row('the unfinished run started again without `--resume`', *run([*RUN, '--out', 'two']), left('two', before))
row('`--resume` with another lr', *run([*RUN, '--out', 'two', '--resume', '--lr', '0.1']),
    left('two', before))
state = work / 'two/state.pt'
state.write_bytes(state.read_bytes()[:1000])
before = files('two')
row('`--resume` from half a state', *run([*RUN, '--out', 'two', '--resume']), left('two', before))

# -----------------------------------------------------------------------------
# the machine
def limit(which, value):
    return dict(preexec_fn=lambda: resource.setrlimit(which, (value, value)))

row('no file may exceed 50 kB, as on a full disk',
    *run([*RUN, '--out', 'full'], **limit(resource.RLIMIT_FSIZE, 50_000)), left('full'))
(work / 'file').write_text('')
row('`--out` where nothing can be written', *run([*RUN, '--out', 'file/run']), '-')
wide = ['train_adv.py', '--loss', 'pgd_at', '--dataset', 'synthetic', '--width', '256', '--batch-size', '512']
row('a batch beyond memory', *run([*wide, '--out', 'memory'], **limit(resource.RLIMIT_DATA, 4 << 30)), '-')
row('a loss that diverges', *run([*RUN, '--lr', '1e30', '--out', 'nan']), left('nan'))

# -----------------------------------------------------------------------------
# files
taught = ['train_adv.py', *SMALL, '--out', 'a', '--teacher']
row('a teacher that is not there', *run([*taught, 'no.pt']), left('a'))
shutil.copy(work / 'whole/best.pt', work / 'half.pt')
(work / 'half.pt').write_bytes((work / 'half.pt').read_bytes()[:9999])
row('a truncated teacher', *run([*taught, 'half.pt']), left('a'))
(work / 'page.pt').write_text('<html>404</html>')
row('a web page in the place of a checkpoint', *run(['evaluate.py', 'page.pt', '--model', 'resnet18']), '-')
torch.save({'conv.weight': torch.zeros(3)}, work / 'foreign.pt')
foreign = ['evaluate.py', 'foreign.pt', '--model', 'resnet18', '--dataset', 'synthetic']
row('a checkpoint of another network', *run(foreign), '-')
np.savez(work / 'floats.npz', x_train=np.zeros((9, 32, 32, 3)), y_train=np.zeros(9, int),
         x_test=np.zeros((9, 32, 32, 3)), y_test=np.zeros(9, int))
row('images that are no bytes', *run(['train_teacher.py', '--dataset', 'floats', '--data-dir', '.']), '-')
rng = np.random.default_rng(0)
for split in ('train', 'val'):
    for k in range(24):
        path = work / f'images/{split}/n{k % 4}/{k}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(path)
IMAGENET = ['--dataset', 'imagenet', '--data-dir', 'images']
train = ['train_teacher.py', *IMAGENET, '--model', 'torchvision-resnet18', '--epochs', '1', '--batch-size',
         '4', '--lr', '0.01']
(work / 'images/train/n0/0.JPEG').write_bytes(b'\xff\xd8\xff')
status, said = run([*train, '--out', 'jpeg'])
row('ImageNet: a damaged training image', status, said, left('jpeg'))
(work / 'images/val/n0/0.JPEG').write_bytes(b'')
row('ImageNet: a damaged test image', *run(['evaluate.py', 'jpeg/last.pt', '--attacks', 'fgsm']), '-')

# -----------------------------------------------------------------------------
# an evaluation
def report(path):
    r = json.loads((work / path).read_text())
    for result in r['results'].values():
        del result['seconds']
    return r['complete'], r['results'], r['notes'], r['flags']

evaluate = ['evaluate.py', 'whole/last.pt', '--n', '24', '--batch-size', '4', '--eps', '24', '--no-audit',
            '--attacks', 'pgd', 'aa-fast']
if sys.argv[1:]:
    path, folder = [os.path.abspath(name) for name in sys.argv[1:]]
    evaluate = ['evaluate.py', path, '--data-dir', folder, '--n', '100', '--batch-size', '25', '--no-audit',
                '--attacks', 'pgd', 'autoattack']
run([*evaluate, '--out', 'whole.json'])
for _ in range(3):
    done = len(list(work.glob('killed.json.state/*.pt')))
    process = start([*evaluate, '--out', 'killed.json'])
    while process.poll() is None and len(list(work.glob('killed.json.state/*.pt'))) <= done:
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 20 if sys.argv[1:] else 0.3))
    process.kill()
    process.communicate()
    assert process.returncode == -9
run([*evaluate, '--out', 'killed.json'])
same = lambda a, b: 'the same report but for times' if report(a) == report(b) else '**ANOTHER REPORT**'
what = 'AutoAttack on 100 CIFAR-10 images' if sys.argv[1:] else 'an evaluation'
row(f'kill -9 of {what}, three times', -9, '-',
    'the same command ends in ' + same('killed.json', 'whole.json'))
shards = [start([*evaluate, '--out', 'shards.json', '--shard', f'{k}/4']) for k in range(4)]
[process.communicate() for process in shards]
row(f'none: {what} in four shards', shards[0].returncode, '-', same('shards.json', 'whole.json'))
shutil.rmtree(work)

"""
What every way of training leaves in the weights and BN statistics after a few steps: the same numbers before
and after a change that should change nothing.

$ python tests/fingerprints.py                          # print them, three numbers for each
$ python tests/fingerprints.py --json after.json        # ... and write them down
$ python tests/fingerprints.py --compare before.json    # status 1 if one differs

The numbers are projections of the weights, the means and the variances on fixed random directions, relative
to their size. Everything is computed in float64, where instruction sets agree to 1e-11, and versions 2.7 and
2.14 of PyTorch to the tolerance. In float32 each of them rounds otherwise; where a gradient is next to zero a
pixel then goes the other way, and after a few steps the numbers are up to 0.3 apart. On one thread, on
`synthetic`.
"""
import argparse
import contextlib
import io
import json
import os
import pathlib
import runpy
import sys
import tempfile

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from support import describe, validation

BASE = '--dataset synthetic --width 4 --subset 64 --epochs 2 --steps 2 --amp off'
TEACHER = '--teacher TEACHER'
TOLERANCE = 1e-6

# name -> flags of train_adv.py. Every row of METHODS, and every option that acts on the training
CASES = {
    **{name: f'--loss {name}' for name in ('standard', 'als', 'pgd_at', 'nat_adv', 'advprop', 'alp', 'trades',
                                           'mart', 'dkl', 'lbgat')},
    **{name: f'--loss {name} {TEACHER}' for name in ('hat', 'softmax_kl', 'logit_mse', 'ltd', 'ard', 'iad1',
                                                     'rslad', 'adaad')},
    **{name: f'--loss {name} {TEACHER} --standard-teacher TEACHER' for name in ('iad2', 'kd_swa')},
    'reverse': f'--loss softmax_kl --reverse {TEACHER}',
    'awp': '--loss trades --awp 0.01 --awp-warmup 0',
    'awp-hat-ema': f'--loss hat {TEACHER} --awp 0.01 --awp-warmup 0.5 --ema 0.9',
    'awp-lbgat': '--loss lbgat --awp 0.01 --awp-warmup 0',
    'awp-dkl': '--loss dkl --awp 0.01 --awp-warmup 0',
    'ema': '--loss trades --ema 0.9',
    'swa': '--loss pgd_at --swa 0.4',
    'free': '--loss pgd_at --free 3 --steps 10',
    'accumulate': f'--loss hat {TEACHER} --accumulate 2',
    'accumulate-awp': '--loss trades --accumulate 2 --awp 0.01 --awp-warmup 0',
    'extra': f'--loss logit_mse {TEACHER} --extra EXTRA --extra-fraction 0.25',
    'extra-labelled': f'--loss trades {TEACHER} --extra EXTRA',
    'warm-start': '--loss pgd_at --warm-start TEACHER',
    'warm-start-teacher': f'--loss logit_mse {TEACHER} --warm-start teacher',
    **{f'bn-order-{order}': f'--loss trades --bn-order {order}'
       for order in ('nat-adv', 'adv-nat', 'nat', 'adv')},
    'bn-order-hat': f'--loss hat {TEACHER} --bn-order adv-nat',
    'dual-bn': '--loss trades --dual-bn',
    'dual-bn-main': '--loss advprop --craft-branch main --eval-branch aux',
    'dual-bn-awp-ema': '--loss advprop --awp 0.01 --awp-warmup 0 --ema 0.9',
    'targets-als': '--loss advprop --targets als --activation hybrid',
    'targets-smooth': '--loss alp --targets smooth --inner least_likely',
    'silu-step': '--loss trades --activation silu --schedule step --no-nesterov',
    'normalize': '--loss pgd_at --normalize --step-schedule cosine --eps-ramp 0.5',
    'attack-bn-train': '--loss pgd_at --attack-bn train',
    'L2': '--loss trades --norm L2',
    'inner-mse': '--loss pgd_at --inner mse',
    'inner-teacher': f'--loss trades --inner teacher {TEACHER}',
    'paper': f'--loss ltd --recipe paper {TEACHER} --epochs 2 --steps 2',
    'seed': '--loss trades --seed 3 --batch-size 24',
}
TEACHERS = {'teacher': '', 'teacher-accumulate': '--accumulate 2 --normalize --schedule step'}

def run(script, *argv):
    before, sys.argv = sys.argv, [script, *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(HERE / script), run_name='__main__')
    finally:
        sys.argv = before

def fingerprint(path):
    """Figures of a checkpoint."""
    weights, g = torch.load(path, weights_only=True)['state_dict'], torch.Generator().manual_seed(0)
    groups = {'weights': [k for k in weights if 'running' not in k and 'num_batches' not in k],
              'means': [k for k in weights if 'running_mean' in k],
              'vars': [k for k in weights if 'running_var' in k]}
    flat = {group: torch.cat([weights[k].flatten() for k in names]) for group, names in groups.items()}
    assert all(v.dtype == torch.float64 for v in flat.values())
    return {group: (v @ torch.randn(len(v), generator=g, dtype=torch.float64) / v.norm()).item()
            for group, v in flat.items()}

def apart(a, b):
    """The largest difference between two fingerprints."""
    return max(abs(a[group] - b[group]) for group in a)

def fingerprints(names=None):
    """name -> fingerprint of last.pt, for all CASES or for some."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double       # what the scripts ask for in float32 as well
    # they take two thirds of the time, and are not what is compared
    validation.clean_and_pgd = lambda *args, **options: (50.0, 25.0, 1.0)
    describe.draw_curves = lambda *args: None
    found = {}
    with tempfile.TemporaryDirectory() as tmp:
        np.savez(f'{tmp}/extra.npz',
                 x=np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))
        for name, flags in TEACHERS.items():
            run('train_teacher.py', *BASE.replace('--steps 2 ', '').split(), *flags.split(),
                '--out', f'{tmp}/{name}')
            found[name] = fingerprint(f'{tmp}/{name}/last.pt')
        for name, flags in CASES.items():
            if names is None or name in names:
                flags = flags.replace(
                    'TEACHER', f'{tmp}/teacher/last.pt').replace('EXTRA', f'{tmp}/extra.npz')
                run('train_adv.py', *BASE.split(), *flags.split(), '--out', f'{tmp}/{name}')
                found[name] = fingerprint(f'{tmp}/{name}/last.pt')
    return found

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json')
    parser.add_argument('--compare', metavar='JSON')
    parser.add_argument('--only', nargs='+', choices=CASES)
    args = parser.parse_args()
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    found = fingerprints(args.only)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1))
    if not args.compare:
        for name, f in found.items():
            print(f'{name:<20}', *(f'{group} {value:9.5f}' for group, value in f.items()), sep='  ')
    else:
        stored = json.loads(pathlib.Path(args.compare).read_text())
        differ = [name for name in found
                  if name not in stored or apart(found[name], stored[name]) > TOLERANCE]
        print(f'{len(found) - len(differ)} the same, {len(differ)} differ', *differ)
        sys.exit(bool(differ))

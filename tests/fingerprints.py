"""
What every way of training leaves in the weights and BN statistics after a few steps: the same numbers before
and after a change that should change nothing.

$ python tests/fingerprints.py                          # print them, two numbers for each
$ python tests/fingerprints.py --json after.json        # ... and write them down
$ python tests/fingerprints.py --compare before.json    # status 1 if a digest differs

A digest is exact, and holds for one version of PyTorch and one instruction set: AVX2 here, also on a
processor that has more. (With AVX-512 it rounds otherwise, and where a gradient is next to zero a pixel goes
the other way.) `figures` are projections of the weights and of the statistics on fixed random directions,
relative to their size: they hold, to a tolerance, also for a version that rounds a little otherwise, and
tests/test_fingerprints.py compares them with the stored ones. On one thread, in fp32, on `synthetic`.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import pathlib
import runpy
import sys
import tempfile

# before torch is loaded, which looks at them once
os.environ.update(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_ENABLE_INSTRUCTIONS='AVX2')

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
BASE = '--dataset synthetic --width 4 --subset 64 --epochs 2 --steps 2 --amp off'
TEACHER = '--teacher TEACHER'

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
    """Digest and figures of a checkpoint."""
    weights = torch.load(path, weights_only=True)['state_dict']
    digest, figures, g = hashlib.sha256(), {}, torch.Generator().manual_seed(0)
    groups = {'weights': [k for k in weights if 'running' not in k and 'num_batches' not in k],
              'means': [k for k in weights if 'running_mean' in k],
              'vars': [k for k in weights if 'running_var' in k]}
    for k, v in weights.items():
        digest.update(k.encode() + v.contiguous().numpy().tobytes())
    for group, names in groups.items():
        flat = torch.cat([weights[k].flatten().double() for k in names])
        figures[group] = (flat @ torch.randn(len(flat), generator=g, dtype=torch.float64)
                          / flat.norm()).item()
    return dict(digest=digest.hexdigest()[:16], **figures)

def fingerprints(names=None):
    """name -> fingerprint of last.pt, for all CASES or for some."""
    torch.set_num_threads(1)
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
            print(f'{name:<20} {f["digest"]}  weights {f["weights"]:9.5f}  means {f["means"]:9.5f}')
    else:
        stored = json.loads(pathlib.Path(args.compare).read_text())
        differ = [name for name in found if found[name]['digest'] != stored.get(name, {}).get('digest')]
        print(f'{len(found) - len(differ)} the same, {len(differ)} differ', *differ)
        sys.exit(bool(differ))

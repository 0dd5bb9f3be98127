"""
The teachers of train_adv.py: a standard one is found or trained, any is loaded and frozen.
"""
import os, subprocess, sys

import models
from support.files import Refused
from support.checkpoint import fingerprint, load_checkpoint

def add_args(parser):
    g = parser.add_argument_group('teachers')
    g.add_argument('--teacher', metavar='PT',
                   help="frozen teacher (default, if it is a standard one: this dataset and model's, "
                        'trained if need be)')
    g.add_argument('--standard-teacher', metavar='PT',
                   help='second one, of iad2 and kd_swa (default: likewise)')
    g.add_argument('--teacher-model',
                   help='architecture of a teacher that holds weights only (default: --model, full width)')

def standard(args, task, world=1):
    """Path of this dataset and model's standard teacher, trained now if need be (Al-Najjar et al., section 3:
    "it is feasible to train our own teacher model"). task: data.task. Raises Refused where several
    processes would train it."""
    folder = f'runs/{task}-teacher'
    last = load_checkpoint(f'{folder}/last.pt')[1] if os.path.exists(f'{folder}/last.pt') else None
    if last and last['epoch'] == last['run']['epochs']:
        print(f'no teacher given: taking {folder}/best.pt, trained earlier', flush=True)
    elif world > 1:
        raise Refused(f'no teacher given, and none in {folder}: train it first, with train_teacher.py')
    else:
        print(f'no teacher given, and none in {folder} that is finished: training it first', flush=True)
        flags = [f'--{k.replace("_", "-")}={getattr(args, k)}'
                 for k in ('dataset', 'data_dir', 'model', 'amp')]
        flags += [f'--{k}={getattr(args, k)}' for k in ('width', 'subset') if getattr(args, k)]
        flags += ['--normalize'] * args.normalize + [f'--out={folder}', '--resume']
        script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'train_teacher.py')
        if status := subprocess.run([sys.executable, script, *flags]).returncode:
            sys.exit(f'no teacher, no student: train_teacher.py ended with status {status}')
    return f'{folder}/best.pt'

def frozen(path, args, classes, device):
    """-> the network in path, on the device, and what the student's checkpoint says of it. Raises Refused,
    one line."""
    net, meta = load_checkpoint(path, args.teacher_model or args.model, classes)
    if meta.get('dataset', args.dataset) != args.dataset:
        raise Refused(f'{path} was trained on {meta["dataset"]}, not on {args.dataset}')
    for m in net.modules():                                     # of its two, the BN it was validated with
        if isinstance(m, models.DualBatchNorm2d):
            m.auxiliary = meta.get('run', {}).get('eval_branch') == 'aux'
    net = net.to(device, memory_format=models.layout(device)).requires_grad_(False)
    return net, dict(path=path, fingerprint=fingerprint(net), trained_with=meta.get('loss'))

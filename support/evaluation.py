"""
What evaluate.py and the audit need before they begin: what the checkpoint says where the flags say
nothing, which flags do not go together, the network and the images.
"""
import hashlib
import math
import os
import re

import torch

import data
import models
from models import bn_branch
from support import imagenet, refusals, speed
from support.autoattack import FAST, PARTS, package
from support.checkpoint import as_validated, is_ours, load_checkpoint
from support.refusals import refuse

DEFAULT = ['clean', 'fgsm', 'pgd', 'cw', 'autoattack']      # the attacks of an evaluation that names none

# -----------------------------------------------------------------------------
# flags

def here(folder, dataset, path):
    """folder, where the file path says that the images lay. Refused if it is of another machine: nothing is
    downloaded into a folder that only a file names."""
    if dataset not in ('digits', 'synthetic') and folder != 'data' and not os.path.isdir(folder):
        refuse(f'{path} is of data in {folder}, which is not here: name their folder with --data-dir')
    return folder

def threat(args, ckpt):
    """Fills in --dataset, --data-dir, --norm, --eps and --step-size from ckpt, the content of
    args.checkpoint, if it is one of ours. -> the run that it was trained in, {} if unknown. Raises Refused
    for what cannot be attacked."""
    run = ckpt.get('run', {}) if is_ours(ckpt) else {}
    args.dataset = args.dataset or run.get('dataset', 'cifar10')
    if args.data_dir is None:
        args.data_dir = here(run.get('data_dir', 'data'), args.dataset, args.checkpoint)

    trained = run.get('norm', 'Linf')
    args.norm = args.norm or trained
    if args.eps is None and args.norm == trained:       # 8 of Linf would be nothing in L2
        args.eps = run.get('eps')
    if args.eps is None:
        args.eps = 128.0 if args.norm == 'L2' else data.row(args.dataset, args.data_dir)['eps']
    refusals.attack(args)
    return run

def architecture(args, ckpt):
    """Refuses flags that do not say how to build the network in ckpt, the content of args.checkpoint."""
    ours = is_ours(ckpt)
    own_code = ours and '.py:' in ckpt['config']['name']        # --model says that it may be run
    if ours and (args.model and not own_code or args.width or args.mean):
        refuse(f'{args.checkpoint} says itself what it is: drop --model, --width, --mean and --std')
    if (args.mean is None) != (args.std is None):
        refuse('--mean and --std go together')
    if args.model and '.py:' in args.model and (args.width or args.mean or args.activation):
        refuse(f'{args.model} makes the whole network: drop --width, --mean, --std and --activation')
    if not ours and args.model is None:
        refuse(f'{args.checkpoint} holds weights only: name their architecture with --model (and --width)')
    if args.model and '.py:' not in args.model:
        refusals.model(args.model, width=args.width)
    if (args.transfer_model or args.transfer_width) and not args.transfer_from:
        refuse('--transfer-model and --transfer-width are of --transfer-from')

def has_autoattack():
    """Raises Refused where its package is not installed."""
    try:
        package()
    except ImportError as e:
        refuse(str(e))

def resolve(args, ckpt):
    """Fills in what args leaves open from ckpt, the content of args.checkpoint, if it is one of ours. -> the
    run that it was trained in, {} if unknown, and --shard as two numbers. Raises Refused for what cannot be
    evaluated."""
    args.attacks = args.attacks or (['clean'] if args.verify else DEFAULT)
    args.compile = args.compile or args.fast
    refusals.seed(args)
    for name in ('steps', 'restarts', 'batch_size', 'n'):
        value = getattr(args, name)
        if value is not None and value < 1:
            refuse(f'--{name.replace("_", "-")} {value}: at least 1')
    if min(args.sweep_steps, default=1) < 1:
        refuse(f'--sweep-steps {min(args.sweep_steps)}: at least 1')
    shard = re.fullmatch(r'(\d+)/(\d+)', args.shard)
    shard = shard and (int(shard[1]), int(shard[2]))
    if not shard or shard[0] >= shard[1]:
        refuse(f'--shard {args.shard}: I/N with I from 0 to N-1')

    architecture(args, ckpt)
    run = threat(args, ckpt)
    for value in args.sweep_eps:
        if value != 0 and not 1 <= value <= (255 if args.norm == 'Linf' else math.inf):
            refuse(f'--sweep-eps {value:g}: eps is in pixels, 0 or 1 to 255 (L2: 255 times the usual radius)')
    if args.norm == 'L2' and {'weak', 'strong', 'pgd-trades'} & set(args.attacks):
        refuse('weak and strong are Linf attacks, and so is pgd-trades')
    if args.fast and (args.individual or set(PARTS) & set(args.attacks)):
        refuse('--fast is for autoattack as a whole: what a part alone leaves has no second search')
    if args.individual and not {'autoattack', 'aa-fast'} & set(args.attacks):
        refuse('--individual is of autoattack, which is not among --attacks')
    if {'autoattack', 'aa-fast', *PARTS} & set(args.attacks):
        has_autoattack()
    return run, shard

def report_path(args, dual_bn):
    """Beside the checkpoint, with every flag in its name that changes the rows."""
    rows = list(args.attacks)
    for name in ('transfer_from', 'sweep_eps', 'sweep_steps', 'verify', 'fast', 'individual', 'draw'):
        if getattr(args, name):
            rows.append(name)
    tag = '' if rows == DEFAULT else '-' + '+'.join(rows)
    for name, usual in (('steps', 20), ('restarts', 1), ('step_size', args.eps / 4), ('seed', 0)):
        if getattr(args, name) != usual:
            tag += f'-{name}{getattr(args, name):g}'
    if args.activation:
        tag += f'-{args.activation}'
    if dual_bn:
        tag += f'-{args.branch}'
    return f'{os.path.splitext(args.checkpoint)[0]}.eval-{args.norm}-{args.eps:g}-n{args.n}{tag}.json'

# -----------------------------------------------------------------------------
# the network

def exact_device():
    """-> the GPU, if there is one, and there no TF32 from here on."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')

def networks(args, run, d, device):
    """-> the network in eval mode on the device; what is known of it; and that of --transfer-from, or None.
    Fills in --branch. run: that it was trained in. Raises Refused."""
    if d.classes < 4 and {'autoattack', 'aa-fast', *PARTS} & set(args.attacks):
        refuse(f'AutoAttack needs four classes (its targeted DLR loss does), {args.dataset} has {d.classes}; '
               'choose others with --attacks')
    channels = d.x_test.shape[-1]
    for flag, values in (('mean', args.mean), ('std', args.std)):
        if values and len(values) != channels:
            refuse(f'--{flag} has {len(values)} numbers, the images have {channels} channels')
    if args.std and min(args.std) <= 0:
        refuse(f'--std {min(args.std):g}: above 0')

    shape = dict(mean=args.mean, std=args.std, activation=args.activation or 'relu', channels=channels)
    model, meta = load_checkpoint(args.checkpoint, args.model, d.classes, width=args.width, **shape)
    if args.branch and not model.build_args['dual_bn']:
        refuse(f'--branch {args.branch}: {args.checkpoint} has no dual BN')
    args.branch = args.branch or run.get('eval_branch', 'main')
    if args.activation and args.activation != model.build_args['activation']:
        weights = model.state_dict()
        model = models.build(**dict(model.build_args, activation=args.activation)).eval()
        model.load_state_dict(weights)

    source = None
    if args.transfer_from:
        width = args.transfer_width
        if not args.transfer_model:                 # of the same architecture, where nothing else is said
            width = width or args.width
        source, known = load_checkpoint(args.transfer_from, args.transfer_model or args.model, d.classes,
                                        flag='--transfer-model', width=width, **shape)
        own_code = '.py:' in source.build_args['name']          # --transfer-model says that it may be run
        if 'config' in known and (args.transfer_model and not own_code or args.transfer_width):
            refuse(f'{args.transfer_from} says itself what it is: drop --transfer-model and --transfer-width')
        as_validated(source, known)
        source = source.to(device).requires_grad_(False)
    return model.to(device), meta, source

def searched(args, model, device):
    """-> the network that the attacks search on, whether AutoAttack does so in bf16, and both in words: with
    --compile the compiled one, with --fast its BN folded into its convolutions, and AutoAttack in bf16 where
    that is native, whose first two attacks then go on in fp32 with what is left. The verdict is the eager
    model's in any case."""
    if not args.compile:
        return model, False, 'float32, eager'
    words, faster = 'float32, compiled', model
    if args.fast and '.py:' not in model.build_args['name']:        # of another network only its author knows
        with bn_branch(model, args.branch):
            # the compiler chooses a layout itself only if all batches have one size, and here they shrink
            faster = speed.folded(model).to(memory_format=speed.layout(device))
        if not any(isinstance(m, torch.nn.BatchNorm2d) for m in faster.modules()):
            words += ', BN folded'
    half = args.fast and speed.autocast_dtype('auto', device) is torch.bfloat16
    half = half and not {'autoattack', 'aa-fast'}.isdisjoint(args.attacks)
    if half:
        words += f'; AutoAttack in bfloat16, what is left by {" and ".join(FAST)} again in float32'
    torch._dynamo.config.recompile_limit = 64       # with gradient or without, one image, any number
    return torch.compile(faster), half, words

# -----------------------------------------------------------------------------
# images

def images(args, d, device):
    """Test images: x fp32 (n,C,H,W) on the device, y (n,) on the CPU; which they are, in words; and a digest.
    Fills in --n. Raises Refused for anything but images in [0, 1] and labels of theirs."""
    total = len(d.y_test)
    args.n = args.n or total
    if args.n > total:
        refuse(f'--n {args.n}: {args.dataset} has {total} test images')
    if args.draw:
        generator = torch.Generator().manual_seed(args.seed)
        index = torch.randperm(total, generator=generator)[:args.n].sort().values
        which = f'{args.n} of {total} test images, drawn with seed {args.seed}'
        pixels = d.x_test[index.to(device)]
    else:
        index = torch.arange(args.n)
        which = f'first {args.n} of {total} test images'
        pixels = d.x_test[:args.n]

    pixels = imagenet.in_memory(pixels, device)
    x = data.to_float(pixels).contiguous()              # networks of others may take views of it
    y = d.y_test.cpu()[index]
    if x.dtype != torch.float32 or not (x.min() >= 0 and x.max() <= 1):
        refuse(f'images are {x.dtype}, {x.min():.3f} to {x.max():.3f}, not float32 in [0, 1]: '
               'the normalisation belongs into the model')
    if y.dtype != torch.int64 or y.min() < 0 or y.max() >= d.classes:
        refuse(f'labels are {y.dtype}, {y.min()} to {y.max()}, not int64 of the classes 0 to {d.classes - 1}')
    digest = hashlib.sha256(pixels.cpu().numpy().tobytes() + y.numpy().tobytes())
    return x, y, which, digest.hexdigest()[:16]

def remarks(args, meta, d, y):
    """What is said of the network and the images y (n,) that were asked for: lines."""
    lines, trained = [], meta.get('config', {}).get('activation', args.activation)
    if args.activation and args.activation != trained:
        lines.append(f'{trained} in the checkpoint, evaluated with {args.activation}')
    if 'the file also holds' in meta['weights']:
        lines.append(meta['weights'])
    if meta.get('config', {}).get('dual_bn'):
        other = 'aux' if args.branch == 'main' else 'main'
        lines.append(f'all of this goes through the {args.branch} BN: --branch {other} reports the other')
    present = y.unique().tolist()
    if len(present) < d.classes:
        shown = ' '.join(map(str, present[:20])) + (' ...' if len(present) > 20 else '')
        hint = '' if args.draw or args.n == len(d.y_test) else ': --draw takes them at random'
        lines.append(f'these {args.n} images hold {len(present)} of {d.classes} classes ({shown}){hint}')
    if args.batch_size and args.batch_size > args.n:
        lines.append(f'--batch-size {args.batch_size}, and {args.n} images: they are one batch')
    return lines

def distance(x_adv, x, norm):
    """(n,) how far every image went."""
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == 'Linf' else delta.norm(dim=1)

def load_adv(path, content, evaluated, x):
    """x_adv, on x's device, of what --save-adv wrote to path. Raises Refused unless these are adversarial
    images of x, float32, in [0, 1] and in the ball that evaluated (images, norm, eps in pixels) describes."""
    if not isinstance(content, dict) or not {'x_adv', 'robust', 'evaluated'} <= set(content):
        refuse(f'{path} was not written by evaluate.py --save-adv')
    for k in ('images', 'norm', 'eps'):
        if content['evaluated'][k] != evaluated[k]:
            refuse(f'{path} holds the adversarial images of another evaluation '
                   f'({k} was {content["evaluated"][k]}, is {evaluated[k]})')
    x_adv = content['x_adv']
    if x_adv.dtype != torch.float32 or x_adv.shape != x.shape or not (x_adv.min() >= 0 and x_adv.max() <= 1):
        refuse(f'{path}: x_adv is {x_adv.dtype} {tuple(x_adv.shape)}, {x_adv.min():.3f} to '
               f'{x_adv.max():.3f}, not float32 {tuple(x.shape)} in [0, 1]')
    moved = 255 * distance(x_adv, x.cpu(), evaluated['norm'])
    outside = (~(moved <= evaluated['eps'] * (1 + 1e-4))).sum().item()
    if outside:
        refuse(f'{path}: {outside} of {len(x)} images are outside the {evaluated["norm"]} ball of '
               f'{evaluated["eps"]:g}/255, the farthest {moved.max():.3f}/255 away')
    return x_adv.to(x.device)

"""
Datasets as uint8 tensors on the device, and batches of fp32 images in [0, 1] cut from them.

    d = load('cifar10', 'data')                  # DIR/NAME.npz if it is there, whatever the name
    for x, y in batches(d.x_train, d.y_train, 128, d.augment, generator): ...
    for x, y in batches(d.x_val, d.y_val, 500): ...          # in order, no augmentation, every image

DIR/NAME.npz holds x_train y_train x_test y_test: images uint8 (N,H,W,3) or grey (N,H,W), labels integer
(N,). Anybody's data works this way. Without the file: cifar10 and cifar100 are downloaded, digits comes
with scikit-learn, synthetic is generated. imagenet is class folders of files (support/imagenet.py).
"""
import hashlib
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from support import imagenet, sources
from support.files import Refused
from support.imagenet import Files

# What a dataset brings with it; explicit flags win. eps in pixels (0..255). flags: of both training scripts;
# epochs, steps: of train_adv.py. A file of another name gets OTHER.
DATASETS = {
    'cifar10':   dict(classes=10,   augment='crop+flip', eps=8.0),
    'cifar100':  dict(classes=100,  augment='crop+flip', eps=8.0),
    # 1,797 real handwritten digits, 8x8 enlarged to 32x32, strokes on an empty ground: a tenth of the
    # range is a fair eps. Sized for two cores: a narrow network, few epochs, and small batches, for the
    # sake of the number of steps.
    'digits':    dict(classes=10,   augment='none', eps=25.5, flags=dict(width=8, batch_size=64),
                      epochs=10, teacher_epochs=8),
    'synthetic': dict(classes=10,   augment='none', eps=8.0,  flags=dict(width=8, batch_size=32),
                      epochs=4, teacher_epochs=4),
    # Chen & Lee's, appendix A.2 ("divided by 10 at the end of 50-th and 90th epoch", of 90)
    'imagenet':  dict(classes=None, augment='crop+flip', eps=4.0,
                      flags=dict(model='torchvision-resnet50', batch_size=320, lr=0.1, schedule='step',
                                 milestones=[50 / 90], weight_decay=1e-4),
                      epochs=90, teacher_epochs=90, steps=6),
}
# files of one's own: nothing is cropped or mirrored without being asked
OTHER =          dict(classes=None, augment='none', eps=8.0)
AUGMENT = ['none', 'crop', 'crop+flip']
SPLIT_SEED = 0              # not --seed: a teacher and its students must leave out the same images

class Dataset(NamedTuple):
    """Images uint8 (N,H,W,3 or 1) or imagenet.Files, labels int64 (N,), on one device.
    val: training images held out for model selection."""
    name: str
    classes: int
    augment: str            # of AUGMENT
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    def statistics(self):
        """mean, std: a float per channel, of the training images in [0, 1]."""
        if isinstance(self.x_train, Files):
            return imagenet.MEAN, imagenet.STD
        value = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in self.x_train.cpu().unbind(-1):
            count = channel.flatten().bincount(minlength=256).double()      # how often each value is there
            n = count.sum()
            mean.append((count @ value / n).item())
            std.append((count @ (value - mean[-1]).square() / (n - 1)).sqrt().item())
        if not all(std):
            raise Refused('--normalize: a channel is the same in all training images')
        return mean, std

# -----------------------------------------------------------------------------

def row(name, folder='data'):
    """The defaults a dataset brings with it.
    Raises Refused for a name that is neither known nor a file."""
    if name not in DATASETS and not os.path.exists(os.path.join(folder, f'{name}.npz')):
        raise Refused(f'unknown dataset {name!r}: neither one of {" ".join(DATASETS)} '
                         f'nor a file {os.path.join(folder, name)}.npz')
    return DATASETS.get(name, OTHER)

def defaults(name, folder='data', teacher=False):
    """{flag: value}, what the dataset brings to a training script. Raises Refused for an unknown name."""
    known = row(name, folder)
    names = dict(epochs='teacher_epochs') if teacher else dict(eps='eps', epochs='epochs', steps='steps')
    own = {flag: known[name] for flag, name in names.items() if name in known}
    return dict(known.get('flags', {}), **own)

def load(name, folder='data', *, subset=None, subset_seed=None, augment=None, device='cpu', training=True):
    """
    -> Dataset. 1,000 training images, or a tenth where there are fewer than 10,000, become val: drawn
    with a fixed seed, before the subset is cut, so that no --subset and no --seed puts them back into
    training. training=False: ImageNet's, which take a while to list, are left out. Raises Refused.
    """
    defaults, path = row(name, folder), os.path.join(folder, f'{name}.npz')
    classes, augment = defaults['classes'], augment or defaults['augment']
    if name == 'imagenet' and augment == 'crop':
        raise Refused('--augment crop: of ImageNet every image is cropped and flipped, or none')
    if os.path.exists(path):
        arrays = sources.from_npz(path, classes)
    elif name in ('digits', 'synthetic'):
        arrays = {'digits': sources.digits, 'synthetic': sources.synthetic}[name]()
    elif name == 'imagenet':
        arrays, classes = imagenet.load(folder, training)
    else:
        arrays = sources.from_torchvision(name, folder)
    x_train, y_train, x_test, y_test = [
        a if isinstance(a, Files) else
        torch.from_numpy(np.ascontiguousarray(a, np.uint8 if a.ndim == 4 else np.int64)).to(device)
        for a in arrays]
    order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    held_out = min(1000, max(1, len(order) // 10))
    val, train = order[:held_out], order[held_out:].sort().values
    if subset is not None:
        if not 1 <= subset <= len(train):
            raise Refused(f'--subset {subset}: {name} has {len(train)} training images '
                             f'beside the {held_out} held out')
        if subset_seed is not None:
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(subset_seed))
            train = train[drawn.to(device)]
        train = train[:subset]
    classes = classes or int(y_train.max()) + 1
    if classes < 2 or training and len(y_train.unique()) == 1:
        raise Refused(f'--dataset {name}: all its training images are of one class, there is nothing '
                      'to tell apart')
    return Dataset(name, classes, augment, x_train[train], y_train[train],
                   x_train[val], y_train[val], x_test, y_test)

def missing_classes(d, subset):
    """A note for the screen where the training images lack classes, or None. subset: of --subset."""
    present = d.y_train.unique()
    if len(present) == d.classes:
        return None
    shown = ' '.join(map(str, present[:10].tolist())) + (' ...' if len(present) > 10 else '')
    why = 'do the labels count from 0 without gaps?'
    if subset:
        why = 'is the file sorted by label? --subset with --subset-seed draws at random'
    return f'note: the training images show {len(present)} of {d.classes} classes ({shown}): {why}'

def fingerprint(d):
    """16 hex digits of the training images (of ImageNet's: their paths), labels and number of classes."""
    digest = hashlib.sha256(f'{d.classes} {tuple(d.x_train.shape)}'.encode())
    for images in (d.x_train, d.x_val):
        digest.update(images.paths.tobytes() if isinstance(images, Files) else images.cpu().numpy().tobytes())
    for labels in (d.y_train, d.y_val):
        digest.update(labels.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

def facts(d, extra=None):
    """What a log says of the data, as JSON. extra: images without labels; up to some 10,000 are read."""
    about = dict(augment=d.augment, data=fingerprint(d), classes=d.classes, train_images=len(d.y_train),
                 val_images=len(d.y_val))
    if extra is not None:
        some = np.ascontiguousarray(extra[::max(1, len(extra) // 10_000)])
        about['extra_data'] = hashlib.sha256(f'{extra.shape}'.encode() + some.tobytes()).hexdigest()[:16]
    return about

def open_images(path, shape):
    """
    The images of a file without labels, uint8 (N,H,W,3) of the given (H,W,3): FILE.npy, which stays on the
    disk, or the array x, x_train, image or images of FILE.npz, which is read into memory. Raises Refused.
    """
    try:
        images = np.load(path, mmap_mode='r')
        if not isinstance(images, np.ndarray):
            name = next((n for n in ('x', 'x_train', 'image', 'images') if n in images), None)
            if name is None:
                raise Refused('no array x, x_train, image or images')
            images = images[name]
    except Exception as e:          # zipfile, zlib, numpy and the file system each have their own
        raise Refused(f'{path} is not an npz or npy file of images: {e}'.splitlines()[0]) from e
    if images.ndim == 3:                            # grey
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != tuple(shape) or not len(images):
        raise Refused(f'{path} holds {images.dtype} {images.shape}; the training images are uint8 '
                         f'(N, {", ".join(map(str, shape))})')
    return images

def image_batches(images, n, augment, generator, seed=0, first=0):
    """Yield n of the images (see open_images) at a time, for ever: x fp32 (n,3,H,W) on the generator's
    device, every image once before any comes again. seed: of their order; first: how many images to skip."""
    order = lambda turn: torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + turn))
    turn, passed = divmod(first, len(images))
    rest = order(turn)[passed:]
    while True:
        while len(rest) < n:
            turn += 1
            rest = torch.cat([rest, order(turn)])
        index, rest = rest[:n].sort().values, rest[n:]          # sorted: the disk reads forwards
        x = torch.from_numpy(images[index.numpy()]).to(generator.device)
        yield to_float(augmented(x, augment, generator))

def to_float(x):
    """uint8 (B,H,W,3) -> fp32 (B,3,H,W) in [0, 1], in speed.layout: on a GPU channels_last,
    and the transpose is free."""
    x = x.permute(0, 3, 1, 2).float() / 255
    if x.is_cuda:
        return x
    # of one channel both layouts are the same numbers in the same order, and contiguous() would leave
    # strides that mean channels_last, in which oneDNN crashes below 8 channels
    return x.clone(memory_format=torch.contiguous_format)

def augmented(x, augment, generator, padding=4):
    """
    'crop': random crop out of a frame of zeros, as torchvision's RandomCrop(padding=4); 'crop+flip': and
    each image flipped with probability 1/2, as RandomHorizontalFlip; 'none'. One gather for the whole batch,
    on its device. uint8 (B,H,W,C) -> the same. Raises ValueError for another word.
    """
    if augment not in AUGMENT:
        raise ValueError(f'augment is one of {AUGMENT}, not {augment!r}')
    if augment == 'none':
        return x
    B, H, W, _ = x.shape

    def draw(high):
        return torch.randint(high, (B, 1), generator=generator, device=x.device)

    padded = F.pad(x, (0, 0, padding, padding, padding, padding))
    rows = torch.arange(H, device=x.device) + draw(2 * padding + 1)
    columns = torch.arange(W, device=x.device)
    if augment == 'crop+flip':
        columns = torch.where(draw(2) == 1, columns.flip(0), columns)
    columns = columns + draw(2 * padding + 1)
    return padded[torch.arange(B, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]]

def at_once(n, x):
    """How many of the images x go through a network with gradients: n, if they have up to 64x64 pixels, and
    fewer in proportion if they are larger, as memory grows with the pixels."""
    return max(4, n * 64 ** 2 // max(64 ** 2, x.shape[1] * x.shape[2]))

def batches(x, y, batch_size, augment='none', generator=None, *, first=0, share=slice(None)):
    """
    Yield x fp32 (B,3,H,W) in [0, 1] and y (B,). With a generator (on y's device): one epoch in random order,
    whole batches only, so that every step has one shape. Without: in order, to the last image. first: batches
    to pass over; share: of each batch, what this process takes. What is drawn depends on neither.
    """
    order = torch.arange(len(y), device=y.device)
    if generator is not None:
        batch_size = min(batch_size, len(y))
        order = torch.randperm(len(y), generator=generator, device=y.device)
        order = order[:len(y) // batch_size * batch_size]
    augment = augment if generator is not None else 'none'
    if isinstance(x, Files):
        seeds = None
        if augment != 'none':
            seeds = torch.randint(2 ** 31, order.shape, generator=generator, device=y.device)
            seeds = [s[share] for s in seeds.cpu().split(batch_size)[first:]]
        index = [i[share] for i in order.cpu().split(batch_size)[first:]]
        for images, labels in imagenet.batches(x, y, index, seeds):
            yield to_float(images), labels
        return
    for k, i in enumerate(order.split(batch_size)):
        images = augmented(x[i], augment, generator)
        if k >= first:
            yield to_float(images[share]), y[i[share]]

def epoch(d, batch_size, seed, epoch, *, first=0, share=slice(None), extra=None, fraction=0.5, label=None):
    """
    Yield x, y of one training epoch. With extra (see open_images), a fraction of every batch is drawn from
    it, the last images; label(x) -> (n,) says what stands for their labels, which is -1 without it. As many
    steps as without them, so that an epoch costs the same. What is drawn depends on (seed, epoch) alone:
    neither on the number of processes nor on where the training was stopped. first: batches to pass over;
    share: of each batch, what this process takes.
    """
    device = d.y_train.device
    generator = torch.Generator(device).manual_seed((seed + 1_000_003 * epoch) % 2 ** 63)
    n_extra = 0 if extra is None else round(fraction * batch_size)
    labelled = batches(d.x_train, d.y_train, batch_size - n_extra, d.augment, generator, first=first,
                       share=share)
    if extra is None:
        yield from labelled
        return
    steps = max(1, len(d.y_train) // batch_size)
    own = torch.Generator(device).manual_seed((seed + 1_000_003 * epoch + 500_000) % 2 ** 63)
    unlabelled = image_batches(extra, n_extra, d.augment, own, seed, first=(epoch - 1) * steps * n_extra)
    for _ in range(first):
        next(unlabelled)
    world, rank = share.step or 1, share.start or 0
    for _, (x, y), more in zip(range(first, steps), labelled, unlabelled):
        # counted from the other end, so that every process has as many images in all
        more = more[world - 1 - rank::world]
        their_y = label(more) if label else y.new_full((len(more),), -1)
        yield torch.cat([x, more]), torch.cat([y, their_y])

"""
ImageNet, or any images in class folders: decoded by worker processes, batches ahead.

    DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG            # as ImageNet is usually unpacked

Training: a random resized crop of 224x224, flipped or not. Otherwise: the shorter side to 256 pixels, and of
that the 224x224 in the centre (Chen & Lee, "LTD: Low Temperature Distillation for Robust Adversarial
Training", appendix A.1: in [0, 1] and not standardised).

The test images are RobustBench's 5,000 (imagenet5000.txt: the numbers N of ILSVRC2012_val_N.JPEG, in its
order); of other folders 5,000 of val, or all if it has fewer, in an order that is always the same.
"""
import atexit, multiprocessing, os, re, signal, sys

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.files import Refused

SIZE = 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]       # everyone's, of ImageNet's training images
TRIES = 100         # so many unreadable files in a row are no accident
reported = set()    # unreadable files that the user has been told of

class Files:
    """Image files in the place of a uint8 tensor (N,SIZE,SIZE,3): with its length, shape and indexing, and
    decoded by batches and in_memory."""
    def __init__(self, paths):
        # one array: of a list each worker would make a copy, by counting references
        self.paths = np.array(paths, dtype=bytes)
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        return Files(self.paths[index.cpu().numpy() if isinstance(index, torch.Tensor) else index])
    @property
    def shape(self):
        return len(self), SIZE, SIZE, 3

def load(folder, training=True):
    """(x_train, y_train, x_test, y_test), Files and numpy labels, and the number of classes. training=False:
    no training images, and DIR/train is not looked for. Raises Refused."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    def is_image(path):             # macOS leaves ._n.JPEG beside n.JPEG
        return path.lower().endswith(IMG_EXTENSIONS) and not os.path.basename(path).startswith('.')

    found = {}
    for split in ('val', 'train'):
        path = os.path.join(folder, split)
        if split == 'train' and not training:
            found[split] = found['val'][0], []
            continue
        try:
            classes = [name for name in find_classes(path)[0] if not name.startswith('.')]
            index = {name: k for k, name in enumerate(classes)}
            found[split] = classes, make_dataset(path, index, is_valid_file=is_image)
        except OSError as e:                    # no such folder, or a class without an image
            raise Refused(f'--dataset imagenet: {path} should be a folder of class folders of images: '
                             f'{e.strerror or e}') from e
    if found['val'][0] != found['train'][0]:
        differ = sorted(set(found['val'][0]) ^ set(found['train'][0]))
        raise Refused(f'{folder}: train and val have different class folders, for instance {differ[0]}')
    shuffled = lambda items: [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    train, test = shuffled(found['train'][1]), shuffled(found['val'][1])[:5000]
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'imagenet5000.txt')) as f:
        wanted = f.read().split()
    number = {m[1]: item for item in found['val'][1]
              if (m := re.search(r'ILSVRC2012_val_0*(\d+)\D', item[0]))}
    classes = len(found['val'][0])
    if classes == 1000 and number:              # ImageNet, and not a part of it
        if missing := [n for n in wanted if n not in number]:
            raise Refused(f"{folder}: {len(missing)} of RobustBench's 5,000 test images are missing, the "
                             f'first is ILSVRC2012_val_{int(missing[0]):08}: fetch it again')
        test = [number[n] for n in wanted]
    files = lambda items: Files([os.fsencode(path) for path, _ in items])
    labels = lambda items: np.array([label for _, label in items], np.int64)
    return (files(train), labels(train), files(test), labels(test)), classes

# -----------------------------------------------------------------------------
# decoding

class Decoded(torch.utils.data.Dataset):
    """(i, seed) -> image uint8 (SIZE,SIZE,3), its number, unreadable files. If file i cannot be read, the
    next that can stands in, under its own number. seed: of the random crop; None: the centre."""
    def __init__(self, files, tries=TRIES):
        from torchvision import transforms
        self.files, self.tries = files, min(tries, len(files))
        self.centre = transforms.Compose([transforms.Resize(SIZE * 256 // 224), transforms.CenterCrop(SIZE)])
        self.random = transforms.Compose([transforms.RandomResizedCrop(SIZE),
                                          transforms.RandomHorizontalFlip()])
    def __getitem__(self, item):
        (i, seed), unreadable = item, []
        for j in range(i, i + self.tries):
            j %= len(self.files)
            try:
                with Image.open(os.fsdecode(self.files.paths[j])) as image:
                    image = image.convert('RGB')
            except Exception:                   # PIL has many names for a damaged file
                unreadable.append(os.fsdecode(self.files.paths[j]))
                continue
            if seed is not None:
                torch.manual_seed(seed)         # of this worker; it draws nothing else
            image = (self.centre if seed is None else self.random)(image)
            return torch.from_numpy(np.array(image)), j, unreadable
        return None, -1, unreadable

def collate(items):
    images, numbers, unreadable = zip(*items)
    if -1 in numbers:
        return None, None, sum(unreadable, [])
    return torch.stack(images), torch.tensor(numbers), sum(unreadable, [])

def ignore_signals(worker):
    """Ctrl-C and SIGTERM, which may reach every process at once: first the training saves its state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def cores():
    """Of this process, those of the machine shared with the others that torchrun has started on it."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, mine // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))

def decode(items, dataset, device):
    """Yield images uint8 (B,SIZE,SIZE,3) on the device and their numbers; items: batches of (i, seed).
    Raises OSError if nothing can be read."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=items, collate_fn=collate, worker_init_fn=ignore_signals,
        num_workers=min(16, cores()), prefetch_factor=2, pin_memory=device.type == 'cuda',
        multiprocessing_context=multiprocessing.get_context('fork'),        # a script would start again
        generator=torch.Generator())            # its own: the training's noise does not depend on it
    loaded = iter(loader)
    atexit.register(loaded._shutdown_workers)   # else a script that ends in the middle waits for them
    try:
        for x, numbers, unreadable in loaded:
            if x is None:
                raise OSError(f'cannot read {", ".join(sorted(set(unreadable))[:3])}: fetch it again')
            for path in sorted(set(unreadable) - reported):
                tqdm.write(f'cannot read {path}: the next image takes its place', file=sys.stderr)
            reported.update(unreadable)
            yield x.to(device, non_blocking=True), numbers.to(device, non_blocking=True)
    finally:
        loaded._shutdown_workers()
        atexit.unregister(loaded._shutdown_workers)

def batches(files, y, index, seeds=None):
    """Yield images uint8 (B,SIZE,SIZE,3) and labels (B,) on y's device. index: per batch, the numbers of its
    images (B,); seeds: likewise those of their crops, or None for the centre."""
    seeds = [s.tolist() for s in seeds] if seeds else [[None] * len(i) for i in index]
    items = (list(zip(i.tolist(), s)) for i, s in zip(index, seeds))
    for x, numbers in decode(items, Decoded(files), y.device):
        yield x, y[numbers]

def in_memory(x, device):
    """The images of Files, uint8 (N,SIZE,SIZE,3) on the device; a tensor as it is. Raises Refused for an
    unreadable file: a number is of all images, or of none."""
    if not isinstance(x, Files):
        return x
    items = ([(i, None) for i in part.tolist()] for part in torch.arange(len(x)).split(50))
    try:
        return torch.cat([images for images, _ in decode(items, Decoded(x, tries=1), device)])
    except OSError as e:
        raise Refused(e) from e

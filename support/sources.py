"""
Where images come from. Each function returns x_train, y_train, x_test, y_test as numpy arrays: images uint8
(N,H,W,3), or (N,H,W,1) in grey, labels integer (N,). ImageNet's files are in support/imagenet.py.
"""
import os

import numpy as np
import torch
import torch.nn.functional as F

from support.files import Refused, atomic, cannot_write

def from_npz(path, classes):
    """Any file of the four arrays, checked. Raises Refused with what is wrong and where."""
    names = 'x_train', 'y_train', 'x_test', 'y_test'
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = [z[k] if k in z else None for k in names]
    except Exception as e:         # zipfile, zlib and numpy each have their own for a damaged or foreign file
        if isinstance(e, OSError) and e.strerror:
            raise Refused(f'cannot read {path}: {e.strerror}') from e
        raise Refused(f'{path} is not an npz file of plain arrays, or is truncated '
                         f'({type(e).__name__})') from e
    missing = [k for k, a in zip(names, arrays) if a is None]
    if missing:
        raise Refused(f'{path} has no array {" ".join(missing)}: it needs {" ".join(names)}')
    for i in 0, 2:
        if arrays[i].ndim == 3:                     # grey
            arrays[i] = arrays[i][..., None]
    for split, x, y in (('train', *arrays[:2]), ('test', *arrays[2:])):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
            raise Refused(f'{path}: x_{split} is {x.dtype} {x.shape}; images are uint8 (N, H, W, 3), '
                          'or grey (N, H, W), 0 to 255')
        if y.dtype.kind not in 'iu' or y.shape != x.shape[:1]:
            raise Refused(f'{path}: y_{split} is {y.dtype} {y.shape}; '
                             f'labels are integers, one per image, here ({len(x)},)')
        if len(y) < 2 or not x.size:
            raise Refused(f'{path}: x_{split} holds {len(y)} images of {x.shape[1]} x {x.shape[2]} pixels')
        classes = classes or int(y.max()) + 1           # of the training labels, where nothing else says
        if classes > max(1000, len(arrays[1])):
            raise Refused(f'{path}: labels up to {classes - 1} on {len(arrays[1])} training images: '
                          'number the classes from 0')
        if y.min() < 0 or y.max() >= classes:
            raise Refused(f'{path}: y_{split} holds labels {y.min()} to {y.max()}, '
                             f'outside the classes 0 to {classes - 1}')
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise Refused(f'{path}: training images are {arrays[0].shape[1:]}, '
                         f'test images {arrays[2].shape[1:]}')
    return arrays

def from_torchvision(name, folder):
    """Download, then keep as folder/name.npz."""
    import torchvision
    cls = {'cifar10': torchvision.datasets.CIFAR10, 'cifar100': torchvision.datasets.CIFAR100}[name]
    path = os.path.join(folder, f'{name}.npz')
    try:
        train, test = cls(folder, train=True, download=True), cls(folder, train=False)
    except Exception as e:                  # no route, no such host, a proxy's page, a broken archive
        raise Refused(f'{name} could not be downloaded ({type(e).__name__}: {e}). Put {path} there '
                         'yourself (x_train y_train x_test y_test, uint8 images NHWC), '
                         'or use --dataset digits, which needs no download') from e
    arrays = train.data, np.array(train.targets), test.data, np.array(test.targets)
    try:
        with atomic(path) as tmp, open(tmp, 'wb') as f:
            np.savez(f, **dict(zip(('x_train', 'y_train', 'x_test', 'y_test'), arrays)))
    except OSError as e:
        raise Refused(cannot_write(path, e)) from e
    return arrays

def digits():
    """UCI's handwritten digits, 8x8 in 17 grey levels, each pixel repeated to 4x4.
    Every fourth image is a test image."""
    from sklearn.datasets import load_digits
    images, y = load_digits(return_X_y=True)
    x = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8).repeat(4, 1).repeat(4, 2)
    x, test = np.stack([x] * 3, 3), np.arange(len(x)) % 4 == 3
    return x[~test], y[~test], x[test], y[test]

def synthetic():
    """Ten smooth random patterns, shifted and noisy: 640 training and 256 test images that a
    small network learns within an epoch or two."""
    g = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=g), size=(32, 32), mode='bilinear')
    y = torch.arange(896) % 10
    x = 127 + 50 * patterns[y] + 25 * torch.randn(896, 3, 32, 32, generator=g)
    x = x.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return x[:640], y[:640].numpy(), x[640:], y[640:].numpy()

"""
A GPU that is not there, for those who have none. Its tensors say `cuda` and hold tensors of the CPU, so that
code takes the paths it takes on a GPU, with the numbers of a CPU. It sees what a CPU does not: tensors or
generators of two devices in one operation, and every wait for the device (.item(), .tolist(), .cpu(), an `if`
on a tensor, indexing by a mask).

    with pretended.gpu() as waits:
        x = torch.rand(4, 3, 32, 32, device='cuda')
        x.sum().item()
    waits           # [['test.py:test_it']]: who waited, each as 'file.py:function', outermost first

Kernels, memory, streams, TF32, torch.compile and CUDA graphs are not in it, and no speed: tests/test_cuda.py.
"""
import contextlib
import os
import traceback
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
# may read one device and write the other
COPIES = {aten.copy_.default, aten._to_copy.default}
# a GPU's tensor may be indexed by one of the CPU
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor}
# the shape of the result, or Python, depends on values
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten._unique2.default, aten.unique_dim.default, aten.bincount.default, aten.equal.default,
         aten.is_nonzero.default}
METHODS_THAT_WAIT = {'item', 'tolist', 'numpy', 'cpu', '__bool__', '__float__', '__int__', '__index__',
                     '__array__', '__contains__', '__format__'}
waits = []

def wait():
    waits.append([f'{os.path.basename(frame.filename)}:{frame.name}' for frame in traceback.extract_stack()
                  if f'{os.sep}torch{os.sep}' not in frame.filename and frame.filename != __file__])

def is_gpu(thing):
    return isinstance(thing, (str, torch.device)) and str(thing).startswith('cuda')

class OnGPU(torch.Tensor):
    """held: the CPU's tensor, with the values."""
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset())

    def __init__(self, held):
        self.held = held

    # of Python only: for autograd, which would ask the driver, the tensor is one of the CPU
    device = property(lambda self: torch.device('cuda', 0))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __reduce_ex__(self, protocol):      # a file holds plain tensors
        return self.detach().held.__reduce_ex__(protocol)

    def __repr__(self):
        return f'OnGPU({self.held})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        everything = tree_flatten((args, kwargs))[0]
        index = []
        if func in BY_INDEX:
            index = [i for i in args[1] if i is not None]
            if any(i.dtype is torch.bool for i in index):
                wait()
        for thing in everything:
            here = isinstance(thing, torch.Tensor) and not isinstance(thing, OnGPU) and thing.dim() > 0
            if here and func not in COPIES and not any(thing is i for i in index):
                raise RuntimeError(f'{func}: a tensor of cuda:0 and one of the CPU')
            if isinstance(thing, REAL_GENERATOR) and not isinstance(thing, Generator):
                raise RuntimeError(f'{func}: a tensor of cuda:0 and a generator of the CPU')
        to_cpu = func is aten.copy_.default and not isinstance(args[0], OnGPU)
        if func in WAITS or to_cpu:
            wait()
        out = func(*tree_map_only(OnGPU, lambda t: t.held, args),
                   **tree_map_only(OnGPU, lambda t: t.held, kwargs))
        if to_cpu:
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, OnGPU, out))

class Generator(torch.Generator):
    """Draws what one of the CPU with its seed draws."""
    def __new__(cls, device='cpu'):
        return super().__new__(cls) if is_gpu(device) else REAL_GENERATOR(device)
    device = property(lambda self: torch.device('cuda', 0))

REAL_GENERATOR, REAL_AUTOCAST = torch.Generator, torch.autocast

class ToAndFro(TorchFunctionMode):
    """Makes tensors on the GPU, brings them there and back."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', '')
        if func is torch.device:
            return func(*args, **kwargs)
        if args and isinstance(args[0], OnGPU):
            back = name == 'to' and any(str(a) == 'cpu' for a in [*args[1:], kwargs.get('device')]
                                        if isinstance(a, (str, torch.device)))
            if back or name in METHODS_THAT_WAIT:
                wait()
                return func(args[0].detach().held, *args[1:], **kwargs)
            if name == 'one_hot':       # makes a tensor where it is not seen
                return OnGPU(func(args[0].held, *args[1:], **kwargs))
        there = any(is_gpu(a) for a in [*args, kwargs.get('device')])
        if kwargs.get('generator') is not None and there != isinstance(kwargs['generator'], Generator):
            raise RuntimeError(f'{name}: a tensor of one device and a generator of the other')
        if not there:
            return func(*args, **kwargs)
        out = func(*['cpu' if is_gpu(a) else a for a in args],
                   **{k: 'cpu' if is_gpu(v) else v for k, v in kwargs.items()})
        return out if isinstance(out, OnGPU) else OnGPU(out)

def module_to(self, *args, **kwargs):
    """nn.Module.to. The parameters are new ones: those of the CPU cannot become OnGPU."""
    layout = kwargs.pop('memory_format', None)

    def moved(t):
        of_images = dict(memory_format=layout) if layout and t.dim() == 4 else {}
        return t.detach().to(*args, **kwargs, **of_images)

    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(moved(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = moved(b)
    return self

def autocast(device_type, *args, **kwargs):
    return REAL_AUTOCAST('cpu' if device_type == 'cuda' else device_type, *args, **kwargs)

OF_CUDA = dict(is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None,
               get_device_name=lambda device=None: 'a pretended GPU', synchronize=lambda device=None: None,
               max_memory_allocated=lambda device=None: 0,
               is_bf16_supported=lambda including_emulation=True: True,
               get_rng_state=lambda device=None: torch.zeros(16, dtype=torch.uint8),
               set_rng_state=lambda state, device=None: None)

@contextlib.contextmanager
def gpu():
    """-> waits, of what runs in the block."""
    waits.clear()
    with contextlib.ExitStack() as stack:
        for name, call in OF_CUDA.items():
            stack.enter_context(mock.patch(f'torch.cuda.{name}', call))
        stack.enter_context(mock.patch('torch.Generator', Generator))
        stack.enter_context(mock.patch('torch.autocast', autocast))
        stack.enter_context(mock.patch('torch.compile', lambda network, **kwargs: network))
        stack.enter_context(mock.patch('torch.nn.Module.to', module_to))
        stack.enter_context(ToAndFro())
        yield waits

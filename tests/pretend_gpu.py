"""A GPU that is not there: tensors that say they lie on cuda:0, and refuse what a tensor on a GPU refuses.

``with pretend_gpu():`` every tensor made on or moved to "cuda" is a ``GpuTensor``: it keeps its values in an ordinary
tensor and computes with them on the processor, but says ``device == cuda:0``. As on a GPU, an operation that mixes it
with tensors of the processor raises RuntimeError, except where CUDA allows it (``copy_``, numbers without dimensions
in elementwise operations, indices of the processor into a tensor of the GPU); so do ``.numpy()`` and ``np.asarray``
(TypeError), generators of the other device, integers in matrix products and (where torch was built for CUDA)
operations that have no CUDA kernel. Backward passes, optimisers, ``module.to``, threads, autocast and the questions
that are put to ``torch.cuda`` work; Lightning Fabric takes it for a GPU. Random numbers are those of the processor.

What it cannot show: other rounding, asynchronous errors, memory limits, and numbers that only the GPU's random
generators give; autocast follows the processor's list of operations and casts the processor's tensors too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}  # go from one device to another
INDEXING = {"aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
SCALARS = {"aten::masked_fill_", "aten::masked_fill", "aten::fill_", "aten::fill"}  # of a value without dimensions
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::addmv"}
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)
MOVERS = {torch.Tensor.to: None, torch.Tensor.cpu: CPU, torch.Tensor.cuda: CUDA}
COMPOSITE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
_calls = threading.local()  # .on_gpu: whether the torch function that is running was given tensors of the GPU


def on_gpu(device: Any) -> bool:
    """Whether a device, a name or None is the GPU."""
    return device is not None and torch.device(device).type == "cuda"


class GpuTensor(Tensor):
    """A tensor on the pretend GPU; ``values`` is where its numbers are."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    made = 0  # how many there were, for tests that something ran here at all

    @staticmethod
    def __new__(cls, values: Tensor) -> GpuTensor:
        size, layout = values.size(), {"strides": values.stride(), "storage_offset": values.storage_offset()}
        with torch._C._InferenceMode(False):  # in it, views of tensors from outside could not be made
            self = Tensor._make_wrapper_subclass(cls, size, dtype=values.dtype, device=CPU, **layout)
        self.values = values
        GpuTensor.made += 1
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _operate(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"GpuTensor({self.values})"

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Refused, as by CUDA."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.values.numpy(force=True)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self.numpy()

    def tolist(self) -> Any:
        return self.values.tolist()

    def get_device(self) -> int:
        return 0

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copy = self.detach().clone()
            learnt = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if learnt else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.values.detach().__reduce_ex__(protocol)


_Generator = torch.Generator


class GpuGenerator(_Generator):
    """A generator of random numbers for the pretend GPU."""

    device = property(lambda self: CUDA)


class _AnyGenerator(_Generator):
    """What ``torch.Generator`` is meanwhile."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return GpuGenerator() if on_gpu(device) else _Generator(device)


class _Move(torch.autograd.Function):
    """To the other device, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.values.clone() if isinstance(x, GpuTensor) else GpuTensor(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Move.forward(ctx, gradient)


def _moved(x: Tensor, device: Any) -> Tensor:
    return x if device is None or on_gpu(device) == isinstance(x, GpuTensor) else _Move.apply(x)


@functools.cache
def _has_kernel(name: str) -> bool:
    """Whether CUDA can do an operation, as far as this build of torch knows."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return not has("aten::mm", "CUDA") or any(has(name, key) for key in ("CUDA", *COMPOSITE))


def _refuse(name: str, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    """Raise what CUDA would raise."""
    here = [t for t in tensors if not isinstance(t, GpuTensor)]
    written = [*zip(func._schema.arguments, args), *((a, kwargs.get(a.name)) for a in func._schema.arguments)]  # noqa: B905
    into = [v for a, v in written if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Tensor)]
    if len(here) < len(tensors) and here and name not in COPIES:
        allowed = torch.Tag.pointwise in func.tags or name in SCALARS
        bad = [t for t in here if t.dim() or not allowed]
        if name in INDEXING and isinstance(args[0], GpuTensor):
            bad = [t for t in args[2:3] if t.dim() and not isinstance(t, GpuTensor)]
        bad += [t for t in into if not isinstance(t, GpuTensor)]
        if bad:
            places = ", ".join(f"{t.device.type}{tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device, but found two: {func} of {places}")
    if len(here) < len(tensors):
        whole = name + "." + func._overloadname if func._overloadname != "default" else name
        if not (_has_kernel(whole) or "for_cpu" in name):
            raise NotImplementedError(f"Could not run '{whole}' with arguments from the 'CUDA' backend")
        if name in PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
            raise RuntimeError(f'"{name[6:]}_cuda" not implemented for {tensors[0].dtype}')


def _operate(func: Any, args: tuple, kwargs: dict) -> Any:
    """Any operation, on the values; its results lie where CUDA would put them."""
    name, device = func._schema.name, kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if name == "aten::copy_":
        gpu = isinstance(args[0], GpuTensor)
    elif device is None:
        gpu = any(isinstance(t, GpuTensor) for t in tensors)
    else:  # "cpu" also stands for "where its input is" in what torch itself composes of smaller operations
        gpu = on_gpu(device) or getattr(_calls, "on_gpu", False)
        kwargs = {**kwargs, "device": CPU}
    _refuse(name, func, args, kwargs, tensors)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    plain = functools.partial(tree_map_only, GpuTensor, lambda t: t.values)
    out = func(*plain(args), **plain(kwargs))
    given = {id(plain(t)): t for t in tensors} if func._schema.is_mutable else {}
    if any(isinstance(t, GpuTensor) and t.shape != t.values.shape for t in given.values()):
        raise NotImplementedError(f"{func} changes the shape of a tensor in place: the pretend GPU cannot follow")

    def placed(t: Tensor) -> Tensor:
        if id(t) in given or not gpu or isinstance(t, GpuTensor):
            return given.get(id(t), t)
        return GpuTensor(t.resolve_conj().resolve_neg())

    return out if name == "aten::_local_scalar_dense" else tree_map_only(Tensor, placed, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _operate(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what is called by name: moves between devices, and whether a device was asked for or follows the input."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        before = getattr(_calls, "on_gpu", False)
        try:
            if func is Tensor.backward:
                _calls.on_gpu = isinstance(args[0], GpuTensor)
                how = {"grad_tensors" if k == "gradient" else k: v for k, v in kwargs.items()}
                with self:
                    return torch.autograd.backward(*args, **how)
            given = any(isinstance(t, GpuTensor) for t in tree_leaves((args, kwargs)))
            _calls.on_gpu = given and kwargs.get("device") is None
            if func in MOVERS:
                return self._move(func, *args, **kwargs)
            if func in MAKERS and not isinstance(args[0], Tensor):
                _calls.on_gpu = False
                device = kwargs.pop("device", None)
                return _moved(func(*args, **kwargs), device)
            if func in MAKERS[1:]:
                return _moved(args[0], kwargs.pop("device", None)).to(**kwargs)
            if func is Tensor.new_tensor:
                device = kwargs.pop("device", args[0].device)
                return _moved(torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs}), device)
            generator = kwargs.get("generator")
            if generator is not None and isinstance(generator, GpuGenerator) != (given or on_gpu(kwargs.get("device"))):
                raise RuntimeError(f"a generator of {generator.device} for a tensor of another device: {func}")
            return func(*args, **kwargs)
        finally:
            _calls.on_gpu = before

    def _move(self, func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if func is not Tensor.to:
            return _moved(x, MOVERS[func])
        like = args[0] if args else kwargs.get("other")
        if isinstance(like, Tensor):
            return _moved(x, like.device).to(like.dtype)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        moved = _moved(x, device)
        how = {"dtype": dtype or x.dtype, "copy": kwargs.get("copy", False) and moved is x, "memory_format": layout}
        _calls.on_gpu = isinstance(moved, GpuTensor)
        return func(moved, **{k: v for k, v in how.items() if v is not None})


class _Autocast(torch.autocast):
    """The processor's autocast for both."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _Event:
    """An event on a stream."""

    def __init__(self, **options: bool) -> None: ...
    def record(self, *stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: _Event) -> float:
        return 1.0


_ANSWERS: dict[str, Any] = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
    "is_bf16_supported": True, "get_device_capability": (9, 0), "get_device_name": "pretend GPU", "empty_cache": None,
    "synchronize": None, "mem_get_info": (8 << 30, 16 << 30), "memory_reserved": 0, "memory_allocated": 0,
    "max_memory_allocated": 0, "reset_peak_memory_stats": None, "manual_seed_all": None, "manual_seed": None,
    "set_rng_state": None, "_lazy_init": None,
}  # fmt: skip


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """A machine with one GPU, until the end of the block; gives its device.

    Models and tensors of the block are of no use after it, except what was moved to the processor.
    """
    real_run, real_enabled, real_dtype = threading.Thread.run, torch.is_autocast_enabled, torch.get_autocast_dtype

    def run(thread: threading.Thread) -> None:
        with _Operations(), _Functions():
            real_run(thread)

    def of_processor(real: Callable) -> Callable:
        return lambda *device: real(*("cpu" if d == "cuda" else d for d in device))

    with ExitStack() as stack:
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *a, answer=answer, **k: answer))
        state = lambda *device: torch.zeros(16, dtype=torch.uint8)  # noqa: E731
        changes: list[tuple[Any, str, Any]] = [
            (torch.cuda, "get_rng_state", state), (torch.cuda, "Event", _Event), (threading.Thread, "run", run),
            (torch, "Generator", _AnyGenerator), (torch, "autocast", _Autocast),
            (torch, "is_autocast_enabled", of_processor(real_enabled)),
            (torch, "get_autocast_dtype", of_processor(real_dtype)),
            (Tensor, "pin_memory", lambda x, *device: x.clone()),
            (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda optimizer: None),
        ]  # fmt: skip
        for owner, name, new in changes:
            stack.enter_context(mock.patch.object(owner, name, new))
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        precision = torch.get_float32_matmul_precision()
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield CUDA

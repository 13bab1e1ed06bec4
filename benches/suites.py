"""What compare.py times: the suites, their contenders, and what each computes."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xunit_rs import DepthwiseConv2d, models, xUnit, xUnitD, xUnitS
from xunit_rs._core import Network

Shape = tuple[int, int, int, int]
Call = Callable[[], tuple[Tensor, ...]]
# From a module and a memory format: the call that is timed.
Maker = Callable[[Any, Any], Call]

LAYOUTS = {"NCHW": torch.contiguous_format, "chl": torch.channels_last}
UNITS = (xUnit, xUnitS, xUnitD)
FLOAT = 4  # bytes

SHAPES: tuple[Shape, ...] = (
    (16, 64, 64, 64),
    (64, 64, 40, 40),
    (1, 64, 256, 256),
    (8, 96, 56, 56),
    (1, 64, 512, 512),
)
NETWORK_SHAPES: tuple[Shape, ...] = ((32, 64, 40, 40), (1, 64, 321, 481))
OVERHEAD_SHAPE: Shape = (1, 8, 4, 4)
MEMORY_SHAPES: tuple[Shape, ...] = ((16, 64, 64, 64),)
TINY: tuple[Shape, ...] = ((2, 8, 12, 12),)
KERNEL_SIZES = (3, 5, 7, 9)
UNIT_SIZES = (7, 9)


@dataclass(frozen=True)
class Group:
    """Contenders that compute the same, from the same numbers."""

    flops: float
    # What must at least pass between cache and memory, in bytes.
    reads: float
    writes: float
    ours: dict[str, Call]
    peers: dict[str, Call]
    # Timed in the same turns, but not the same computation: neither checked nor among the best.
    beside: dict[str, Call] = field(default_factory=dict)
    # The two convolutions alone, of each of PyTorch's contenders, to be subtracted.
    without: dict[str, Call] = field(default_factory=dict)
    # Calls in one time.
    loops: int = 1


class Options(NamedTuple):
    threads: int
    compile: bool
    between: bool


class Case(NamedTuple):
    """A row to be, of `shape`; its group takes memory and is made only when its turn comes."""

    suite: str
    operation: str
    shape: Shape
    make: Callable[[Options], Any]


# ---------------------------------------------------------------- contenders


def ours_of(fast: nn.Module, call: Maker) -> dict[str, Call]:
    """`call(module, memory format)` for our module in each layout."""
    return {
        "" if name == "NCHW" else f" {name}": call(copy.deepcopy(fast), layout)
        for name, layout in LAYOUTS.items()
    }


def peers_of(plain: nn.Module, call: Maker, compiled: bool) -> dict[str, Call]:
    """`call(module, memory format)` for PyTorch in each layout, eager and compiled."""
    peers = {}
    for name, layout in LAYOUTS.items():
        peers[name] = call(copy.deepcopy(plain).to(memory_format=layout), layout)
    if compiled:
        for name, layout in LAYOUTS.items():
            module = copy.deepcopy(plain).to(memory_format=layout)
            peers[compiled_name(name)] = call(compile_anew(module), layout)
    return peers


def compiled_name(layout: str) -> str:
    return "comp" if layout == "NCHW" else f"comp {layout}"


def compile_anew(function: Any) -> Any:
    """Compiled for these very shapes, as if it were the first: no limit on recompiling applies."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def group_of(
    plain: nn.Module, fast: nn.Module, call: Maker, options: Options, channels: int, **size: float
) -> Group:
    """The group of two modules; with `between`, each of them between two 1×1 convolutions.

    1×1, because a larger one would take so much longer than the operation that the difference
    would be lost in the noise.
    """
    if not options.between:
        return Group(ours=ours_of(fast, call), peers=peers_of(plain, call, options.compile), **size)
    first, last = (nn.Conv2d(channels, channels, 1) for _ in range(2))
    alone = peers_of(nn.Sequential(first, last), call, options.compile)
    return Group(
        ours=ours_of(nn.Sequential(first, fast, last), call),
        peers=peers_of(nn.Sequential(first, plain, last), call, options.compile),
        without={convolutions(name): conv for name, conv in alone.items()},
        **size,
    )


def convolutions(contender: str) -> str:
    """The name of the two convolutions alone that belong to a contender."""
    return f"convs {contender.strip() or 'NCHW'}"


def inference(x: Tensor) -> Maker:
    def make(module: Any, layout: Any) -> Call:
        value = x.contiguous(memory_format=layout)

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (module(value),)

        return call

    return make


def training_step(x: Tensor, grad: Tensor) -> Maker:
    """Forward and backward, with the gradients of the input and of every parameter."""

    def make(module: Any, layout: Any) -> Call:
        value = x.contiguous(memory_format=layout).requires_grad_()
        upstream = grad.contiguous(memory_format=layout)
        wanted = [value, *module.parameters()]

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(value), wanted, upstream)

        return call

    return make


def network_step(x: Tensor, clean: Tensor) -> Maker:
    """Forward, loss and the gradients of all parameters. The optimizer, the same for all, is left
    out."""

    def make(module: Any, layout: Any) -> Call:
        value = x.contiguous(memory_format=layout)
        target = clean.contiguous(memory_format=layout)
        wanted = list(module.parameters())

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(F.mse_loss(module(value), target), wanted)

        return call

    return make


# ---------------------------------------------------------------- kernels


def kernels(shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    """The depthwise convolution alone, its input gradient alone, its weight gradient alone."""
    strides = [(shape, k, 1) for shape in shapes for k in sizes]
    strides += [(shapes[0], k, 2) for k in sizes]
    for shape, k, stride in strides:
        for what in ("forward", "input gradient", "weight gradient"):
            name = f"depthwise k={k} " + ("stride 2 " if stride == 2 else "") + what
            yield Case("kernels", name, shape, partial(depthwise, shape, k, stride, what))


def depthwise(shape: Shape, k: int, stride: int, what: str, options: Options) -> Group:
    channels = shape[1]
    plain = nn.Conv2d(channels, channels, k, stride, k // 2, groups=channels)
    fast = DepthwiseConv2d(channels, k, stride, k // 2, backend="rust")
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        y = plain(x)
    inputs, outputs = FLOAT * x.numel(), FLOAT * y.numel()
    reads, writes = {
        "forward": (inputs, outputs),
        "input gradient": (outputs, inputs),
        "weight gradient": (inputs + outputs, 0),
    }[what]
    size = {"flops": 2.0 * y.numel() * k * k, "reads": reads, "writes": writes}
    if what == "forward":
        return group_of(plain, fast, inference(x), options, channels, **size)
    of_input = what == "input gradient"
    grad = torch.randn_like(y)
    peers = peers_of(plain, gradient(x, grad, of_input), False)
    if options.compile:
        for name, layout in LAYOUTS.items():
            peers[compiled_name(name)] = compiled_gradient(plain, x, grad, of_input, layout)
    return Group(ours=ours_of(fast, gradient(x, grad, of_input)), peers=peers, **size)


def gradient(x: Tensor, grad: Tensor, of_input: bool) -> Maker:
    """One gradient alone, the only one required, over and over through one graph."""

    def make(module: Any, layout: Any) -> Call:
        module.requires_grad_(False)
        value = x.contiguous(memory_format=layout)
        upstream = grad.contiguous(memory_format=layout)
        wanted = value if of_input else module.weight
        wanted.requires_grad_()
        out = module(value)

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, wanted, upstream, retain_graph=True)

        return call

    return make


def compiled_gradient(
    plain: nn.Conv2d, x: Tensor, grad: Tensor, of_input: bool, layout: Any
) -> Call:
    """The same under torch.compile, which would not let the graph be kept: by its own operator."""
    stride, padding, dilation = plain.stride, plain.padding, plain.dilation
    groups, mask = plain.groups, [of_input, not of_input, False]
    value, upstream, weight = (
        t.detach().contiguous(memory_format=layout) for t in (x, grad, plain.weight)
    )

    def backward(upstream: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            upstream, value, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found[0 if of_input else 1]

    compiled = compile_anew(backward)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (compiled(upstream, value, weight),)

    return call


# ---------------------------------------------------------------- modules


def modules(shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    """The units, evaluation and training step."""
    for shape, unit, k, norm, training in itertools.product(
        shapes, UNITS, sizes, (True, False), (False, True)
    ):
        name = unit_name(unit, k, norm) + (" training step" if training else " evaluation")
        yield Case("modules", name, shape, partial(one_unit, unit, shape, k, norm, training))


def unit_name(unit: type[nn.Module], k: int, norm: bool) -> str:
    return f"{unit.__name__} k={k}" + (" BN" if norm else "")


def one_unit(
    unit: Any, shape: Shape, k: int, norm: bool, training: bool, options: Options, loops: int = 1
) -> Group:
    channels = shape[1]
    fast = unit(channels, k, norm, backend="rust").train(training)
    plain = copy.deepcopy(fast)
    plain.backend = "torch"
    x, grad = torch.randn(shape), torch.randn(shape)
    call = training_step(x, grad) if training else inference(x)
    products = k * k + (channels if unit is xUnitD else 0)
    size = {
        "flops": 2.0 * x.numel() * products * (3 if training else 1),
        # Training: x; then, in the backward pass, the gradient and x again.
        "reads": FLOAT * x.numel() * (3 if training else 1),
        "writes": FLOAT * x.numel() * (2 if training else 1),
    }
    if loops == 1:
        return group_of(plain, fast, call, options, channels, **size)
    return Group(
        ours={"": call(fast, torch.contiguous_format)},
        peers={"NCHW": call(plain, torch.contiguous_format)},
        loops=loops,
        **size,
    )


# ---------------------------------------------------------------- networks


def networks(shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    """The denoisers, on images of one channel; C of a shape is the width of the networks."""
    for shape in shapes:
        image, features = (shape[0], 1, *shape[2:]), shape[1]
        for version in ("2018", "2021"):
            make = partial(denoise, image, partial(models.XDnCNN, version, 1, features))
            yield Case("networks", f"xDnCNN-{version} inference", image, make)
        yield Case("networks", "DnCNN inference", image, partial(denoise_relu, image, features))
        if shape[0] > 1:  # a batch
            make = partial(train_denoiser, image, partial(models.XDnCNN, "2018", 1, features))
            yield Case("networks", "xDnCNN-2018 training step", image, make)


def twins(network: Callable[..., models.XDnCNN]) -> tuple[models.XDnCNN, models.XDnCNN]:
    """Ours and the plain one, the same weights."""
    fast, plain = network(backend="auto"), network(backend="torch")
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def network_size(plain: nn.Module, image: Shape, times: int) -> dict[str, float]:
    """Each weight of a convolution meets each pixel once; of memory, the images alone count."""
    pixels = image[0] * image[2] * image[3]
    products = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Conv2d))
    return {
        "flops": 2.0 * pixels * products * times,
        "reads": FLOAT * pixels,
        "writes": FLOAT * pixels,
    }


def denoise(image: Shape, network: Callable[..., models.XDnCNN], options: Options) -> Group:
    x = torch.rand(image)
    fast, plain = (model.eval() for model in twins(network))
    call = inference(x)
    beside = peers_of(models.DnCNN(1, fast.features).eval(), call, False)
    return Group(
        ours=ours_of(fast, call) | {" Network": rust_network(fast, x, options.threads)},
        peers=network_peers(plain, x, options),
        beside={f"DnCNN {name}": other for name, other in beside.items()},
        **network_size(plain, image, 1),
    )


def denoise_relu(image: Shape, features: int, options: Options) -> Group:
    x = torch.rand(image)
    plain = models.DnCNN(1, features).eval()
    return Group(
        ours={" Network": rust_network(plain, x, options.threads)},
        peers=network_peers(plain, x, options),
        **network_size(plain, image, 1),
    )


def network_peers(plain: nn.Module, x: Tensor, options: Options) -> dict[str, Call]:
    peers = peers_of(plain, inference(x), options.compile)
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        peers["onnx"] = onnx_runtime(plain, x, options.threads)
    if find_spec("openvino"):
        peers["openvino"] = openvino(plain, x, options.threads)
    return peers


def train_denoiser(image: Shape, network: Callable[..., models.XDnCNN], options: Options) -> Group:
    clean = torch.rand(image)
    call = network_step(clean + 0.1 * torch.randn(image), clean)
    fast, plain = twins(network)
    beside = peers_of(models.DnCNN(1, fast.features), call, False)
    return Group(
        ours=ours_of(fast, call),
        peers=peers_of(plain, call, options.compile),
        beside={f"DnCNN {name}": other for name, other in beside.items()},
        **network_size(plain, image, 3),
    )


def rust_network(model: models.XDnCNN | models.DnCNN, x: Tensor, threads: int) -> Call:
    """The runtime that needs no PyTorch, image by image."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.safetensors")
        model.save(path)
        network = Network.load(str(path))
    images = list(x.numpy())

    def call() -> tuple[Tensor, ...]:
        return (torch.stack([torch.from_numpy(network.denoise(i, 0, threads)) for i in images]),)

    return call


def onnx_runtime(plain: nn.Module, x: Tensor, threads: int) -> Call:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        torch.onnx.export(plain, (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: (torch.from_numpy(session.run(None, feed)[0]),)


def openvino(plain: nn.Module, x: Tensor, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.convert_model(plain, example_input=x, input=[list(x.shape)])
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: (torch.from_numpy(request.infer([array])[0]),)


# ---------------------------------------------------------------- overhead and memory


def overhead(shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    """Calls on next to no data: the module beside its plain definition."""
    for shape, unit, k, training in itertools.product(shapes, UNITS, sizes, (False, True)):
        name = unit_name(unit, k, True) + (" forward + backward" if training else " evaluation")
        make = partial(one_unit, unit, shape, k, True, training, loops=50 if training else 200)
        yield Case("overhead", name, shape, make)


def memory(shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    """Peak memory of a training step; `make` gives the arguments of peak_memory.py."""
    for shape, unit, k in itertools.product(shapes, UNITS, sizes):
        name = unit_name(unit, k, True) + " training step"
        size = "x".join(map(str, shape))
        yield Case("memory", name, shape, partial(memory_arguments, unit.__name__, k, size))


def memory_arguments(unit: str, k: int, size: str, options: Options) -> list[str]:
    return [unit, str(k), size, str(options.threads)]


SUITES: dict[str, Callable[[tuple[Shape, ...], tuple[int, ...]], Iterator[Case]]] = {
    "kernels": kernels,
    "modules": modules,
    "networks": networks,
    "overhead": overhead,
    "memory": memory,
}


def cases(
    suite: str,
    shapes: tuple[Shape, ...] | None,
    sizes: tuple[int, ...] | None,
    tiny: bool,
    between: bool,
) -> list[Case]:
    """The rows of a suite, on its own shapes and kernel sizes where none are given."""
    defaults = {
        "kernels": (SHAPES, KERNEL_SIZES),
        "modules": (SHAPES, UNIT_SIZES),
        "networks": (NETWORK_SHAPES, (9,)),
        "overhead": ((OVERHEAD_SHAPE,), (7,)),
        "memory": (MEMORY_SHAPES, UNIT_SIZES),
    }[suite]
    if tiny:
        defaults = (TINY, defaults[1][-1:])
    found = SUITES[suite](shapes or defaults[0], sizes or defaults[1])
    if tiny and suite == "memory":
        found = itertools.islice(
            found, 1
        )  # a row takes four processes, each of which loads PyTorch
    # Between two convolutions there is a forward pass or a whole step, no gradient alone.
    alone = ("input gradient", "weight gradient")
    return [case for case in found if not (between and case.operation.endswith(alone))]

"""The operations that models are written in, each with what torch allocates and keeps for it.

As torch 2.13 does: `derivatives.yaml` says what backward reads, `FunctionsManual.cpp` what it makes
on the way. A tensor that needs no gradient itself (a frozen weight, a mask) is no reason to keep
the other factor of a product. Named after what they compute; sizes follow from their inputs.
"""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.memory.autograd import Graph, Value

WIDE = 4  # bytes of a float32


def cast(graph: Graph, x: Value, width: int) -> Value:
    """x.to(dtype); the same tensor where it has that width already."""
    if x.width == width:
        return x
    return graph.op((x,), x.size * width, width=width)


def copy(graph: Graph, x: Value) -> Value:
    """A contiguous copy."""
    return graph.op((x,), x.num_bytes, width=x.width)


def scale(graph: Graph, x: Value) -> Value:
    """x * constant, -x, x * cos: a product with what needs no gradient."""
    return graph.op((x,), x.num_bytes, width=x.width)


def multiply(graph: Graph, x: Value, y: Value) -> Value:
    """x * y, elementwise, of equal size; each keeps the other."""
    saves = [b for a, b in ((x, y), (y, x)) if a.needs_grad]
    return graph.op((x, y), x.num_bytes, saves=saves, width=x.width)


def weigh(graph: Graph, x: Value, parameter: str, size: int, *, extra: int = 0) -> Value:
    """x * weight of the last dimension.

    Args:
        extra: bytes that are made of the weight on the way, such as 1 + weight.
    """
    trained = parameter in graph.trained
    return graph.op(
        (x,),
        x.num_bytes,
        saves=(x,) if trained else (),
        saves_bytes=extra,
        backward_temporary=x.num_bytes if trained else 0,
        parameters=((parameter, size * graph.width),) if trained else (),
        gathers=(parameter,),
        width=x.width,
    )


def square(graph: Graph, x: Value) -> Value:
    """x.pow(2), whose backward is grad * (2 * x.pow(1))."""
    return graph.op(
        (x,), x.num_bytes, saves=(x,), backward_temporary=2 * x.num_bytes, width=x.width
    )


def mean_rows(graph: Graph, x: Value, row: int) -> Value:
    """x.mean(-1, keepdim=True) of rows of so many elements."""
    return graph.op((x,), x.num_bytes // row, width=x.width)


def per_row(graph: Graph, x: Value, factor: Value) -> Value:
    """x * factor, one number a row, whose gradient is as large as x until it is summed."""
    both = x.needs_grad and factor.needs_grad
    saves = (*((factor,) if x.needs_grad else ()), *((x,) if factor.needs_grad else ()))
    return graph.op(
        (x, factor),
        x.num_bytes,
        saves=saves,
        backward_temporary=x.num_bytes if both else 0,
        width=x.width,
    )


def activation(graph: Graph, x: Value, kind: str) -> Value:
    """act(x), as transformers' ACT2FN has it.

    silu, gelu and tanh are one operation each; relu keeps its output; relu squared and the gelu
    that older models write out are several.
    """
    if kind in ("relu", "tanh", "sigmoid"):
        return graph.op((x,), x.num_bytes, saves_output=True, width=x.width)
    if kind == "relu2":
        return square(graph, activation(graph, x, "relu"))
    if kind in ("gelu_new", "gelu_fast"):
        return _written_gelu(graph, x)
    return graph.op((x,), x.num_bytes, saves=(x,), width=x.width)


def _written_gelu(graph: Graph, x: Value) -> Value:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))."""
    half = scale(graph, x)
    cube = graph.op(
        (x,), x.num_bytes, saves=(x,), backward_temporary=2 * x.num_bytes, width=x.width
    )
    inner = scale(graph, cube)
    del cube
    inner = graph.add(x, inner)
    inner = scale(graph, inner)
    bent = activation(graph, inner, "tanh")
    del inner
    bent = scale(graph, bent)  # 1 + tanh
    return multiply(graph, half, bent)


def linear(graph: Graph, x: Value, layer: Linear, name: str) -> Value:
    """x W^T + b; `name` of the module in the model."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    num_weights = layer.in_features * layer.out_features
    parameters = []
    if weight in graph.trained:
        parameters.append((weight, num_weights * graph.width))
    saves = (x,) if parameters else ()
    if layer.bias and bias in graph.trained:
        parameters.append((bias, layer.out_features * graph.width))
    rows = x.size // layer.in_features
    return graph.op(
        (x,),
        rows * layer.out_features * x.width,
        saves=saves,
        parameters=parameters,
        gathers=(weight, bias) if layer.bias else (weight,),
        width=x.width,
        viewed=True,
    )


def take_rows(graph: Graph, x: Value, num_bytes: int) -> Value:
    """x.index_select(rows): its backward adds into zeros as large as x."""
    return graph.op((x,), num_bytes, width=x.width)


def dropout(graph: Graph, x: Value, *, on_gpu: bool) -> Value:
    """x * mask / (1 - p): on a GPU a byte an element is kept, on a CPU the factor itself."""
    if not graph.drops:
        return x
    mask = x.size if on_gpu else x.num_bytes
    return graph.op((x,), x.num_bytes, saves_bytes=mask, width=x.width)


def rms_norm(
    graph: Graph, x: Value, parameter: str, row: int, *, plus_one: bool = False, late: bool = False
) -> Value:
    """Root mean square norm over rows of so many elements, in float32.

    Args:
        parameter: of the weight; empty: there is none.
        plus_one: Gemma's: (1 + weight) * x in float32, cast afterwards.
        late: the weight multiplies in float32 and the product is cast (OLMo-2).
    """
    wide = cast(graph, x, WIDE)
    variance = mean_rows(graph, square(graph, wide), row)
    factor = activation(graph, scale(graph, variance), "sigmoid")  # rsqrt keeps its output, too
    wide = per_row(graph, wide, factor)
    if plus_one:
        out = weigh(graph, wide, parameter, row, extra=row * WIDE)
        return cast(graph, out, x.width)
    if late:
        return cast(graph, weigh(graph, wide, parameter, row), x.width)
    wide = cast(graph, wide, x.width)
    return weigh(graph, wide, parameter, row) if parameter else wide


def centred_norm(graph: Graph, x: Value, parameter: str, row: int) -> Value:
    """A layer norm written out in float32, which takes the mean away twice (Cohere)."""
    wide = cast(graph, x, WIDE)
    mean = mean_rows(graph, wide, row)
    variance = mean_rows(graph, square(graph, graph.add(wide, mean)), row)
    factor = activation(graph, scale(graph, variance), "sigmoid")
    wide = per_row(graph, graph.add(wide, mean), factor)
    return cast(graph, weigh(graph, wide, parameter, row), x.width)


def xielu(graph: Graph, x: Value, name: str) -> Value:
    """transformers' xIELU in plain torch, with its two trained numbers."""
    positive = weigh(graph, x, f"{name}.alpha_p", 1)
    positive = graph.add(multiply(graph, positive, x), scale(graph, x))
    bent = graph.op((x,), x.num_bytes, saves=(x,), backward_temporary=x.num_bytes, width=x.width)
    bent = activation(graph, bent, "tanh")  # expm1 keeps its output, too
    bent = graph.add(bent, x)
    negative = graph.add(weigh(graph, bent, f"{name}.alpha_n", 1), scale(graph, x))
    del bent
    return graph.op((positive, negative), x.num_bytes, saves_bytes=x.size, width=x.width)


def layer_norm(graph: Graph, x: Value, parameter: str, row: int, *, bias: bool = True) -> Value:
    """F.layer_norm: one operation, which keeps its input, and mean and deviation of each row."""
    name = parameter.removesuffix(".weight")
    names = (parameter, f"{name}.bias")[: 1 + bias] if parameter else ()
    num_rows = x.size // row
    return graph.op(
        (x,),
        x.num_bytes,
        saves=(x,),
        saves_bytes=2 * num_rows * WIDE,
        parameters=[(each, row * graph.width) for each in names if each in graph.trained],
        gathers=names,
        width=x.width,
    )

"""Registration of ops with PyTorch: their schemas, kernels, references and gradients.

The definitions use plain ``torch.library``: the wrappers of ``torch.library.custom_op`` cost some microseconds more per
call, which matters for small batches. The dispatcher itself costs time, too, as it boxes every argument for a kernel in
Python: calls that only the kernel has to see (:func:`nobody_watches`) bypass it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cpc_ext._native import KERNEL_DEVICES, native

__all__ = [
    "autocast_dtype",
    "differentiable_once",
    "drawn_by",
    "in_forward_mode",
    "is_plain",
    "may_need_gradients",
    "may_take_kernels",
    "nobody_watches",
    "refuse_forward_mode",
    "register",
    "tf32_allowed",
    "values_at_hand",
    "with_workspace",
    "without_autocast",
]

_library = torch.library.Library("cpc_ext", "DEF")

_NO_FORWARD_MODE = "the ops of cpc_ext have no forward-mode derivatives"


_Arguments = TypeVar("_Arguments", bound="tuple[Any, ...]")
_Result = TypeVar("_Result", bound="Tensor | tuple[Tensor, ...]")


def register(
    name: str,
    arguments: type[_Arguments],
    result: type[_Result],
    *,
    reference: Callable[[_Arguments], _Result],
    kernel: Callable[[_Arguments], _Result],
    fake: Callable[[_Arguments], _Result],
    direct: Callable[[_Arguments], Any] | None = None,
    setup_context: Callable[[Any, _Arguments, _Result], None] | None = None,
    backward: Callable[..., dict[str, Tensor | None]] | None = None,
    once: bool = False,
) -> Callable[..., _Result]:
    """Define the op ``cpc_ext::NAME(...)`` and return a function of its flat arguments that calls it.

    The function also takes the same arguments as a NamedTuple, ``whole``, which saves constructing one.

    Args:
        name: name of the op.
        arguments: NamedTuple type of the op's arguments, whose field types give its schema. A field that is a
            NamedTuple itself stands for its own fields.
        result: Tensor, or a NamedTuple type of tensors; through the dispatcher, callers get a plain tuple. Results
            alias no argument.
        reference: plain PyTorch; runs on devices without a kernel.
        kernel: runs on the devices that this build has kernels for. No result is a view of another tensor.
        fake: returns empty results, for tracing.
        direct: replaces the kernel in calls that bypass the dispatcher; may return None in place of results that are
            not needed. Default: the kernel.
        setup_context: ``setup_context(ctx, arguments, result)``, as for ``torch.library.register_autograd``.
        backward: ``backward(ctx, saved, *gradients)`` returns gradients by the arguments' names, where ``saved`` is
            ``ctx.saved_tensors``; arguments that it does not name get none. Unless ``once``, it must consist of
            differentiable operations when a graph of the gradients is requested (``create_graph``).
        once: the gradients cannot be differentiated; see :func:`differentiable_once`.
    """
    kinds = dict(_leaves(arguments))
    _library.define(f"{name}{_schema(kinds, result)}", tags=(torch.Tag.pt2_compliant_tag,))
    typed = _typed(arguments)

    def of_values(function: Callable[[_Arguments], _Result]) -> Callable[..., _Result]:
        return lambda *values: function(typed(values))

    _library.impl(name, of_values(reference), "CompositeExplicitAutograd")
    for device in KERNEL_DEVICES:
        _library.impl(name, of_values(kernel), device.upper())
    torch.library.register_fake(f"cpc_ext::{name}", of_values(fake), lib=_library)
    op: Callable[..., _Result] = getattr(torch.ops.cpc_ext, name).default
    straight = kernel if direct is None else direct
    if backward is None or setup_context is None:
        dispatched, differentiated = op, None
    else:
        dispatched, differentiated = _with_gradient(
            name, op, straight, list(kinds), typed, result, setup_context, backward, once=once
        )
    places = _places_of_tensors(kinds)
    keys_of = torch._C._dispatch_keys

    def call(*values: Any, whole: _Arguments | None = None) -> Any:
        if torch.compiler.is_compiling() or not nobody_watches():
            return dispatched(*values)
        requires_grad = False
        for at in places:
            tensor = values[at]
            if tensor is not None:
                if type(tensor) not in _PLAIN_TYPES or keys_of(tensor).raw_repr() not in _PLAIN_KEYS:
                    return dispatched(*values)
                requires_grad = requires_grad or tensor.requires_grad
        if requires_grad and torch.is_grad_enabled():
            if differentiated is None or torch._C._dispatch_tls_is_dispatch_key_excluded(_Key.AutogradCPU):
                return dispatched(*values)
            return differentiated(*values, None)
        return straight(typed(values) if whole is None else whole)

    return call


def _with_gradient(
    name: str,
    op: Any,
    straight: Callable[[Any], Any],
    arguments: Sequence[str],
    typed: Callable[[tuple[Any, ...]], Any],
    result: type,
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., dict[str, Tensor | None]],
    *,
    once: bool,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register the gradient of an op, for :func:`register`.

    typed: converts the op's flat arguments to their NamedTuple.

    Returns two functions with a gradient. The first calls the op through the dispatcher; the second bypasses it and
    calls ``straight``, and takes None as an additional last argument.

    This does what ``torch.library.register_autograd`` does, except that the transforms of ``torch.func`` accept the
    first function, and that defaults of arguments are not looked up, which takes longer than a small batch's kernel.
    """

    def in_order(ctx: Any, saved: tuple[Any, ...], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        by_name = backward(ctx, saved, *gradients)
        return (*map(by_name.get, arguments), None)

    # PyTorch gives results as a plain tuple.
    named: Callable[[Any], Any] = (lambda x: x) if result is Tensor else functools.partial(tuple.__new__, result)
    refusing = differentiable_once(name)(in_order)

    def below(keys: torch._C.DispatchKeySet, values: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *values)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *values, keys = arguments  # Last, so that ctx.needs_input_grad begins with the op's own arguments.
            whole = typed(tuple(values))
            if keys is None:
                with torch._C._AutoDispatchBelowAutograd():  # Safe because no result is a view.
                    output = straight(whole)
            else:
                output = named(below(keys, values))
            setup_context(ctx, whole, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            return refusing(ctx, *gradients) if once else in_order(ctx, ctx.saved_tensors, *gradients)

    class Transformed(Differentiated):
        """The form that ``torch.func`` accepts. PyTorch looks up its signature at each call, which takes some time."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return op(*arguments[:-1])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, typed(inputs[:-1]), named(output))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            raise NotImplementedError(_NO_FORWARD_MODE)

    run: Callable[..., Any] = Differentiated.apply
    transformed: Callable[..., Any] = Transformed.apply

    def differentiated(keys: torch._C.DispatchKeySet, *values: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*values):
            return run(*values, keys)
        return below(keys, values)

    _library.impl(name, differentiated, "Autograd", with_keyset=True)

    def call(*values: Any) -> Any:
        # Transforms act on autograd functions, not on dispatched ops; functionalization, which only traces, on ops.
        if _transforming() and torch._C._functorch.peek_interpreter_stack().key() != _FUNCTIONALIZE:
            return transformed(*values, None)
        return op(*values)

    # The second is what Function.apply calls after it has looked for transforms.
    return call, super(torch.autograd.Function, Differentiated).apply


_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def _raw(*keys: torch._C.DispatchKey) -> int:
    """Return a set of dispatch keys as a number."""
    return functools.reduce(torch._C.DispatchKeySet.add, keys[1:], torch._C.DispatchKeySet(keys[0])).raw_repr()


_Key = torch._C.DispatchKey
# Dispatch keys of dense tensors on devices with kernels whose memory holds their values as they are; tensors made in
# inference mode have fewer keys.
_PLAIN_KEYS = frozenset(
    _raw(*(getattr(_Key, f"{kind}{device.upper()}") for kind in ("", "Autocast")), *autograd)
    for device in KERNEL_DEVICES
    for autograd in ((_Key.ADInplaceOrView, getattr(_Key, f"Autograd{device.upper()}")), ())
)
# Dispatch keys that a thread adds to those of the tensors when no mode, transform or tracer is active.
_NO_MODE = frozenset({_raw(_Key.BackendSelect, _Key.ADInplaceOrView), _raw(_Key.BackendSelect)})
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def nobody_watches() -> bool:
    """Return whether no mode, transform, tracer or profiler is active that would have to see a call.

    Modes are those of ``torch.overrides`` and ``torch.utils._python_dispatch``. Where none is active, a call may bypass
    the dispatcher if its tensors are on a device with kernels, of no subclass, and hold their values in memory.
    """
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _NO_MODE
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._autograd._profiler_enabled()
    )


def _transforming() -> bool:
    """Return whether a transform of ``torch.func`` is active."""
    return torch._C._functorch.maybe_current_level() is not None and not torch.compiler.is_compiling()


def may_need_gradients(*tensors: Tensor | None) -> bool:
    """Return whether a gradient in one of the tensors may be requested.

    ``torch.func.vmap`` hides whether a transform outside of it requests one, so under transforms every tensor counts.
    """
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and (tensor.requires_grad or _transforming()) for tensor in tensors)


def _leaves(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield names and types of a NamedTuple's fields, with nested NamedTuples replaced by their fields."""
    for name, field in get_type_hints(kind).items():
        yield from get_type_hints(field).items() if hasattr(field, "_fields") else [(name, field)]


def _places_of_tensors(kinds: dict[str, Any]) -> tuple[int, ...]:
    """Return the positions of the tensors among an op's flat arguments, whose types ``kinds`` gives by name."""
    return tuple(at for at, kind in enumerate(kinds.values()) if kind is Tensor or Tensor in get_args(kind))


def _schema(kinds: dict[str, Any], result: type) -> str:
    def prototype() -> None: ...

    returned: Any = Tensor if result is Tensor else tuple[(Tensor,) * len(get_type_hints(result))]  # type: ignore[misc]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in kinds.items()
    ]
    vars(prototype)["__signature__"] = inspect.Signature(parameters, return_annotation=returned)
    return torch.library.infer_schema(prototype, mutates_args=())


def _typed(kind: type[_Arguments]) -> Callable[[tuple[Any, ...]], _Arguments]:
    """Return a function that converts an op's flat arguments to their NamedTuple."""
    parts: list[tuple[slice, Any]] = []
    end = 0
    for field in get_type_hints(kind).values():
        size = len(field._fields) if hasattr(field, "_fields") else 1
        if hasattr(field, "_fields"):
            parts.insert(0, (slice(end, end + size), field))  # In reverse, so that earlier positions stay valid.
        end += size
    new: Callable[[Any, Iterable[Any]], _Arguments] = tuple.__new__  # Without the checks of _make.
    if not parts:
        return lambda values: new(kind, values)

    def typed(values: tuple[Any, ...]) -> _Arguments:
        nested = list(values)
        for at, part in parts:
            nested[at] = (new(part, nested[at]),)
        return new(kind, nested)

    return typed


def differentiable_once(
    name: str,
) -> Callable[[Callable[..., tuple[Tensor | None, ...]]], Callable[..., tuple[Tensor | None, ...]]]:
    """Return a decorator of a backward function: differentiating its gradients raises a RuntimeError that names the op.

    PyTorch's own ``once_differentiable`` raises only where the incoming gradient requires one, and only where the whole
    graph is traversed; otherwise the gradients count as constants, and second derivatives come out as zeros or lack a
    part.

    The function is ``backward(ctx, saved, *gradients)``, where ``saved`` is ``ctx.saved_tensors``. These must include
    arguments or results of the op that require a gradient: through them autograd reaches the node that raises.
    """

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # Only once: activation checkpointing requires it.
            if not torch.is_grad_enabled():  # No graph of the gradients is requested (create_graph).
                return backward(ctx, saved, *gradients)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            sources = [tensor for tensor in (*gradients, *saved) if tensor is not None and tensor.requires_grad]
            refuse: Callable[..., Tensor] = _Refusal.apply
            return tuple(result if result is None else refuse(name, result, *sources) for result in results)

        return wrapper

    return decorate


class _Refusal(torch.autograd.Function):
    """Identity of a gradient whose own backward raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} has no second derivatives: its gradient cannot be differentiated. Compute what needs them in "
            "plain PyTorch, or detach the gradient if it is to count as a constant"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype for a device; None where autocast is off, or where the device has none (meta)."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast is off for a device."""
    if not _has_autocast(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _has_autocast(kind: str) -> bool:
    # No query for the usual two: it takes time, and torch.compile cannot trace it in PyTorch 2.11.
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


# Singletons of PyTorch; looking them up each time costs some microseconds.
_FP32_PRECISIONS: dict[str, Any] = {
    "convolution": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    "product": torch.backends.cuda.matmul,
}


def tf32_allowed(tensor: Tensor, work: str) -> bool:
    """Return whether kernels may round float32 to TF32 on a tensor's device, in a "convolution" or matrix "product".

    ``torch.backends.cudnn.conv.fp32_precision`` and ``torch.backends.cuda.matmul.fp32_precision`` decide. They also
    reflect PyTorch's older switches (``allow_tf32``, ``torch.set_float32_matmul_precision``) and the general one
    (``torch.backends.fp32_precision``). The CPU's kernels never round; CUDA kernels emulated on the CPU do.
    """
    return (tensor.is_cuda or hasattr(native, "emulate_cuda")) and _FP32_PRECISIONS[work].fp32_precision == "tf32"


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword argument that makes a random function of PyTorch draw from a generator; none for None.

    ``generator=None`` would select an overload that does not take sizes which torch.compile leaves symbolic.
    """
    return {} if generator is None else {"generator": generator}


def values_at_hand(tensor: Tensor) -> bool:
    """Return whether a tensor's values may be read: on a GPU that would stall the stream, in a trace break it."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        # FakeTensorMode, make_fx and similar modes.
        and not torch._C._len_torch_dispatch_stack()
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether neither a tracer nor a transform is active, on this tensor or on others.

    Only then may a tensor be modified without autograd's knowledge, or an autograd function without support for
    transforms be used.
    """
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
        and torch._C._functorch.maybe_current_level() is None
    )


def with_workspace(kernel: Callable[..., int], tensor: Tensor, *arguments: Any) -> None:
    """Call a kernel; if it returns the size of a workspace, call it again with one on a tensor's device."""
    size = kernel(*arguments, None)
    if size:
        kernel(*arguments, tensor.new_empty(size, dtype=torch.uint8))


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is active, whose tangents the ops would drop."""
    return forward_ad._current_level >= 0


def may_take_kernels() -> bool:
    """Return whether an op of this package may compute a layer that PyTorch has, too.

    Not in forward mode, which the ops refuse, and not during export: an exported program has to run for any size, which
    a choice by the current sizes would restrict, and with PyTorch's layers it can be loaded without this package.
    """
    return not (in_forward_mode() or torch.compiler.is_exporting())


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor carries a tangent."""
    if not in_forward_mode():
        return
    for tensor in inputs:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(_NO_FORWARD_MODE)

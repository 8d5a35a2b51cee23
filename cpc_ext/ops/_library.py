"""Makes PyTorch know an op: its schema, and who computes it on which device.

Plain ``torch.library`` definitions: the wrappers of ``torch.library.custom_op`` cost some microseconds a call more,
which small batches feel. So does the dispatcher itself, which boxes every argument for a kernel in Python: calls that
nobody but the kernel has to see (:func:`nobody_watches`) go to it straight.
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
    """Define ``cpc_ext::NAME(...)`` and return what calls it, a function of the flat arguments.

    It may be given the same as a NamedTuple besides, ``whole``, which saves making one.

    Args:
        name: of the op.
        arguments: a NamedTuple of the op's arguments, whose types give its schema. A field that is a NamedTuple itself
            stands for the fields of that.
        result: Tensor, or a NamedTuple of tensors, which a caller of the op gets as a plain tuple. Results alias no
            argument.
        reference: plain PyTorch; runs on devices without a kernel.
        kernel: runs on the devices that this build has kernels for. No result is a view of another tensor.
        fake: gives empty results, for tracing.
        direct: as the kernel, where a call goes to it straight; results that are not needed may then be None in place
            of an empty tensor. Default: the kernel.
        setup_context: ``setup_context(ctx, arguments, result)``, as of ``torch.library.register_autograd``.
        backward: ``backward(ctx, saved, *gradients)`` gives gradients by the arguments' names, where ``saved`` is
            ``ctx.saved_tensors``; those that it does not name get none. What it gives is differentiated in turn where a
            graph of it is asked for, so it must be made of differentiable operations then.
        once: what backward gives cannot be differentiated: see :func:`differentiable_once`.
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
    """The part of :func:`register` for autograd. typed: what makes the op's flat arguments a NamedTuple again.

    Returns what calls the op through the dispatcher, and what calls it straight, ``straight``, where a gradient may be
    asked for; that takes one argument more, None.

    The same as ``torch.library.register_autograd``, but that ``torch.func``'s transforms take the function that this
    gives, and that nobody looks up the defaults of arguments, which takes longer than a small batch's kernel.
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
            *values, keys = arguments  # The last, so that ctx.needs_input_grad is of the op's own arguments.
            whole = typed(tuple(values))
            if keys is None:
                with torch._C._AutoDispatchBelowAutograd():  # Where no result is another tensor's view.
                    output = straight(whole)
            else:
                output = named(below(keys, values))
            setup_context(ctx, whole, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            return refusing(ctx, *gradients) if once else in_order(ctx, ctx.saved_tensors, *gradients)

    class Transformed(Differentiated):
        """The form that transforms take; PyTorch looks up its signature at each call, which takes some time."""

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
        # Transforms act on functions, not on what the dispatcher calls; that which only traces wants it the other way.
        if _transforming() and torch._C._functorch.peek_interpreter_stack().key() != _FUNCTIONALIZE:
            return transformed(*values, None)
        return op(*values)

    # The method that Function.apply calls when it has looked for transforms.
    return call, super(torch.autograd.Function, Differentiated).apply


_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def _raw(*keys: torch._C.DispatchKey) -> int:
    """A set of dispatch keys as a number."""
    return functools.reduce(torch._C.DispatchKeySet.add, keys[1:], torch._C.DispatchKeySet(keys[0])).raw_repr()


_Key = torch._C.DispatchKey
# The keys of dense tensors on devices that have kernels, whose values are what is in their memory; those of inference
# mode have fewer.
_PLAIN_KEYS = frozenset(
    _raw(*(getattr(_Key, f"{kind}{device.upper()}") for kind in ("", "Autocast")), *autograd)
    for device in KERNEL_DEVICES
    for autograd in ((_Key.ADInplaceOrView, getattr(_Key, f"Autograd{device.upper()}")), ())
)
# What a thread's calls go through besides where no mode, transform or tracer is at work.
_NO_MODE = frozenset({_raw(_Key.BackendSelect, _Key.ADInplaceOrView), _raw(_Key.BackendSelect)})
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def nobody_watches() -> bool:
    """Whether no mode of ``torch.overrides`` or ``torch.utils._python_dispatch``, transform, tracer or profiler is on.

    Then a call on tensors of a device with kernels that are no subclass's, and whose memory holds their values,
    concerns the kernel alone, and may leave the dispatcher out.
    """
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _NO_MODE
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._autograd._profiler_enabled()
    )


def _transforming() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.maybe_current_level() is not None and not torch.compiler.is_compiling()


def may_need_gradients(*tensors: Tensor | None) -> bool:
    """Whether a gradient in one of some tensors may be asked for.

    ``torch.func.vmap`` hides whether one outside of it will be, so that every tensor counts then.
    """
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and (tensor.requires_grad or _transforming()) for tensor in tensors)


def _leaves(kind: type) -> Iterator[tuple[str, Any]]:
    """Names and types of a NamedTuple's fields, those that are NamedTuples replaced by theirs."""
    for name, field in get_type_hints(kind).items():
        yield from get_type_hints(field).items() if hasattr(field, "_fields") else [(name, field)]


def _places_of_tensors(kinds: dict[str, Any]) -> tuple[int, ...]:
    """Where tensors are among an op's flat arguments, of the types ``kinds``."""
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
    """What makes an op's flat arguments a NamedTuple again."""
    parts: list[tuple[slice, Any]] = []
    end = 0
    for field in get_type_hints(kind).values():
        size = len(field._fields) if hasattr(field, "_fields") else 1
        if hasattr(field, "_fields"):
            parts.insert(0, (slice(end, end + size), field))  # The last comes first, so that the others stay in place.
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
    """Decorator of a backward function: differentiating what it gives is a RuntimeError that names the op.

    PyTorch's own ``once_differentiable`` raises only where the incoming gradient requires one, and only where all of
    the graph is gone through; otherwise what backward gives counts as constant, and second derivatives come out as
    zeros or lack a part.

    The function is ``backward(ctx, saved, *gradients)``, where ``saved`` is ``ctx.saved_tensors``. Among them there
    must be arguments or results of the op that require a gradient, through which the refusal is found.
    """

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # Once, as activation checkpointing asks for.
            if not torch.is_grad_enabled():  # Nobody asked for a graph of the gradients (create_graph).
                return backward(ctx, saved, *gradients)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            sources = [tensor for tensor in (*gradients, *saved) if tensor is not None and tensor.requires_grad]
            refuse: Callable[..., Tensor] = _Refusal.apply
            return tuple(result if result is None else refuse(name, result, *sources) for result in results)

        return wrapper

    return decorate


class _Refusal(torch.autograd.Function):
    """A gradient as it is, in whose place in the graph there is an error."""

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
    """What autocast brings tensors of a device to; None where it is off, or where the device has none (meta)."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off for a device."""
    if not _has_autocast(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _has_autocast(kind: str) -> bool:
    # The usual two are not asked about: it takes time, and torch.compile cannot trace it in PyTorch 2.11.
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


# Objects of which PyTorch has one each; looking them up anew costs some microseconds.
_FP32_PRECISIONS: dict[str, Any] = {
    "convolution": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    "product": torch.backends.cuda.matmul,
}


def tf32_allowed(tensor: Tensor, work: str) -> bool:
    """Whether kernels may round float32 to TF32 on a tensor's device, in a "convolution" or matrix "product".

    ``torch.backends.cudnn.conv.fp32_precision`` and ``torch.backends.cuda.matmul.fp32_precision`` decide, in which
    PyTorch also reflects its older switches (``allow_tf32``, ``torch.set_float32_matmul_precision``) and those above
    them (``torch.backends.fp32_precision``). The CPU's kernels never round, emulated ones of CUDA do.
    """
    return (tensor.is_cuda or hasattr(native, "emulate_cuda")) and _FP32_PRECISIONS[work].fp32_precision == "tf32"


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """What tells a function of PyTorch that draws numbers whose these are.

    With a generator that is None it would be an overload that takes no sizes which torch.compile leaves open.
    """
    return {} if generator is None else {"generator": generator}


def values_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at, which would stall a GPU's stream and break what is traced."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        # FakeTensorMode, make_fx and their like.
        and not torch._C._len_torch_dispatch_stack()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether neither a tracer nor a transform is at work, on this tensor or on others.

    Then a tensor's memory may be written to unseen, and functions of autograd that transforms cannot take may be used.
    """
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
        and torch._C._functorch.maybe_current_level() is None
    )


def with_workspace(kernel: Callable[..., int], tensor: Tensor, *arguments: Any) -> None:
    """Call a kernel, whose last argument is its workspace, with one on a tensor's device where it asks for that."""
    size = kernel(*arguments, None)
    if size:
        kernel(*arguments, tensor.new_empty(size, dtype=torch.uint8))


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents, which the ops would drop."""
    return forward_ad._current_level >= 0


def may_take_kernels() -> bool:
    """Whether a layer that PyTorch has, too, may be computed by an op of ours.

    Not in forward mode, which the ops refuse, nor while a program is exported: that is to run for any size, where what
    is faster for the sizes at hand would bound it, and PyTorch's layers need nothing of ours to be loaded.
    """
    return not (in_forward_mode() or torch.compiler.is_exporting())


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent."""
    if not in_forward_mode():
        return
    for tensor in inputs:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(_NO_FORWARD_MODE)

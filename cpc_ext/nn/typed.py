"""PyTorch's module and containers with precise types for type checkers; at run time they are PyTorch's own.

A call of a :class:`Module` has the type of its ``forward``, and a container the type of the layers that it holds, where
PyTorch declares ``Any`` and :class:`torch.nn.Module`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

__all__ = ["Module", "ModuleList", "Sequential"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Generic, ParamSpec, Protocol, TypeVar, overload

    from torch import Tensor

    P = ParamSpec("P")
    Result = TypeVar("Result", covariant=True)
    Layer = TypeVar("Layer", bound=nn.Module, covariant=True)

    class _Runs(Protocol[P, Result]):
        def forward(self, *args: P.args, **kwargs: P.kwargs) -> Result: ...

    class Module(nn.Module):
        # PyTorch declares a writable attribute.
        @property
        def __call__(self: _Runs[P, Result]) -> Callable[P, Result]: ...  # type: ignore[override]

    class ModuleList(nn.ModuleList, Generic[Layer]):
        def __init__(self, modules: Iterable[Layer] = ()) -> None: ...
        def __iter__(self) -> Iterator[Layer]: ...
        @overload
        def __getitem__(self, idx: slice) -> ModuleList[Layer]: ...
        @overload
        def __getitem__(self, idx: int) -> Layer: ...
        def __getitem__(self, idx: int | slice) -> Layer | ModuleList[Layer]: ...

    class Sequential(Module, nn.Sequential, Generic[Layer]):
        def __init__(self, *layers: Layer) -> None: ...
        def __iter__(self) -> Iterator[Layer]: ...
        def forward(self, input: Tensor) -> Tensor: ...
else:
    Module, ModuleList, Sequential = nn.Module, nn.ModuleList, nn.Sequential

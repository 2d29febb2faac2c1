"""Hooks that do not keep their owner alive.

Owns: calls of a method that end where its object is gone.
Does not: know what is hooked.
Threads: any.

Note [Who owns whom]: the model owns its session: hooks on modules hold it. Everything else that calls it does so
through here: hooks on the optimizer, on parameters and in graphs. The garbage collector does not see into graphs, so a
loss that the user keeps, or that a module keeps of itself, would else keep the model and its session for good.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from offload.errors import SessionClosedError

T = TypeVar("T")


def weakly(method: Callable[..., T], *first: Any) -> Callable[..., T]:
    """`method(*first, …)`, a bound method whose object this does not keep alive. SessionClosedError once it is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> T:
        alive = reference()
        if alive is None:
            raise gone()
        return alive(*first, *args, **kwargs)

    return call


def gone() -> SessionClosedError:
    """What is raised for an object that is gone."""
    return SessionClosedError(
        "the session of this graph, parameter or optimizer is gone: it ended with its model, which nothing held any "
        "more, or was closed with give_back=False. Build the model again and call offload.enable."
    )

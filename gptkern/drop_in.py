"""``accelerate`` and ``restore``, without an import of transformers before one of them is called."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

Generation = Literal["auto", "library"]
Rng = Literal["torch", "philox"]


def accelerate(model: Any, *, generation: Generation = "auto", rng: Rng = "torch") -> Any:
    """Put a loaded transformers model on gptkern's ops, in place: attention, norms, MLP, loss, ``generate``.

    Parameters are shared, not copied; their names and the state dict stay. It either completes or leaves
    the model as it was.

    A model whose modules are hooked, replaced or changed, or whose class overrides what generation calls,
    computes what the library computes with it: that part, or the whole of ``generate``, takes the library's
    way and says so once. Whether it is so is looked at whenever a generation begins; a module that is hooked
    or put in while one is under way ends it with a ``RuntimeError``.

    Args:
        model: Of a class in ``gptkern.transformers.SUPPORTED``, or of a subclass.
        generation: ``"auto"`` runs ``generate`` on gptkern's engine where the call is one it takes, and
            on the library's loop, saying so once, where not; ``"library"`` keeps the library's loop.
        rng: How ``generate`` samples. ``"torch"`` draws what the library draws from torch's generator: the
            same tokens as before, by its own processors. ``"philox"`` draws the same distribution with
            gptkern's sampler, faster: a draw depends on one seed a call, taken from torch's generator, on
            the row's number in the batch, and on how many tokens the row has made. The same call after
            the same ``torch.manual_seed`` gives the same tokens; a prompt in another row, others. Greedy
            and beam search take the sampler with either.

    Returns:
        The same model.

    Raises:
        TypeError: A model of another class.
        ValueError: A head dimension, activation, ``generation`` or ``rng`` that is not supported.
        ModuleNotFoundError: transformers is not installed.
    """
    return _swap("accelerate").accelerate(model, generation=generation, rng=rng)


def restore(model: Any) -> Any:
    """Undo ``accelerate``, and free the engine of ``generate``; the same model.

    One that is not accelerated stays as it is.

    Raises:
        TypeError: No transformers model.
        ModuleNotFoundError: transformers is not installed.
    """
    return _swap("restore").restore(model)


def needs_transformers(name: str) -> ModuleNotFoundError:
    """The error that ``name`` raises where transformers is not installed."""
    return ModuleNotFoundError(
        f"{name} needs transformers: pip install 'gptkern[transformers]'", name="transformers"
    )


def _swap(name: str) -> ModuleType:
    try:
        from gptkern.transformers import swap
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise needs_transformers(f"gptkern.{name}") from None
    return swap

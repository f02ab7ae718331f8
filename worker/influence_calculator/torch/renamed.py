"""Old names of constructor arguments, so that code written for pyDVL 0.9 runs and says what to change."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from influence_calculator.torch.user_warnings import warn_user

Arguments = ParamSpec("Arguments")

OLD_NAMES = {
    "hessian_regularization": "regularization",
    "use_block_cg": "solve_simultaneously",
    "pre_conditioner": "preconditioner",
    "rank_estimate": "rank",
}


def accepts_old_names(*old: str) -> Callable[[Callable[Arguments, None]], Callable[Arguments, None]]:
    """Decorates a constructor that these keywords of `OLD_NAMES` may reach too, with a DeprecationWarning."""

    def decorate(constructor: Callable[Arguments, None]) -> Callable[Arguments, None]:
        @wraps(constructor)
        def renaming(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            for name in old:
                if name in kwargs:
                    new = OLD_NAMES[name]
                    if new in kwargs:
                        raise TypeError(
                            f"{name}: expected one of {name} and {new}, got both; give {new} alone"
                        )
                    warn_user(f"{name} is called {new} now", DeprecationWarning)
                    kwargs[new] = kwargs.pop(name)
            constructor(*args, **kwargs)

        return renaming

    return decorate

"""Which training examples made the model behave like this? Influence functions for torch models.

Influences are `z_test · g_train` with factors `z_test = (H + λI)^-1 g_test`, `[T, N]`. Positive: the
training example helps, removing it raises the test loss by about score / N. Neither negated nor divided
by N. In mode perturbation `∇x (z_test · g_train(x))`, `[T, N, F...]`.

Names, arguments and module paths are those of pyDVL 0.10's `pydvl.influence`: replacing that prefix of an
import suffices.
"""

import lazy_loader

# Each name is imported at its first use: what runs on a worker never needs `dask.array`, which takes as long
# to import as a small chunk to compute. The names are in the stub beside this file.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Errors of the maths. All of them are ValueErrors, as pyDVL's named errors are.

CalculatorError
├── UnsupportedModelError     a method cannot treat part of the model
│   ├── TrainingModeError     a module answers differently each time: dropout, batch statistics
│   └── CaptureMismatchError  hooks see another gradient than autograd
├── BlocksError               a block structure, or the λ of its blocks, does not fit the model's parameters
├── UnsupportedLossError      the curvature of the loss by the outputs cannot be had this way
├── UnsupportedInputError     perturbation, and no input that can be moved
├── SingularCurvatureError    nothing to invert: λ is missing
└── NotFiniteError            NaN or infinity where a number is needed
"""


class CalculatorError(ValueError):
    """Base of all errors that the maths raises on purpose."""


class UnsupportedModelError(CalculatorError):
    """The method cannot treat part of the model; the message names it and the cure."""


class TrainingModeError(UnsupportedModelError):
    """A module is in training mode and answers differently from call to call or batch to batch."""


class CaptureMismatchError(UnsupportedModelError):
    """Gradients captured by hooks differ from autograd's; the message names the parameters."""


class BlocksError(CalculatorError):
    """Blocks that overlap or name what is not tracked, or λs of others; begins with the argument's name."""


class UnsupportedLossError(CalculatorError):
    """The loss's second derivative by the outputs is too large to form or does not exist."""


class UnsupportedInputError(CalculatorError):
    """Mode perturbation moves floating-point inputs, and the batch holds none, or targets that may be one."""


class SingularCurvatureError(CalculatorError):
    """The curvature plus λ is not positive somewhere, so that it has no inverse."""


class NotFiniteError(CalculatorError):
    """A value is NaN or infinite; the message names where it came from."""

"""Products of gradients without a curvature: GradDot, and TracIn over several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from influence_calculator.maths.checkpoints import Checkpoint as Checkpoint
from influence_calculator.maths.checkpoints import load_checkpoints
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.tracin import TracIn
from influence_calculator.torch.base import GivenBlocks
from influence_calculator.torch.blockwise import TorchInfluenceByBlock
from influence_calculator.torch.util import BlockMode, LossType


class GradDotInfluence(TorchInfluenceByBlock):
    """Scores `g_test · g_train`: the curvature taken for the identity.

    Cheap, and what other methods are compared with. `fit` computes nothing; it checks on a few examples that
    the model can be differentiated example by example.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        block_structure: the blocks of parameters whose parts `influences_by_block` tells apart.
    """

    def __init__(
        self, model: nn.Module, loss: LossType, block_structure: GivenBlocks = BlockMode.FULL
    ) -> None:
        super().__init__(model, loss, GradDot(block_structure))


class TracInInfluence(TorchInfluenceByBlock):
    """Scores `Σ_c η_c g_c(test) · g_c(train)` over checkpoints c with learning rates η (TracInCP).

    Factors hold a block of columns per checkpoint: `[t, C·P]`; checkpoints are this model's blocks. The
    training data is read once for all of them and differentiated at each.

    Args:
        model: in eval mode; its parameters' values do not matter. To count it give its own state too.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        checkpoints: `Checkpoint(state, learning_rate)`, where the state is a state dict, the path of one or a
            function that returns one. Each is copied to the model's device when this is built.

    Raises:
        ValueError: no checkpoint, or one whose state cannot be had or is not that of this model.
    """

    def __init__(self, model: nn.Module, loss: LossType, checkpoints: Sequence[Checkpoint]) -> None:
        super().__init__(model, loss, TracIn())
        self.checkpoints = load_checkpoints(model, checkpoints)

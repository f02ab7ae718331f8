"""The plan of a job: the grid of the result, its groups, ranges, micro-batches and memory. Pure.

Made once, from the spec and the sizes that the worker which loads first has measured; stored with the
result, and used as it stands by every later attempt, for the numbers depend on it to the last bit.
"""

from influence_job.plan.document import Plan, ResultArray, Sizes
from influence_job.plan.making import make_plan
from influence_job.plan.memory import StageMemory, device_budget

__all__ = ["Plan", "ResultArray", "Sizes", "StageMemory", "device_budget", "make_plan"]

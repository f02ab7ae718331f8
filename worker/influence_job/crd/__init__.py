"""The CustomResourceDefinition of InfluenceJob, made from the pydantic models of spec and status.

`influence crd` prints it, `make manifests` writes the copies that are committed. Pydantic and the standard
library only.
"""

from influence_job.crd.definition import PLURAL, custom_resource_definition

__all__ = ["PLURAL", "custom_resource_definition"]

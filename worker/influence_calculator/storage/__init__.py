"""Arrays on disk and in object stores: zarr and numpy alone, no torch, no Dask."""

from influence_calculator.storage.zarr_array import create_array, require_free

__all__ = ["create_array", "require_free"]

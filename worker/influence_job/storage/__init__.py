"""Where a job's results live: the Zarr store, its ledger, its sinks. Knows no torch and no Dask."""

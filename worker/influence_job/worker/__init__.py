"""What runs inside a Dask worker. One module per stage; `session` holds what a process keeps.

The driver submits `loading.load`, `fitting.fit_range`, `fitting.fit_unit`, `solving.begin`,
`factors.compute_factors`, `scores.compute_regions`, `closing.merge` and `closing.verify`. Each takes a
`WorkerContext` and answers an `Outcome`: ledger rows of what is durable in the store, and at most one
failure, which is a value, so that the driver knows which index failed and keeps the rows of those that did
not.
"""

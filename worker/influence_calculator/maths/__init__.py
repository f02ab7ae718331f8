"""The mathematics of influence functions, on torch alone: no Dask, no Zarr, no jobs.

`objective` says what is differentiated, `method` what a method is; each method has a module of its
own. The calculators and the job both go through `region`, so that a pair of chunks is computed by
the same lines on a laptop, in a Dask graph and in a cluster.
"""

"""Entry points of jobs that run as they are, on data that is installed with them."""

# The controller of dask-kubernetes, for clusters that cannot pull its own image; its chart takes this one's name.
#
#   docker build --file operator/dask-kubernetes.Dockerfile --tag dask-kubernetes-operator .
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm
FROM ${BASE_IMAGE}
# Where pip looks and whom it trusts; arguments, so that they leave no trace in the image.
ARG PIP_CERT PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
COPY constraints.txt /opt/lists/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --constraint /opt/lists/constraints.txt pip \
    && pip install --quiet --constraint /opt/lists/constraints.txt dask-kubernetes && pip check

# The chart sets uid 1000 or the user another: USER stands in for the entry in /etc/passwd that it lacks.
USER 65532:65532
ENV HOME=/tmp USER=dask PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
ENTRYPOINT ["kopf", "run", "-m", "dask_kubernetes.operator.controller"]
CMD ["--liveness=http://0.0.0.0:8080/healthz", "--all-namespaces"]

#!/bin/bash
# images.sh: builds this checkout's images with docker or buildah and pushes them to the test cluster's registry,
# or to IMAGE_REGISTRY (host/path). Images are tagged by what they are made of: unchanged means nothing to do.
# Their names go to $K8S_HOME/images.env, which the tests read (images.<registry>.env with IMAGE_REGISTRY).
source "$(dirname "$0")/settings.sh"
BASE_IMAGE=${BASE_IMAGE:-}   # without one: docker takes the Dockerfiles' own, buildah a Debian from its archive
TARGET=${IMAGE_REGISTRY:-$REGISTRY}
ENVIRONMENT=$K8S_HOME/images${IMAGE_REGISTRY:+.${IMAGE_REGISTRY//[^a-zA-Z0-9.-]/_}}.env

base_image() { # prints the base image's name; makes a Debian with Python where no registry is in reach
  local name=localhost/base:bookworm folder container
  if ! "${BUILDAH[@]}" inspect --type image $name >/dev/null 2>&1; then
    folder=$(mktemp -d)
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base.tar" >&2
    container=$("${BUILDAH[@]}" from scratch)
    "${BUILDAH[@]}" add --quiet "$container" "$folder/base.tar" / >/dev/null
    "${BUILDAH[@]}" commit --quiet --rm "$container" $name >/dev/null
    rm -rf "$folder"
    say "made the base image $name" >&2
  fi
  echo $name
}
# What pip is told on this machine holds in a build, too: its index, and wheels of torch for the CPU.
PIP_ARGUMENTS=()
for variable in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS; do
  case ${!variable:-} in http*) PIP_ARGUMENTS+=(--build-arg "$variable=${!variable}") ;; esac
done
build() { # build NAME:TAG FOLDER
  local base=()
  [ -z "$BASE_IMAGE" ] || base=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
  if [ "$ENGINE" = docker ]; then
    DOCKER_BUILDKIT=1 docker build "${base[@]}" "${PIP_ARGUMENTS[@]}" --tag "$TARGET/$1" "$2"
    return
  fi
  # runc, as crun refuses hybrid cgroups; the host's CA file, as downloads may pass a proxy with a CA of its own;
  # TMPDIR, because buildah keeps pip's cache (RUN --mount=type=cache) below it.
  TMPDIR=$K8S_HOME/buildah/tmp "${BUILDAH[@]}" bud --quiet --isolation oci --runtime /usr/sbin/runc --network host --layers \
    "${base[@]}" "${PIP_ARGUMENTS[@]}" --volume /etc/ssl/certs/ca-certificates.crt:/run/host-ca.crt:ro \
    --build-arg PIP_CERT=/run/host-ca.crt --tag "$TARGET/$1" "$2" >/dev/null
}
is_built() {
  if [ "$ENGINE" = docker ]; then docker image inspect "$TARGET/$1"; else "${BUILDAH[@]}" inspect --type image "$TARGET/$1"; fi >/dev/null 2>&1
}
push() { # push NAME:TAG; only layers that the registry lacks travel
  local secure
  if [ "$ENGINE" = docker ]; then
    docker push --quiet "$TARGET/$1" >/dev/null
  elif [ -n "${IMAGE_REGISTRY:-}" ]; then
    case $TARGET in localhost:* | 127.*) secure=false ;; *) secure=true ;; esac   # as docker does
    "${BUILDAH[@]}" push --quiet --tls-verify=$secure "$TARGET/$1" "docker://$TARGET/$1"
  else
    inside "${BUILDAH[@]}" push --quiet --tls-verify=false --format oci --compression-format zstd --compression-level 1 \
      "$TARGET/$1" "docker://$TARGET/$1"
  fi
}
is_on_node() { # in the test cluster an image is ready when its node has it: no test waits for a pull
  [ -z "${IMAGE_REGISTRY:-}" ] && containers images ls --quiet "name==$TARGET/$1" | grep --quiet .
}
put_on_node() { inside ctr --address "$CONTAINERD_SOCKET" --namespace k8s.io images pull --plain-http "$TARGET/$1" >/dev/null; }

image() { # image VARIABLE NAME FOLDER DOCKERFILE SOURCES...: what must be there in the end
  local variable=$1 name=$2 folder=$3 dockerfile=$4 copy full
  shift 4
  # Tag and image are made of one copy: sources that change meanwhile belong to the next image.
  copy=$(mktemp --directory)
  tar --directory "$folder" --exclude __pycache__ --exclude '*.md' --create "$@" | tar --directory "$copy" --extract
  cp "$CHECKOUT/$dockerfile" "$copy/Dockerfile"
  full=$name:$({ echo "$ENGINE $BASE_IMAGE ${PIP_ARGUMENTS[*]}"
    cd "$copy" && find . -type f -print0 | sort -z | xargs -0 sha256sum; } | sha256sum | head -c 12)
  if ! is_on_node "$full"; then
    is_built "$full" || { build "$full" "$copy"; say "built $full"; }
    push "$full"
    say "pushed $full"
    [ -n "${IMAGE_REGISTRY:-}" ] || { put_on_node "$full"; say "the node has $full"; }
  fi
  echo "$variable=$TARGET/$full" >>"$ENVIRONMENT.new"
  rm -r "$copy"
}

lock
ENGINE=buildah   # docker's daemon cannot push into the test cluster's network namespace
[ -z "${IMAGE_REGISTRY:-}" ] || ! docker info >/dev/null 2>&1 || ENGINE=docker
if [ "$ENGINE" = buildah ]; then
  command -v buildah >/dev/null || fail "expected docker or buildah to build images, found neither: install one"
  mkdir -p "$K8S_HOME/buildah/tmp"
  [ -n "$BASE_IMAGE" ] || BASE_IMAGE=$(base_image)
fi
[ -n "${IMAGE_REGISTRY:-}" ] || [ -S "$CONTAINERD_SOCKET" ] || fail "expected the test cluster to run: make cluster; or set IMAGE_REGISTRY"
: >"$ENVIRONMENT.new"
CODE=(.dockerignore pyproject.toml constraints.txt LICENSE worker operator)
GCS=$(cd "$CHECKOUT" && PYTHONPATH=tests/support "${PYTHON:-python3}" -c 'import gcs; print(gcs.server_binary())')
image GCS_IMAGE fake-gcs-server "$(dirname "$GCS")" tests/cluster/machine/gcs.Dockerfile "$(basename "$GCS")"
image DASK_OPERATOR_IMAGE dask-kubernetes-operator "$CHECKOUT" operator/dask-kubernetes.Dockerfile constraints.txt
image OPERATOR_IMAGE influence-operator "$CHECKOUT" operator/Dockerfile "${CODE[@]}"
image WORKER_IMAGE influence-worker "$CHECKOUT" worker/Dockerfile "${CODE[@]}"
mv "$ENVIRONMENT.new" "$ENVIRONMENT"
say "images ready: $ENVIRONMENT"

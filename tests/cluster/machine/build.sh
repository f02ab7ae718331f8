#!/bin/bash
# build.sh: gets together what the cluster is made of, in $K8S_HOME: packages of Debian, and binaries from Go modules
# (Kubernetes as go.mod pins it, CoreDNS, Helm). What is there in its version is left alone.
# With nothing there, on 2 cores: Kubernetes 6.5 min, CoreDNS 2 min, Helm 2 min.
source "$(dirname "$0")/settings.sh"
KUBERNETES=$(sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' "$MACHINE/go.mod")
COREDNS=v1.14.7   # coredns.yaml names it, too
HELM=v3.22.0
PACKAGES=(etcd-server containerd runc containernetworking-plugins docker-registry buildah mmdebstrap   # the cluster
  iproute2 iptables conntrack socat procps curl openssl gcc libc6-dev)                                  # these scripts

refuse_foreign() { # Debian's containerd and Docker's exclude each other; two kubelets fight over cgroups and rules
  [ "$K8S_ALLOW_FOREIGN" != yes ] || return 0
  local found=() process
  ! dpkg-query --show --showformat '${db:Status-Status}' containerd.io 2>/dev/null | grep --quiet --line-regexp installed ||
    found+=("the package containerd.io (Docker's)")
  ! command -v k3s >/dev/null || found+=("k3s at $(command -v k3s)")
  process=$(command -v kubelet || true)
  [ -z "$process" ] || [ "$process" = "$BIN/kubelet" ] || found+=("a kubelet at $process")
  for process in $(pgrep --exact kubelet || true); do
    # One with a network namespace of its own is out of the way: ours, or a node of kind.
    [ "$(readlink "/proc/$process/ns/net")" != "$(readlink /proc/self/ns/net)" ] || found+=("a running kubelet, pid $process")
  done
  [ ${#found[@]} = 0 ] || fail "this machine has $(IFS=,; echo "${found[*]}"), which a second Kubernetes could disturb." \
    "Set TEST_KUBECONFIG (and IMAGE_REGISTRY) to test on that cluster, or K8S_ALLOW_FOREIGN=yes to install beside it."
}
install_packages() { # only what is missing; nothing is removed or upgraded for it, and no service starts
  local package missing=() policy=/usr/sbin/policy-rc.d
  for package in "${PACKAGES[@]}"; do
    dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep --quiet --line-regexp installed || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "expected Debian's packages ${missing[*]}, found no apt-get: set TEST_KUBECONFIG to use a cluster of yours"
  if [ ! -e $policy ]; then   # Debian asks this script before it starts a package's service
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap "rm -f $policy" EXIT
  fi
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-remove --no-install-recommends "${missing[@]}"
  say "installed ${missing[*]}"
}
need_go() { command -v go >/dev/null || fail "expected Go >= 1.25 to build $1, found none: install it, or set TEST_KUBECONFIG to use a cluster of yours"; }
build_kubernetes() {
  local version=k8s.io/component-base/version client=k8s.io/client-go/pkg/version minor=${KUBERNETES#v1.}
  "$BIN/kubelet" --version 2>/dev/null | grep --quiet --line-regexp "Kubernetes $KUBERNETES" && return 0
  need_go "Kubernetes $KUBERNETES"
  go -C "$MACHINE" install -trimpath -ldflags "-s -w -X $version.gitVersion=$KUBERNETES -X $version.gitMajor=1 \
    -X $version.gitMinor=${minor%%.*} -X $client.gitVersion=$KUBERNETES" tool
  say "built Kubernetes $KUBERNETES"
}
build_tool() { # build_tool NAME VERSION MODULE LINKER_FLAGS: unless it is there in this version
  ! says_version "$1" "$2" || return 0
  need_go "$1 $2"
  go install -trimpath -ldflags "-s -w ${4:-}" "$3@$2"
  says_version "$1" "$2" || fail "expected $BIN/$1 in version $2 from $3, got $(version_of "$1")"
  say "built $1 $2"
}
says_version() { [ "$(version_of "$1")" = "$2" ]; }
version_of() { # version_of NAME: v1.2.3, or nothing
  case $1 in
    coredns) "$BIN/coredns" -version 2>/dev/null | sed --quiet 's/^CoreDNS-/v/p' ;;
    helm) "$BIN/helm" version --template '{{.Version}}' 2>/dev/null || true ;;
  esac
}
make_image() { # make_image NAME:TAG BINARY: an image of one static binary, as an archive for containerd
  local archive=$IMG/${1%:*}.tar container
  [ ! -s "$archive" ] || [ "$2" -nt "$archive" ] || return 0
  container=$("${BUILDAH[@]}" from scratch)
  "${BUILDAH[@]}" add --quiet "$container" "$2" "/${1%:*}" >/dev/null
  "${BUILDAH[@]}" config --entrypoint "[\"/${1%:*}\"]" "$container"
  "${BUILDAH[@]}" commit --quiet --rm "$container" "localhost/$1" >/dev/null
  "${BUILDAH[@]}" push --quiet "localhost/$1" "docker-archive:$archive.new:localhost/$1"
  mv "$archive.new" "$archive"
  say "made the image $1"
}
need_root
lock
refuse_foreign
install_packages
mkdir -p "$BIN" "$IMG"
export CGO_ENABLED=0 GOBIN=$BIN GOTOOLCHAIN=local
build_kubernetes
build_tool coredns $COREDNS github.com/coredns/coredns
build_tool helm $HELM helm.sh/helm/v3/cmd/helm "-X helm.sh/helm/v3/internal/version.version=$HELM"
if [ ! -s "$IMG/pause.tar" ]; then gcc -static -Os -o "$IMG/pause" "$MACHINE/pause.c"; fi
make_image pause:1 "$IMG/pause"
make_image "coredns:${COREDNS#v}" "$BIN/coredns"
say "everything built: $BIN"

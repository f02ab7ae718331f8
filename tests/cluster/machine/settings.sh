# settings.sh: what the test cluster is called and where it lies, and what every script here needs. Sourced.
# The variables that start with K8S_ may be set by the caller; two clusters need two of each.
set -euo pipefail
MACHINE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(cd "$MACHINE/../../.." && pwd)

K8S_HOME=${K8S_HOME:-$HOME/.cache/influence-cluster}   # binaries, images, certificates, state, logs
K8S_NETNS=${K8S_NETNS:-influence-cluster}              # network namespace, and the cgroup of all containers
K8S_API_PORT=${K8S_API_PORT:-6443}                     # where 127.0.0.1 of this machine reaches the API server
K8S_ALLOW_FOREIGN=${K8S_ALLOW_FOREIGN:-}               # "yes": install although another Kubernetes is here

BIN=$K8S_HOME/bin IMG=$K8S_HOME/img PKI=$K8S_HOME/pki ETC=$K8S_HOME/etc RUN=$K8S_HOME/run LOG=$K8S_HOME/log
CONTAINERD_SOCKET=$RUN/containerd.sock
BUILDAH=(buildah --root "$K8S_HOME/buildah/root" --runroot "$K8S_HOME/buildah/run" --storage-driver overlay)
REGISTRY=localhost:5000        # inside the network namespace only
NODE=node1
NODE_IP=10.200.0.10            # on a bridge without ports inside the namespace
POD_CIDR=10.244.0.0/16         # of the cluster
NODE_POD_CIDR=10.244.0.0/24    # of its one node
SERVICE_CIDR=10.96.0.0/16
API_SERVICE_IP=10.96.0.1
DNS_IP=10.96.0.10

BEGIN=$(date +%s%N)
say() { # say WORDS...: with the seconds since this script began
  local tenths=$((($(date +%s%N) - BEGIN) / 100000000))
  printf '%5d.%d s  %s\n' $((tenths / 10)) $((tenths % 10)) "$*"
}
fail() { # fail WORDS...: ends the script
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}
lock() { # one script at a time works on $K8S_HOME; the lock ends with the process
  mkdir -p "$K8S_HOME"
  exec 9>"$K8S_HOME/lock"
  flock --nonblock 9 || { echo "waiting for another script that works on $K8S_HOME" >&2; flock 9; }
}
need_root() { [ "$(id -u)" = 0 ] || fail "expected to run as root (network namespaces, cgroups), got uid $(id -u)"; }
inside() { nsenter --net="/run/netns/$K8S_NETNS" -- "$@"; }
kubectl_inside() { inside "$BIN/kubectl" --kubeconfig="$ETC/admin.kubeconfig" "$@"; }
containers() { ctr --address "$CONTAINERD_SOCKET" --namespace k8s.io "$@"; }
put() { # put FILE: stdin into FILE, which is left untouched when it says the same already
  local new
  new=$(mktemp)
  cat >"$new"
  if cmp --silent "$new" "$1"; then rm "$new"; else mv "$new" "$1"; fi
}
wait_for() { # wait_for WHAT SECONDS COMMAND...: until the command succeeds
  local what=$1 tries=$(($2 * 10))
  shift 2
  while ! "$@" >/dev/null 2>&1; do
    ((tries-- > 0)) || fail "gave up waiting for: $what. Logs: $LOG"
    sleep 0.1
  done
  say "$what"
}

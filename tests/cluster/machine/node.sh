# node.sh: container runtime, image registry, kubelet, kube-proxy, DNS. Sourced by up.sh.

start_runtime() {
  local name
  for name in containerd.toml registry.yaml kubelet.yaml kube-proxy.yaml 10-bridge.conflist; do
    fill_in "$MACHINE/templates/$name" | put "$ETC/$name"
  done
  mkdir -p "$K8S_HOME/cni/net.d" "$K8S_HOME/cni/data"
  put "$K8S_HOME/cni/net.d/10-bridge.conflist" <"$ETC/10-bridge.conflist"
  launch_inside containerd /usr/bin/containerd --config "$ETC/containerd.toml"
  launch_inside registry /usr/bin/docker-registry serve "$ETC/registry.yaml"
  wait_for "containerd answers" 30 ctr --address "$CONTAINERD_SOCKET" version
  import_images
}
fill_in() { # fill_in FILE: with each ${NAME} replaced by that variable of settings.sh
  local text name
  text=$(cat "$1")
  for name in $(grep --only-matching '\${[A-Z0-9_]*}' "$1" | sort --unique | tr -d '${}'); do
    text=${text//"\${$name}"/${!name}}
  done
  echo "$text"
}
import_images() { # the two images that the cluster itself needs; build.sh made them
  local archive
  for archive in "$IMG"/*.tar; do
    [ "$RUN/imported-$(basename "$archive")" -nt "$archive" ] && continue
    containers images import "$archive" >/dev/null
    touch "$RUN/imported-$(basename "$archive")"
    say "imported $(basename "$archive" .tar)"
  done
}
make_cgroup() { # all containers live below a cgroup of this cluster's own; the kubelet wants it to exist
  local controller
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then   # version 2
    for controller in cpu cpuset memory pids; do echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control; done
    mkdir -p "/sys/fs/cgroup/$K8S_NETNS"
  else
    for controller in blkio cpu cpuacct cpuset devices freezer hugetlb memory pids systemd; do
      [ ! -d "/sys/fs/cgroup/$controller" ] || mkdir -p "/sys/fs/cgroup/$controller/$K8S_NETNS"
    done
    [ ! -d /sys/fs/cgroup/cpuset ] || for controller in cpus mems; do
      cat "/sys/fs/cgroup/cpuset/cpuset.$controller" >"/sys/fs/cgroup/cpuset/$K8S_NETNS/cpuset.$controller"
    done
  fi
}
KUBELET_SYSCTLS="kernel.panic kernel.panic_on_oops vm.overcommit_memory kernel.keys.root_maxkeys kernel.keys.root_maxbytes"
restore_sysctls() { # the kubelet sets these for the whole machine when it starts
  [ -s "$RUN/sysctl.before" ] || return 0
  xargs --arg-file "$RUN/sysctl.before" sysctl --quiet --write
  rm "$RUN/sysctl.before"
}
start_node() {
  make_cgroup
  : >>"$ETC/resolv.conf"   # empty, for pods with dnsPolicy Default: nothing of this machine's resolver
  if ! pid_of kubelet >/dev/null && [ ! -s "$RUN/sysctl.before" ]; then
    sysctl $KUBELET_SYSCTLS | tr -d ' ' >"$RUN/sysctl.before"
  fi
  trap restore_sysctls EXIT
  start_kubelet
  launch_inside kube-proxy "$BIN/kube-proxy" --config="$ETC/kube-proxy.yaml" --v=2
  wait_for "node is Ready" 120 node_is_ready
  if ! kubectl_inside diff --filename "$MACHINE/coredns.yaml" >/dev/null 2>&1; then
    kubectl_inside apply --server-side --force-conflicts --filename "$MACHINE/coredns.yaml" >>"$LOG/coredns-apply.log"
  fi
  wait_for "DNS is available" 120 kubectl_inside --namespace kube-system wait --for=condition=Available --timeout=1s deployment/coredns
}
start_kubelet() {
  launch_inside kubelet "$BIN/kubelet" --config="$ETC/kubelet.yaml" --kubeconfig="$ETC/kubelet.kubeconfig" \
    --root-dir="$K8S_HOME/kubelet" --cert-dir="$PKI" --hostname-override=$NODE --node-ip=$NODE_IP --v=2
}
node_is_ready() { # a kubelet that came while containerd still initialized its CRI service has ended: another is started
  pid_of kubelet >/dev/null || start_kubelet
  kubelet_is_ready
}
kubelet_is_ready() { # the kubelet itself is asked, too: for some seconds after its end the node still counts as ready
  inside curl --silent --fail http://127.0.0.1:10248/healthz && kubectl_inside get node $NODE | grep --quiet --word-regexp Ready
}

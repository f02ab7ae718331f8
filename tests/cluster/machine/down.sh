#!/bin/bash
# down.sh [--purge]: stops what up.sh started and removes what its pods left. With --purge its state goes, too:
# objects, images of the registry, logs. Binaries, base images and pip's cache stay for the next time.
source "$(dirname "$0")/settings.sh"
source "$MACHINE/processes.sh"
source "$MACHINE/network.sh"
need_root
lock

end_containers() { # by containerd, which knows its own
  local task
  pid_of containerd >/dev/null || return 0
  for task in $(containers tasks ls --quiet); do containers tasks kill --signal KILL "$task" >/dev/null 2>&1 || true; done
  for _ in $(seq 50); do containers tasks ls | grep --quiet --word-regexp RUNNING || break; sleep 0.1; done
  for task in $(containers tasks ls --quiet); do containers tasks rm --force "$task" >/dev/null 2>&1 || true; done
  for task in $(containers containers ls --quiet); do containers containers rm "$task" >/dev/null 2>&1 || true; done
}
unmount_all() { # volumes, root file systems and network namespaces of pods: all lie in these folders
  local folder
  for folder in kubelet containerd run; do
    awk -v top="$K8S_HOME/$folder" '$5 == top || index($5, top "/") == 1 {print $5}' /proc/self/mountinfo
  done | sort --reverse | xargs --no-run-if-empty umount --lazy
}
remove_cgroup() {
  local top
  for top in /sys/fs/cgroup/"$K8S_NETNS" /sys/fs/cgroup/*/"$K8S_NETNS"; do
    [ ! -d "$top" ] || find "$top" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
}
# kubelet first, so that nothing starts again; with --purge nobody needs to end gently
[ "${1:-}" != --purge ] || signal KILL kubelet kube-proxy kube-scheduler kube-controller-manager kube-apiserver etcd
stop 3 kubelet kube-proxy kube-scheduler kube-controller-manager
end_containers
stop 3 containerd registry api-inside api-outside kube-apiserver
stop 5 etcd
say "processes and containers ended"
unmount_all
if is_own_netns; then ip netns del "$K8S_NETNS"; fi
rm -f "$RUN/netns"
rm -rf "$K8S_HOME/cni/data"   # addresses of pods that are gone
remove_cgroup
if [ "${1:-}" = --purge ]; then
  rm -rf "$K8S_HOME"/{etcd,kubelet,containerd,cni,etc,log,podlogs,registry,run}
fi
say "cluster down"

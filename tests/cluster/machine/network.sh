# network.sh: the network namespace in which the whole cluster lives. Sourced by up.sh.
# It has no way out: nothing on this machine notices the cluster, and nothing in it needs the internet.

netns_identity() { stat --format %i "/run/netns/$K8S_NETNS" 2>/dev/null; }
is_own_netns() { # a namespace of that name that somebody else made is not ours to use or remove
  [ -s "$RUN/netns" ] && [ "$(cat "$RUN/netns")" = "$(netns_identity)" ]
}
make_network() {
  if [ -e "/run/netns/$K8S_NETNS" ]; then
    is_own_netns || fail "/run/netns/$K8S_NETNS is there and was not made by this recipe: set K8S_NETNS to another name"
    return 0
  fi
  ip netns add "$K8S_NETNS"
  netns_identity >"$RUN/netns"
  ip -n "$K8S_NETNS" link set lo up
  ip -n "$K8S_NETNS" link add node0 type bridge   # some kernels have no dummy driver; a bridge without ports serves
  ip -n "$K8S_NETNS" addr add "$NODE_IP/24" dev node0
  ip -n "$K8S_NETNS" link set node0 up
  # The node's own calls to a service need a route before their address is translated.
  ip -n "$K8S_NETNS" route add "$SERVICE_CIDR" dev node0
  inside sysctl --quiet --write net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1
}

#!/bin/bash
# up.sh: brings up a one-node Kubernetes cluster in a network namespace of its own; build.sh has made its binaries.
# What runs is left alone, what is missing is started, what has other arguments than before is started again.
# Afterwards: KUBECONFIG=$K8S_HOME/kubeconfig
source "$(dirname "$0")/settings.sh"
source "$MACHINE/processes.sh"
source "$MACHINE/network.sh"
source "$MACHINE/certificates.sh"
source "$MACHINE/control-plane.sh"
source "$MACHINE/node.sh"
need_root
lock
mkdir -p "$PKI" "$ETC" "$RUN" "$LOG"
check_port
make_network
make_certificates
say "network namespace $K8S_NETNS, certificates"
start_api_server
start_controllers
start_runtime
start_node
say "cluster up: KUBECONFIG=$K8S_HOME/kubeconfig"

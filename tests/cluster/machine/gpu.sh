#!/bin/bash
# gpu.sh N: the node advertises N of nvidia.com/gpu, which pods can then request; there is no device behind it.
# An extended resource of the Node object: survives restarts of the kubelet, not a new object.
source "$(dirname "$0")/settings.sh"
kubectl_inside patch node $NODE --subresource=status --type=json \
  --patch "[{\"op\": \"add\", \"path\": \"/status/capacity/nvidia.com~1gpu\", \"value\": \"$1\"}]"

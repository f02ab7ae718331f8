#!/bin/bash
# inside.sh COMMAND...: runs a command in the cluster's network namespace, where pods and services have addresses.
source "$(dirname "$0")/settings.sh"
inside "$@"

# control-plane.sh: etcd, API server, controller manager, scheduler. Sourced by up.sh.

start_api_server() {
  local etcd=http://127.0.0.1:2379 peer=http://127.0.0.1:2380 before
  before=$(pid_of kube-apiserver || true)
  launch_inside etcd /usr/bin/etcd --name=$NODE --data-dir="$K8S_HOME/etcd" --snapshot-count=10000 \
    --listen-client-urls=$etcd --advertise-client-urls=$etcd \
    --listen-peer-urls=$peer --initial-advertise-peer-urls=$peer --initial-cluster=$NODE=$peer
  # The audit log has each request's user, verb, object and the decision; audit.yaml says whose.
  launch_inside kube-apiserver "$BIN/kube-apiserver" --etcd-servers=$etcd \
    --advertise-address=$NODE_IP --bind-address=0.0.0.0 --secure-port=6443 --service-cluster-ip-range=$SERVICE_CIDR \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement \
    --audit-policy-file="$MACHINE/audit.yaml" --audit-log-path="$LOG/audit.log" --audit-log-maxsize=500 --audit-log-maxbackup=3 \
    --client-ca-file="$PKI/ca.crt" --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-client-certificate="$PKI/apiserver-kubelet-client.crt" \
    --kubelet-client-key="$PKI/apiserver-kubelet-client.key" --kubelet-preferred-address-types=InternalIP,Hostname \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-key-file="$PKI/service-accounts.pub" --service-account-signing-key-file="$PKI/service-accounts.key" \
    --requestheader-client-ca-file="$PKI/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --proxy-client-cert-file="$PKI/front-proxy-client.crt" \
    --proxy-client-key-file="$PKI/front-proxy-client.key" --allow-privileged=true --profiling=false
  forward_api
  wait_for "API server is ready" 120 inside curl --silent --fail --cacert "$PKI/ca.crt" --cert "$PKI/admin.crt" \
    --key "$PKI/admin.key" https://127.0.0.1:6443/readyz
  # Who lost the one before looks for it again after up to two minutes; who contends for a lease would have ended.
  [ "$(pid_of kube-apiserver)" = "$before" ] || stop 3 kube-proxy kube-scheduler kube-controller-manager
}
check_port() {
  if ! pid_of api-outside >/dev/null && ss -Hltn "sport = :$K8S_API_PORT" | grep --quiet .; then
    fail "port $K8S_API_PORT of this machine is taken: set K8S_API_PORT to a free one"
  fi
}
forward_api() { # the one way in: 127.0.0.1:$K8S_API_PORT here -> unix socket -> 127.0.0.1:6443 in the namespace
  launch_inside api-inside /usr/bin/socat "UNIX-LISTEN:$RUN/api.sock,fork,unlink-early,mode=600" TCP:127.0.0.1:6443
  launch api-outside /usr/bin/socat "TCP-LISTEN:$K8S_API_PORT,bind=127.0.0.1,fork,reuseaddr" "UNIX-CONNECT:$RUN/api.sock"
}
start_controllers() {
  # A node counts as lost after 16 s, four of the kubelet's reports (kubelet.yaml): tests do not wait for 50 s.
  launch_inside kube-controller-manager "$BIN/kube-controller-manager" --kubeconfig="$ETC/controller-manager.kubeconfig" \
    --authentication-kubeconfig="$ETC/controller-manager.kubeconfig" --authorization-kubeconfig="$ETC/controller-manager.kubeconfig" \
    --node-monitor-grace-period=16s --node-monitor-period=2s \
    --bind-address=127.0.0.1 --leader-elect=false --use-service-account-credentials=true \
    --service-account-private-key-file="$PKI/service-accounts.key" --root-ca-file="$PKI/ca.crt" --client-ca-file="$PKI/ca.crt" \
    --requestheader-client-ca-file="$PKI/front-proxy-ca.crt" --cluster-signing-cert-file="$PKI/ca.crt" \
    --cluster-signing-key-file="$PKI/ca.key" --allocate-node-cidrs=true --cluster-cidr=$POD_CIDR \
    --service-cluster-ip-range=$SERVICE_CIDR --kube-api-qps=500 --kube-api-burst=1000 --profiling=false
  launch_inside kube-scheduler "$BIN/kube-scheduler" --kubeconfig="$ETC/scheduler.kubeconfig" \
    --authentication-kubeconfig="$ETC/scheduler.kubeconfig" --authorization-kubeconfig="$ETC/scheduler.kubeconfig" \
    --bind-address=127.0.0.1 --leader-elect=false --profiling=false
  wait_for "controller manager works" 60 kubectl_inside --namespace default get serviceaccount default
}

# certificates.sh: who is who in the cluster. Sourced by up.sh; what exists is kept.

make_authority() { # make_authority FILE NAME
  [ -s "$PKI/$1.crt" ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -keyout "$PKI/$1.key" -out "$PKI/$1.crt" -subj "/CN=$2" \
    -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature 2>/dev/null
}
make_certificate() { # make_certificate FILE AUTHORITY SUBJECT clientAuth|serverAuth [NAMES]
  [ ! -s "$PKI/$1.crt" ] || return 0
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
    -keyout "$PKI/$1.key" -out "$PKI/$1.csr" -subj "$3" 2>/dev/null
  {
    echo "basicConstraints=CA:FALSE"
    echo "keyUsage=critical,digitalSignature,keyEncipherment"
    echo "extendedKeyUsage=$4"
    [ -z "${5:-}" ] || echo "subjectAltName=$5"
  } >"$PKI/$1.extensions"
  openssl x509 -req -in "$PKI/$1.csr" -CA "$PKI/$2.crt" -CAkey "$PKI/$2.key" -CAcreateserial -days 3650 \
    -extfile "$PKI/$1.extensions" -out "$PKI/$1.crt" 2>/dev/null
}
write_kubeconfig() { # write_kubeconfig FILE CERTIFICATE SERVER
  put "$1" <<Y
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "$3", certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")}}]
users: [{name: user, user: {client-certificate-data: $(base64 -w0 "$PKI/$2.crt"), client-key-data: $(base64 -w0 "$PKI/$2.key")}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
Y
  chmod 600 "$1"
}
make_certificates() {
  local names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
  make_authority ca kubernetes-ca
  make_authority front-proxy-ca front-proxy-ca
  make_certificate apiserver ca /CN=kube-apiserver serverAuth "$names,DNS:localhost,DNS:$NODE,IP:$API_SERVICE_IP,IP:$NODE_IP,IP:127.0.0.1"
  make_certificate apiserver-kubelet-client ca /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
  make_certificate front-proxy-client front-proxy-ca /CN=front-proxy-client clientAuth
  make_certificate admin ca /O=system:masters/CN=kubernetes-admin clientAuth
  make_certificate controller-manager ca /CN=system:kube-controller-manager clientAuth
  make_certificate scheduler ca /CN=system:kube-scheduler clientAuth
  make_certificate proxy ca /CN=system:kube-proxy clientAuth
  make_certificate kubelet ca "/O=system:nodes/CN=system:node:$NODE" clientAuth
  make_certificate kubelet-server ca "/CN=$NODE" serverAuth "DNS:$NODE,IP:$NODE_IP,IP:127.0.0.1"
  if [ ! -s "$PKI/service-accounts.key" ]; then
    openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/service-accounts.key"
    openssl ec -in "$PKI/service-accounts.key" -pubout -out "$PKI/service-accounts.pub" 2>/dev/null
  fi
  local component
  for component in controller-manager scheduler proxy kubelet admin; do
    write_kubeconfig "$ETC/$component.kubeconfig" $component "https://$NODE_IP:6443"
  done
  write_kubeconfig "$K8S_HOME/kubeconfig" admin "https://127.0.0.1:$K8S_API_PORT"
}

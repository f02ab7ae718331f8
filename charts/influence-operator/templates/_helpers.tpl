{{/* The name of objects: the release's, which is the chart's as a rule. */}}
{{- define "influence-operator.name" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What picks the operator's pods. A Deployment's selector cannot change: neither can this. */}}
{{- define "influence-operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "influence-operator.labels" -}}
{{ include "influence-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "influence-operator.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "influence-operator.name" .) }}
{{- else }}
{{- required "serviceAccount.name: expected the name of a ServiceAccount, since serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "influence-operator.subjects" -}}
- kind: ServiceAccount
  name: {{ include "influence-operator.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{/*
Egress to everything but TCP 8786, which needs no knowledge of the API server's address. A network plugin that knows no
`endPort` takes a range for its first port: what must be reached is named one by one, too.
*/}}
{{- define "influence-operator.egress" -}}
- ports:
    - {protocol: TCP, port: 1, endPort: 8785}
    - {protocol: TCP, port: 8787, endPort: 65535}
    - {protocol: UDP, port: 1, endPort: 65535}
    {{- range .Values.networkPolicy.singlePorts }}
    {{- if eq (int .) 8786 }}
    {{- fail "networkPolicy.singlePorts: expected ports of DNS and of the API server, got 8786, which egress is kept from: leave it out" }}
    {{- end }}
    - {protocol: TCP, port: {{ int . }}}
    - {protocol: UDP, port: {{ int . }}}
    {{- end }}
{{- end }}

{{/*
What the operator does wherever jobs may be; a test holds it against influence_operator.cluster.kinds.RIGHTS,
where the reasons are.
*/}}
{{- define "influence-operator.rules" -}}
- apiGroups: [influence-operator.dev]
  resources: [influencejobs]
  verbs: [list, watch, delete]
- apiGroups: [influence-operator.dev]
  resources: [influencejobs/status]
  verbs: [patch]
# Used only where the admission plugin OwnerReferencesPermissionEnforcement is on.
- apiGroups: [influence-operator.dev]
  resources: [influencejobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, delete]
# Never read: it writes the TLS material of an attempt and removes it.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [kubernetes.dask.org]
  resources: [daskclusters]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [kubernetes.dask.org]
  resources: [daskworkergroups]
  verbs: [list, watch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [list, watch, delete]
- apiGroups: [""]
  resources: [services, pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, list]
{{- end }}

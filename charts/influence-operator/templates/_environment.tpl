{{/* The operator's settings: influence_operator.settings names each and says what it means. */}}
{{- define "influence-operator.environment" -}}
{{- $settings := dict
  "IMAGE" (printf "%s:%s" .Values.worker.image.repository (.Values.worker.image.tag | default .Chart.AppVersion))
  "IMAGE_PULL_POLICY" .Values.worker.image.pullPolicy
  "DRIVER_CPU" .Values.driver.cpu
  "DRIVER_MEMORY" .Values.driver.memory
  "SCHEDULER_CPU" .Values.scheduler.cpu
  "SCHEDULER_MEMORY" .Values.scheduler.memory
  "WORKER_CPU" .Values.worker.cpu
  "WORKER_MEMORY" .Values.worker.memory
  "OPERATOR_SELECTOR" (printf "app.kubernetes.io/name=%s,app.kubernetes.io/instance=%s" .Chart.Name .Release.Name)
  "METRICS_NAMESPACE" .Values.metrics.namespace
  "WATCH_NAMESPACES" (join "," .Values.watchNamespaces)
  "API_AUDIENCES" (join "," .Values.apiAudiences)
  "RESYNC_SECONDS" .Values.resyncSeconds
  "LEASE_NAME" (include "influence-operator.name" .)
  "LEASE_SECONDS" .Values.leaseSeconds
  "STATUS_WRITES_PER_SECOND" .Values.statusWritesPerSecond
  "LOG_FORMAT" .Values.log.format
  "LOG_LEVEL" .Values.log.level
-}}
- name: INFLUENCE_OPERATOR_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
- name: INFLUENCE_OPERATOR_POD
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
{{- range $name, $value := $settings }}
- name: INFLUENCE_OPERATOR_{{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
